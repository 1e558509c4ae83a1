"""The record table: what a row says, where it stands, and what is refused before hours of training."""

import json
import subprocess

import pytest

from checkpoint.files import read_json
from experiments import __main__ as command
from experiments import records, seeds
from scores import pages

ROOT = records.Path(records.__file__).parents[1]


def result(name: str, t2i: list[float], edit: list[float], minus: float) -> dict:
    """As seeds.run returns it: three students' averages, and their difference from the teacher."""
    rows = [{"t2i": {"average": a}, "edit": {"average": b}} for a, b in zip(t2i, edit, strict=True)]
    gain = {task: {"score": {"mean": minus, "half": 0.02}} for task in ("t2i", "edit")}
    students = {"name": name, "train.py": "--lr 0.1", "seeds": [0, 1, 2], "minus": "main"}
    return students | {"rows": rows, "differences": {"teacher": gain, "main": gain}}


@pytest.fixture
def record(tmp_path, monkeypatch):
    """The command, with students whose scores are given and whose runs have logs alone."""
    monkeypatch.setattr(records, "commit", lambda: "abc1234")

    def make(name: str, scores: list[float], passes: int, minus: float = -0.01, more: tuple[str, ...] = ()) -> None:
        for seed in range(3):
            folder = tmp_path / "runs" / name / f"seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").write_text(f'{{"passes": {passes - 10}}}\n{{"passes": {10 + seed}}}\n')
        students = result(name, scores, [score - 0.1 for score in scores], minus)
        monkeypatch.setattr(seeds, "run", lambda options, words: students)
        words = ["--name", name, "--changed", f"what {name} is", "--runs", str(tmp_path / "runs")]
        command.main(["record", *words, "--records", str(tmp_path / "records.json"), *more, "--", "--steps", "7"])

    return make


def test_a_row_has_the_mean_of_both_tasks_with_its_interval_and_the_passes_of_its_logs(record, tmp_path):
    record("first", [0.5, 0.6, 0.7], 4000)
    (row,) = read_json(tmp_path / "records.json")["rows"]
    assert row["score"]["mean"] == pytest.approx(0.55) and row["t2i"] == pytest.approx(0.6)
    assert row["score"]["half"] == pytest.approx(4.30 * 0.1 / 3**0.5)
    assert (row["passes"], row["updates"], row["commit"]) == (4001, 7, "abc1234")
    assert row["minus main"] == row["minus teacher"] == dict.fromkeys(("t2i", "edit"), {"mean": -0.01, "half": 0.02})
    page = (tmp_path / "records.md").read_text()
    assert "**0.550** ± 0.248" in page and "what first is (`--lr 0.1`)" in page and "No row has reached it." in page


def test_rows_stand_by_score_within_the_budget_and_by_updates_at_the_teachers(record, tmp_path):
    (tmp_path / "records.md").write_text(f"# Mine\n\n{pages.START}\n\n{pages.END}\n\nThe end.\n")
    record("low", [0.5, 0.5, 0.5], 4000)
    record("high", [0.6, 0.6, 0.6], records.BUDGET - 1, minus=0.01)
    record("long", [0.9, 0.9, 0.9], records.BUDGET)  # on average one more
    page = (tmp_path / "records.md").read_text()
    within, rest = page.split("**Beyond them**")
    beyond, fewest = rest.split("**Fewest updates")
    assert within.index("what high is") < within.index("what low is") and "what long is" not in within
    assert "what long is" in beyond and "what high is" in fewest and "what low is" not in fewest
    assert page.startswith("# Mine\n") and page.endswith("\nThe end.\n")


def test_a_name_is_replaced_only_when_asked(record, tmp_path):
    record("first", [0.5, 0.5, 0.5], 4000)
    with pytest.raises(ValueError, match="has a row first already"):
        record("first", [0.6, 0.6, 0.6], 4000)
    record("first", [0.6, 0.6, 0.6], 4000, more=("--overwrite",))
    (row,) = read_json(tmp_path / "records.json")["rows"]
    assert row["t2i"] == pytest.approx(0.6)


def test_what_makes_no_row_is_said_before_the_training(record, tmp_path):
    with pytest.raises(ValueError, match="--seeds: a row needs 3 or more"):
        record("first", [0.5] * 3, 4000, more=("--seeds", "0", "1"))
    (tmp_path / "records.md").write_text("# Without marks\n")
    with pytest.raises(ValueError, match="records.md: the lines .* must stand there once"):
        record("first", [0.5] * 3, 4000)
    assert not (tmp_path / "records.json").exists()


def test_a_row_needs_a_commit_without_changes(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    monkeypatch.setattr(records, "__file__", str(tmp_path / "records.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ValueError, match="git does not know one here"):
        records.commit()
    (tmp_path / "records.py").write_text("a")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    assert len(records.commit()) == 7
    (tmp_path / "records.py").write_text("b")
    with pytest.raises(ValueError, match="(?s)commit your changes first:.* M records.py"):
        records.commit()


def test_the_page_of_the_results_shows_their_rows():
    kept = json.loads((ROOT / "results" / "records.json").read_text())
    assert kept["budget"] == records.BUDGET
    assert records.tables(kept["rows"]) in (ROOT / "results" / "records.md").read_text()
    main = next(row for row in kept["rows"] if row["name"] == "main")
    students = read_json(ROOT / "results" / "main" / "seeds.json")["rows"]
    assert main["t2i"] == pytest.approx(sum(row["t2i"]["average"] for row in students) / 3)
    assert main["passes"] <= records.BUDGET
