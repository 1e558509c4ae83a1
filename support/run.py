"""A run's folder: its arguments, its checkpoints, its specialised teachers, and the signals that end it."""

import hashlib
import json
import os
import platform
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from support import watch
from support.conditions import shards
from support.files import read_json, write_json, write_tensors
from support.options import settle
from support.ranks import by_first, rank, ranks, together
from support.trainee import Trainee


def find_teachers(args) -> dict[str, Path]:
    """Specialised teachers by name: the checkpoint's teachers/NAME (a folder, or a LoRA's NAME.safetensors), and --teacher
    NAME=FOLDER_OR_LORA, which goes first."""
    places = sorted((args.checkpoint / "teachers").glob("*"))
    found = {p.stem: p for p in places if p.is_dir() or p.suffix == ".safetensors"}
    for given in args.teacher:
        name, _, place = given.partition("=")
        if not name or name in ("base", "student", "fake") or not place or not Path(place).exists():
            raise ValueError(f"--teacher {given}: NAME=FOLDER_OR_LORA is expected; NAME is not base, student or fake")
        found[name] = Path(place)
    return found


def open_run(args) -> tuple[object, Path | None]:
    """Settle the arguments and open the run's folder: the arguments, and the checkpoint to go on from (None: a new run).

    A folder that holds anything is only ever continued, with --resume and the same arguments; else ValueError.
    """
    return by_first(lambda: _open_run(args))


def _open_run(args) -> tuple[object, Path | None]:
    out, before = args.home, None
    if args.resume:
        if not (out / "args.json").is_file():
            raise ValueError(f"{out}: no run to go on with; start one without --resume, or name its folder with --out")
        before = read_json(out / "args.json")["arguments"]
    if not before and out.is_dir() and {f.name for f in out.iterdir()} - {"args.json", "conditions"}:  # a failed start
        raise ValueError(f"{out}: not empty; --resume goes on with the run in it, --out names another folder")
    args = settle(replace(args, dtype=args.dtype or before["dtype"]) if before else args)  # not measured a second time
    find_teachers(args), shards(args.cache or out / "conditions")  # their errors come before anything is written
    now = json.loads(json.dumps(asdict(args), default=str))
    contents = {p: hashlib.sha256(p.read_bytes()).hexdigest()[:8] if p.is_file() else "missing" for p in args.prompts}
    now["prompts"] = [f"{path} ({content})" for path, content in contents.items()]
    free = {"resume", "out", "steps", "save_every", "panel_every", "device", "compile", "recompute", "cache"}
    for name in now.keys() - free - {"plan", "gpus", "peak_tflops", "utilisation"}:
        if before and now[name] != before.get(name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {now[name]}, but the run in {out} was started with {before.get(name)}")
    out.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    here = {"host": platform.node(), "pid": os.getpid(), "processes": ranks()}
    write_json(out / "args.json", {"arguments": now, "versions": versions, "source": watch.source(), "started": here})
    return args, newest(out) if before else None


def save(out: Path, step: int, trainees: dict[str, Trainee]) -> None:
    """Write checkpoints/STEP/NAME-RANK-of-RANKS.safetensors aside, rename the folder into place, keep the last two.

    A rename happens or does not: a writer killed before it leaves a folder that is not named by a number, which nothing
    reads. The bytes are forced to the disk first, or a power cut could keep the new name without them. OSError: the disk
    is full, say; what was written aside is removed, and the checkpoint before it stays.
    """
    aside, place = out / "checkpoints" / "unfinished", out / "checkpoints" / f"{step:08d}"

    def publish() -> None:
        shutil.rmtree(place, ignore_errors=True)
        os.replace(aside, place)
        for old in whole_checkpoints(out)[:-2]:
            shutil.rmtree(old)

    try:
        by_first(lambda: (shutil.rmtree(aside, ignore_errors=True), aside.mkdir(parents=True)) and None)
        with together():
            for name, trainee in trainees.items():
                if trainee.sharded or rank() == 0:
                    mine, all = (rank(), ranks()) if trainee.sharded else (0, 1)
                    path = aside / f"{name}-{mine:04d}-of-{all:04d}.safetensors"
                    write_tensors(path, trainee.state())
                    with open(path, "rb+") as file:
                        os.fsync(file.fileno())
        by_first(publish)
    except OSError as error:
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        kept = ", ".join(f.name for f in whole_checkpoints(out)[-1:]) or "none yet"
        raise OSError(f"no checkpoint of step {step} ({error}); the last whole one: {kept}") from None


def whole_checkpoints(out: Path) -> list[Path]:
    """A run's whole checkpoints, oldest first."""
    return sorted(f for f in (out / "checkpoints").glob("*") if f.name.isdigit())


def newest(out: Path) -> Path | None:
    """The newest checkpoint; None for a run that ended before its first. The metrics are cut back to its step."""
    found = [None, *whole_checkpoints(out)][-1]
    if (metrics := out / "metrics.jsonl").is_file():
        lines = metrics.read_text().splitlines(keepends=True)
        metrics.write_text("".join(lines[: int(found.name) if found else 0]))
    return found


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within, Ctrl-C and SIGTERM only add their number to the list; who works there ends when it suits."""
    noted: list[int] = []
    before = {s: signal.signal(s, lambda number, frame: noted.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextmanager
def located(where: Callable[[], str]) -> Iterator[None]:
    """Within, a FloatingPointError says where it happened."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{where()}: {error}") from None
