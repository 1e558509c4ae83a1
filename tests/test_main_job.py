"""The main job from the command line, with tiny numbers and networks: distil, compare, then draw and score what came out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from page_commands import ROOT, commands, pages
from PIL import Image

import eval as evaluation
import recipe
import sample
import train
from checkpoint.files import read_json
from model import MMDiT

README = pages("README.md", "docs/prompts.md", "docs/node.md")  # as a reader meets them
# The job itself has no flag for fewer cases: its table is meant to be compared with the README's.
TRAIN = """
import train
import eval as evaluation
evaluation.COMPARED.update(t2i=2, edit=2)
evaluation.BENCHES = {"t2i": ("text",), "edit": ("object", "style")}
evaluation.VARIETY = (1, 2)
train.main()
"""
STUDENT_STEPS = 2


@pytest.fixture(scope="module")
def job(toy_checkpoint, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    out = tmp_path_factory.mktemp("job") / "run"
    words = f"--checkpoint {toy_checkpoint} --out {out} --pool 12 --steps 2 --batch 4 --micro-batch 2 --panel-every 1"
    command = [sys.executable, "-c", TRAIN, *words.split(), "--student-steps", str(STUDENT_STEPS), "--warmup", "0"]
    return out, subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_one_command_distils_and_compares(job, toy_checkpoint):
    out, result = job
    assert result.returncode == 0, result.stderr
    assert "dmd" in result.stderr and "2/2" in result.stderr  # a progress bar, beside the results
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in (out / "panels").iterdir()) == ["000001.png", "000002.png"]
    rows = json.loads((out / "comparison.json").read_text())
    assert [row["nfe"] for row in rows] == [80, STUDENT_STEPS, STUDENT_STEPS, STUDENT_STEPS]
    assert (out / "comparison.md").read_text() in result.stdout
    for name in ("grid.png", "comparison.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 256 and len(set(picture.convert("L").tobytes())) > 50

    index = read_json(out / "student" / "model_index.json")
    assert len(index["sample_sigmas"]) == STUDENT_STEPS and (index["guidance"], index["resolution"]) == (1.0, 128)
    student = MMDiT.from_pretrained(out / "student" / "transformer")
    teacher = MMDiT.from_pretrained(toy_checkpoint / "transformer")
    moved = [(a - b).abs().max() for a, b in zip(student.parameters(), teacher.parameters())]
    assert sum(m > 0 for m in moved) > len(moved) / 2  # two steps: bf16 may round a norm's move away
    assert max(moved) < 1


def test_the_student_is_scored_alone_as_in_the_table(job, tmp_path, monkeypatch):
    """eval.py on the written student: its row of the comparison again, to the last digit."""
    out, _ = job
    monkeypatch.setattr(evaluation, "BENCHES", {"edit": ("object", "style")})
    monkeypatch.setattr(evaluation, "VARIETY", (1, 2))
    words = f"--checkpoint {out / 'student'} --bench edit --cases 2 --json {tmp_path / 'row.json'}"
    evaluation.main(words.split())
    row, expected = read_json(tmp_path / "row.json"), json.loads((out / "comparison.json").read_text())[3]
    for key in ("nfe", "guidance", "edit", "edit_attributes", "edit_fidelity", "edit_interval", "edit_diversity"):
        assert row[key] == expected[key]


def test_readme_commands(job, toy_checkpoint, tmp_path, monkeypatch):
    """As they stand there, in an empty folder; only checkpoints are the tiny ones, and numbers tiny."""
    student = job[0] / "student"
    monkeypatch.chdir(tmp_path)
    main_job, _, _, own_prompts, *node = commands("train.py", README)  # a third teacher: the next test
    assert main_job == [] and train.parse(main_job).home == Path("runs/dmd-flash")
    drawn = commands("sample.py", README)
    assert len(drawn) == 2 and all("runs/dmd-flash/student" in words for words in drawn)
    for words in drawn:
        words[words.index("--checkpoint") + 1] = str(student)
        sample.main(words)
        assert Path(words[words.index("--out") + 1]).stat().st_size > 1000

    examples = [line.strip() for line in README.splitlines() if line.startswith('    {"task"')]
    Path("mine.jsonl").write_text("\n".join(examples))
    for name in {name for line in examples for name in json.loads(line).get("images", [])}:
        Image.open("tree.png").convert("RGB").save(name)
    for name in {json.loads(line)["target"] for line in examples if "target" in line}:
        Image.open("sea.png").save(name)
    tiny = ["--steps", "1", "--batch", "2", "--micro-batch", "1", "--warmup", "0", "--student-steps", "1"]
    for words in (own_prompts, *node):  # of node: plans, and a run of LoRA roles
        words[words.index("--checkpoint") + 1] = str(toy_checkpoint)
        train.main([*words, *tiny])
    assert (tmp_path / "runs" / "mine" / "student" / "model_index.json").is_file()
    assert len(node) == 3 and (tmp_path / "runs" / "lora" / "lora.safetensors").is_file()
    (large,) = [line.split("train.py")[1].split() for line in README.splitlines() if line.startswith("    torchrun")]
    assert list(train.parse(large).prompts) == [Path("mine.jsonl")]  # test_node.py runs the like of it


def test_readmes_third_teacher(toy_checkpoint, tmp_path, monkeypatch):
    """The two recipes that README adds, and its commands: a teacher for one family of edits, then a student of three."""
    block = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    for new in eval(f"[{block}]", vars(recipe)):
        monkeypatch.setitem(recipe.RECIPES, new.name, new)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "COMPARED", {"t2i": 2, "edit": 2})
    monkeypatch.setattr(evaluation, "BENCHES", {"t2i": ("text",), "edit": ("style",)})
    monkeypatch.setattr(evaluation, "VARIETY", (1, 2))
    tiny = ["--checkpoint", str(toy_checkpoint), "--steps", "1", "--batch", "2", "--micro-batch", "1", "--pool", "6"]
    _, teacher, student, *_ = commands("train.py", README)
    train.main([*teacher, *tiny, "--warmup", "0"])
    train.main([*student, *tiny, "--warmup", "0", "--student-steps", "1"])
    assert (tmp_path / "runs" / "dmd-flash-style" / "comparison.png").is_file()


def test_the_readme_is_short_and_names_the_whole_book():
    text = (ROOT / "README.md").read_text()
    for page in ("flow", "dmd", "recipe", "train", "model", "sample", "eval"):
        assert f"[{page}.py]({page}.py): " in text
    assert len(text.split()) <= 1400
