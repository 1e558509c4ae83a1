"""The benches: what is counted, and what is written. The networks are tiny and random, so the
pictures are nonsense and depend on everything."""

import copy
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import flow
from checkpoint.export import export
from checkpoint.files import read_json
from model import MMDiT
from program.options import TOY
from sample import Pipeline
from toy import figures, judge, world
from toy.draw import Sampler, open_checkpoint, reconstruct, teacher_samplers

SIGMAS = [1.0, 0.6, 0.3, 0.0]


@pytest.fixture(autouse=True)
def little_variety(monkeypatch):
    monkeypatch.setattr(evaluation, "VARIETY", (1, 2))


@pytest.fixture(scope="module")
def pipeline(toy_checkpoint) -> Pipeline:
    return open_checkpoint(toy_checkpoint)


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def test_right_pictures_score_one(pipeline, monkeypatch):
    """The truth in place of the model's pictures, a perfect autoencoder: 1 everywhere, certain, with no diversity."""
    answers = lambda p, s, cases, seeds: ([case.answer() for case in cases], 0.5)  # noqa: E731
    monkeypatch.setattr(evaluation, "draw_cases", answers)
    monkeypatch.setattr(evaluation, "reconstruct", lambda pipeline, pictures: pictures)
    row, shown = evaluation.evaluate(pipeline, Sampler("x", SIGMAS), {"t2i": 3, "edit": 2})
    for bench, categories in (("t2i", world.CATEGORIES), ("edit", world.FAMILIES)):
        for key in (bench, f"{bench}_compliance", f"{bench}_attributes", f"{bench}_fidelity"):
            assert row[key] == dict.fromkeys((*categories, "average"), 1.0)
        assert row[f"{bench}_interval"] == 0
        modes, distance = (dict.fromkeys((*categories, "average"), value) for value in (1.0, 0.0))
        assert row[f"{bench}_diversity"] == {"distance": distance, "modes": modes, "of": 2}
    assert row["seconds_per_image"] == pytest.approx(9 * 0.5 / (3 * 3 + 6 * 2))
    assert len(shown) == 9 and len(shown["t2i", "text"]) == 3

    # Sources in place of results: nothing was done, nothing was spoilt.
    sources = lambda p, s, cases, seeds: ([case.images[0] for case in cases], 0.5)  # noqa: E731
    monkeypatch.setattr(evaluation, "draw_cases", sources)
    row, _ = evaluation.evaluate(pipeline, Sampler("x", SIGMAS), {"edit": 2})
    for family in ("scene", "object", "text", "identity", "style"):
        assert (row["edit_compliance"][family], row["edit_fidelity"][family], row["edit"][family]) == (0, 1, 0.5)
    assert row["edit_compliance"]["enhance"] == 0 and row["edit_fidelity"]["enhance"] < 0.5


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def run(checkpoint: Path, out: Path, *words: str) -> dict:
    evaluation.main(["--checkpoint", str(checkpoint), "--json", str(out / "row.json"), "--out", str(out), *words])
    return read_json(out / "row.json")


def test_main_writes_row_table_and_sheet(toy_checkpoint, tmp_path, capsys):
    row = run(toy_checkpoint, tmp_path / "all", "--steps", "2", "--cases", "2")
    assert (row["nfe"], row["guidance"], row["name"]) == (4, 2.0, "checkpoint")  # the checkpoint's own guidance
    assert list(row["t2i"]) == [*world.CATEGORIES, "average"] and list(row["edit"]) == [*world.FAMILIES, "average"]
    for bench in ("t2i", "edit"):
        assert row[bench]["average"] == pytest.approx(np.mean(list(row[bench].values())[:-1]))
        assert all(0 <= score <= 1 for score in row[bench].values())
    assert row["seconds_per_image"] > 0
    table = (tmp_path / "all" / "table.md").read_text()
    assert table in capsys.readouterr().out
    scores, measures = table.split("\n\n")
    assert f"**{row['edit']['average']:.3f}**" in scores and f"{row['t2i_colour']['saturation']:.1f}" in measures
    assert all(len({len(line) for line in block.splitlines()}) == 1 for block in (scores, measures))
    assert row["edit_shift"]["of"] == 12 and row["variety"]["distance"] > 0
    # Two cases of each: half the sheet's width for T2I; rows: model and truth, then source, model and truth.
    with Image.open(tmp_path / "all" / "sheet.png") as sheet:
        assert sheet.width > 12 * 128 and sheet.height > 5 * 128

    # Again, one bench alone: the same numbers but the time's.
    again = run(toy_checkpoint, tmp_path / "edit", "--steps", "2", "--cases", "2", "--bench", "edit", "--guidance", "2")
    assert "t2i" not in again and "t2i_diversity" not in again
    for key in again.keys() - {"seconds_per_image", "cases", "checksum", "variety"}:
        assert again[key] == row[key]


