"""The folder of a run: arguments, checkpoints, teachers, the result; and the signals that end a run."""

import json
import os
import platform
import signal
import subprocess
import timeit
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

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

# Options that may differ in a resumed run. Most change no number. Of checkpoint, prompts and teachers the contents are
# compared, not the paths.
FREE = {"resume", "redraw", "out", "steps", "save_every", "panel_every", "device", "compile", "recompute", "cache"}
FREE |= {"plan", "gpus", "checkpoint", "prompts", "teacher"}


# ---- the start -------------------------------------------------------------------------------------------------------


def fill_defaults(options: TrainOptions) -> TrainOptions:
    """Fill in the options that depend on the checkpoint and the machine. ValueError names the flag."""
    index = checkpoint.read_index(options.checkpoint)
    check_sizes(options)
    if options.prompts and options.checkpoint == TOY:
        say(
            "no --checkpoint is given: your prompts train the toy, which draws 128 x 128 pixels and was made for its "
            "own captions; its text encoder is random. For real pictures give --checkpoint DIR"
        )
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


def check_sizes(options: TrainOptions) -> None:
    """ValueError where the processes cannot share the micro-batches equally. A ratio that is not exact is only said."""
    batch, micro_batch = f"--batch {options.batch}", f"--micro-batch {options.micro_batch}"
    for size in options.sizes:
        if size % ranks():
            problem = f"{batch} in {micro_batch} makes parts of {size} samples"
            processes = f"which {ranks()} processes cannot divide equally"
            raise ValueError(f"{problem}, {processes}; take multiples of {ranks()}")
    if len(set(options.sizes)) > 1:
        ratio = "the recipe's ratio holds for them, but not for samples"
        say(f"{micro_batch} does not divide {batch}: micro-batches differ, {ratio}")


def faster_dtype(device: str) -> str:
    """bfloat16 on a GPU. On a CPU the one that multiplies faster: some have no bf16 units and emulate them."""
    if device != "cpu":
        return "bfloat16"

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 768, dtype=dtype)
        return min(timeit.repeat(lambda: a @ b, number=1, repeat=20))  # the least disturbed one

    return "bfloat16" if seconds(torch.bfloat16) < seconds(torch.float32) else "float32"


def find_teachers(options: TrainOptions) -> dict[str, Path]:
    """The specialised teachers by name, each a transformer folder or a LoRA file: those of the checkpoint's teachers/,
    and --teacher NAME=PLACE, which replaces one of the same name. ValueError for a --teacher that is neither."""
    teachers = checkpoint.teachers_in(options.checkpoint)
    for given in options.teacher:
        name, _, place = given.partition("=")
        if name in ("", "base", "student", "fake") or not place:
            raise ValueError(f"--teacher {given}: NAME=FOLDER_OR_LORA is expected; NAME is not base, student or fake")
        teacher = Path(place)
        is_lora = teacher.suffix == ".safetensors" and teacher.is_file()
        if not is_lora and not (teacher / "config.json").is_file():
            problem = "no transformer folder (with config.json) and no .safetensors file there"
            raise ValueError(f"--teacher {given}: {problem}")
        teachers[name] = teacher
    return teachers


def open_run(options: TrainOptions) -> tuple[TrainOptions, Path | None]:
    """Fill in the options and open the run's folder. Returns the options, and the checkpoint to resume from (None: the
    start).

    A folder that is not empty needs --resume, the same arguments, and the same contents of prompts, checkpoint and
    teachers. Otherwise a ValueError is raised before anything is written. A resumed run changes its folder only in
    `restore`.
    """
    return on_rank0(lambda: resume_run(options) if options.resume else start_run(options))


def start_run(options: TrainOptions) -> tuple[TrainOptions, None]:
    out = options.home
    if {path.name for path in visible(out)} - {"args.json", "conditions"}:  # these two: a start that failed
        raise ValueError(f"{out}: not empty; --resume goes on with the run in it, --out names another folder")
    options = fill_defaults(options)
    contents = fingerprints(options)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "args.json", {**start_record(options), "contents": contents})
    return options, None


def resume_run(options: TrainOptions) -> tuple[TrainOptions, Path | None]:
    out = options.home
    if not (out / "args.json").is_file():
        raise ValueError(f"{out}: no run to go on with; start one without --resume, or name its folder with --out")
    before = read_json(out / "args.json")
    if not (isinstance(before.get("arguments"), dict) and isinstance(before.get("contents"), dict)):
        raise ValueError(f"{out / 'args.json'}: does not say how the run was started; it cannot go on")
    dtype = options.dtype or before["arguments"].get("dtype")  # not measured a second time
    options = fill_defaults(replace(options, dtype=dtype))
    contents = fingerprints(options)

    for name, value in start_record(options)["arguments"].items():
        value_before = before["arguments"].get(name)
        if name not in FREE and value != value_before:
            raise ValueError(f"{flag(name)} is {value}, but the run in {out} was started with {value_before}")
    for name in sorted(contents.keys() | before["contents"].keys()):
        if contents.get(name) != before["contents"].get(name):
            raise ValueError(f"{name} is not what the run in {out} was started with; put it back, or start anew")
    checkpoints = whole_checkpoints(out)
    state = checkpoints[-1] if checkpoints else None
    if state and int(state.name) > options.steps:
        raise ValueError(f"--steps {options.steps}: the run in {out} is at step {int(state.name)} already")
    return options, state


