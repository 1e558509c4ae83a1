"""Tiny training runs, and what they leave behind."""

import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

import flow
import train
from training import presets
from training.options import TrainOptions
from training.run import whole_checkpoints


def run_options(checkpoint: Path, out: Path, objective: str = "dmd", **numbers) -> TrainOptions:
    given = dict(steps=3, batch=4, micro_batch=2, dtype="float32", panel_every=10**6, save_every=10**6)
    numbers = given | dict(guidance=2.0, resolution=64) | numbers
    return TrainOptions(**presets.defaults(objective, 0, 0) | numbers, checkpoint=checkpoint, out=out)


def train_run(checkpoint: Path, out: Path, pool: train.Pool, objective: str = "dmd", **numbers) -> Path:
    """A whole run. Returns the folder of its result."""
    options, state = train.open_run(run_options(checkpoint, out, objective, **numbers))
    return train.train(options, pool, state)


def recipe_for(pool: train.Pool, name: str = "flash", teachers: Sequence[str] = ()) -> train.Recipe:
    """A recipe, for the categories of the pool and these specialised teachers."""
    return train.recipes.find(name).resolve(train.recipes.categories(pool.entries), teachers)


def job_of(options, pool, recipe, teachers=None, trainees=None) -> train.Job:
    """A job as train.open_job makes it; without networks the draws can be looked at."""
    per_step = {"fake": options.fake_updates, "student": 1, "teacher": 1}
    sigmas = flow.student_sigmas(options.student_steps)
    return train.Job(options, pool, recipe, sigmas, teachers or {}, trainees or {}, per_step)


def newest(out: Path) -> tuple[int, dict]:
    """The newest checkpoint: its step, and {network: {tensor's name: tensor}}."""
    folder = whole_checkpoints(out)[-1]
    return int(folder.name), {f.name.split("-")[0]: load_file(f) for f in folder.iterdir()}


def same(a, b) -> bool:
    """Equal to the last bit, through dictionaries and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = ("seconds", "images_per_second", "memory_gb")
    return [{k: v for k, v in line.items() if k not in measured} for line in lines]


def forked_process(work: Callable[[], None]) -> int:
    """Start `work` in a copy of this process, which is cheap, and return its number."""
    if pid := os.fork():
        return pid
    torch.set_num_threads(1)  # the other threads were not copied
    sys.stdout = sys.stderr = open(os.devnull, "w")
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)  # gone without any cleaning up, like a program that is killed


def exit_codes(ranks: int, work: Callable[[int], None]) -> list[int]:
    """Run `work(rank)` in copies of this process that are the ranks of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}

    def as_rank(rank: int) -> None:
        os.environ |= group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        work(rank)

    pids = [forked_process(partial(as_rank, rank)) for rank in range(ranks)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
