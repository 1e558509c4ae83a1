"""A run's folder: its arguments, its checkpoints, its specialised teachers, and the signals that end it."""

import json
import os
import platform
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch

from support import checkpoint, prompts, watch
from support.files import open_weights, read_json, write_json, write_tensors
from support.options import check, flag
from support.ranks import by_first, rank, ranks, say, together
from support.trainee import Trainee

# What may differ in a resumed run: it changes no number, or only how far the run goes.
FREE = {"resume", "redraw", "out", "steps", "save_every", "panel_every", "device", "compile", "recompute", "cache"}
FREE |= {"plan", "gpus", "peak_tflops", "utilisation"}


# ---- the start -------------------------------------------------------------------------------------------------------


def settle(args):
    """Check the options, and fill in what depends on the checkpoint and the machine. ValueError names the flag."""
    for f in fields(args):
        value, within = getattr(args, f.name), f.metadata["within"]
        if within and value is not None:
            check(f.name, value, within)
    index = checkpoint.read_index(args.checkpoint)
    if uneven := [size for size in args.sizes if size % ranks()]:
        parts = f"--batch {args.batch} in --micro-batch {args.micro_batch} makes parts of {uneven[0]}"
        raise ValueError(
            f"{parts} samples, which {ranks()} processes cannot divide equally; take multiples of {ranks()}"
        )
    device = check_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    guidance = float(index["guidance"] if args.guidance is None else args.guidance)
    resolution, dtype = args.resolution or index["resolution"], args.dtype or faster_dtype(device)
    return replace(args, out=args.home, guidance=guidance, resolution=resolution, device=device, dtype=dtype)


def check_device(device: str) -> str:
    """The device as it is, or ValueError: another word, or this machine has none."""
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", device):
        raise ValueError(f"--device {device}: expected is cpu, mps, cuda or cuda:NUMBER")
    here = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "cuda": torch.cuda.device_count()}
    kind, _, number = device.partition(":")
    if int(number or 0) >= here[kind]:
        raise ValueError(f"--device {device}: this machine has {here[kind]} of that kind; --device cpu needs none")
    return device


def faster_dtype(device: str) -> str:
    """bfloat16 on a GPU. On a CPU the one that multiplies faster: some have no bf16 units and emulate them."""

    def seconds(dtype: torch.dtype) -> float:
        a, b, spent = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 768, dtype=dtype), []
        for _ in range(20):
            start = time.perf_counter()
            _ = a @ b
            spent.append(time.perf_counter() - start)
        return min(spent)  # the least disturbed one

    return "bfloat16" if device != "cpu" or seconds(torch.bfloat16) < seconds(torch.float32) else "float32"


def find_teachers(args) -> dict[str, Path]:
    """Specialised teachers by name, each a transformer folder or a LoRA file: the checkpoint's teachers/NAME, and
    --teacher NAME=PLACE, which goes first. ValueError for a --teacher that is neither."""
    places = sorted((args.checkpoint / "teachers").glob("*"))
    found, named = {p.stem: p for p in places if p.is_dir() or p.suffix == ".safetensors"}, {}
    for given in args.teacher:
        name, _, place = given.partition("=")
        if name in ("", "base", "student", "fake") or not place:
            raise ValueError(f"--teacher {given}: NAME=FOLDER_OR_LORA is expected; NAME is not base, student or fake")
        if name in named:
            raise ValueError(f"--teacher {given}: {name} is given twice")
        named[name] = Path(place)
        if not (
            (named[name] / "config.json").is_file() or named[name].suffix == ".safetensors" and named[name].is_file()
        ):
            raise ValueError(
                f"--teacher {given}: no transformer folder (with config.json) and no .safetensors file there"
            )
    return found | named


def open_run(args) -> tuple[object, Path | None]:
    """Settle the arguments and open the run's folder: the arguments, and the checkpoint to go on from (None: the start).

    A folder that is not empty needs --resume, the same arguments, and the same contents of prompts, checkpoint and
    teachers. Else it is a ValueError, before anything is written. A resumed run changes its folder only in `restore`.
    """
    return by_first(lambda: _open_run(args))


def _open_run(args) -> tuple[object, Path | None]:
    out, before = args.home, None
    if args.resume:
        if not (out / "args.json").is_file():
            raise ValueError(f"{out}: no run to go on with; start one without --resume, or name its folder with --out")
        before = read_json(out / "args.json")
        if not (isinstance(before.get("arguments"), dict) and isinstance(before.get("contents"), dict)):
            raise ValueError(f"{out / 'args.json'}: does not say how the run was started; it cannot go on")
        args = replace(args, dtype=args.dtype or before["arguments"].get("dtype"))  # not measured a second time
    elif out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file; --out names a folder")
    elif out.is_dir() and {f.name for f in out.iterdir()} - {"args.json", "conditions"}:  # these: a failed start
        raise ValueError(f"{out}: not empty; --resume goes on with the run in it, --out names another folder")

    # What the run and its end need.
    args = settle(args)
    for name in ("transformer", "vae", "text_encoder", "processor"):
        if not (args.checkpoint / name).is_dir():
            raise ValueError(f"{args.checkpoint / name}: no such folder; a checkpoint in the published layout has it")
    read_json(args.checkpoint / "scheduler" / "scheduler_config.json")
    contents = {"the checkpoint": checkpoint.fingerprint(args.checkpoint)}
    for name, place in find_teachers(args).items():
        contents[f"teacher {name}"] = checkpoint.files_fingerprint(place.iterdir() if place.is_dir() else [place])
    contents |= {"a prompt or its picture": prompts.fingerprint(args.prompts)} if args.prompts else {}
    started = start_record(args)

    if before is None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "args.json", started | {"contents": contents})
        return args, None
    for name, value in started["arguments"].items():
        if name not in FREE and value != before["arguments"].get(name):
            then = before["arguments"].get(name)
            raise ValueError(f"{flag(name)} is {value}, but the run in {out} was started with {then}")
    if changed := {
        name
        for name in contents.keys() | before["contents"].keys()
        if contents.get(name) != before["contents"].get(name)
    }:
        raise ValueError(f"{min(changed)} is not what the run in {out} was started with; put it back, or start anew")
    state = newest(out)
    if state and int(state.name) > args.steps:
        raise ValueError(f"--steps {args.steps}: the run in {out} is at step {int(state.name)} already")
    result = out / ("transformer" if args.objective == "flow" else "student")
    if result.exists():
        if not ((result / "model_index.json").is_file() or (result / "config.json").is_file()):
            raise ValueError(f"{result}: exists and is no result of this run; move it away")
        say(f"{result}: from an earlier end of this run; the end of this one replaces it")
    return args, state


