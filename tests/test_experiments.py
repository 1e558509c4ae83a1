"""The three experiments: with tiny numbers from the command line, and their statistics against closed forms and simulation."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import recipe
import train
from checkpoint.files import read_json
from experiments import tables as experiments
from experiments.tables import EXPERIMENTS, HALFWAY, LONGER, SPECIALISTS, START, TEACHER, Above, difference
from model import MMDiT
from networks.vae import VAE
from scores import charts
from toy import score as benches
from toy import world
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
    student = replace(experiments.STUDENT, batch=2, micro_batch=2, fake_updates=1, warmup=0, panel_every=100)
    monkeypatch.setattr(experiments, "STUDENT", student)
    monkeypatch.setattr(experiments, "POOL", {"t2i": 3, "edit": 2})
    monkeypatch.setattr(watch, "draw_pictures", lambda *_: None)
    monkeypatch.setattr(benches, "CATEGORIES", {"t2i": world.CATEGORIES, "edit": ("object", "style")})
    monkeypatch.setattr(benches, "CASES", {"t2i": 2, "edit": 2})
    monkeypatch.setattr(benches, "COMPARED", {"t2i": 2, "edit": 2})
    monkeypatch.setattr(benches, "VARIETY", (1, 2))
    monkeypatch.setattr(VAE, "decode", lambda self, z: enlarged(z))
    # The exact judge takes a tenth of a second a picture; this one looks at its mean colour alone.
    monkeypatch.setattr(benches.judge, "judge", colour)
    monkeypatch.setattr(benches.judge, "fit_free", lambda picture, case: tuple(picture.mean((0, 1)).round(1)))
    monkeypatch.setattr(benches.Sampler, "nfe", property(lambda self: len(self.sigmas) - 1))
    full = benches.default_sampler
    monkeypatch.setattr(benches, "default_sampler", lambda name, pipeline, steps, w: full(name, pipeline, 3, w))
    return checkpoint


def enlarged(z: torch.Tensor) -> torch.Tensor:
    """Opaque pictures from the first three channels of latents: the autoencoder would take a third of the time."""
    opaque = torch.ones_like(z[:, :1])
    return torch.cat([z[:, :3].tanh(), opaque], 1).repeat_interleave(16, 2).repeat_interleave(16, 3)


def colour(pictures: list[Image.Image], cases: list, reconstruct) -> list[benches.judge.Verdict]:
    means = [float(np.asarray(picture)[..., :3].mean()) * 10 % 1 for picture in pictures]  # sensitive to anything
    return [benches.judge.Verdict({"dark": mean < 0.5}, {}, mean) for mean in means]


def run(tiny: Path, name: str, *words: str) -> tuple[dict, str]:
    out = tiny.parent / "results" / name
    words = [
        "--experiment",
        name,
        "--checkpoint",
        str(tiny),
        "--out",
        str(out),
        "--runs",
        str(tiny.parent / "runs"),
        *words,
    ]
    evaluation.main([*words, "--steps", "2"])
    return read_json(out / "table.json"), (out / "table.md").read_text()


def students(tiny: Path) -> dict[str, int]:
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
    early = students(tiny)
    assert len(early) == 3 * 2
    monkeypatch.setattr(train, "train", real)
    result, table = run(tiny, "composition", "--seeds", "2", "--nfe", "2")
    assert early.items() <= students(tiny).items() and len(students(tiny)) == 5 * 2
    check(tiny, "composition", result, table, seeds=2)
    assert [row["nfe"] for row in result["rows"].values()] == [3, 3, 2] + [2] * 5

    # Of seeds after the first the scores alone are needed: their weights may be gone, or on another machine.
    for folder in (tiny.parent / "runs").glob("*-seed1/stages/00000?"):
        shutil.rmtree(folder)
    monkeypatch.setattr(train, "train", None)
    assert run(tiny, "composition", "--seeds", "2", "--nfe", "2") == (result, table)
    monkeypatch.setattr(train, "train", real)

    # E5 is "base only" of the next table: four more students. One seed: no verdicts.
    before = students(tiny)
    result, table = run(tiny, "teachers", "--seeds", "1", "--nfe", "2")
    assert before.items() <= students(tiny).items() and len(students(tiny)) == 5 + 4
    check(tiny, "teachers", result, table, seeds=1)
    assert {claim["verdict"] for claim in result["claims"]} == {"cannot tell"} and "nothing can be told" in table
    by_name = {label: row["t2i"] for label, row in result["rows"].items()}
    assert by_name[SPECIALISTS]["text"] != by_name[TEACHER]["text"]  # the specialist draws where it has a say ...
    assert by_name[SPECIALISTS]["portrait"] == by_name[TEACHER]["portrait"]  # ... and only there

    # Step-wise teachers without edits are 10:0, which now is scored on edits too, from its kept weights.
    before = students(tiny)
    result, table = run(tiny, "mixture", "--seeds", "1", "--nfe", "2")
    assert before.items() <= students(tiny).items() and len(students(tiny)) == len(before) + 4
    check(tiny, "mixture", result, table, seeds=1)

    # Again: the same table, and no picture judged.
    monkeypatch.setattr(benches.judge, "judge", None)
    assert run(tiny, "mixture", "--seeds", "1", "--nfe", "2") == (result, table)
    # Another judge: judged anew, nothing trained.
    monkeypatch.setattr(benches.judge, "judge", lambda *args: colour(*args)[::-1])
    monkeypatch.setattr(experiments.Workshop, "judge_version", lambda self: "another")
    monkeypatch.setattr(train, "train", None)
    assert run(tiny, "mixture", "--seeds", "1", "--nfe", "2")[0]["rows"]["5:5"]["edit"] == result["rows"]["5:5"]["edit"]
    # Another checkpoint: another folder.
    shutil.copy(tiny / "teachers" / "text" / "diffusion_pytorch_model.safetensors", tiny / "transformer")
    with pytest.raises(ValueError, match="made with other weights; name another --runs"):
        run(tiny, "composition", "--overwrite")
    with pytest.raises(ValueError, match="table.json: exists; .*give --overwrite"):
        run(tiny, "composition", "--seeds", "1", "--nfe", "2")


def test_two_commands_share_a_folder(tiny, monkeypatch):
    """They begin at the same moment and want the same students and scores: each is made once, and both get the same."""
    made, real_train, real_evaluate = [], train.train, benches.evaluate

    def trained(args, pool, state):
        made.append((args.out.name, args.steps))
        return real_train(args, pool, state)

    def evaluated(pipeline, sampler, *rest, **options):
        made.append((sampler.name, *rest[0]))
        return real_evaluate(pipeline, sampler, *rest, **options)

    monkeypatch.setattr(train, "train", trained)
    monkeypatch.setattr(train, "noted_signals", nullcontext)  # which the main thread alone can note
    monkeypatch.setattr(benches, "evaluate", evaluated)

    def command(_) -> list[tuple[Path, dict]]:
        shop = experiments.Workshop(tiny.parent / "runs", tiny, steps=2, nfe=2)
        places = shop.student("e1-landscape", 0, ("t2i",))
        sampler = benches.Sampler("E1", shop.sigmas)
        return [(places[step], shop.row(places[step], sampler, "t2i", 2, places[step])) for step in places]

    with ThreadPoolExecutor(2) as two:
        first, second = two.map(command, range(2))
    assert first == second
    student = "e1-landscape-2nfe-2steps-seed0"
    assert sorted(made) == [("E1", "t2i"), ("E1", "t2i"), (student, 1), (student, 2)]


def test_two_commands_share_a_table(tiny, monkeypatch):
    """While one trains its first student the other goes on with others. Both have the same scores."""
    made, both, real = [], threading.Barrier(2, timeout=60), train.train

    def trained(args, pool, state):
        made.append((args.out.name, args.steps))
        if len(made) <= 2:
            both.wait()  # passed only if the other command trains at this moment, too
        return real(args, pool, state)

    monkeypatch.setattr(train, "train", trained)
    monkeypatch.setattr(train, "noted_signals", nullcontext)  # which the main thread alone can note

    def command(_) -> experiments.Scores:
        shop = experiments.Workshop(tiny.parent / "runs", tiny, steps=2, nfe=2)
        return experiments.measure(shop, EXPERIMENTS["composition"], seeds=1)

    with ThreadPoolExecutor(2) as two:
        first, second = two.map(command, range(2))
    assert first == second
    assert len(set(made)) == len(made) == 5 * 2  # five students in two stages


def check(tiny: Path, name: str, result: dict, table: str, seeds: int) -> None:
    plan = EXPERIMENTS[name]
    assert list(result["rows"]) == [TEACHER, SPECIALISTS, START, *plan.rows]
    longer = [label for label in plan.rows if label.endswith(LONGER)]
    for label, row in result["rows"].items():
        assert row["seeds"] == (seeds if label in plan.rows else 1)
        for bench in plan.paper:
            scores = dict(row[bench])
            assert row[bench]["average"] == pytest.approx(np.mean(row[f"{bench}_by_seed"]))
            assert scores.pop("average") == pytest.approx(np.mean(list(scores.values())))
            columns = {"t2i": 13, "edit": 12}[bench]
            lines = [
                line for line in table.splitlines() if line.split("|")[1:2] and line.split("|")[1].strip() == label
            ]
            (line,) = [line for line in lines if line.count("|") == columns + 1]
            assert f"**{row[bench]['average']:.3f}**" in line
            assert plan.paper[bench].get(label, "") in line
        assert row["seconds_per_image"] > 0
    assert [claim["claim"] for claim in result["claims"]] == list(plan.claims)
    assert all(claim["claim"] in table and claim["verdict"] in table for claim in result["claims"])
    for bench in plan.paper:
        lines, later = result["curve"][bench], result["curve"].get(bench + LONGER, {})
        assert [*lines, *later] == [label for label in plan.rows if label not in longer] + longer
        assert all([x for x, _ in line] == [0, 1, 2] for line in lines.values())
        assert all([x for x, _ in line] == [0, 3, 5, 8, 10] for line in later.values())
        assert len({line[0][1][0] for line in lines.values()}) == 1  # all begin at the undistilled network
        for label, line in (lines | later).items():  # the cases of the curve are here all cases
            assert line[-1][1] == pytest.approx(result["rows"][label][f"{bench}_by_seed"])
    for picture in ("sheet.png", "curve.png"):
        with Image.open(tiny.parent / "results" / name / picture) as image:
            assert min(image.size) > 300 and len(image.getcolors(1 << 24)) > 50


def test_a_student_in_stages_is_the_student_of_one_run(tiny):
    shop = experiments.Workshop(tiny.parent / "runs", tiny, 3, 2)
    stages = shop.student("step-wise", 1, ("t2i",))
    assert [stage for stage in stages] == [1, 2, 3]
    args = replace(experiments.STUDENT, checkpoint=tiny, recipe="step-wise", out=tiny.parent / "whole", seed=1, steps=3)
    args, state = train.open_run(replace(args, student_steps=2, dtype=shop.dtype))
    pool = experiments.encoded(shop.home / "conditions", tiny, "cpu", ("t2i",))
    whole = train.train(args, pool, state) / "transformer"
    networks = [MMDiT.from_pretrained(folder).state_dict() for folder in (*stages.values(), whole)]
    assert all(torch.equal(networks[-1][key], networks[-2][key]) for key in networks[-1])
    for a, b in pairwise(networks[:3]):
        assert any(not torch.equal(a[key], b[key]) for key in a)


def test_students_in_two_tables_have_one_recipe():
    same = [("base-only", "e5-all"), ("mix-10-0", "step-wise")]
    data = {"t2i": world.CATEGORIES, "edit": world.FAMILIES}
    for a, b in same:
        a, b = (recipe.find(name).resolve(data, ["text", "edit"]) for name in (a, b))
        assert a == replace(b, name=a.name)
    used = {name for plan in EXPERIMENTS.values() for name in plan.rows.values()}
    assert used | {name for name, _ in same} | {"flash"} == recipe.RECIPES.keys()


def test_no_benched_prompt_is_trained_on():
    """Captions name all attributes, so this compares combinations; that edits keep away too is shown in test_world.py."""
    for category in world.CATEGORIES:
        trained = {p.prompt for p in world.training_prompts("t2i", category, experiments.POOL["t2i"], 0, targets=False)}
        benched = {case.prompt for case in world.bench("t2i", category, benches.CASES["t2i"])}
        assert len(benched) > 20 and not trained & benched


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def test_interval_holds_what_it_promises():
    """Two students of 3 seeds on 2 x 30 cases, drawn 2,000 times: the true difference lies in 95% of the intervals."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        ease = rng.normal(0, 0.3, (1, 2, 30))  # of a case, for all students
        liking = rng.normal(0, 0.15, (2, 1, 2, 30))  # of a recipe for a case
        luck = rng.normal(0, 0.04, (2, 3, 1, 1))  # of a seed
        a, b = (0.5 + ease + liking[i] + luck[i] for i in range(2))
        mean, half = difference(a + 0.1, b)
        inside += abs(mean - 0.1) <= half
    assert 0.94 <= inside / 2000 <= 0.985  # adding the two parts is a little wide


