"""A student as a checkpoint of its own, in the published layout, or as a LoRA file."""

import shutil
from pathlib import Path

import torch

from model import MMDiT
from support.checkpoint import check_sigmas, read_index
from support.files import aside, check_finite, may_write, read_json, write_json
from support.lora import factorise, role_lora, write_lora
from support.ranks import rank, together
from support.sample_flags import Args
from support.trainee import Trainee

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
    model: MMDiT,
    sigmas: list[float],
    out_directory: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    link: bool = False,
    stochastic: bool = True,
) -> None:
    """Write a few-step student as the family publishes them: `model`, its `sigmas` (without the final 0), and a scheduler
    that does not shift them. `stochastic`: it draws by flow.renoise, else by flow.euler. Encoder, VAE and processor are
    copied from the base checkpoint, or linked to it: 18 GB less for the published ones, and the folder is whole only as
    long as the base stays where it is.

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
                shutil.copytree(base / name, part / name, copy_function=shutil.copyfile)  # with new files' permissions
        model.save_pretrained(part / "transformer", dtype)
        scheduler = read_json(base / "scheduler" / "scheduler_config.json")
        scheduler |= {"use_dynamic_shifting": False, "shift": 1.0, "shift_terminal": None}
        scheduler["stochastic_sampling"] = stochastic
        write_json(part / "scheduler" / "scheduler_config.json", scheduler)
        write_json(part / "model_index.json", read_index(base) | {"sample_sigmas": sigmas, "guidance": 1.0})


def export_student(pipeline, args: Args) -> None:
    """--export: the checkpoint's student, with what --lora makes of it, as a folder; or what it changed in --base."""
    sigmas, stochastic = pipeline.sample_sigmas, pipeline.scheduler.stochastic_sampling
    if sigmas is None:
        raise ValueError(
            f"{args.checkpoint}: no few-step student (it has no sample_sigmas); if it is one, give --sigmas"
        )
    if not args.base:
        may_write(args.export, folder=True)  # before the weights are read
        export(args.checkpoint, pipeline.mmdit, sigmas, args.export, link=args.link, stochastic=stochastic)
        return print(f"{args.export}: {len(sigmas)} steps at {sigmas}")
    may_write(args.export, args.overwrite)
    base = MMDiT.from_pretrained(Path(args.base) / "transformer", pipeline.dtype, pipeline.device)
    if base.config != pipeline.mmdit.config:
        raise ValueError(f"--base {args.base}: its transformer has another size than that of {args.checkpoint}")
    lora, kept = factorise(base, pipeline.mmdit, args.rank)
    check_finite({f"{name}.{part}": t for name, pair in lora.items() for part, t in zip("AB", pair)}, args.export)
    write_lora(args.export, lora, sigmas, stochastic=stochastic)
    size = Path(args.export).stat().st_size / 1e6
    print(f"{args.export}: rank {args.rank}, {kept:.1%} of what the student changed, {size:.1f} MB")


def export_run(args, trainee: Trainee, sigmas: list[float]) -> Path:
    """What a finished run leaves: out/student, a checkpoint of its own, or out/transformer for the flow objective; with
    LoRAs also out/lora.safetensors, for the base checkpoint (of a teacher: what --teacher reads)."""
    flows, renoises = args.objective == "flow", args.sampler == "renoise"
    folder = args.out / ("transformer" if flows else "student")
    with trainee.averaged() as network, together():
        alone = trainee.export()
        if rank() == 0:
            if args.lora_rank:
                lora = role_lora(network.model, network.role)
                write_lora(args.out / "lora.safetensors", lora, None if flows else sigmas[:-1], stochastic=renoises)
            if flows:
                alone.save_pretrained(folder)
            else:
                export(args.checkpoint, alone, sigmas[:-1], folder, stochastic=renoises)
    return folder
