"""What a run takes, by arithmetic from a checkpoint's config alone: memory, work and time (`train.py --plan`).

Bytes are one process's, by part; FLOPs those of a whole update. `args` is train.Args, settled.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoint.files import config_from_json
from data.prompts import TASKS
from model import MMDiT, MMDiTConfig

TEXT = 200  # tokens of a long prompt with its template, for the plan; real ones differ little in work


def read_config(checkpoint: Path) -> MMDiTConfig:
    return config_from_json(MMDiTConfig, checkpoint / "transformer" / "config.json")


def parameters(config: MMDiTConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MMDiT(config).parameters())


def sample_flops(
    config: MMDiTConfig, purpose: str, prefix: int, target: int, k: int | None, scorers: int, lora: bool = False
) -> float:
    """One sample's part of one update: "flow", "fake" or "student"; `scorers`: forwards that make the real score.

    A multiplication and an addition for each weight and token, and twice for each pair of tokens and channel that
    attention compares. A backward pass is two forwards; with LoRA the matrices' is one, for frozen weights have no
    gradient. What `recompute` computes again is work, but no progress.
    """
    width = config.num_attention_heads * config.attention_head_dim
    weights = 2 * config.num_layers * (4 + 3 * config.mlp_ratio) * width**2  # a token's
    pair = 4 * config.num_layers * width
    text = prefix * (weights + pair * prefix)  # text and sources: once, where no gradient is wanted
    step = target * (weights + pair * (prefix + target))
    steps = 0 if purpose == "flow" else k + (purpose == "fake")  # of the rollout, without gradient
    looks = scorers + 1 if purpose == "student" else 0  # of teachers and fake score, at x_t
    frozen = lora * (prefix + target) * weights
    return bool(steps) * text + steps * step + (3 + looks) * (text + step) - frozen


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


def make_plan(args, config: MMDiTConfig, recipe, gpus: int, frozen: int, layouts: dict[str, tuple[int, int]]) -> Plan:
    """recipe: with rules for the teachers there are. frozen: networks. layouts: task -> tokens of one sample, those of text
    and sources and those of the target."""
    flows, e = args.objective == "flow", getattr(torch, args.dtype).itemsize
    total, width = parameters(config), config.num_attention_heads * config.attention_head_dim
    learners, sharded = 1 if flows else 2, gpus > 1 and not args.lora_rank
    rows = gpus if sharded else 1
    inside = config.num_layers * (4 + 3 * config.mlp_ratio) * width**2  # the blocks' part of the weights
    trained = 8 * config.num_layers * width * args.lora_rank or total
    copies = 0 if sharded or args.lora_rank or e == 4 else learners  # working weights beside the masters
    muon = inside if args.muon_lr and not args.lora_rank else 0  # Muon has one moment where AdamW has two
    waiting = 4 * trained / rows if len(args.sizes) > 1 else 0.0
    gathered = 2 * inside / config.num_layers * (2 * e + 4) + (total - inside) * (e + 4) if sharded else 0.0

    # Saved for the backward pass, by token and block, in units of the width: counted from the lines of model.Block and
    # held against measurements by tests/test_plan.py. A frozen weight does not need its input, so a LoRA saves less.
    inner = (17 if args.lora_rank else 25) * e + 4 * 4
    guided = 1 if args.guidance == 1 else 2
    activations, rollout, flops = 0.0, 0.0, 0.0
    for task, (prefix, target) in layouts.items():
        block = (prefix + target) * inner * width
        kept = (prefix + target) * e * width  # by a block that is computed again
        saved = config.num_layers * kept + block if args.recompute else config.num_layers * block
        saved += (8 * (prefix + target) + 10 * target) * e * width  # ends, tokens' modulation; gradients on their way
        # A rollout keeps the student's keys and values of text and sources, and computes a block without gradient.
        kept = 0 if flows else (2 * config.num_layers * prefix + 20 * (prefix + target)) * e * width
        activations, rollout = max(activations, saved), max(rollout, kept)
        for k in range(args.student_steps):
            scorers = guided * len(recipe.weights(k, args.student_steps, task, None))
            kinds = {"flow": 1} if flows else {"fake": args.fake_updates, "student": 1}
            work = sum(
                n * sample_flops(config, kind, prefix, target, k, scorers, args.lora_rank > 0)
                for kind, n in kinds.items()
            )
            share = dict(zip(TASKS, recipe.ratio, strict=True))[task] / sum(recipe.ratio)
            flops += args.batch * share * work / args.student_steps
    parts = {
        "frozen weights": frozen * total * e / rows,
        "working weights": copies * total * e,
        "masters": learners * trained * 4 / rows,
        "average": trained * 4 / rows if args.ema else 0.0,
        "optimiser": learners * (8 * trained - 4 * muon) / rows,
        "gradients": 4 * trained / rows + (copies > 0 and waiting > 0) * total * e,
        "gathered": gathered,
        "activations": args.sizes[0] / gpus * activations,
        "rollout": args.sizes[0] / gpus * rollout,
    }
    return Plan(total, trained, parts, waiting, flops)


def describe(args, recipe, gpus: int, teachers: dict[str, Path]) -> str:
    """The plan as a table. A sample is a square of args.resolution with TEXT tokens; an edit has one source of that size."""
    config = read_config(args.checkpoint)
    tokens = (args.resolution // 16) ** 2
    recipe = replace(recipe, rules=tuple(rule for rule in recipe.rules if rule.teacher in teachers))
    frozen = 1 + sum(teachers[name].is_dir() for name in recipe.teacher_names)
    frozen = frozen if args.objective == "dmd" else int(args.lora_rank > 0)
    tasks = [task for task, parts in zip(TASKS, recipe.ratio, strict=True) if parts]
    layouts = {task: (TEXT + (tokens if task == "edit" else 0), tokens) for task in tasks}
    plan = make_plan(args, config, recipe, gpus, frozen, layouts)
    seconds = plan.update_flops / (gpus * 1e12 * args.peak_tflops * args.utilisation)
    way = f"LoRA of rank {args.lora_rank}" if args.lora_rank else "all weights"
    lines = [
        f"{args.checkpoint}: {plan.parameters / 1e9:.3f} billion parameters, {plan.trained / 1e6:.1f} million trained",
        f"{args.objective}, {way}, {args.dtype}, {gpus} process(es), {frozen} frozen network(s), batch {args.batch} in "
        f"micro-batches of {args.micro_batch}, {args.resolution} x {args.resolution}, recompute {args.recompute}",
        *(f"  {task}: {p:,} tokens of text and sources, {n:,} of the target" for task, (p, n) in layouts.items()),
        "GB a process:",
        *(f"  {name:16} {size / 1e9:9.3f}" for name, size in plan.bytes.items() if size),
        f"  {'peak':16} {plan.peak / 1e9:9.3f}",
        f"{plan.update_flops / 1e12:,.2f} TFLOP an update",
        f"{seconds:,.2f} s an update, {seconds * args.steps / 3600:,.2f} h for {args.steps} steps, at "
        f"{args.utilisation:.0%} of {args.peak_tflops:,.0f} TFLOP/s a process (--peak-tflops; an H100's is 989)",
    ]
    return "\n".join(lines)