def test_interval_of_known_numbers():
    a = np.array([0.2, 0.4, 0.6])[:, None, None] + np.zeros((3, 2, 5))
    assert difference(a, np.zeros((1, 2, 5))) == pytest.approx((0.4, 4.30 * 0.2 / 3**0.5))
    assert difference(a, a) == pytest.approx((0, 2.78 * (2 * 0.04 / 3) ** 0.5))
    b = np.array([[[0.0, 1.0], [0.0, 0.0]]])  # only cases scatter
    assert difference(b, 0 * b) == pytest.approx((0.25, 1.96 * (0.5 / 2) ** 0.5 / 2))
    assert difference(b, b) == (0, 0)


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

    def word(*pairs: tuple[str, str], seeds: int = 3) -> str:
        return experiments.verdict([Above(*pair) for pair in pairs], some, seeds)[0]

    assert word(("high", "low")) == "agree" and word(("low", "high")) == "disagree"
    assert word(("wide", "low")) == "cannot tell" and word(("high", "fixed")) == word(("fixed", "low")) == "agree"
    assert word(("high", "low"), ("high", "wide")) == "cannot tell"
    assert word(("high", "low"), ("wide", "low"), ("low", "high")) == "disagree"
    assert word(("high", "low"), seeds=1) == "cannot tell"
    evidence = experiments.verdict([Above("high", "low", "b")], some, 3)[1]
    assert evidence == ["high - low, t2i b: +0.600 ± 0.023"]


