"""A run's folder: how it begins, is saved, ends and goes on."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from safetensors.torch import load_file
from test_layout import flip
from training_runs import forked_process, metrics, newest, run_options, train_run

import train
from checkpoint.weights import write_tensors
from training import watch
from training.run import fill_defaults, save, whole_checkpoints


def test_an_uneven_ratio_is_said(checkpoint, tmp_path, capsys):
    fill_defaults(run_options(checkpoint, tmp_path, batch=4, micro_batch=2))
    assert "does not divide" not in capsys.readouterr().out
    fill_defaults(run_options(checkpoint, tmp_path, batch=5, micro_batch=3))
    assert "--micro-batch 3 does not divide --batch 5" in capsys.readouterr().out


def test_killed_at_any_moment_of_saving(tmp_path):
    """Twenty writers that do nothing but save are killed at random moments: what is newest is whole, and no older than
    the last save that came to its end."""
    moments, told = random.Random(0), tmp_path / "told"
    (tmp_path / "run").mkdir()
    for _ in range(20):
        first = [0, *(int(f.name) for f in whole_checkpoints(tmp_path / "run"))][-1] + 1

        def write(first=first):
            for step in range(first, first + 10**6):
                tensors = {name: torch.from_numpy(np.full(50_000, step)) for name in "ab"}
                trainee = SimpleNamespace(sharded=False, state=lambda tensors=tensors: tensors)
                train.save(tmp_path / "run", step, {"student": trainee, "fake": trainee})
                told.write_text(f"{step:09d}")

        told.unlink(missing_ok=True)
        pid = forked_process(write)
        while not told.exists():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        step, networks = newest(tmp_path / "run")
        assert step >= int(told.read_text() or 0) and networks.keys() == {"student", "fake"}
        assert all((tensor == step).all() for tensors in networks.values() for tensor in tensors.values())
        assert len(whole_checkpoints(tmp_path / "run")) <= 3  # two, and one that it did not come to remove
    assert step >= 20


def test_the_next_checkpoint_removes_what_a_killed_writer_left(tmp_path):
    """Also of another step: at full size it is 199 GB. Nothing else beside it is touched."""
    left = tmp_path / "checkpoints" / ".00000002.qwen-image-flash.part"
    left.mkdir(parents=True)
    (left / "student-0000-of-0001.safetensors").touch()
    (left.parent / ".DS_Store").touch()
    for step in (3, 4, 5):
        save(tmp_path, step, {})
    assert sorted(path.name for path in left.parent.iterdir()) == [".DS_Store", "00000004", "00000005"]


def test_full_disk_is_reported_and_the_last_checkpoint_stays(tmp_path):
    def trainees(step: int) -> dict:
        return {"student": SimpleNamespace(sharded=False, state=lambda: {"a": torch.full((10_000,), step)})}

    train.save(tmp_path, 1, trainees(1))

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # no file may be larger, as if no room were left
        with pytest.raises(OSError, match=r"no checkpoint of step 2 \(.*the last whole one: 00000001"):
            train.save(tmp_path, 2, trainees(2))

    assert os.waitpid(forked_process(write), 0)[1] == 0
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["00000001"]
    assert newest(tmp_path)[0] == 1


@pytest.mark.parametrize("kind", ["masters", "average", "moment"])
def test_what_is_not_finite_is_neither_saved_nor_exported(checkpoint, pools, tmp_path, monkeypatch, kind):
    """At the last step, where no loss is left to show it."""
    update = train.Trainee.update

    def poisoned(self, rate):
        update(self, rate)
        if self.title == "student" and self.updates == 2:
            adam = self.optimizers[0]
            moment = adam.state[adam.param_groups[0]["params"][0]]["exp_avg"]
            tensor = {"masters": self.masters[-1], "average": (self.average or [None])[-1], "moment": moment}[kind]
            tensor.detach().view(-1)[-1] = torch.nan

    monkeypatch.setattr(train.Trainee, "update", poisoned)
    monkeypatch.setattr(watch, "draw_pictures", lambda *arguments: None)
    with pytest.raises(FloatingPointError, match=r"no checkpoint of step 2 \(student: .* is not finite\); .*00000001"):
        train_run(checkpoint, tmp_path / "run", pools["dmd"], steps=2, save_every=1, batch=2)
    assert [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()] == ["00000001"]
    assert not (tmp_path / "run" / "student").exists()


@pytest.fixture(scope="module")
def finished(checkpoint, pools, tmp_path_factory) -> Path:
    """A run of two steps, with masters apart from the weights, both optimisers, and its own copy of the checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(checkpoint, folder / "checkpoint")
    numbers = dict(steps=2, batch=2, fake_updates=1, dtype="bfloat16")
    train_run(folder / "checkpoint", folder / "run", pools["dmd"], **numbers)
    return folder


def resume(folder: Path, pool: train.Pool, steps: int) -> None:
    numbers = dict(steps=steps, batch=2, fake_updates=1, dtype=None, resume=True)
    train_run(folder / "checkpoint", folder / "run", pool, **numbers)


def copy_run(finished: Path, to: Path) -> None:
    """The run and its checkpoint, which its notes now name at their new place."""
    shutil.copytree(finished, to, dirs_exist_ok=True)
    notes = to / "run" / "args.json"
    notes.write_text(notes.read_text().replace(str(finished), str(to)))


