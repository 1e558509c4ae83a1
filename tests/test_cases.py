"""Cases from files: their names, their pictures, and the commands that draw and judge them."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_server import about, well, write_bench
from page_commands import commands, pages
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import eval as evaluation
from data.pictures import open_picture
from judges import rubrics, writing
from judges.cases import name_cases
from recipe import Prompt, read_prompts
from sample import Pipeline
from scores.colours import colours, pixels
from scores.measures import mean_distance
from toy import world


def test_names_of_pictures(tmp_path):
    cases, folder = write_bench(tmp_path), tmp_path
    again = name_cases(list(cases.values())[::-1])
    assert again == cases  # whatever the order
    with pytest.raises(ValueError, match="twice: t2i, text, 'text 1'"):
        name_cases([*cases.values(), Prompt("t2i", "text", "text 1")])
    (folder / "copy.png").write_bytes((folder / "source.png").read_bytes())
    with pytest.raises(ValueError, match="twice: edit, scene"):  # the same picture under another name
        name_cases([*cases.values(), Prompt("edit", "scene", "do it", [folder / "copy.png"])])
    with pytest.raises(ValueError, match="edit, motion, 'run': such edits have no rubric; categories are scene"):
        name_cases([Prompt("edit", "motion", "run", [folder / "source.png"])])


@pytest.fixture
def cases(tmp_path) -> Path:
    """A folder of two files: one T2I prompt, one edit. The toy's template knows no other words than the toy's."""
    folder = tmp_path / "bench"
    folder.mkdir()
    case = world.bench_cases("edit", "style", 1)[0]
    case.images[0].save(folder / "source.png")
    edit = {"task": "edit", "category": "style", "prompt": case.prompt, "images": ["source.png"]}
    draw = {"task": "t2i", "category": "text", "prompt": world.bench_cases("t2i", "text", 1)[0].prompt}
    (folder / "edit.jsonl").write_text(json.dumps(edit))
    (folder / "t2i.jsonl").write_text(json.dumps(draw))
    return folder


def test_files_are_drawn_once_and_judged_by_two(toy_checkpoint, cases, serve, tmp_path, monkeypatch, capsys):
    def answer(question, n):
        if question["model"] == "strict/2" and "style" in about(question) and refusing:
            return 400
        return well(question).replace("4.5", "2.25" if question["model"] == "strict/2" else "4.5")

    refusing, server, out = True, serve(answer), tmp_path / "turbo"
    monkeypatch.setenv("MY_KEY", "secret-key")
    words = f"--checkpoint {toy_checkpoint} --prompts {cases} --out {out} --steps 2 --judge {server.url} "
    words = (words + "--judge-model kind strict/2 --judge-key MY_KEY").split()
    with pytest.raises(SystemExit) as stop:
        evaluation.main(words)
    shown = capsys.readouterr()
    assert stop.value.code == 1 and "not scored by strict/2: style-" in shown.err and "HTTP 400" in shown.err
    row = json.loads((out / "row.json").read_text())
    assert (row["scale"], row["nfe"], row["guidance"], row["name"]) == (5, 4, 2.0, "turbo")
    assert row["t2i"] == {"text": 4.5, "average": 4.5} and row["judges"]["strict/2"]["t2i"]["average"] == 2.25
    assert row["edit"] == {"style": 4.5, "average": 4.5} and row["judges"]["strict/2"]["edit"]["average"] is None
    assert row["seconds_per_image"] > 0 and "secret" not in shown.out + shown.err + str(list(out.rglob("*")))

    # Again: nothing is drawn, one question is asked.
    times = {path: path.stat().st_mtime_ns for path in (out / "pictures").iterdir()}
    refusing, before = False, len(server.asked)
    evaluation.main(words)
    assert len(server.asked) == before + 1 and len(times) == 2
    assert times == {path: path.stat().st_mtime_ns for path in (out / "pictures").iterdir()}
    row = json.loads((out / "row.json").read_text())
    assert row["judges"]["strict/2"]["edit"] == {"style": 2.25, "average": 2.25}
    capsys.readouterr()
    evaluation.main(["--table", str(out / "row.json"), str(out / "row.json")])
    table = capsys.readouterr().out
    assert table.count("turbo") == 4 + 2 and table.count("| strict/2 | 2.25") == 4

    # The pictures are those of the pipeline, from a noise of their own.
    name, case = next((n, c) for n, c in name_cases(read_prompts([cases / "t2i.jsonl"])).items())
    pipeline = Pipeline.from_pretrained(toy_checkpoint)
    seed = int(name[-20:-4], 16) % 2**31
    with Image.open(out / "pictures" / name) as picture:
        assert picture.tobytes() == pipeline(case.prompt, steps=2, guidance=2.0, seed=seed).tobytes()

    # Everything that is wrong is said before the first question.
    before = len(server.asked)

    def fails(message: str, *more: str) -> None:
        with pytest.raises((ValueError, OSError), match=message):
            evaluation.main([*words, *more])
        assert len(server.asked) == before

    fails("drawn by other weights or settings", "--steps", "3")
    fails("two names", "--judge-model", "kind", "kind")
    fails("nowhere", "--prompts", str(tmp_path / "nowhere"))
    fails("--prompts and --table: give one of them", "--table", str(out / "row.json"))
    moved = tmp_path / "moved"
    shutil.copytree(out / "pictures", moved)
    (moved / name).unlink()
    fails(r"missing \(1 in all\); it is 'text'", "--pictures", str(moved))
    (moved / name).write_bytes(b"no picture")
    fails("cannot be read as a picture", "--pictures", str(moved))
    shutil.copy(out / "pictures" / name, moved)
    shutil.copy(out / "pictures" / name, moved / "extra.png")
    fails(r"extra.png: belongs to no case \(1", "--pictures", str(moved))
    (moved / "extra.png").unlink()
    (cases / "again.jsonl").write_text((cases / "t2i.jsonl").read_text())
    fails("a case is there twice")
    (cases / "again.jsonl").unlink()
    evaluation.main([*words, "--pictures", str(moved)])  # equal pictures, wherever they lie: known
    assert len(server.asked) == before
    fails("turbo/row.json: exists; name another, or give --overwrite", "--name", "mine")
    row = json.loads((out / "row.json").read_text())
    assert (row["nfe"], row["guidance"]) == (4, 2.0)  # they say so themselves

    # Pictures of the most used web interface have text under the same key, which is no JSON.
    notes = PngInfo()
    notes.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7")
    with Image.open(moved / name) as picture:
        picture.save(moved / name, pnginfo=notes)
    evaluation.main([*words, "--pictures", str(moved)])
    row = json.loads((out / "row.json").read_text())
    assert row["nfe"] is None and row["guidance"] is None and "seconds_per_image" not in row


def test_without_a_judge_the_row_has_the_measures_that_need_none(toy_checkpoint, cases, tmp_path, capsys):
    """Several pictures of each case, and the colours of another model's; then the same of pictures from elsewhere."""
    words = f"--checkpoint {toy_checkpoint} --prompts {cases} --steps 1 --variety 3".split()
    evaluation.main([*words, "--out", str(tmp_path / "other"), "--seed", "5"])
    evaluation.main([*words, "--out", str(tmp_path / "mine"), "--reference", str(tmp_path / "other" / "pictures")])
    row = json.loads((tmp_path / "mine" / "row.json").read_text())
    pictures = sorted(path.name for path in (tmp_path / "mine" / "pictures").iterdir())
    names = sorted(name_cases(read_prompts(sorted(cases.glob("*.jsonl")))))
    assert pictures == sorted(f"{name[:-4]}{tail}.png" for name in names for tail in ("", "-1", "-2"))
    assert row["judges"] == {} and row["edit_shift"]["of"] == 1 and "t2i" not in row and len(row["variety"]) == 2
    folders = [tmp_path / name / "pictures" for name in ("mine", "other")]
    (drawn,) = [name for name in names if name.startswith("text")]
    (own, own_contrast), (theirs, _) = (colours(pixels(open_picture(folder / drawn))) for folder in folders)
    assert (row["t2i_colour"]["saturation"], row["t2i_colour"]["contrast"]) == (own, own_contrast)
    assert row["t2i_colour"]["saturation_above_reference"] == own - theirs != 0
    distances = {}
    for name in names:
        small = [pixels(open_picture(folders[0] / f"{name[:-4]}{tail}.png"), (64, 64)) for tail in ("", "-1", "-2")]
        distances[name] = mean_distance(small)
    (edited,) = distances.keys() - {drawn}
    assert row["variety"] == {"distance": distances[drawn], "edit_distance": distances[edited]}
    assert min(distances.values()) > 0

    capsys.readouterr()
    evaluation.main(["--table", str(tmp_path / "mine" / "row.json"), str(tmp_path / "other" / "row.json")])
    assert f"| {own:.1f}" in capsys.readouterr().out
    given = f"--prompts {cases} --out {tmp_path / 'given'} --pictures {folders[0]}".split()
    evaluation.main(given)  # further pictures of a case may lie there
    assert json.loads((tmp_path / "given" / "row.json").read_text())["t2i_colour"]["saturation"] == own
    for more, what in ((["--variety", "4"], "-3.png: missing"), (["--reference", str(cases)], "belongs to no case")):
        with pytest.raises(ValueError, match=what):
            evaluation.main([*given, *more])