def test_claims_speak_of_rows_that_are_there():
    for plan in EXPERIMENTS.values():
        known = {*plan.rows, *(row + HALFWAY for row in plan.rows), TEACHER, SPECIALISTS, START}
        for part in (part for parts in plan.claims.values() for part in parts):
            assert {part.row, part.other} <= known and part.bench in plan.paper and part.part in benches.PARTS
            assert part.category in ("average", *benches.CATEGORIES[part.bench])
        assert all(label in known for rows in plan.paper.values() for label in rows)


def test_chart_draws_every_line_at_its_height(tmp_path):
    lines = {"up": [(0, [0.0]), (10, [1.0, 1.0])], "down": [(0, [1.0]), (10, [0.0, 0.2])]}
    charts.chart({"T2I": lines, "edit": {"up": lines["up"]}}, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    for panel, colours in ((pixels[:300, 60:520], charts.COLOURS[:2]), (pixels[:300, 580:1040], charts.COLOURS[:1])):
        for colour, rises in zip(colours, (True, False)):
            rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            y, x = np.nonzero((np.abs(panel - rgb) < 30).all(axis=2))
            assert len(x) > 300  # a line from left to right
            left, right = y[x < x.min() + 40].mean(), y[x > x.max() - 40].mean()
            assert (left > right) == rises  # y counts downwards
    assert json.dumps(lines)
