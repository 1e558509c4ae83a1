"""What the options of train.py become where it is not the laptop's distillation; each number with its source."""

import math
import os

from program.options import TOY
from training.options import TrainOptions

# ---- the toy's teacher -----------------------------------------------------------------------------------------------

FLOW = {  # all ours
    "objective": "flow",
    "steps": 2000,
    "batch": 96,
    "micro_batch": 16,
    "muon_lr": 0.02,
    "lr": 2e-3,
    "warmup": 100,
    "decay": 0.5,
    "ema": 0.999,
    "time_shift": 1.0,
    "save_every": 500,
    "panel_every": 500,
}

# ---- a student of the 7B's size --------------------------------------------------------------------------------------
# The papers give no values, and we have not run these. Sources, side by side with more of them: docs/node.md.
#
# ModelOpt             its DMD of Qwen-Image
# Self-Forcing-Plus    its DMD of a 14B network; the fork Chevolier/Self-Forcing-Plus distils Qwen-Image-Edit at rank 32
#                      (configs/qwen_image_dmd.yaml)
# DP-DMD               of SD3.5-M, all weights
# Decoupled DMD        Tongyi-MAI/Z-Image, issue 74
# LightX2V             ModelTC/LightX2V, lightx2v_train/configs/train/dmd/qwen_image_edit_2511_dmd_lora.yaml

LARGE = {
    "steps": 1000,  # ModelOpt
    "batch": 32,  # DP-DMD
    "micro_batch": 8,  # ours, for memory
    "muon_lr": 0.0,  # AdamW alone, as all of these
    "lr": 2e-6,  # ModelOpt
    "fake_muon_lr": 0.0,
    "fake_lr": 2e-6,  # ModelOpt
    "fake_updates": 5,  # Self-Forcing-Plus
    "warmup": 20,  # ours
    "decay": 0.0,  # ours
    "ema": 0.99,  # Self-Forcing-Plus
    "time_shift": 3.0,  # Decoupled DMD
    # Every public student of Qwen-Image-2.1 whose sampler is known is drawn by Euler's method (docs/checkpoints.md).
    # The paper's first author asks for "ODE formulation, not SDE" (Multimedia-Analytics-Laboratory/dpdmd, issue 2),
    # and TDM (arXiv 2503.06674) trains along the ODE. Why the toy keeps renoise: docs/node.md.
    "sampler": "euler",
    "aspects": True,
    "recompute": True,
    "dtype": "bfloat16",
    "save_every": 250,  # a checkpoint has 199 GB; the newest two are kept
    "panel_every": 20,
}
# The same with LoRAs. LightX2V has the same rates and rank, 1,000 updates and a clip of 1, but 2 fake updates and a
# guidance of 4. Lightning's authors have 5e-5 for a LoRA and 4e-7 for a fake score of all weights, both with beta1 0
# (ModelTC/LightX2V-Qwen-Image-Lightning, issue 64).
LARGE_LORA = LARGE | {
    "micro_batch": 2,  # ours, for one GPU's memory
    "lr": 1e-4,  # the fork of Self-Forcing-Plus, as are the fake rate, batch, fake updates and EMA
    "fake_lr": 2e-5,
    "save_every": 50,
}

# ---- a specialised teacher of the 7B's size --------------------------------------------------------------------------
# No source has numbers for its fine-tuning. Not run by us. clip and text_dropout stay: 2.0 report.

LARGE_FLOW = {
    "objective": "flow",
    "steps": 2000,  # as the paper's students (section 3)
    "batch": 32,
    "micro_batch": 8,  # ours, for memory
    "muon_lr": 0.0,  # AdamW, as in the paper's section 3
    "lr": 1e-5,  # DP-DMD
    "warmup": 20,  # ours
    "decay": 0.0,  # ours
    "ema": 0.99,  # the longest seen with students
    "time_shift": 3.0,  # ours
    "recompute": True,
    "dtype": "bfloat16",
    "panel_every": 100,
}
LARGE_FLOW_LORA = LARGE_FLOW | {
    "micro_batch": 2,  # ours, for one GPU's memory
    "lr": 1e-4,  # LightX2V's rate of a LoRA
}

# ---- what a run gets -------------------------------------------------------------------------------------------------


def defaults(objective: str, parameters: int, lora_rank: int) -> dict:
    """The values that replace those of TrainOptions for this objective and a network of so many parameters."""
    if parameters <= 1e9:
        return FLOW if objective == "flow" else {}
    large, lora = (LARGE_FLOW, LARGE_FLOW_LORA) if objective == "flow" else (LARGE, LARGE_LORA)
    return lora if lora_rank else large


def divisible(batch: int, micro_batch: int, processes: int) -> dict[str, int]:
    """Both rounded up, so that each process has an equal part of every micro-batch."""
    micro_batch = math.ceil(micro_batch / processes) * processes
    return {"batch": math.ceil(batch / micro_batch) * micro_batch, "micro_batch": micro_batch}


def of_run(options: TrainOptions) -> dict:
    """The defaults of a run whose given options are in `options`: for objective, checkpoint and number of processes."""
    config, parameters = options.checkpoint / "transformer" / "config.json", 0
    if options.checkpoint != TOY and config.is_file():  # where there is none, who opens the checkpoint says so
        from training import plan  # imports torch

        parameters = plan.parameters(plan.read_config(options.checkpoint))
    own = {"batch": TrainOptions.batch, "micro_batch": TrainOptions.micro_batch}
    own |= defaults(options.objective, parameters, options.lora_rank)
    processes = options.gpus or int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets it
    return own | divisible(own["batch"], own["micro_batch"], processes)


def check_size(options: TrainOptions) -> None:
    """ValueError where a run without --prompts, so on the toy's own, is for pictures of another size than theirs."""
    from checkpoint.layout import read_index  # imports torch

    resolution = options.resolution or read_index(options.checkpoint)["resolution"]
    if not options.prompts and resolution != 128:
        raise ValueError(f"--resolution {resolution}: the toy's own prompts have 128; give --prompts FILE")
