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

FROZEN = ("vae", "text_encoder", "processor")  # a student takes these from its base


def check_base(base: Path) -> None:
    """ValueError or FileNotFoundError if the checkpoint lacks a part that `export` needs."""
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
    """Write a few-step student as a checkpoint in the published layout.

    model        its MMDiT; encoder, VAE and processor come from the base checkpoint
    sigmas       the times at which it draws, without the final 0
    link         link to the base's files instead of copying them. This saves 18 GB with the published ones, but the
                 base must then stay where it is
    stochastic   it draws by flow.renoise, else by flow.euler
    bend         how the scheduler bends the sigmas; by default not at all

    ValueError, before anything is written: the folder is not empty, or the model is not finite.
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
        scheduler["use_dynamic_shifting"] = bend.use_dynamic_shifting
        scheduler["shift"] = bend.shift
        scheduler["shift_terminal"] = bend.shift_terminal
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
    """Write the LoRA of `rank` that is nearest to the change from the base to a full student. Its header has the
    times at which the student draws. Layers that `exact` names are written as whole changes. Returns a summary to
    print.

    ValueError: the networks differ in size, a name fits no layer, or the times depend on the picture's size.
    """
    if scheduler.use_dynamic_shifting:
        problem = f"a LoRA's header has no place for a dynamic shift of {sigmas}"
        raise ValueError(f"{out}: {problem}; --export a folder instead")
    for name in exact:
        if not any(is_named(layer, [name]) for layer in layers_of(student)):
            raise ValueError(f"--exact {name}: no layer's name contains this; try proj_out or attn.norm_q")
    weight = next(student.parameters())
    base = type(student).from_pretrained(Path(base_directory) / "transformer", weight.dtype, weight.device)
    if base.config != student.config:
        raise ValueError(f"--base {base_directory}: its transformer has another size than the student's")
    lora, kept = factorise(base, student, rank, exact)
    for name, (a, b, _) in lora.items():
        check_finite({f"{name}.A": a, f"{name}.B": b}, str(out))
    times = scheduler.sigmas(sigmas, tokens=1)[:-1]  # this applies a static shift
    write_lora(out, lora, times, stochastic=scheduler.stochastic_sampling, exact=exact)
    size = Path(out).stat().st_size / 1e6
    whole = f" and {', '.join(exact)} whole" if exact else ""
    summary = f"{out}: rank {rank}{whole}, {kept:.1%} of what the student changed, {size:.1f} MB"
    return f"{summary}\n{how_it_draws(times, scheduler.stochastic_sampling)}"


def copy_folder(source: Path, target: Path) -> None:
    """Copy the visible contents of a folder, but not its permissions: a base is often read-only, and a read-only copy
    could neither be finished nor removed."""
    target.mkdir()
    for path in visible(source):
        if path.is_dir():
            copy_folder(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
