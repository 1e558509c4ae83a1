"""A run's folder: its arguments, its checkpoints, its specialised teachers, and the signals that end it."""

import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch

from checkpoint import layout as checkpoint
from checkpoint.export import check_base, export
from checkpoint.files import KEPT, PART, aside, read_json, remove, visible, write_json
from checkpoint.lora import write_lora
from checkpoint.weights import finite, write_tensors
from data.prompts import prompts_fingerprint
from program.options import TOY, flag
from program.ranks import on_rank0, raise_on_all_ranks, rank, ranks, say
from training.options import TrainOptions
from training.roles import role_lora
from training.trainee import Trainee

# What may differ in a resumed run: it changes no number, or only how far the run goes. Of checkpoint, prompts and teachers
# the contents are compared, not the spelling of their paths.
FREE = {"resume", "redraw", "out", "steps", "save_every", "panel_every", "device", "compile", "recompute", "cache"}
FREE |= {"plan", "gpus", "checkpoint", "prompts", "teacher"}


# ---- the start -------------------------------------------------------------------------------------------------------


def fill_defaults(options: TrainOptions) -> TrainOptions:
    """Fill in what depends on the checkpoint and the machine. ValueError names the flag."""
    index = checkpoint.read_index(options.checkpoint)
    if uneven := [size for size in options.sizes if size % ranks()]:
        parts = f"--batch {options.batch} in --micro-batch {options.micro_batch} makes parts of {uneven[0]}"
        raise ValueError(
            f"{parts} samples, which {ranks()} processes cannot divide equally; take multiples of {ranks()}"
        )
    if len(set(options.sizes)) > 1:
        ratio = "the recipe's ratio holds for them, but not for samples"
        say(
            f"--micro-batch {options.micro_batch} does not divide --batch {options.batch}: micro-batches differ, {ratio}"
        )
    if options.prompts and options.checkpoint == TOY:
        say("no --checkpoint is given: your prompts train the toy, which draws 128 x 128 pixels and was made for its own "
            "captions; its text encoder is random. For real pictures give --checkpoint DIR")  # fmt: skip
    guidance, source = options.guidance, "--guidance"
    if guidance is None:
        guidance, source = float(index["guidance"]), "the checkpoint's model_index.json"
    if options.objective == "dmd":
        off = ", which is off" if guidance == 1 else ""
        say(f"guidance of the teachers: w = {guidance:g}{off}, from {source}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint.open_device(device)
    return replace(
        options,
        out=options.home,
        guidance=guidance,
        resolution=options.resolution or index["resolution"],
        device=device,
        dtype=options.dtype or faster_dtype(device),
    )


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


def find_teachers(options: TrainOptions) -> dict[str, Path]:
    """Specialised teachers by name, each a transformer folder or a LoRA file: the checkpoint's teachers/NAME, and
    --teacher NAME=PLACE, which goes first. ValueError for a --teacher that is neither."""
    found = checkpoint.teachers_in(options.checkpoint)
    for given in options.teacher:
        name, _, place = given.partition("=")
        if name in ("", "base", "student", "fake") or not place:
            raise ValueError(f"--teacher {given}: NAME=FOLDER_OR_LORA is expected; NAME is not base, student or fake")
        found[name] = Path(place)
        is_lora = found[name].suffix == ".safetensors" and found[name].is_file()
        if not is_lora and not (found[name] / "config.json").is_file():
            raise ValueError(
                f"--teacher {given}: no transformer folder (with config.json) and no .safetensors file there"
            )
    return found


def open_run(options: TrainOptions) -> tuple[TrainOptions, Path | None]:
    """Fill in the options and open the run's folder: the arguments, and the checkpoint to go on from (None: the start).

    A folder that is not empty needs --resume, the same arguments, and the same contents of prompts, checkpoint and
    teachers. Else it is a ValueError, before anything is written. A resumed run changes its folder only in `restore`.
    """
    return on_rank0(lambda: _open_run(options))


def _open_run(options: TrainOptions) -> tuple[TrainOptions, Path | None]:
    out, before = options.home, None
    if options.resume:
        if not (out / "args.json").is_file():
            raise ValueError(f"{out}: no run to go on with; start one without --resume, or name its folder with --out")
        before = read_json(out / "args.json")
        if not (isinstance(before.get("arguments"), dict) and isinstance(before.get("contents"), dict)):
            raise ValueError(f"{out / 'args.json'}: does not say how the run was started; it cannot go on")
        options = replace(
            options, dtype=options.dtype or before["arguments"].get("dtype")
        )  # not measured a second time
    elif {path.name for path in visible(out)} - {"args.json", "conditions"}:  # these: a failed start
        raise ValueError(f"{out}: not empty; --resume goes on with the run in it, --out names another folder")

    options = fill_defaults(options)
    teachers = find_teachers(options)
    check_base(options.checkpoint)
    contents = {"a prompt or its picture": prompts_fingerprint(options.prompts)} if options.prompts else {}
    # The checkpoint takes longest, and the first note is written: the digests, where the encoders' are kept as well.
    kept = (options.cache or out / "conditions") / KEPT
    contents["the checkpoint"] = checkpoint.fingerprint(options.checkpoint, kept=kept)
    for name, place in teachers.items():
        contents[f"teacher {name}"] = checkpoint.fingerprint(place, kept=kept)
    started = start_record(options)

    if before is None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "args.json", started | {"contents": contents})
        return options, None
    for name, value in started["arguments"].items():
        then = before["arguments"].get(name)
        if name not in FREE and value != then:
            raise ValueError(f"{flag(name)} is {value}, but the run in {out} was started with {then}")
    for name in sorted(contents.keys() | before["contents"].keys()):
        if contents.get(name) != before["contents"].get(name):
            raise ValueError(f"{name} is not what the run in {out} was started with; put it back, or start anew")
    state = [None, *whole_checkpoints(out)][-1]
    if state and int(state.name) > options.steps:
        raise ValueError(f"--steps {options.steps}: the run in {out} is at step {int(state.name)} already")
    return options, state


