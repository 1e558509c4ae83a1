"""What a run needs: memory, work and time, computed from a checkpoint's config alone (`train.py --plan`).

Bytes are those of one process, by part. FLOPs are those of a whole update. The options are filled in (training/run.py).
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
    """One sample's part of one update: "flow", "fake" or "student". scorers: forwards that make the real score.

    A forward pass takes a multiplication and an addition for each weight and token, and two of both for each channel of
    each pair of tokens in attention. A backward pass takes two forwards; with LoRA one for the matrices, because frozen
    weights have no gradient. What `recompute` computes again is not counted.
    """
    weights = 2 * config.num_layers * weights_of_block(config)  # a token's
    pair = 4 * config.num_layers * width_of(config)
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
    waiting: float  # the gradients of earlier micro-batches, while the last one computes its own
    update_flops: float

    @property
    def peak(self) -> float:
        """The most of three moments: in a rollout, before a backward pass, and after it. During a backward pass the
        gradients grow and the activations are freed."""
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
    """The plan of one process.

    recipe     a Recipe, with the teachers there are
    frozen     the number of frozen networks
    layouts    task -> tokens of one sample: those of text and sources, and those of the target
    """
    item, width = itemsize(options), width_of(config)
    total = parameters(config)
    inside = config.num_layers * weights_of_block(config)  # of these, the weights in the blocks
    trained = 8 * config.num_layers * width * options.lora_rank or total
    learners = 1 if options.objective == "flow" else 2
    sharded = gpus > 1 and not options.lora_rank
    rows = gpus if sharded else 1  # a process holds this part of each sharded tensor
    copies = 0 if sharded or options.lora_rank or item == 4 else learners  # working weights beside the masters
    muon = inside if options.muon_lr and not options.lora_rank else 0  # Muon has one moment where AdamW has two
    waiting = 4 * trained / rows if len(options.sizes) > 1 else 0.0
    gathered = 0.0
    if sharded:
        gathered = 2 * inside / config.num_layers * (2 * item + 4) + (total - inside) * (item + 4)
    activations, rollout = 0.0, 0.0
    for prefix, target in layouts.values():
        activations = max(activations, activation_bytes(options, config, prefix, target))
        rollout = max(rollout, rollout_bytes(options, config, prefix, target))
    samples = options.sizes[0] / gpus  # that run at once in a process
    parts = {
        "frozen weights": frozen * total * item / rows,
        "working weights": copies * total * item,
        "masters": learners * trained * 4 / rows,
        "average": trained * 4 / rows if options.ema else 0.0,
        "optimiser": learners * (8 * trained - 4 * muon) / rows,
        "gradients": 4 * trained / rows + (copies > 0 and waiting > 0) * total * item,
        "gathered": gathered,
        "activations": samples * activations,
        "rollout": samples * rollout,
    }
    return Plan(total, trained, parts, waiting, update_flops(options, config, recipe, layouts))


def itemsize(options: TrainOptions) -> int:
    """Bytes of a number in the working dtype."""
    return getattr(torch, options.dtype).itemsize


def width_of(config: MMDiTConfig) -> int:
    return config.num_attention_heads * config.attention_head_dim


def weights_of_block(config: MMDiTConfig) -> int:
    return (4 + 3 * config.mlp_ratio) * width_of(config) ** 2


def activation_bytes(options: TrainOptions, config: MMDiTConfig, prefix: int, target: int) -> float:
    """What one sample keeps for the backward pass. Counted from the lines of model.Block, and held against measurements
    by tests/test_plan.py. A frozen weight does not need its input, so a LoRA keeps less."""
    item, width = itemsize(options), width_of(config)
    of_token = (17 if options.lora_rank else 25) * item + 4 * 4  # in a block, in units of the width
    of_block = (prefix + target) * of_token * width
    of_input = (prefix + target) * item * width  # with recompute, a block keeps only its input
    ends = (8 * (prefix + target) + 10 * target) * item * width  # and the modulation, and gradients on their way
    if options.recompute:
        return config.num_layers * of_input + of_block + ends
    return config.num_layers * of_block + ends


def rollout_bytes(options: TrainOptions, config: MMDiTConfig, prefix: int, target: int) -> float:
    """What a rollout holds of one sample: keys and values of text and sources, and a block without gradient."""
    if options.objective == "flow":
        return 0.0
    numbers = 2 * config.num_layers * prefix + 20 * (prefix + target)
    return numbers * itemsize(options) * width_of(config)


def update_flops(options: TrainOptions, config: MMDiTConfig, recipe, layouts: dict[str, tuple[int, int]]) -> float:
    """Of one update of the student, with those of the fake score before it; or of one of a teacher."""
    if options.objective == "flow":
        updates_of = {"flow": 1}
    else:
        updates_of = {"fake": options.fake_updates, "student": 1}
    guided = 1 if options.guidance == 1 else 2
    shares = dict(zip(TASKS, recipe.ratio, strict=True))
    flops = 0.0
    for task, (prefix, target) in layouts.items():
        share = shares[task] / sum(recipe.ratio)
        for k in range(options.student_steps):
            scorers = guided * recipe.mean_teachers(k, options.student_steps, task)
            work = 0.0
            for purpose, updates in updates_of.items():
                lora = options.lora_rank > 0
                work += updates * sample_flops(config, purpose, prefix, target, k, scorers, lora)
            flops += options.batch * share * work / options.student_steps
    return flops


def describe(options: TrainOptions, recipe, gpus: int, teachers: dict[str, Path]) -> str:
    """The plan as a table. A sample is a square of options.resolution with TEXT tokens. An edit has one source of the
    same size."""
    config = read_config(options.checkpoint)
    tokens = (options.resolution // 16) ** 2
    recipe = recipe.with_teachers(teachers)
    if options.objective == "dmd":
        frozen = 1 + sum(teachers[name].is_dir() for name in recipe.teacher_names)
    else:
        frozen = int(options.lora_rank > 0)
    tasks = [task for task, parts in zip(TASKS, recipe.ratio, strict=True) if parts]
    layouts = {task: (TEXT + (tokens if task == "edit" else 0), tokens) for task in tasks}
    plan = make_plan(options, config, recipe, gpus, frozen, layouts)
    trained = f"LoRA of rank {options.lora_rank}" if options.lora_rank else "all weights"
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
