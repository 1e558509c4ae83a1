"""A student as a checkpoint of its own, in the published layout, or as a LoRA file."""

import shutil
from pathlib import Path

import torch
from torch import nn

from checkpoint.files import aside, may_write, read_json, visible, write_json
from checkpoint.layout import check_sigmas, how_it_draws, read_index
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
) -> None:
    """Write a few-step student as the family publishes them: `model`, its `sigmas` (without the final 0), and a scheduler
    that does not shift them. `stochastic`: it draws by flow.renoise, else by flow.euler; a short README.md says so, too.
    Encoder, VAE and processor are copied from the base checkpoint, or linked to it: 18 GB less for the published ones, and
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
        scheduler |= {"use_dynamic_shifting": False, "shift": 1.0, "shift_terminal": None}
        scheduler["stochastic_sampling"] = stochastic
        write_json(part / "scheduler" / "scheduler_config.json", scheduler)
        write_json(part / "model_index.json", read_index(base) | {"sample_sigmas": sigmas, "guidance": 1.0})
        (part / "README.md").write_text(f"A few-step student of {base.name}. {how_it_draws(sigmas, stochastic)}\n")


def copy_folder(source: Path, target: Path) -> None:
    """Copy what is visible in a folder. New files and folders get new ones' permissions: a base is often read-only, and
    what is read-only can neither be finished nor removed."""
    target.mkdir()
    for path in visible(source):
        if path.is_dir():
            copy_folder(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