def test_what_is_not_finite_is_no_score(toy_checkpoint, tmp_path, pipeline):
    """A NaN in the MMDiT, in the decoder or in the encoder: an error that says where, and no row."""
    for part, name, where in (("mmdit", "img_mlp.out", "latents"), ("vae", "decoder.conv_out", "decoded pixels")):
        broken = open_checkpoint(toy_checkpoint)
        next(p for n, p in getattr(broken, part).named_parameters() if name in n).data[0] = float("nan")
        with pytest.raises(ValueError, match=f"{toy_checkpoint}: x: {where} are not finite"):
            evaluation.evaluate(broken, Sampler("x", SIGMAS), {"t2i": 2})
    with pytest.raises(ValueError, match="autoencoder's pixels are not finite"):
        reconstruct(broken, np.zeros((1, 128, 128, 3), dtype=np.float32))


def cells_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_tables_of_rows(toy_checkpoint, tmp_path, capsys):
    """Rows with different benches, in both orders: everything is shown. What is no row is an error that names the file."""
    both, edit = tmp_path / "both.json", tmp_path / "edit.json"
    words = ["--checkpoint", str(toy_checkpoint), "--steps", "1", "--cases", "2", "--json"]
    evaluation.main([*words, str(both)])
    evaluation.main([*words, str(edit), "--bench", "edit"])
    for files in ((both, edit), (edit, both)):
        capsys.readouterr()
        evaluation.main(["--table", *map(str, files)])
        scores = capsys.readouterr().out.split("\n\n")[0]
        lines = cells_of(scores)
        whole = cells_of(figures.table([read_json(both)]).split("\n\n")[0])
        assert [line[0] for line in lines] == [line[0] for line in whole]
        for line in lines[2:]:
            t2i = line[0].startswith(("T2I", "**T2I"))
            assert [cell == "-" for cell in line[1:]] == [t2i and file == edit for file in files]

    row, places = read_json(both), []

    def walk(value, *keys):
        places.append(keys)
        for key, inner in value.items() if isinstance(value, dict) else ():
            walk(inner, *keys, key)

    walk(row)
    assert len(places) == 130
    for *keys, last in places[1:]:  # whatever is changed, or taken out
        for new in (0.5, -1, float("nan"), "1", None, True, [], {}, ...):
            changed = copy.deepcopy(row)
            inner = functools.reduce(dict.__getitem__, keys, changed)
            if inner.pop(last) == new and (new is None or type(new) is float):
                continue
            if new is not ...:
                inner[last] = new
            refused(tmp_path / "changed.json", json.dumps(changed), both)
    for text in ("[]", "{}", "", "{", "null", "[" * 100_000, '{"name": "x", "t2i": {}}', "\udcff"):
        refused(tmp_path / "other.json", text, both)
    capsys.readouterr()


def refused(path: Path, text: str, good: Path) -> None:
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=str(path)):
        evaluation.main(["--table", str(good), str(path)])


def test_nothing_of_others_is_written_over(toy_checkpoint, tmp_path, capsys):
    words = ["--checkpoint", str(toy_checkpoint), "--steps", "1", "--cases", "2", "--bench", "edit"]
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "table.md").write_text("mine")
    for place in (["--json", str(tmp_path / "notes.json")], ["--out", str(tmp_path / "mine")]):
        with pytest.raises(ValueError, match=place[1]):
            evaluation.main([*words, *place])
    assert (tmp_path / "notes.json").read_text() == '{"mine": 1}'
    assert [p.read_text() for p in (tmp_path / "mine").iterdir()] == ["mine"]
    evaluation.main([*words, "--out", str(tmp_path / "out")])
    first = read_json(tmp_path / "out" / "row.json")
    evaluation.main([*words, "--out", str(tmp_path / "out")])  # its own, again
    with pytest.raises(ValueError, match="row.json: exists"):  # the same model, drawn otherwise
        evaluation.main([*words, "--steps", "2", "--out", str(tmp_path / "out")])
    other = shutil.copytree(toy_checkpoint, tmp_path / "other")
    with pytest.raises(ValueError, match="row.json: exists; name another, or give --overwrite"):
        evaluation.main([*words, "--checkpoint", str(other), "--out", str(tmp_path / "out")])
    assert read_json(tmp_path / "out" / "row.json")["edit"] == first["edit"]
    evaluation.main([*words, "--checkpoint", str(other), "--out", str(tmp_path / "out"), "--overwrite"])
    assert read_json(tmp_path / "out" / "row.json")["name"] == "other"


def two_steps(checkpoint: Path, student: Path) -> None:
    """A student with the checkpoint's own weights."""
    export(checkpoint, MMDiT.from_pretrained(checkpoint / "transformer"), [1.0, 0.5], student, torch.float32)