def start_record(args) -> dict:
    """What args.json notes of a start."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    here = {"host": platform.node(), "pid": os.getpid(), "processes": ranks()}
    arguments = json.loads(json.dumps(asdict(args), default=str))
    return {"arguments": arguments, "versions": versions, "source": watch.source(), "started": here}


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save(out: Path, step: int, trainees: dict[str, Trainee]) -> None:
    """Write checkpoints/STEP/NAME-RANK-of-RANKS.safetensors aside, rename the folder into place, keep the last two.

    A rename happens or does not: a writer that is killed before it leaves the folder `unfinished`, which nothing reads.
    The bytes are forced to the disk first, or a power cut could keep the new name without them. FloatingPointError: a
    tensor is not finite. OSError: the disk is full, say. In both cases the checkpoint before it stays.
    """
    aside, place = out / "checkpoints" / "unfinished", out / "checkpoints" / f"{step:08d}"

    def publish() -> None:
        shutil.rmtree(place, ignore_errors=True)
        os.replace(aside, place)
        write_json(out / "newest.json", {"step": step})
        for old in whole_checkpoints(out)[:-2]:
            shutil.rmtree(old)

    try:
        by_first(lambda: (shutil.rmtree(aside, ignore_errors=True), aside.mkdir(parents=True)) and None)
        with together():
            for name, trainee in trainees.items():
                if trainee.sharded or rank() == 0:
                    state = trainee.state()
                    for tensor in state:
                        if not state[tensor].isfinite().all():
                            raise FloatingPointError(f"{name}: {tensor} is not finite")
                    mine, all = (rank(), ranks()) if trainee.sharded else (0, 1)
                    path = aside / f"{name}-{mine:04d}-of-{all:04d}.safetensors"
                    write_tensors(path, state, {"network": name})
                    with open(path, "rb+") as file:
                        os.fsync(file.fileno())
        by_first(publish)
    except (FloatingPointError, OSError) as error:
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        kept = ", ".join(f.name for f in whole_checkpoints(out)[-1:]) or "none yet"
        kind = FloatingPointError if isinstance(error, FloatingPointError) else OSError
        raise kind(f"no checkpoint of step {step} ({error}); the last whole one: {kept}") from None


def whole_checkpoints(out: Path) -> list[Path]:
    """A run's whole checkpoints, oldest first."""
    return sorted(f for f in (out / "checkpoints").glob("*") if f.name.isdigit())


def newest(out: Path) -> Path | None:
    """The newest checkpoint; None for a run that ended before its first. ValueError where all of them were removed."""
    found = [None, *whole_checkpoints(out)][-1]
    if found is None and (out / "newest.json").is_file():
        raise ValueError(
            f"{out / 'checkpoints'}: its checkpoints are gone; put one back, or start anew with another --out"
        )
    return found


def restore(args, state: Path | None, trainees: dict[str, Trainee]) -> None:
    """Bring the networks to the checkpoint `state` (None: they stay at their start), then open the folder of a resumed
    run: args.json notes this start, and the metrics are cut back to the checkpoint's step.

    ValueError, before that, unless the checkpoint holds exactly the files and tensors that such a run writes.
    """
    step = int(state.name) if state else 0
    with together():
        if state:
            files = state_files(state, list(trainees))
            for name, trainee in trainees.items():
                trainee.restore(files[name], step * args.fake_updates if name == "fake" else step)

    def open_folder() -> None:
        write_json(args.out / "args.json", read_json(args.out / "args.json") | start_record(args))
        if (metrics := args.out / "metrics.jsonl").is_file():
            metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:step]))

    by_first(open_folder)
    say(f"{args.out}: goes on after step {step} of {args.steps}")


def state_files(folder: Path, names: list[str]) -> dict[str, list[Path]]:
    """A checkpoint's files by network, in the order of their ranks; ValueError unless they are complete, and all."""
    found = {name: sorted(folder.glob(f"{name}-*.safetensors")) for name in names}
    for name, files in found.items():
        expected = [f"{name}-{i:04d}-of-{len(files):04d}.safetensors" for i in range(len(files))]
        if not files or [f.name for f in files] != expected:
            raise ValueError(f"{folder}: not all files of the {name} are there, or too many")
        for path in files:
            with open_weights(path) as file:
                if (file.metadata() or {}).get("network") != name:
                    raise ValueError(f"{path}: does not hold the {name}'s state")
    if stray := set(folder.iterdir()) - set(sum(found.values(), [])):
        raise ValueError(f"{min(stray)}: no file of this run; move it away")
    return found


# ---- signals and errors ----------------------------------------------------------------------------------------------


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within, Ctrl-C and SIGTERM only add their number to the list. The loop looks at it after each step."""
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
