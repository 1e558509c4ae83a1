"""A checkpoint's small files: model_index.json, the scheduler's config, the sigmas. Which of its files are read, and
their fingerprint. Which device the networks run on, and whether their outputs are finite."""

import json
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import flow
from checkpoint.files import build_config, digest, file_digests, read_json, visible
from checkpoint.weights import finite
from program.edges import notice, short
from program.ranges import Ranged, only, within

# Pictures' sides are multiples of this: a slot of the language model is 2 x 2 latent tokens of 16 x 16 pixels.
MULTIPLE = 32
PARTS = ("scheduler", "transformer", "vae", "text_encoder", "processor")  # a checkpoint's folders that are always read


@dataclass
class Scheduler(Ranged):
    """scheduler/scheduler_config.json: how a list of sigmas is bent, and which sampler uses it.

    The published values bend the sigmas towards noise. A few-step student's do not bend them.
    """

    use_dynamic_shifting: bool = True  # more target tokens move the steps towards noise
    shift: float = within(1.0, "(0, 100]")  # used if dynamic shifting is off
    base_shift: float = within(0.5, "[-10, 10]")
    max_shift: float = within(0.9, "[-10, 10]")
    base_image_seq_len: int = within(256, "[1, 1048576]")
    max_image_seq_len: int = within(8192, "[1, 1048576]")
    shift_terminal: float | None = within(None, "[0, 1)")  # the last sigma before 0; published: 0.02
    stochastic_sampling: bool = False  # drawn by flow.renoise, else by flow.euler
    # The other keys of diffusers' class, which no checkpoint of this family uses.
    num_train_timesteps: int = only(1000)
    time_shift_type: str = only("exponential")
    invert_sigmas: bool = only(False)
    use_karras_sigmas: bool = only(False)
    use_exponential_sigmas: bool = only(False)
    use_beta_sigmas: bool = only(False)

    def __post_init__(self):
        super().__post_init__()
        if self.base_image_seq_len >= self.max_image_seq_len:
            raise ValueError(f"base_image_seq_len is {self.base_image_seq_len}; it must be below max_image_seq_len")

    def sigmas(self, steps: int | list[float], tokens: int) -> list[float]:
        """The bent sigmas, with the final 0, for a picture of `tokens` tokens, from a number of steps or from sigmas.

        ValueError: the file's values give no valid schedule for this size.
        """
        try:
            sigmas = flow.teacher_sigmas(
                steps,
                tokens,
                use_dynamic_shifting=self.use_dynamic_shifting,
                shift=self.shift,
                base_shift=self.base_shift,
                max_shift=self.max_shift,
                base_image_seq_len=self.base_image_seq_len,
                max_image_seq_len=self.max_image_seq_len,
                shift_terminal=self.shift_terminal,
            )
        except (OverflowError, ZeroDivisionError):
            sigmas = []
        check_sigmas(sigmas[:-1], f"scheduler_config.json at {tokens} tokens")
        return sigmas

    @property
    def bends(self) -> bool:
        """Whether `sigmas` changes the sigmas that it is given."""
        return self.use_dynamic_shifting or self.shift != 1.0 or self.shift_terminal is not None


UNBENT = Scheduler(use_dynamic_shifting=False, shift=1.0, shift_terminal=None)


def choose_schedule(
    directory: Path,
    scheduler: Scheduler,
    own: list[float] | None,
    students: dict[str | Path, tuple[list[float], bool]],
    sigmas: list[float] | None,
    shift: str | float,
) -> tuple[Scheduler, list[float] | None]:
    """The times at which a checkpoint draws with LoRAs: (the scheduler that bends them, the times before it does).

    own                 the checkpoint's sample_sigmas, which its scheduler may bend
    students            LoRA files of few-step students: their times, which are not bent, and whether they re-noise
    sigmas, shift       the user's times (without the final 0), and how to bend them: "dynamic", like the checkpoint's
                        scheduler but without its terminal stretch; a number, statically; or "none"
    """
    schedules = list(students.values())
    if sigmas is None and any(schedule != schedules[0] for schedule in schedules):
        times = [times for times, _ in schedules]
        raise ValueError(f"the LoRA files have schedules of their own, {times}; choose one by sigmas")
    if students:
        student_times, renoises = schedules[0]
        scheduler = replace(scheduler, stochastic_sampling=renoises)
    if sigmas is not None:
        check_sigmas(sigmas, "sigmas")
        factor = 1.0 if isinstance(shift, str) else shift
        scheduler = replace(scheduler, use_dynamic_shifting=shift == "dynamic", shift=factor, shift_terminal=None)
        return scheduler, sigmas
    if students:
        files, count = ", ".join(map(str, students)), len(student_times)
        notice(f"schedule {student_times}", f"{files}: draws in {count} steps at {student_times}")
        return replace(scheduler, use_dynamic_shifting=False, shift=1.0, shift_terminal=None), student_times
    if own is not None and scheduler.shift_terminal:
        notice(
            f"terminal {directory}",
            f"{directory}: its scheduler's shift_terminal moves the last of the sample_sigmas {own} to "
            f"{scheduler.shift_terminal}. If its student was trained without it, give --sigmas and --shift",
        )
    return scheduler, own


