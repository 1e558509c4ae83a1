"""A student as a checkpoint of its own, in the published layout, or as a LoRA file."""

import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from checkpoint.files import aside, may_write, read_json, visible, write_json
from checkpoint.layout import UNBENT, Scheduler, check_sigmas, how_it_draws, read_index
from checkpoint.lora import factorise, is_named, layers_of, write_lora
from checkpoint.weights import check_finite

FROZEN = ("vae", "text_encoder", "processor")  # what a student shares with its base


def check_base(base: Path) -> None:
    """ValueError or FileNotFoundError unless the folder has all parts of a checkpoint, which `export` will need."""
    read_index(base)
    read_json(base / "scheduler" / "scheduler_config.json")
    for name in (*FROZEN, "transformer"):
        if not (base / name).is_dir():
            raise FileNotFoundError(f"{base / name}: no such folder; a checkpoint in the published layout has it")


def export(
    base_directory: str | Path,
    model: nn.Module,
    sigmas: list[float],
    out_directory: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    link: bool = False,
    stochastic: bool = True,
    bend: Scheduler = UNBENT,
) -> None:
    """Write a few-step student as the family publishes them: `model`, its `sigmas` (without the final 0), and a scheduler
    that bends these as `bend` does; by default not at all. `stochastic`: it draws by flow.renoise, else by flow.euler; a
    short README.md says so, too. Encoder, VAE and processor are copied from the base checkpoint, or linked to it: 18 GB less for the published ones, and
    the folder is whole only as long as the base stays where it is.

    ValueError, before anything is written: the folder has something in it, or the model is not finite.
    """
    base, out = Path(base_directory).resolve(), Path(out_directory).resolve()
    sigmas = check_sigmas(sigmas, "sigmas")
    check_finite(model.state_dict(), f"{out}: the student")
    check_base(base)
    may_write(out, folder=True)
    with aside(out) as part:
        part.mkdir()
        for name in FROZEN:
            if link:
                (part / name).symlink_to(base / name)
            else:
                copy_folder(base / name, part / name)
        model.save_pretrained(part / "transformer", dtype)
        scheduler = read_json(base / "scheduler" / "scheduler_config.json")
        scheduler |= {key: getattr(bend, key) for key in ("use_dynamic_shifting", "shift", "shift_terminal")}
        scheduler["stochastic_sampling"] = stochastic
        write_json(part / "scheduler" / "scheduler_config.json", scheduler)
        write_json(part / "model_index.json", read_index(base) | {"sample_sigmas": sigmas, "guidance": 1.0})
        (part / "README.md").write_text(
            f"A few-step student of {base.name}. {how_it_draws(sigmas, stochastic, bend)}\n"
        )


def export_lora(
    base_directory: str | Path,
    student: nn.Module,
    out: str | Path,
    sigmas: list[float],
    scheduler: Scheduler,
    rank: int,
    exact: Collection[str] = (),
) -> str:
    """Write what a full student changed in its base as the nearest LoRA of `rank`, with the times that it draws at, and
    layers with a name of `exact` in theirs as whole changes. Returns what to tell of it.

    ValueError: the networks have other sizes, a name is in no layer's, or the times depend on the picture's size.
    """
    if scheduler.use_dynamic_shifting:
        raise ValueError(
            f"{out}: a LoRA's header has no place for a dynamic shift of {sigmas}; --export a folder instead"
        )
    for name in exact:
        if not any(is_named(layer, [name]) for layer in layers_of(student)):
            raise ValueError(
                f"--exact {name}: no layer has this in its name; proj_out or attn.norm_q would be such names"
            )
    weight = next(student.parameters())
    base = type(student).from_pretrained(Path(base_directory) / "transformer", weight.dtype, weight.device)
    if base.config != student.config:
        raise ValueError(f"--base {base_directory}: its transformer has another size than the student's")
    lora, kept = factorise(base, student, rank, exact)
    check_finite({f"{name}.{part}": t for name, pair in lora.items() for part, t in zip("AB", pair)}, str(out))
    times = scheduler.sigmas(sigmas, tokens=1)[:-1]  # a static shift is done here
    write_lora(out, lora, times, stochastic=scheduler.stochastic_sampling, exact=exact)
    size = Path(out).stat().st_size / 1e6
    whole = f" and {', '.join(exact)} whole" if exact else ""
    told = f"{out}: rank {rank}{whole}, {kept:.1%} of what the student changed, {size:.1f} MB"
    return f"{told}\n{how_it_draws(times, scheduler.stochastic_sampling)}"


def copy_folder(source: Path, target: Path) -> None:
    """Copy what is visible in a folder. New files and folders get new ones' permissions: a base is often read-only, and
    what is read-only can neither be finished nor removed."""
    target.mkdir()
    for path in visible(source):
        if path.is_dir():
            copy_folder(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
