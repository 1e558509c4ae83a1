"""What a run takes, by arithmetic from a checkpoint's config alone: memory, work and time (`train.py --plan`).

Bytes are one process's, by part; FLOPs those of a whole update. The options are filled in (training/run.py).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoint.files import config_from_json
from data.prompts import TASKS
from model import MMDiT, MMDiTConfig
from training.options import TrainOptions

PEAK_TFLOPS = 989.0  # of one GPU in bf16: an H100's
UTILISATION = 0.4  # the part of the peak that is reached; ours, not measured
TEXT = 200  # tokens of a long prompt with its template, for the plan; real ones differ little in work


def read_config(checkpoint: Path) -> MMDiTConfig:
    return config_from_json(MMDiTConfig, checkpoint / "transformer" / "config.json")


def parameters(config: MMDiTConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MMDiT(config).parameters())


def sample_flops(
    config: MMDiTConfig, purpose: str, prefix: int, target: int, k: int | None, scorers: float, lora: bool = False
) -> float:
    """One sample's part of one update: "flow", "fake" or "student"; `scorers`: forwards that make the real score.

    A multiplication and an addition for each weight and token, and twice for each pair of tokens and channel that
    attention compares. A backward pass is two forwards; with LoRA the matrices' is one, for frozen weights have no
    gradient. What `recompute` computes again is work, but no progress.
    """
    width = config.num_attention_heads * config.attention_head_dim
    weights = 2 * config.num_layers * (4 + 3 * config.mlp_ratio) * width**2  # a token's
    pair = 4 * config.num_layers * width
    prefix_work = prefix * (weights + pair * prefix)
    target_work = target * (weights + pair * (prefix + target))
    forward = prefix_work + target_work
    work = 3 * forward  # of the network that learns: a forward, and a backward of two
    if lora:
        work -= (prefix + target) * weights  # frozen weights have no gradient of their own
    if purpose == "student":
        work += (scorers + 1) * forward  # teachers and fake score look at x_t
    rollout_steps = 0 if purpose == "flow" else k + (purpose == "fake")  # without gradient
    if rollout_steps:
        work += prefix_work + rollout_steps * target_work  # text and sources once for all steps
    return work


@dataclass
class Plan:
    """One process's bytes by part, and an update's FLOPs over all processes."""

    parameters: int
    trained: int
    bytes: dict[str, float]
    waiting: float  # of the gradients: what is there already while the last micro-batch computes its own
    update_flops: float

    @property
    def peak(self) -> float:
        """The largest of three times: a rollout, the moment before a backward pass, and the moment after it. Through the
        pass the gradients grow while the activations go."""
        computing = max(self.bytes["activations"], self.bytes["rollout"])
        rest = sum(self.bytes.values()) - self.bytes["activations"] - self.bytes["rollout"] - self.bytes["gradients"]
        return rest + max(self.waiting + computing, self.bytes["gradients"])


def make_plan(
    options: TrainOptions,
    config: MMDiTConfig,
    recipe,
    gpus: int,
    frozen: int,
    layouts: dict[str, tuple[int, int]],
) -> Plan:
    """recipe: a Recipe, with the teachers there are. frozen: networks. layouts: task -> tokens of one sample, those of text
    and sources and those of the target."""
    flows, e = options.objective == "flow", getattr(torch, options.dtype).itemsize
    total, width = parameters(config), config.num_attention_heads * config.attention_head_dim
    learners, sharded = 1 if flows else 2, gpus > 1 and not options.lora_rank
    rows = gpus if sharded else 1
    inside = config.num_layers * (4 + 3 * config.mlp_ratio) * width**2  # the blocks' part of the weights
    trained = 8 * config.num_layers * width * options.lora_rank or total
    copies = 0 if sharded or options.lora_rank or e == 4 else learners  # working weights beside the masters
    muon = inside if options.muon_lr and not options.lora_rank else 0  # Muon has one moment where AdamW has two
    waiting = 4 * trained / rows if len(options.sizes) > 1 else 0.0
    gathered = 2 * inside / config.num_layers * (2 * e + 4) + (total - inside) * (e + 4) if sharded else 0.0

    # Saved for the backward pass, by token and block, in units of the width: counted from the lines of model.Block and
    # held against measurements by tests/test_plan.py. A frozen weight does not need its input, so a LoRA saves less.
    inner = (17 if options.lora_rank else 25) * e + 4 * 4
    guided = 1 if options.guidance == 1 else 2
    activations, rollout, flops = 0.0, 0.0, 0.0
    for task, (prefix, target) in layouts.items():
        block = (prefix + target) * inner * width
        kept = (prefix + target) * e * width  # by a block that is computed again
        saved = config.num_layers * kept + block if options.recompute else config.num_layers * block
        saved += (8 * (prefix + target) + 10 * target) * e * width  # ends, tokens' modulation; gradients on their way
        # A rollout keeps the student's keys and values of text and sources, and computes a block without gradient.
        kept = 0 if flows else (2 * config.num_layers * prefix + 20 * (prefix + target)) * e * width
        activations, rollout = max(activations, saved), max(rollout, kept)
        share = dict(zip(TASKS, recipe.ratio, strict=True))[task] / sum(recipe.ratio)
        for k in range(options.student_steps):
            scorers = guided * recipe.mean_teachers(k, options.student_steps, task)
            kinds = {"flow": 1} if flows else {"fake": options.fake_updates, "student": 1}
            work = 0.0
            for kind, updates in kinds.items():
                lora = options.lora_rank > 0
                work += updates * sample_flops(config, kind, prefix, target, k, scorers, lora)
            flops += options.batch * share * work / options.student_steps
    parts = {
        "frozen weights": frozen * total * e / rows,
        "working weights": copies * total * e,
        "masters": learners * trained * 4 / rows,
        "average": trained * 4 / rows if options.ema else 0.0,
        "optimiser": learners * (8 * trained - 4 * muon) / rows,
        "gradients": 4 * trained / rows + (copies > 0 and waiting > 0) * total * e,
        "gathered": gathered,
        "activations": options.sizes[0] / gpus * activations,
        "rollout": options.sizes[0] / gpus * rollout,
    }
    return Plan(total, trained, parts, waiting, flops)


def describe(options: TrainOptions, recipe, gpus: int, teachers: dict[str, Path]) -> str:
    """The plan as a table. A sample is a square of options.resolution with TEXT tokens; an edit has one source of that size."""
    config = read_config(options.checkpoint)
    tokens = (options.resolution // 16) ** 2
    recipe = recipe.with_teachers(teachers)
    frozen = 1 + sum(teachers[name].is_dir() for name in recipe.teacher_names)
    frozen = frozen if options.objective == "dmd" else int(options.lora_rank > 0)
    tasks = [task for task, parts in zip(TASKS, recipe.ratio, strict=True) if parts]
    layouts = {task: (TEXT + (tokens if task == "edit" else 0), tokens) for task in tasks}
    plan = make_plan(options, config, recipe, gpus, frozen, layouts)
    if options.lora_rank:
        trained = f"LoRA of rank {options.lora_rank}"
    else:
        trained = "all weights"
    lines = [
        f"{options.checkpoint}: {plan.parameters / 1e9:.3f} billion parameters, {plan.trained / 1e6:.1f} million trained",
        f"{options.objective}, {trained}, {options.dtype}, {gpus} process(es), {frozen} frozen network(s), "
        f"batch {options.batch} in micro-batches of {options.micro_batch}, {options.resolution} x {options.resolution}, "
        f"recompute {options.recompute}",
        *(f"  {task}: {p:,} tokens of text and sources, {n:,} of the target" for task, (p, n) in layouts.items()),
        "GB a process:",
        *(f"  {name:16} {size / 1e9:9.3f}" for name, size in plan.bytes.items() if size),
        f"  {'peak':16} {plan.peak / 1e9:9.3f}",
        cost(plan, options, gpus),
    ]
    if options.objective == "dmd":  # what the other choice of guidance would cost
        other = replace(options, guidance=1.0 if options.guidance != 1 else 4.0)
        without_or_with = "with guidance (w above 1)" if options.guidance == 1 else "without guidance (w = 1)"
        other_plan = make_plan(other, config, recipe, gpus, frozen, layouts)
        lines.append(f"{without_or_with}: {cost(other_plan, other, gpus)}")
    return "\n".join(lines)


def cost(plan: Plan, options: TrainOptions, gpus: int) -> str:
    """Work and time of a plan, in words."""
    seconds = plan.update_flops / (gpus * 1e12 * PEAK_TFLOPS * UTILISATION)
    hours = seconds * options.steps / 3600
    at = f"at {UTILISATION:.0%} of {PEAK_TFLOPS:,.0f} TFLOP/s a process (an H100 in bf16)"
    return (
        f"{plan.update_flops / 1e12:,.2f} TFLOP an update; {seconds:,.2f} s an update, {hours:,.2f} h for "
        f"{options.steps} steps, {at}"
    )