def check_sigmas(sigmas: list[float], name: str) -> list[float]:
    """The sigmas as floats. ValueError, beginning with `name`, unless they fall within (0, 1]."""
    are_numbers = isinstance(sigmas, (list, tuple)) and sigmas and all(type(s) in (int, float) for s in sigmas)
    if not are_numbers or sigmas[0] > 1 or not all(a > b for a, b in pairwise([*sigmas, 0.0])):
        raise ValueError(
            f"{name}: {short(sigmas)} is no schedule: numbers that fall within (0, 1], without the final 0"
        )
    return [float(s) for s in sigmas]


@dataclass
class Drawing(Ranged):
    """Two optional keys of model_index.json."""

    resolution: int = within(1024, f"[{MULTIPLE}, 4096]")  # side of a picture's area, in pixels
    guidance: float = within(1.0, "[1, 1e6]")  # the teacher's; 1 is off


def how_it_draws(sigmas: list[float], stochastic: bool, bend: Scheduler = UNBENT) -> str:
    """How a student must be drawn, in words: for a folder's README.md, a LoRA's header and the terminal."""
    count = "1 step" if len(sigmas) == 1 else f"{len(sigmas)} steps"
    times = f"{sigmas}, which its scheduler shifts" if bend.bends else f"{sigmas}"
    steps = f"Draws in {count} at the times {times}, without guidance,"
    if not stochastic:
        return f"{steps} by Euler's method."
    return (
        f"{steps} with new noise after each step (stochastic_sampling). diffusers does this if its scheduler's config"
        " says so. ComfyUI, vLLM-Omni and SGLang only have Euler's method, which draws this student worse."
    )


def read_index(directory: str | Path) -> dict:
    """model_index.json, checked, with the defaults of the three optional keys."""
    path = Path(directory) / "model_index.json"
    index = {"sample_sigmas": None} | asdict(Drawing()) | read_json(path)
    if index.get("_class_name") != "QwenImage21Pipeline":
        raise ValueError(f"{path}: _class_name is {index.get('_class_name')!r}, QwenImage21Pipeline is expected")
    known = {*PARTS, "sample_sigmas", "resolution", "guidance"}
    unknown = [key for key in index if key not in known and not key.startswith("_")]
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}")
    if index["sample_sigmas"] is not None:
        index["sample_sigmas"] = check_sigmas(index["sample_sigmas"], f"{path}: sample_sigmas")
    build_config(Drawing, index, f"{path}: ")
    return index


def check_parts(directory: Path, mmdit, vae, encoder) -> None:
    """Check that the three networks' configs fit together. ValueError names the numbers that must be equal."""
    for numbers, first, second in (
        ("transformer in_channels and out_channels", mmdit.in_channels, mmdit.out_channels),
        ("transformer in_channels and vae z_dim", mmdit.in_channels, vae.z_dim),
        ("transformer context_in_dim and text_encoder hidden_size", mmdit.context_in_dim, encoder.text.hidden_size),
        ("pixels to a latent pixel: 16 and 2^levels of vae dim_mult", 16, vae.factor),
    ):
        if first != second:
            raise ValueError(f"{directory}: {numbers} are {first} and {second}; they must be equal")


def open_device(name: str | torch.device) -> torch.device:
    """The device, if torch can compute on it; else ValueError."""
    try:
        tried = torch.zeros(1, device=name)
        tried.item()  # "meta" has no values
        return tried.device
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:  # an unknown name; no such hardware
        raise ValueError(f"--device {name}: torch cannot use it here ({str(error).splitlines()[0]})") from None


def files_read(place: Path) -> list[Path]:
    """The files that a run reads at a place. Of a checkpoint: model_index.json and the files of its PARTS, without its
    teachers/, which are places of their own. Of another folder: configs and weights. Of a file: the file itself."""
    if place.is_file():
        return [place]
    if (place / "model_index.json").is_file():
        files = [place / "model_index.json"]
        for part in PARTS:
            files += files_read(place / part)
        return files
    return [path for path in visible(place) if path.suffix in (".json", ".safetensors")]


def teachers_in(checkpoint: Path) -> dict[str, Path]:
    """The specialised teachers of a checkpoint by name, each a transformer folder or a LoRA file."""
    places = visible(checkpoint / "teachers")
    return {place.stem: place for place in places if place.is_dir() or place.suffix == ".safetensors"}


def fingerprint(*places: Path, kept: Path | None = None) -> str:
    """16 letters that depend on every byte that is read at these places and on the names of the files inside, but not
    on the places' own names or on time stamps. kept: see `file_digests`."""
    names, files = [], []
    for number, place in enumerate(places):
        for file in files_read(place):
            names.append(f"{number} {file.relative_to(place).as_posix()}")
            files.append(file)
    return digest(json.dumps(list(zip(names, file_digests(files, kept)))))[:16]


def check_stage(stage: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """A network's output, unchanged. If it is not finite, a ValueError suggests another dtype."""
    if not finite(values):
        wider = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}.get(dtype)
        advice = f"--dtype {wider} may help" if wider else "the checkpoint or a LoRA is damaged, or its scale too large"
        raise ValueError(f"{stage} are not finite in {str(dtype).removeprefix('torch.')}; {advice}")
    return values
