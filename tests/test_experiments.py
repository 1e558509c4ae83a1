"""The paper's tables, and jobs over several seeds: with tiny numbers from the command line, and what they say of the claims."""

import re
import shutil
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from page_commands import ROOT, commands, pages
from PIL import Image

import eval as evaluation
import recipe
import train
from checkpoint.files import read_json
from experiments import __main__ as command
from experiments import kept, long, seeds, students, tables
from experiments.claims import EXPERIMENTS, HALFWAY, LONGER, SPECIALISTS, START, TEACHER, Above
from experiments.options import JOBS, KINDS
from model import MMDiT
from networks.vae import VAE
from plane import __main__ as plane
from plane.claims import FAKES, FIRST, OTHERS
from plane.rows import ROWS
from scores.statistics import difference_of_models, interval_over_cases
from toy import draw, judge, world
from training import watch


@pytest.fixture
def tiny(monkeypatch, toy_checkpoint, tmp_path) -> Path:
    """A checkpoint with specialised teachers, and numbers so small that a student takes a second."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(toy_checkpoint, checkpoint)
    for seed, name in enumerate(("text", "edit")):
        model = MMDiT.from_pretrained(checkpoint / "transformer")
        for parameter in model.parameters():
            parameter.data *= 1 + 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        model.save_pretrained(checkpoint / "teachers" / name)
    small = dict(batch=2, micro_batch=2, fake_updates=1, warmup=0, panel_every=100)
    for module in (students, tables, long):
        monkeypatch.setattr(module, "STUDENT", replace(students.STUDENT, **small))
    monkeypatch.setattr(students, "POOL", {"t2i": 3, "edit": 2})
    monkeypatch.setattr(watch, "draw_pictures", lambda *_: None)
    monkeypatch.setattr(evaluation, "BENCHES", {"t2i": world.CATEGORIES, "edit": ("object", "style")})
    monkeypatch.setattr(evaluation, "CASES", {"t2i": 2, "edit": 2})
    monkeypatch.setattr(evaluation, "COMPARED", {"t2i": 2, "edit": 2})
    monkeypatch.setattr(evaluation, "VARIETY", (1, 2))
    monkeypatch.setattr(VAE, "decode", lambda self, z: enlarged(z))
    # The exact judge takes a tenth of a second a picture; this one looks at its mean colour alone.
    monkeypatch.setattr(judge, "judge", colour)
    monkeypatch.setattr(judge, "fit_free", lambda picture, case: tuple(picture.mean((0, 1)).round(1)))
    monkeypatch.setattr(draw.Sampler, "nfe", property(lambda self: len(self.sigmas) - 1))
    full = draw.default_sampler
    monkeypatch.setattr(students, "default_sampler", lambda name, pipeline, steps, w: full(name, pipeline, 3, w))
    return checkpoint


def enlarged(z: torch.Tensor) -> torch.Tensor:
    """Opaque pictures from the first three channels of latents: the autoencoder would take a third of the time."""
    opaque = torch.ones_like(z[:, :1])
    return torch.cat([z[:, :3].tanh(), opaque], 1).repeat_interleave(16, 2).repeat_interleave(16, 3)


def colour(pictures: list[Image.Image], cases: list, reconstruct) -> list[judge.Verdict]:
    means = [float(np.asarray(picture)[..., :3].mean()) * 10 % 1 for picture in pictures]  # sensitive to anything
    return [judge.Verdict({"dark": mean < 0.5, "nothing extra": True}, {}, mean) for mean in means]


def run(tiny: Path, name: str, *words: str) -> tuple[dict, str]:
    out = tiny.parent / "results" / name
    places = ["--checkpoint", str(tiny), "--out", str(out), "--runs", str(tiny.parent / "runs")]
    command.main([name, *places, *words, "--steps", "2"])
    return read_json(out / "table.json"), (out / "table.md").read_text()


def trained(tiny: Path) -> dict[str, int]:
    """name -> when its weights were written."""
    stages = (tiny.parent / "runs").glob("*/stages/000002")
    return {path.parent.parent.name: (path / "config.json").stat().st_mtime_ns for path in stages}


def test_experiments_with_tiny_numbers(tiny, monkeypatch, capsys):
    """All three, from one folder: what they write, that nothing is made twice, that a killed one goes on."""
    real = train.train

    def killed(args, pool, state):
        if args.recipe == "e4-landscape-portrait":
            raise SystemExit(143)
        return real(args, pool, state)

    monkeypatch.setattr(train, "train", killed)
    with pytest.raises(SystemExit):
        run(tiny, "composition", "--seeds", "2", "--nfe", "2")
    early = trained(tiny)
    assert len(early) == 3 * 2
    monkeypatch.setattr(train, "train", real)
    result, table = run(tiny, "composition", "--seeds", "2", "--nfe", "2")
    assert early.items() <= trained(tiny).items() and len(trained(tiny)) == 5 * 2
    check(tiny, "composition", result, table, count=2)
    assert [row["nfe"] for row in result["rows"].values()] == [3, 3, 2] + [2] * 5

    # Of seeds after the first the scores alone are needed: their weights may be gone, or on another machine.
    for folder in (tiny.parent / "runs").glob("*-seed1/stages/00000?"):
        shutil.rmtree(folder)
    monkeypatch.setattr(train, "train", None)
    assert run(tiny, "composition", "--seeds", "2", "--nfe", "2") == (result, table)
    monkeypatch.setattr(train, "train", real)

    # E5 is "base only" of the next table: four more students. One seed: no verdicts.
    before = trained(tiny)
    result, table = run(tiny, "teachers", "--seeds", "1", "--nfe", "2")
    assert before.items() <= trained(tiny).items() and len(trained(tiny)) == 5 + 4
    check(tiny, "teachers", result, table, count=1)
    assert {claim["verdict"] for claim in result["claims"]} == {"cannot tell"} and "nothing can be told" in table
    by_name = {label: row["t2i"] for label, row in result["rows"].items()}
    assert by_name[SPECIALISTS]["text"] != by_name[TEACHER]["text"]  # the specialist draws where it has a say ...
    assert by_name[SPECIALISTS]["portrait"] == by_name[TEACHER]["portrait"]  # ... and only there

    # Step-wise teachers without edits are 10:0, which now is scored on edits too, from its kept weights.
    before = trained(tiny)
    result, table = run(tiny, "mixture", "--seeds", "1", "--nfe", "2")
    assert before.items() <= trained(tiny).items() and len(trained(tiny)) == len(before) + 4
    check(tiny, "mixture", result, table, count=1)

    # Again: the same table, and no picture judged.
    monkeypatch.setattr(judge, "judge", None)
    assert run(tiny, "mixture", "--seeds", "1", "--nfe", "2") == (result, table)
    # Another checkpoint: another folder.
    shutil.copy(tiny / "teachers" / "text" / "diffusion_pytorch_model.safetensors", tiny / "transformer")
    with pytest.raises(ValueError, match="made with other weights"):
        run(tiny, "composition", "--overwrite")
    with pytest.raises(ValueError, match="table.json: exists; .*give --overwrite"):
        run(tiny, "composition", "--seeds", "1", "--nfe", "2")


def test_one_command_at_a_time_has_a_folder(tiny):
    runs = tiny.parent / "runs"
    with kept.hold(runs), pytest.raises(ValueError, match="another command is at work in it; wait"):
        run(tiny, "composition", "--seeds", "1", "--nfe", "2")
    assert not list(runs.glob("*seed0")) and not (tiny.parent / "results" / "composition" / "table.json").exists()
    with kept.hold(runs):  # the one before has let go
        pass


def check(tiny: Path, name: str, result: dict, table: str, count: int) -> None:
    plan = EXPERIMENTS[name]
    assert list(result["rows"]) == [TEACHER, SPECIALISTS, START, *plan.rows]
    longer = [label for label in plan.rows if label.endswith(LONGER)]
    for label, row in result["rows"].items():
        assert row["seeds"] == (count if label in plan.rows else 1)
        for task in plan.paper:
            scores = dict(row[task])
            assert row[task]["average"] == pytest.approx(np.mean(row[f"{task}_by_seed"]))
            assert scores.pop("average") == pytest.approx(np.mean(list(scores.values())))
            columns = {"t2i": 13, "edit": 12}[task]
            lines = [line for line in table.splitlines() if line.startswith(f"| {label} ")]
            (line,) = [line for line in lines if line.count("|") == columns + 1]
            assert f"**{row[task]['average']:.3f}**" in line
            assert plan.paper[task].get(label, "") in line
        assert row["seconds_per_image"] > 0
    assert [claim["claim"] for claim in result["claims"]] == list(plan.claims)
    assert all(claim["claim"] in table and claim["verdict"] in table for claim in result["claims"])
    for task in plan.paper:
        lines, later = result["curve"][task], result["curve"].get(task + LONGER, {})
        assert [*lines, *later] == [label for label in plan.rows if label not in longer] + longer
        assert all([x for x, _ in line] == [0, 1, 2] for line in lines.values())
        assert all([x for x, _ in line] == [0, 3, 5, 8, 10] for line in later.values())
        assert len({line[0][1][0] for line in lines.values()}) == 1  # all begin at the undistilled network
        for label, line in (lines | later).items():  # the cases of the curve are here all cases
            assert line[-1][1] == pytest.approx(result["rows"][label][f"{task}_by_seed"])
    for picture in ("sheet.png", "curve.png"):
        with Image.open(tiny.parent / "results" / name / picture) as image:
            assert min(image.size) > 300 and len(image.getcolors(1 << 24)) > 50


def test_a_student_in_stages_is_the_student_of_one_run(tiny):
    some = students.Students(tiny.parent / "runs", tiny, 3, 2, ["t2i"])
    assert students.stages(3, 4) == [1, 2, 3]
    student = replace(students.STUDENT, recipe="step-wise", seed=1)
    folders = [some.weights(student, step) for step in (1, 2, 3)]
    args = replace(student, checkpoint=tiny, out=tiny.parent / "whole", steps=3)
    args, state = train.open_run(replace(args, student_steps=2, dtype=some.settings["dtype"]))
    whole = train.train(args, some.pool, state) / "transformer"
    networks = [MMDiT.from_pretrained(folder).state_dict() for folder in (*folders, whole)]
    assert all(torch.equal(networks[-1][key], networks[-2][key]) for key in networks[-1])
    for a, b in pairwise(networks[:3]):
        assert any(not torch.equal(a[key], b[key]) for key in a)


def test_long_rows_resume_and_are_reused_on_any_machine(tiny, tmp_path, monkeypatch, capsys):
    """Two rows of two looks. The command is killed within the second row: it goes on at the look that is missing."""
    names = ("step-wise", "step-wise, below")
    monkeypatch.setattr(long, "ROWS", {name: long.ROWS[name] for name in names})
    monkeypatch.setattr(long, "DIFFERENCES", [names[::-1]])

    def run_long(runs: str, *words: str, cases: str = "2") -> str:
        own = ["long", "--checkpoint", str(tiny), "--steps", "2", "--cases", cases, "2", "--out", str(tmp_path / "out")]
        command.main([*own, "--runs", str(tmp_path / runs), *words])
        return (tmp_path / "out" / "README.md").read_text()

    real, updates = train.train, []

    def killed(args, pool, state):
        updates.append((args.renoise_times, args.seed, args.steps))
        if updates[-1] == ("below", 0, 2):
            raise SystemExit(143)
        return real(args, pool, state)

    monkeypatch.setattr(train, "train", killed)
    with pytest.raises(SystemExit):
        run_long("runs", "--seeds", "1")
    monkeypatch.setattr(train, "train", lambda *words: (updates.append(words[0].steps), real(*words))[1])
    text = run_long("runs", "--seeds", "1")
    assert updates == [("pooled", 0, 1), ("pooled", 0, 2), ("below", 0, 1), ("below", 0, 2), 2]
    pooled, below = (
        read_json(tmp_path / "out" / "rows" / f"flash-{times}-seed0.json") for times in ("pooled", "below")
    )
    a, b = (row["looks"]["2"]["edit"]["score"]["average"] for row in (pooled, below))
    assert a != b and f"{b - a:+.3f}" in text and "±" not in text  # one seed says nothing about others

    # Elsewhere, with the rows' files alone, nothing is trained. A second seed is.
    monkeypatch.setattr(train, "train", None)
    assert run_long("elsewhere", "--seeds", "1") == text
    monkeypatch.setattr(train, "train", real)
    assert "±" in run_long("elsewhere", "--seeds", "2")
    for task in ("t2i", "edit"):
        with Image.open(tmp_path / "out" / f"{task}.png") as image:
            assert image.width > 2000

    with pytest.raises(ValueError, match="seed0.json: made with other cases; remove it, or name another --out"):
        run_long("elsewhere", cases="3")


def test_two_commands_do_not_train_the_same_long_row(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "train", None)
    monkeypatch.setattr(long, "ROWS", {"step-wise": ("flash", "pooled")})
    monkeypatch.setattr(long, "DIFFERENCES", [])
    words = f"long --seeds 1 --checkpoint {tiny} --runs {tmp_path / 'runs'} --out {tmp_path}"
    with kept.hold(tmp_path / "runs" / "locks" / "flash-pooled-seed0"):
        command.main(words.split())
    assert not (tmp_path / "rows").exists()


def test_seeds_with_tiny_numbers(tiny, tmp_path, monkeypatch, capsys):
    """Two students of a job, and one of another: trained once, scored, and compared case by case."""
    monkeypatch.setattr(evaluation, "BENCHES", {"t2i": ("text", "portrait"), "edit": ("style",)})
    full = draw.default_sampler
    monkeypatch.setattr(draw, "default_sampler", lambda name, pipeline, steps, w: full(name, pipeline, 3, w))
    compared = []  # a whole run of train.py ends with its comparison, which test_main_job.py looks at
    monkeypatch.setattr(evaluation, "compare", lambda student, teacher, out: compared.append(out))
    job = f"--checkpoint {tiny} --steps 1 --batch 2 --micro-batch 2 --pool 6 --student-steps 2 --warmup 0".split()

    def run_seeds(name: str, *words: str, more: tuple[str, ...] = ()) -> dict:
        own = ["seeds", "--name", name, "--runs", str(tmp_path / "runs"), "--cases", "3", "2", *words]
        command.main([*own, "--json", str(tmp_path / f"{name}.json"), "--", *job, *more])
        return read_json(tmp_path / f"{name}.json")

    with monkeypatch.context() as killed, pytest.raises(SystemExit):
        killed.setattr(train, "save", lambda *_: sys.exit(143))
        run_seeds("plain", "--seeds", "5", "6")
    first = run_seeds("plain", "--seeds", "5", "6")
    assert [row["name"] for row in first["rows"]] == ["plain, seed 5", "plain, seed 6"]
    assert first["rows"][0]["edit"] != first["rows"][1]["edit"] and first["cases"] == {"t2i": 3, "edit": 2}
    assert compared == [tmp_path / "runs" / "plain" / f"seed{seed}" for seed in (5, 6)]

    def case_scores(name: str, seed: int) -> np.ndarray:  # (categories, cases)
        row = read_json(tmp_path / "runs" / name / f"seed{seed}" / kept.row_name("row", {"t2i": 3, "edit": 2}))
        return np.array(list(row["t2i_each"]["score"].values()))

    of_teacher = read_json(tmp_path / "runs" / "plain" / kept.row_name("teacher", {"t2i": 3, "edit": 2}))
    teacher = of_teacher["t2i_each"]["score"]
    a, b = np.stack([case_scores("plain", seed) for seed in (5, 6)]), np.array(list(teacher.values()))
    mean, half = difference_of_models(a, b[None])
    assert first["differences"]["teacher"]["t2i"]["score"] == {"mean": mean, "half": half}
    assert f"{mean:+.3f} ± {half:.3f}" in (tmp_path / "plain.md").read_text()

    # Again: nothing is trained, the same comes out. Another job needs another name.
    with monkeypatch.context() as idle:
        idle.setattr(train, "train", None)
        assert run_seeds("plain", "--seeds", "5", "6") == first
        with pytest.raises(ValueError, match="made with other options; name another folder"):
            run_seeds("plain", "--seeds", "5", "6", "--overwrite", more=("--lr", "0.01"))
    # Another judge scores the same students again, and its rows stand beside the old ones.
    with monkeypatch.context() as changed:
        changed.setattr(train, "train", None)
        changed.setattr(judge, "version", lambda: "another")
        perfect = judge.Verdict({"dark": True, "nothing extra": True}, {}, 1.0)
        changed.setattr(judge, "judge", lambda pictures, *_: [perfect] * len(pictures))
        assert {row["t2i"]["average"] for row in run_seeds("plain", "--seeds", "5", "6")["rows"]} == {1.0}
    assert run_seeds("plain", "--seeds", "5", "6") == first

    # What needs no judge. Two edits are too few for a median; the colours of T2I are means over all cases.
    assert first["measures"]["edits: scale, %"]["models"]["teacher"] == {"mean": None, "half": None}
    saturation = first["measures"]["T2I: saturation, CIELAB"]
    means = [row["t2i_colour"]["saturation"] for row in first["rows"]]
    assert saturation["models"]["students"]["mean"] == pytest.approx(np.mean(means))
    assert f"{saturation['students minus']['teacher']['mean']:+.3f} ± " in (tmp_path / "plain.md").read_text()
    modes = [row["t2i_diversity"]["modes"]["average"] for row in first["rows"]]
    minus = np.mean(modes) - of_teacher["t2i_diversity"]["modes"]["average"]
    assert first["differences"]["teacher"]["t2i"]["modes"]["mean"] == pytest.approx(minus)

    other = run_seeds("fast", "--seeds", "6", "--minus", "plain", more=("--lr", "0.01"))
    pairs = case_scores("fast", 6) - case_scores("plain", 6)
    over_cases = interval_over_cases(dict(enumerate(pairs)))
    assert other["differences"]["plain"]["t2i"]["score"] == pytest.approx({"mean": pairs.mean(), "half": over_cases})
    with pytest.raises(ValueError, match="seed7/row-3-2-judge-.*.json: missing; make it first, with --name plain"):
        run_seeds("fast", "--seeds", "7", "--minus", "plain", "--overwrite", more=("--lr", "0.01"))
    for words in (["--seed", "3"], ["--objective", "flow"], ["--prompts", "mine.jsonl"], ["--out", "here"]):
        with pytest.raises(ValueError, match=f'{words[0]}: behind "--"'):
            command.main(["seeds", "--", *words])
    with pytest.raises(ValueError, match="--cases: two numbers"):
        command.main(["seeds", "--cases", "3"])


PAGES = pages("README.md", "docs/*.md", "results/**/*.md", "toy/README.md", "forks/README.md")


def test_the_pages_commands_are_commands():
    parsed = [command.parse(words) for words in commands("-m experiments", PAGES)]
    assert {name for name, _, _ in parsed} == {*KINDS}
    for name, options, words in parsed:
        if name in JOBS:
            seeds.student_options(words)
        elif name in EXPERIMENTS:
            assert options.seeds == (7 if name == "mixture" else 5)  # as the tables say


def test_every_file_of_the_results_comes_from_a_command_or_stands_on_a_page():
    made = set()
    for name, options, _ in map(command.parse, commands("-m experiments", PAGES)):
        if name == "seeds" and options.json:
            made |= {str(options.json), str(options.json.with_suffix(".md"))}
        elif name in EXPERIMENTS:
            made |= {f"results/{name}/{file}" for file in ("table.md", "table.json", "sheet.png", "curve.png")}
    findings = (ROOT / "results" / "plane" / "findings.md").read_text()
    written = set(re.findall(r"--experiment (\w+)[^`\n]* --out results/plane", findings))
    assert {"claims", "dimension"} <= written <= plane.UPDATES.keys()
    for name in written:
        made |= {f"results/plane/{name}.{ending}" for ending in ("md", "json", "png")}
    if "claims" in written:
        made |= {f"results/plane/rows/{ROWS[row].name}-{fake}.json" for row in (*FIRST, *OTHERS) for fake in FAKES}
    rows = {long.row_file(Path("results/long"), name, seed) for name in long.ROWS for seed in range(5)}
    made |= {*map(str, rows), *(f"results/long/{file}" for file in ("README.md", "t2i.png", "edit.png"))}
    made |= {"results/plane/drift.png"}  # python -m plane --experiment claims
    made |= {f"results/plane/dmd.{ending}" for ending in ("md", "json", "png", "gif")}  # python -m plane
    made |= {f"results/main/comparison.{ending}" for ending in ("md", "json", "png")}  # python train.py
    pages = [ROOT / "README.md", ROOT / "results" / "plane" / "findings.md"]
    pages += [ROOT / "results" / f"{page}.md" for page in ("README", "claims", "tried", "time")]
    named = "".join(page.read_text() for page in pages)
    for file in (file for file in (ROOT / "results").rglob("*") if file.is_file() and file not in pages):
        known = str(file.relative_to(ROOT)) in made or f"({file.with_suffix('.md').name})" in named
        assert known, f"{file}: no command makes it, and no page names it"


def test_students_in_two_tables_have_one_recipe():
    data = {"t2i": world.CATEGORIES, "edit": world.FAMILIES}
    base, e5 = (recipe.find(name).resolve(data, ["text", "edit"]) for name in ("base-only", "e5-all"))
    assert base == replace(e5, name="base-only")
    used = {name for plan in EXPERIMENTS.values() for name in plan.rows.values()}
    used |= {name for name, _ in long.ROWS.values()}
    assert used | {"base-only"} == recipe.RECIPES.keys()


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def test_verdicts():
    def rows(*means: float) -> list[dict]:
        each = {"a": [0.0, 0.1, 0.2], "b": [0.2, 0.1, 0.0]}
        return [{"t2i_each": {"score": {c: [mean + x for x in some] for c, some in each.items()}}} for mean in means]

    some = {
        "high": rows(0.8, 0.81, 0.82),
        "low": rows(0.2, 0.21, 0.22),
        "wide": rows(0.1, 0.5, 0.9),
        "fixed": rows(0.5),
    }
    some = {(label, "t2i"): value for label, value in some.items()}

    def word(*pairs: tuple[str, str], count: int = 3) -> str:
        return tables.weigh([Above(*pair) for pair in pairs], some, count)[0]

    assert word(("high", "low")) == "agree" and word(("low", "high")) == "disagree"
    assert word(("wide", "low")) == "cannot tell" and word(("high", "fixed")) == word(("fixed", "low")) == "agree"
    assert word(("high", "low"), ("high", "wide")) == "cannot tell"
    assert word(("high", "low"), ("wide", "low"), ("low", "high")) == "disagree"
    assert word(("high", "low"), count=1) == "cannot tell"
    evidence = tables.weigh([Above("high", "low", "b")], some, 3)[1]
    assert evidence == ["high - low, t2i b: +0.600 ± 0.023"]


def test_claims_speak_of_rows_that_are_there():
    for plan in EXPERIMENTS.values():
        known = {*plan.rows, *(row + HALFWAY for row in plan.rows), TEACHER, SPECIALISTS, START}
        for part in (part for parts in plan.claims.values() for part in parts):
            assert {part.row, part.other} <= known and part.task in plan.paper and part.measure in evaluation.PARTS
            assert part.category in ("average", *evaluation.BENCHES[part.task])
        assert all(label in known for rows in plan.paper.values() for label in rows)
