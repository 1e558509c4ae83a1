"""Passes: what the networks of a run compute, counted in the run, against the arithmetic."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import recipe
import train
from training.passes import Passes

GUIDED = 2  # forwards of a guided teacher


@pytest.fixture
def words(small_run, toy_checkpoint) -> list[str]:
    """With a second teacher, which the default recipe asks for edits in the last two quarters."""
    return [*small_run, "--teacher", f"edit={toy_checkpoint / 'transformer'}", "--steps", "3"]


def sample_passes(name: str, k: int | None = None, scorers: float = 0) -> float:
    """One sample's part of one update of the trainee `name`. scorers: forwards that make the real score; a guided teacher
    has 2. Without the first-step loss."""
    learns = 1 + 2  # a forward with gradient, and its backward
    if name == "fake":
        return (k + 1) + learns  # the student's rollout; the fake score on its picture
    if name == "student":
        return k + learns + scorers + 1  # the steps before k; step k; the real and the fake score at x_t
    return learns


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("more", [[], ["--lora-rank", "2"], ["--sampler", "euler", "--panel-every", "1"]])
def test_counted_passes_are_those_of_the_arithmetic(words, more, tmp_path):
    """Of every step, from its micro-batches' tasks and k. A panel's pictures do not count."""
    train.main([*words, *more, "--out", str(tmp_path / "run")])
    flash = recipe.find("flash").resolve({"t2i": ["portrait"], "edit": ["scene"]}, ["edit"])
    for line in lines(tmp_path / "run"):
        names = ["student"] * 3 + ["fake"] * 6  # micro-batches of 2 samples, in the log's order
        expected = 0
        for name, task, k in zip(names, line["tasks"], line["k"], strict=True):
            teachers = flash.weights(k, 4, task, {"t2i": "portrait", "edit": "scene"}[task])
            expected += 2 * sample_passes(name, k, GUIDED * len(teachers))
        assert line["passes"] == expected


def test_flow_counts_a_forward_and_its_backward(small_run, tmp_path):
    prompts = tmp_path / "mine.jsonl"
    targets = [json.loads(line) | {"target": "photo.png"} for line in prompts.read_text().splitlines()]
    prompts.write_text("\n".join(map(json.dumps, targets)))
    train.main([*small_run, "--steps", "3", "--objective", "flow", "--out", str(tmp_path / "flow")])
    assert [line["passes"] for line in lines(tmp_path / "flow")] == [6 * sample_passes("teacher")] * 3 == [18] * 3


def test_two_roles_on_one_model_count_once_each():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj_out = nn.Linear(2, 2)

        def forward(self, z):
            return self.proj_out(z)

    model = Model()
    passes = Passes([model, model])
    with torch.no_grad():
        model(torch.ones(3, 2))
    assert passes.count == 3
    model(torch.ones(5, 2))
    assert passes.count == 8  # its backward has not run
    model(torch.ones(4, 2)).sum().backward()
    assert passes.count == 8 + 4 + 8
