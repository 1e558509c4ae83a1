"""What the options of train.py become where it is not the laptop's distillation; each number with its source."""

import math
import os

from program.options import TOY
from training.options import TrainOptions

# The toy's teacher (ours).
FLOW = dict(objective="flow", steps=2000, batch=96, micro_batch=16, save_every=500, panel_every=500, warmup=100)
FLOW |= dict(muon_lr=0.02, lr=2e-3, decay=0.5, ema=0.999, time_shift=1.0)
# A student of the 7B's size. The papers give no values, and we have not run these. They come from others' DMD:
# ModelOpt's of Qwen-Image (both rates, 1,000 steps), Self-Forcing-Plus's of a 14B network (5 fake updates, an EMA of 0.99)
# and DP-DMD's of SD3.5-M (a batch of 32, no weight decay). A checkpoint has 199 GB; the newest two are kept.
# The sampler is Euler's: every public student of Qwen-Image-2.1 whose sampler is known is drawn by it (docs/checkpoints.md),
# the paper's first author asks for "ODE formulation, not SDE" (Multimedia-Analytics-Laboratory/dpdmd, issue 2), and TDM
# (arXiv 2503.06674) trains along the ODE. The toy keeps renoise: docs/node.md.
LARGE = dict(steps=1000, batch=32, micro_batch=8, save_every=250, panel_every=20, dtype="bfloat16", recompute=True)
LARGE |= dict(muon_lr=0.0, lr=2e-6, fake_muon_lr=0.0, fake_lr=2e-6, fake_updates=5, warmup=20, decay=0.0)
LARGE |= dict(ema=0.99, time_shift=3.0, aspects=True, sampler="euler")
# A time_shift of 3 is that of Decoupled DMD (Tongyi-MAI/Z-Image, issue 74).
# The same with LoRAs: both rates, fake updates, batch and EMA are those of configs/qwen_image_dmd.yaml of the fork
# Chevolier/Self-Forcing-Plus, which distils Qwen-Image-Edit at rank 32. LightX2V has the same rates and rank, 1,000
# updates and a clip of 1, but 2 fake updates and a guidance of 4 (ModelTC/LightX2V, lightx2v_train/configs/train/dmd/
# qwen_image_edit_2511_dmd_lora.yaml). Lightning's authors have 5e-5 for a LoRA and 4e-7 for a fake score of all weights,
# both with beta1 0 (ModelTC/LightX2V-Qwen-Image-Lightning, issue 64). Side by side: docs/node.md.
LARGE_LORA = LARGE | dict(micro_batch=2, save_every=50, lr=1e-4, fake_lr=2e-5)
# A specialised teacher of the 7B's size. No source has numbers for its fine-tuning. Not run by us.
LARGE_FLOW = dict(objective="flow", muon_lr=0.0)  # AdamW, as in the paper's section 3
LARGE_FLOW |= dict(lr=1e-5, batch=32)  # ours: as DP-DMD, which moves all weights of SD3.5-M
LARGE_FLOW |= dict(micro_batch=8, recompute=True, dtype="bfloat16")  # ours, for memory; the masters are fp32
LARGE_FLOW |= dict(steps=2000, ema=0.99)  # ours: the paper's students (section 3); the longest EMA seen with students
LARGE_FLOW |= dict(warmup=20, decay=0.0, time_shift=3.0, panel_every=100)  # ours; clip and text_dropout: 2.0 report
LARGE_FLOW_LORA = LARGE_FLOW | dict(micro_batch=2, lr=1e-4)  # ours: one GPU's memory; LightX2V's rate of a LoRA


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