def start_record(options: TrainOptions) -> dict:
    """What args.json notes of a start."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    here = {"host": platform.node(), "pid": os.getpid(), "processes": ranks()}
    arguments = json.loads(json.dumps(asdict(options), default=str))
    return {"arguments": arguments, "versions": versions, "source": source(), "started": here}


def source() -> str:
    """The commit of this source, with "-dirty" where something differs from it; "unknown" without git."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save(out: Path, step: int, trainees: dict[str, Trainee]) -> None:
    """Write checkpoints/STEP/ (see state_name), whole or not at all, and keep the last two. A killed writer's leftovers
    are removed by the next.

    FloatingPointError: a tensor is not finite. OSError: the disk is full, say. In both cases the checkpoint before it stays.
    """
    place = out / "checkpoints" / f"{step:08d}"

    def open_folder() -> Path:
        for left in place.parent.glob(f".*{PART}"):
            remove(left)
        part = stack.enter_context(aside(place))
        part.mkdir()
        return part

    def publish() -> None:
        remove(place)
        stack.close()  # here the folder gets its name
        for old in whole_checkpoints(out)[:-2]:
            remove(old)

    try:
        with ExitStack() as stack:  # rank 0 alone has something in it
            part = on_rank0(open_folder)
            with raise_on_all_ranks():
                for name, trainee in trainees.items():
                    if not trainee.sharded and rank() > 0:
                        continue
                    state = trainee.state()
                    for tensor in state:
                        if not finite(state[tensor]):
                            raise FloatingPointError(f"{name}: {tensor} is not finite")
                    write_tensors(part / state_name(name, rank(), ranks() if trainee.sharded else 1), state)
            on_rank0(publish)
    except (FloatingPointError, OSError) as error:
        kept = ", ".join(f.name for f in whole_checkpoints(out)[-1:]) or "none yet"
        kind = FloatingPointError if isinstance(error, FloatingPointError) else OSError
        raise kind(f"no checkpoint of step {step} ({error}); the last whole one: {kept}") from None


def state_name(network: str, rank: int, ranks: int) -> str:
    return f"{network}-{rank:04d}-of-{ranks:04d}.safetensors"


def whole_checkpoints(out: Path) -> list[Path]:
    """A run's whole checkpoints, oldest first."""
    return sorted(f for f in (out / "checkpoints").glob("*") if f.name.isdigit())


def restore(
    options: TrainOptions, state: Path | None, trainees: dict[str, Trainee], updates_per_step: dict[str, int]
) -> None:
    """Bring the networks to the checkpoint `state` (None: they stay at their start), then open the folder of a resumed
    run: args.json notes this start, the metrics are cut back to the checkpoint's step, and the result of an earlier end
    gets another name.

    ValueError, before that, unless the checkpoint holds exactly the files and tensors that such a run writes.
    """
    step = int(state.name) if state else 0
    with raise_on_all_ranks():
        if state:
            files = state_files(state, list(trainees))
            for name, trainee in trainees.items():
                trainee.restore(files[name], step * updates_per_step[name])

    def open_folder() -> None:
        write_json(options.out / "args.json", read_json(options.out / "args.json") | start_record(options))
        if (metrics := options.out / "metrics.jsonl").is_file():
            metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:step]))
        result = options.out / ("transformer" if options.objective == "flow" else "student")
        if result.exists():
            kept = next(path for n in count(1) if not (path := result.with_name(f"{result.name}-{n}")).exists())
            os.replace(result, kept)
            say(f"{result}: from an earlier end of this run, is now {kept.name}")

    on_rank0(open_folder)
    say(f"{options.out}: goes on after step {step} of {options.steps}")


def state_files(folder: Path, names: list[str]) -> dict[str, list[Path]]:
    """A checkpoint's files by network, in the order of their ranks; ValueError unless they are complete, and all."""
    found = {name: sorted(folder.glob(f"{name}-*")) for name in names}
    expected = [folder / state_name(name, i, len(files)) for name, files in found.items() for i in range(len(files))]
    if not all(found.values()) or set(visible(folder)) != set(expected):
        raise ValueError(f"{folder}: should hold the files that a run saves of {' and '.join(names)}, and no others")
    return found


def export_run(options: TrainOptions, trainee: Trainee, sigmas: list[float]) -> Path:
    """What a finished run leaves: out/student, a checkpoint of its own, or out/transformer for the flow objective; with
    LoRAs also out/lora.safetensors, for the base checkpoint (of a teacher: what --teacher reads)."""
    flows, renoises = options.objective == "flow", options.sampler == "renoise"
    folder = options.out / ("transformer" if flows else "student")
    with trainee.averaged() as network, raise_on_all_ranks():
        alone = trainee.export()
        if rank() == 0:
            if options.lora_rank:
                lora = role_lora(network.model, network.role)
                write_lora(options.out / "lora.safetensors", lora, None if flows else sigmas[:-1], stochastic=renoises)
            if flows:
                alone.save_pretrained(folder)
            else:
                export(options.checkpoint, alone, sigmas[:-1], folder, stochastic=renoises)
    return folder


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
