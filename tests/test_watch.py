"""What a run tells of itself."""

from types import SimpleNamespace

import pytest
import torch

from training import watch
from training.trainee import Record


def test_metrics_tell_times_and_tasks_apart():
    """Over the samples of two ranks."""
    times = [0.1, 0.95]
    records = [
        Record(task, "text", 2, times, torch.tensor(losses))
        for task, losses in (("t2i", [1.0, 2.0]), ("edit", [3.0, 3.0]))
    ]
    student = SimpleNamespace(records=records, grad_norm=0.5)
    fake = SimpleNamespace(records=[Record("t2i", "text", 1, times, torch.tensor([7.0, 9.0]))], grad_norm=0.25)
    theirs = [
        ("student", "t2i", 0.1, 5.0),
        ("student", "t2i", 0.95, 0.0),
        ("fake", "t2i", 0.1, 8.0),
        ("fake", "t2i", 0.95, 8.0),
    ]
    line = watch.metrics({"student": student, "fake": fake}, lambda mine: [mine, theirs])
    assert line["fake_loss"] == 8.0 and (line["grad_norm"], line["fake_grad_norm"]) == (0.5, 0.25)
    assert line["loss"] == pytest.approx(14 / 6) and line["loss_by_task"] == {"edit": 3.0, "t2i": 2.0}
    assert line["loss_by_t"] == [3.0, None, None, None, pytest.approx(5 / 3, abs=1e-4)]
    assert line["categories"] == {"t2i text": 8, "edit text": 4}  # each rank has as many
    assert line["tasks"] == ["t2i", "edit", "t2i"] and line["k"] == [2, 2, 1]
