"""A student as a checkpoint of its own, in the published layout, or as a LoRA file."""

import argparse
import os
import shutil
from pathlib import Path

import torch

from model import MMDiT
from support.checkpoint import check_sigmas, read_index
from support.files import read_json, write_json
from support.lora import factorise, role_lora
from support.lora_files import export_lora, write_lora
from support.ranks import rank, together
from support.trainee import Trainee


def export(
    base_directory: str | Path,
    model: MMDiT,
    sigmas: list[float],
    out_directory: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    link: bool = False,
) -> None:
    """Write a few-step student as the family publishes them: `model`, its `sigmas` (without the final 0), an identity
    scheduler; encoder, VAE and processor are copied from the base checkpoint, or linked to it: 18 GB less for the
    published ones, and the folder is whole only as long as the base stays where it is.

    Written beside `out_directory` and renamed, so that whatever stands there is whole. An older checkpoint is replaced;
    anything else is left alone, with a ValueError.
    """
    base, out = Path(base_directory).resolve(), Path(out_directory).resolve()
    index = read_index(base)
    sigmas = check_sigmas(sigmas, "sigmas")
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "model_index.json").is_file())):
        raise ValueError(f"{out}: exists and is no checkpoint; it is not overwritten")
    if base.is_relative_to(out):
        raise ValueError(f"{out}: holds the base checkpoint, which would be lost; name another folder")
    part, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")  # ours: left by a killed run
    for leftover in part, old:
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    for name in "vae", "text_encoder", "processor":
        if link:
            (part / name).symlink_to(base / name)
        else:
            shutil.copytree(base / name, part / name, copy_function=shutil.copyfile)  # with a new file's permissions
    model.save_pretrained(part / "transformer", dtype)
    scheduler = read_json(base / "scheduler" / "scheduler_config.json")
    scheduler |= {"use_dynamic_shifting": False, "shift": 1.0, "shift_terminal": None}
    write_json(part / "scheduler" / "scheduler_config.json", scheduler)
    write_json(part / "model_index.json", index | {"sample_sigmas": sigmas, "guidance": 1.0})
    if out.exists():
        os.replace(out, old)
    os.replace(part, out)
    shutil.rmtree(old, ignore_errors=True)


def export_student(pipeline, args: argparse.Namespace) -> None:
    """--export: the checkpoint's student, with what --lora makes of it, as a folder; or what it changed in --base."""
    if pipeline.sample_sigmas is None:
        raise ValueError(
            f"{args.checkpoint}: no few-step student (it has no sample_sigmas); if it is one, give --sigmas"
        )
    if Path(args.export).suffix != ".safetensors":
        export(args.checkpoint, pipeline.mmdit, pipeline.sample_sigmas, args.export, link=args.link)
        print(f"{args.export}: {len(pipeline.sample_sigmas)} steps at {pipeline.sample_sigmas}")
        return
    if not args.base:
        raise ValueError(f"--export {args.export}: a LoRA changes a base; name its folder with --base")
    base = MMDiT.from_pretrained(Path(args.base) / "transformer", pipeline.dtype, pipeline.device)
    if base.config != pipeline.mmdit.config:
        raise ValueError(f"--base {args.base}: its transformer has another size than that of {args.checkpoint}")
    lora, kept = factorise(base, pipeline.mmdit, args.rank)
    for file in export_lora(args.export, lora, pipeline.sample_sigmas):
        print(f"{file}: rank {args.rank}, {kept:.1%} of what the student changed, {file.stat().st_size / 1e6:.1f} MB")


def export_run(args, trainee: Trainee, sigmas: list[float]) -> Path:
    """What a finished run leaves: out/student, a checkpoint of its own, or out/transformer for the flow objective; with
    LoRAs also out/lora.safetensors, for the base checkpoint (of a teacher: what --teacher reads)."""
    flows = args.objective == "flow"
    folder = args.out / ("transformer" if flows else "student")
    with trainee.averaged() as network, together():
        alone = trainee.export()
        if rank() == 0:
            if args.lora_rank:
                lora, file = role_lora(network.model, network.role), args.out / "lora.safetensors"
                write_lora(file, lora) if flows else export_lora(file, lora, sigmas[:-1])
            if flows:
                alone.save_pretrained(folder)
            else:
                export(args.checkpoint, alone, sigmas[:-1], folder)
    return folder
