"""docs/evening.md: each of its commands runs, and each of its patches does what the page says of it."""

import re
from collections.abc import Callable
from functools import cache
from types import ModuleType

import pytest
import torch
from page_commands import ROOT, commands, pages

from plane import method, panels
from plane.__main__ import PICTURED, main
from plane.rows import Scores

PAGE = pages("docs/evening.md")
PATCHES = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "forks").glob("*/*.patch"))
FEW = method.Setting(seeds=2, updates=150)


@pytest.mark.parametrize("words", commands("-m plane", PAGE), ids=" ".join)
def test_every_command_of_the_page_runs(words, tmp_path, monkeypatch):
    monkeypatch.setattr(panels, "FINE", 1)  # coarse panels are quick
    words[words.index("--out") + 1] = str(tmp_path)
    main([*words, "--seeds", "1", "--updates", "1"])
    assert (tmp_path / "dmd.png").exists() and "Student, 4 steps" in (tmp_path / "dmd.md").read_text()


def test_the_page_names_every_patch_and_every_patch_that_it_names_is_there():
    named = set(re.findall(r"git apply (forks/\S+)", PAGE))
    assert named | {f"forks/bugs/{i}.patch" for i in (2, 3, 4, 5)} == set(PATCHES) and len(PATCHES) == 9


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_is_small_and_a_bug_is_not_told_in_its_head(patch):
    head, diff = (ROOT / patch).read_text().split("diff --git", 1)
    changed = [line for line in diff.splitlines() if re.match(r"[+-](?![+-]{2} )", line)]
    assert len(changed) <= (6 if "rollout" in patch else 2)
    if "bugs" in patch:
        assert not re.search("sign|detach|time|average|fake|real|condition", head)


# ---- symptoms: FEW students and updates, and the numbers that the page names ----------------------------------------


@pytest.fixture
def patched(forked) -> Callable[[str], ModuleType]:
    """patched(NAME): plane.method of a copy that forks/NAME.patch has changed."""
    return lambda name: forked(name)("plane.method")


def trained(plane: ModuleType, recipe: str = "base-5-5", **changes: int) -> Scores:
    setting = plane.Setting(**{"seeds": FEW.seeds, "updates": FEW.updates} | changes)
    ((_, students, _),) = plane.train(setting, PICTURED[recipe], {setting.updates})
    return plane.evaluate(setting, students, plane.SIGMAS)


@cache
def sound() -> Scores:
    return trained(method)


@cache
def untrained() -> Scores:
    """The base teacher in four steps."""
    return method.evaluate(FEW, FEW.teacher(), method.SIGMAS)


def mean(scored: Scores, category: str, measure: str) -> float:
    return scored[category][measure].mean().item()


def assert_untrained(scored: Scores) -> None:
    for category, measures in untrained().items():
        for measure, values in measures.items():
            torch.testing.assert_close(scored[category][measure], values, rtol=0.0, atol=0.0)


def test_without_fake_updates_nothing_moves_under_the_base_teacher():
    assert_untrained(trained(method, updates=10, fake_updates=0))


def test_without_fake_updates_specialists_collapse_the_student():
    scored = trained(method, "flash", updates=300, fake_updates=0)
    assert mean(scored, "object", "coverage") < 0.5
    assert mean(scored, "object", "precision") > mean(untrained(), "object", "precision") + 0.1
    assert mean(scored, "object", "distance") > 0.5


def test_without_the_normaliser_little_changes(patched):
    scored = trained(patched("evening/no-normaliser"))
    for category, measures in sound().items():
        assert not torch.equal(scored[category]["distance"], measures["distance"])
        assert mean(scored, category, "precision") == pytest.approx(measures["precision"].mean().item(), abs=0.08)
        assert mean(scored, category, "distance") < mean(untrained(), category, "distance")


def test_without_the_rollout_samples_miss_their_modes(patched):
    scored = trained(patched("evening/no-rollout"))
    assert mean(scored, "portrait", "precision") < mean(sound(), "portrait", "precision") - 0.08
    assert mean(scored, "text", "distance") > 1.2 * mean(sound(), "text", "distance")


def test_two_lists_of_sigmas_leave_the_student_far_from_exact_samples(patched):
    scored = trained(patched("evening/two-lists"), updates=300)  # falls behind more and more
    far, near = (sum(mean(some, category, "distance") for category in method.TASKS) for some in (scored, sound()))
    assert far > 1.5 * near


def test_collapsed_specialists_collapse_the_student(patched):
    scored = trained(patched("evening/collapsed"), "specialised-5-5")
    for category in ("object", "style"):
        assert mean(scored, category, "coverage") <= 0.5 and mean(sound(), category, "coverage") == 1
        assert mean(scored, category, "distance") > 0.4


def test_bug_1_leaves_the_student_where_it_was(patched):
    assert_untrained(trained(patched("bugs/1"), updates=10))


def test_bug_2_sends_all_samples_away(patched):
    scored = trained(patched("bugs/2"))
    for category in method.TASKS:
        assert mean(scored, category, "precision") < 0.05 and mean(scored, category, "distance") > 100


def test_bug_3_hurts_edits_alone(patched):
    scored = trained(patched("bugs/3"))
    assert mean(scored, "object", "precision") < mean(untrained(), "object", "precision") - 0.2
    for category in method.CATEGORIES["t2i"]:
        assert mean(scored, category, "precision") > mean(sound(), category, "precision") - 0.1


def test_bug_4_sends_samples_through_their_modes(patched):
    scored = trained(patched("bugs/4"))
    for category in ("landscape", "portrait", "object"):
        assert mean(scored, category, "precision") < mean(untrained(), category, "precision") - 0.1
        assert mean(scored, category, "distance") > 3 * mean(sound(), category, "distance")


def test_bug_5_draws_coarser_than_before_training(patched):
    scored = trained(patched("bugs/5"))
    for category in ("landscape", "portrait", "text"):
        assert mean(scored, category, "distance") > mean(untrained(), category, "distance")
        assert mean(scored, category, "distance") > 3 * mean(sound(), category, "distance")