def test_compare_writes_table_and_pictures(toy_checkpoint, tmp_path, monkeypatch, capsys):
    """A student with the teacher's own weights: its row and pictures are those of the teacher at its steps."""
    few = {"t2i": ("portrait",), "edit": ("text", "scene")}
    monkeypatch.setattr(evaluation, "BENCHES", few)
    two_steps(toy_checkpoint, tmp_path / "student")
    rows = evaluation.compare(tmp_path / "student", toy_checkpoint, tmp_path / "out", {"t2i": 3, "edit": 2})
    assert [row["nfe"] for row in rows] == [80, 2, 2, 2] and [row["guidance"] for row in rows] == [2.0, 1.0, 1.0, 1.0]
    full, euler, renoise, student = [
        {k: v for k, v in row.items() if k not in ("name", "seconds_per_image")} for row in rows
    ]
    assert student == renoise and renoise["t2i_diversity"] != euler["t2i_diversity"] != full["t2i_diversity"]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == rows
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert all(row["name"] in table for row in rows) and table in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "comparison.png") as sheet:
        assert sheet.height > (5 + 6) * 128
    with pytest.raises(ValueError, match="1024"):
        large = shutil.copytree(tmp_path / "student", tmp_path / "large")
        index = read_json(large / "model_index.json") | {"resolution": 1024}
        (large / "model_index.json").write_text(json.dumps(index))
        evaluation.compare(large, toy_checkpoint, tmp_path / "other")


def by_colour(pictures: list[Image.Image], cases: list, reconstruct) -> list[judge.Verdict]:
    means = [float(np.asarray(picture.convert("RGB"), np.float32).mean()) / 255 for picture in pictures]
    return [judge.Verdict({"bright": mean > 0.5, "nothing extra": mean < 0.9}, {}, mean) for mean in means]


def test_compare_takes_a_teachers_rows_from_its_log(toy_checkpoint, tmp_path, monkeypatch):
    """Those of the first cases are the rows measured anew, and no teacher is judged. Other weights or judge: measured."""
    monkeypatch.setattr(evaluation, "BENCHES", {"t2i": ("text",), "edit": ("text",)})
    monkeypatch.setattr(judge, "judge", by_colour)  # the exact one finds nothing right in a random network's pictures
    teacher, cases = shutil.copytree(toy_checkpoint, tmp_path / "teacher"), {"t2i": 2, "edit": 3}
    two_steps(teacher, student := tmp_path / "student")
    expected = evaluation.compare(student, teacher, tmp_path / "out", cases)
    base = open_checkpoint(teacher)
    samplers = teacher_samplers(base, [1.0, 0.5, 0.0])
    more = {"t2i": 4, "edit": 4}
    rows = [evaluation.evaluate(base, sampler, more)[0] for sampler in samplers]
    log = {"score base": {"rows": rows}, "judge": judge.version()}
    log["fingerprint"] = evaluation.fingerprint_with_teachers(teacher)
    (teacher / "build.json").write_text(json.dumps(log))
    judged, real = [], evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda p, s, *rest: (judged.append(s.name), real(p, s, *rest))[1])
    rows = evaluation.compare(student, teacher, tmp_path / "out", cases)
    assert judged == [expected[3]["name"]] and len({row["t2i"]["average"] for row in rows}) > 2
    for row, again in zip(expected, rows):
        for key in again.keys() - {"seconds_per_image"}:
            assert again[key] == (row[key] if "diversity" in key else pytest.approx(row[key], abs=1e-4)), key
    assert evaluation.recorded(teacher, cases)
    (teacher / "build.json").write_text(json.dumps(log | {"judge": "another"}))
    assert evaluation.recorded(teacher, cases) == {}
    (teacher / "build.json").write_text(json.dumps(log))
    with open(teacher / "transformer" / "diffusion_pytorch_model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    assert evaluation.recorded(teacher, cases) == {}


def test_the_toys_own_log_is_of_this_judge():
    """The four Euler steps of the toy's base teacher, on the first cases: what its log says is what comes out today."""
    pipeline = open_checkpoint(TOY)
    sampler = teacher_samplers(pipeline, flow.student_sigmas(4))[1]
    row, _ = evaluation.evaluate(pipeline, sampler, {"t2i": 2, "edit": 2})
    (then,) = [row for row in evaluation.build_log(TOY)["score base"]["rows"] if row["name"] == sampler.name]
    for bench in ("t2i", "edit"):
        for part, tolerance in (("compliance", 0), ("fidelity", 0.02)):
            for category, scores in row[f"{bench}_each"][part].items():
                assert scores == pytest.approx(then[f"{bench}_each"][part][category][:2], abs=tolerance)