def test_what_lies_beside_the_pictures_stays(toy_checkpoint, cases, tmp_path):
    """Only a killed run's own unfinished file may lie there. Nothing is removed that has another name."""
    words = f"--checkpoint {toy_checkpoint} --prompts {cases} --out {tmp_path / 'out'} --steps 1".split()
    folder = tmp_path / "out" / "pictures"
    folder.mkdir(parents=True)
    (folder / "film.part").write_bytes(b"mine")
    with pytest.raises(ValueError, match="film.part: belongs to no case"):
        evaluation.main(words)
    assert (folder / "film.part").read_bytes() == b"mine" and len(list(folder.iterdir())) == 1
    (folder / "film.part").unlink()
    names = name_cases(read_prompts(sorted(cases.glob("*.jsonl"))))
    (folder / f".{min(names)}.qwen-image-flash.part").write_bytes(b"half a picture")
    evaluation.main(words)
    assert {path.name for path in folder.iterdir()} == names.keys()


def test_the_layout_of_a_public_bench(tmp_path, monkeypatch):
    """The code of docs/benches.md, on rows of the form that GEdit-Bench has."""
    kinds = (
        "background_change color_alter material_alter motion_change ps_human style_change subject-add subject-remove "
    )
    kinds = (kinds + "subject-replace text_change tone_transfer").split()
    rows = [
        {"task_type": kind, "key": f"{kind}{i}", "instruction": f"edit {i}", "instruction_language": ["en", "cn"][i]}
        | {"input_image_raw": Image.new("RGB", (8, 8)), "input_image": None, "Intersection_exist": True}
        for kind in kinds
        for i in range(2)
    ]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name, split: rows))
    monkeypatch.chdir(tmp_path)
    page = pages("docs/benches.md")
    code = next(block.split("```")[0] for block in page.split("```python\n")[1:] if "GEdit-Bench" in block)
    exec(code, {})
    cases = read_prompts([tmp_path / "gedit" / "edit.jsonl"])
    assert len(cases) == 11 and {case.category for case in cases} <= rubrics.FAMILIES.keys()


def test_the_pages_commands(toy_checkpoint, cases, serve, monkeypatch, capsys):
    """As they stand there, in an empty folder: only the checkpoint is tiny, the endpoint local, and numbers small."""
    monkeypatch.chdir(cases.parent)
    server = serve(lambda question, n: well(question) if "grade" in str(question) else '{"prompts": ["a", "b", "c"]}')
    page = pages("docs/benches.md").replace("http://localhost:8000/v1", server.url)
    page = page.replace("runs/mine/student", str(toy_checkpoint)).replace("--count 20000", "--count 3")

    score, table, measure = commands("eval.py", page)
    (write,) = commands("-m judges.writing", page)
    evaluation.main([*score, "--steps", "1"])
    shutil.copytree("results/mine", "results/other")
    evaluation.main(table)
    assert capsys.readouterr().out.count("| mine |") == 2 + 4  # two tasks, of one model and of two
    evaluation.main([*measure, "--steps", "1", "--overwrite"])
    assert json.loads(Path("results/mine/row.json").read_text())["variety"]["distance"] > 0
    writing.main(write)
    assert {prompt.prompt for prompt in read_prompts(["portrait.jsonl"])} == {"a", "b", "c"}