def fingerprints(options: TrainOptions) -> dict[str, str]:
    """The contents of prompts, checkpoint and teachers, by their names in messages. All of them are checked to be there."""
    teachers = find_teachers(options)
    check_base(options.checkpoint)
    # The checkpoint takes longest. Its digests are kept where those of the encoders are, too.
    kept = (options.cache or options.home / "conditions") / KEPT
    contents = {}
    if options.prompts:
        contents["a prompt or its picture"] = prompts_fingerprint(options.prompts)
    contents["the checkpoint"] = checkpoint.fingerprint(options.checkpoint, kept=kept)
    for name, place in teachers.items():
        contents[f"teacher {name}"] = checkpoint.fingerprint(place, kept=kept)
    return contents


def start_record(options: TrainOptions) -> dict:
    """What args.json says of a start."""
    arguments = json.loads(json.dumps(asdict(options), default=str))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    started = {"host": platform.node(), "pid": os.getpid(), "processes": ranks()}
    return {"arguments": arguments, "versions": versions, "source": source(), "started": started}


def source() -> str:
    """The commit of this source, with "-dirty" if something differs from it; "unknown" without git."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save(out: Path, step: int, trainees: dict[str, Trainee]) -> None:
    """Write checkpoints/STEP/ (its files: state_name), whole or not at all, and keep the newest two. What a killed run
    left of one is removed first.

    FloatingPointError: a tensor is not finite. OSError: the disk is full, for example. Earlier checkpoints stay.
    """
    place = out / "checkpoints" / f"{step:08d}"

    def open_folder() -> Path:
        for leftover in place.parent.glob(f".*{PART}"):
            remove(leftover)
        part = stack.enter_context(aside(place))
        part.mkdir()
        return part

    def publish() -> None:
        remove(place)
        stack.close()  # renames the folder
        for old in whole_checkpoints(out)[:-2]:
            remove(old)

    try:
        with ExitStack() as stack:  # rank 0 alone uses it
            part = on_rank0(open_folder)
            with raise_on_all_ranks():
                for name, trainee in trainees.items():
                    if trainee.sharded or rank() == 0:
                        file = state_name(name, rank(), ranks() if trainee.sharded else 1)
                        write_state(part / file, name, trainee.state())
            on_rank0(publish)
    except (FloatingPointError, OSError) as error:
        kept = ", ".join(f.name for f in whole_checkpoints(out)[-1:]) or "none yet"
        kind = FloatingPointError if isinstance(error, FloatingPointError) else OSError
        raise kind(f"no checkpoint of step {step} ({error}); the last whole one: {kept}") from None


def write_state(file: Path, network: str, state: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not finite(tensor):
            raise FloatingPointError(f"{network}: {name} is not finite")
    write_tensors(file, state)


def state_name(network: str, rank: int, ranks: int) -> str:
    return f"{network}-{rank:04d}-of-{ranks:04d}.safetensors"


def whole_checkpoints(out: Path) -> list[Path]:
    """A run's whole checkpoints, oldest first."""
    return sorted(f for f in (out / "checkpoints").glob("*") if f.name.isdigit())


def restore(
    options: TrainOptions, state: Path | None, trainees: dict[str, Trainee], updates_per_step: dict[str, int]
) -> None:
    """Bring the networks to the checkpoint `state` (None: they stay at their start). Then change the folder of a resumed
    run: args.json notes this start, the metrics are cut back to the checkpoint's step, and the result of an earlier end
    is renamed.

    ValueError, before any of this, unless the checkpoint holds exactly the files and tensors that such a run writes.
    """
    step = int(state.name) if state else 0
    with raise_on_all_ranks():
        if state:
            files = state_files(state, list(trainees))
            for name, trainee in trainees.items():
                trainee.restore(files[name], step * updates_per_step[name])

    def open_folder() -> None:
        arguments, metrics = options.out / "args.json", options.out / "metrics.jsonl"
        write_json(arguments, {**read_json(arguments), **start_record(options)})
        if metrics.is_file():
            lines = metrics.read_bytes().splitlines(keepends=True)
            metrics.write_bytes(b"".join(lines[:step]))
        result = result_folder(options)
        if result.exists():
            numbered = (result.with_name(f"{result.name}-{n}") for n in count(1))
            kept = next(path for path in numbered if not path.exists())
            os.replace(result, kept)
            say(f"{result}: from an earlier end of this run, is now {kept.name}")

    on_rank0(open_folder)
    say(f"{options.out}: goes on after step {step} of {options.steps}")


def state_files(folder: Path, names: list[str]) -> dict[str, list[Path]]:
    """A checkpoint's files by network, in the order of their ranks. ValueError: one is missing, or there are others."""
    files = {name: sorted(folder.glob(f"{name}-*")) for name in names}
    expected = set()
    for name, of_network in files.items():
        expected |= {folder / state_name(name, rank, len(of_network)) for rank in range(len(of_network))}
    if not all(files.values()) or set(visible(folder)) != expected:
        raise ValueError(f"{folder}: should hold the files that a run saves of {' and '.join(names)}, and no others")
    return files


def result_folder(options: TrainOptions) -> Path:
    return options.out / ("transformer" if options.objective == "flow" else "student")


def export_run(options: TrainOptions, trainee: Trainee, sigmas: list[float]) -> Path:
    """Write the result of a finished run: out/student, a checkpoint of its own, or out/transformer for the flow
    objective. With LoRAs also out/lora.safetensors, for the base checkpoint (of a teacher: for --teacher)."""
    flows, renoises = options.objective == "flow", options.sampler == "renoise"
    folder = result_folder(options)
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
    """Within, Ctrl-C and SIGTERM only add their number to the list that is yielded. The loop reads it after each step."""
    noted: list[int] = []
    before = {s: signal.signal(s, lambda number, frame: noted.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextmanager
def located(where: str) -> Iterator[None]:
    """Within, a FloatingPointError says where it happened."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{where}: {error}") from None