def test_a_finished_run_goes_on_and_says_from_where(finished, pools, tmp_path, capsys):
    copy_run(finished, tmp_path)
    (tmp_path / "run" / "student" / "thesis.txt").touch()
    for steps in (2, 3):
        resume(tmp_path, pools["dmd"], steps)
        said = capsys.readouterr().out
        assert f"goes on after step 2 of {steps}" in said and "student: from an earlier end of this run" in said
    assert (tmp_path / "run" / "student-1" / "thesis.txt").is_file() and (tmp_path / "run" / "student-2").is_dir()
    assert newest(tmp_path / "run")[0] == 3 and len(metrics(tmp_path / "run")) == 3
    assert json.loads((tmp_path / "run" / "args.json").read_text())["arguments"]["steps"] == 3


def without(start: str) -> Callable[[dict], object]:
    """Takes the first tensor away whose name begins so."""
    return lambda tensors: tensors.pop(min(name for name in tensors if name.startswith(start)))


def matrix(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], object]:
    """Changes one of Adam's moments, of a matrix that is not square."""

    def replace(tensors: dict) -> None:
        name = min(n for n in tensors if n.startswith("exp_avg ") and len(set(tensors[n].shape)) == 2)
        tensors[name] = change(tensors[name])

    return replace


STATE_DAMAGE = {  # to the tensors of the student's state
    "no master": without("master "),
    "no moment": without("exp_avg "),
    "another count": lambda tensors: tensors.update(updates=tensors["updates"] + 1),
    "stray tensor": lambda tensors: tensors.update({"master nothing": torch.zeros(1)}),
    "transposed": matrix(lambda moment: moment.T.contiguous()),
    "integers": matrix(lambda moment: moment.int()),
    "NaN": matrix(lambda moment: moment * torch.nan),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
STUDENT, FAKE = "student-0000-of-0001.safetensors", "fake-0000-of-0001.safetensors"
FILE_DAMAGE = {  # to the folder of a state, to the run's notes, or to what it was started with
    "empty file": lambda state: (state / FAKE).write_bytes(b""),
    "no file": lambda state: (state / FAKE).unlink(),
    "other network": lambda state: shutil.copy(state / STUDENT, state / FAKE),
    "stray file": lambda state: (state / "notes.txt").touch(),
    "another rank": lambda state: shutil.copy(state / FAKE, state / "fake-0001-of-0002.safetensors"),
    "no options": lambda state: (state.parents[1] / "args.json").write_text("{}"),
    "options in a list": lambda state: (state.parents[1] / "args.json").write_text('{"arguments": [], "contents": {}}'),
    "weights": lambda state: flip(state.parents[2] / "checkpoint" / "transformer" / WEIGHTS),
    "teacher": lambda state: flip(state.parents[2] / "checkpoint" / "teachers" / "edit" / WEIGHTS),
    "fewer steps": lambda state: None,
}


@pytest.mark.parametrize("change", [*STATE_DAMAGE, *FILE_DAMAGE])
def test_resume_refuses_what_the_run_did_not_write(finished, pools, tmp_path, change):
    copy_run(finished, tmp_path)
    state = whole_checkpoints(tmp_path / "run")[0]
    if change in STATE_DAMAGE:
        tensors = load_file(state / STUDENT)
        STATE_DAMAGE[change](tensors)
        write_tensors(state / STUDENT, tensors)
    else:
        FILE_DAMAGE[change](state)

    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises((ValueError, OSError)) as error:
        resume(tmp_path, pools["dmd"], steps=1 if change == "fewer steps" else 3)
    assert str(tmp_path) in str(error.value) or "--steps" in str(error.value)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_folder_belongs_to_the_run_that_began_it(checkpoint, prompts, tmp_path):
    out = tmp_path / "run"
    args, _ = train.open_run(run_options(checkpoint, out))
    train.open_run(run_options(checkpoint, out))  # a start that failed on its prompts may be repeated
    (out / "metrics.jsonl").touch()
    note = (out / "args.json").read_bytes()
    with pytest.raises(ValueError, match=r"run: not empty; --resume"):
        train.open_run(run_options(checkpoint, out))
    with pytest.raises(ValueError, match=r"--seed is 1, but the run in .* was started with 0"):
        train.open_run(run_options(checkpoint, out, seed=1, resume=True))
    assert (out / "args.json").read_bytes() == note
    with pytest.raises(ValueError, match="other: no run to go on with"):
        train.open_run(run_options(checkpoint, tmp_path / "other", resume=True))
    shutil.copytree(prompts.parent, tmp_path / "mine")
    mine = tmp_path / "mine" / "prompts.jsonl"
    train.open_run(run_options(checkpoint, tmp_path / "fourth", prompts=(mine,)))
    train.open_run(run_options(checkpoint, tmp_path / "fourth", prompts=(mine,), resume=True))
    mine.write_bytes(mine.read_bytes().replace(b"wizard", b"witch", 1))
    with pytest.raises(ValueError, match="a prompt or its picture is not what the run in .* was started with"):
        train.open_run(run_options(checkpoint, tmp_path / "fourth", prompts=(mine,), resume=True))
    with pytest.raises(OSError):
        train.open_run(run_options(checkpoint, prompts / "run"))  # a folder inside a file cannot be made
    words = ["--checkpoint", str(checkpoint), "--prompts", str(prompts), "--out", str(out)]  # the folder is taken
    ended = subprocess.run([sys.executable, train.__file__, *words], capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("train.py: ") and ended.stderr.count("\n") == 1


def test_guidance_and_resolution_are_the_checkpoints(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    reference.write_model_index(folder, resolution=192, guidance=3.0)
    for given, expected in (({}, (3.0, 192)), ({"guidance": 2.0, "resolution": 64}, (2.0, 64))):
        options = fill_defaults(run_options(folder, tmp_path / "run", **{"guidance": None, "resolution": None} | given))
        assert (options.guidance, options.resolution) == expected
