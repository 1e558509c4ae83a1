"""Speed and memory, side by side with diffusers' class. Not a test: pytest does not collect it.

    python tests/benchmark.py gpu            the 7B config with random weights on one GPU: a picture, an edit, a LoRA update
    python tests/benchmark.py cpu            ratios at the toy's config and at about 100M parameters, anywhere
    python tests/benchmark.py cpu --quick    the same with the toy's config alone

Every comparison takes the two in turns within one process and reports the median of the pairs' ratios, ours / diffusers':
below 1 is faster. On a shared machine single times mean little; such ratios do (with one thread: OMP_NUM_THREADS=1).
Prints Markdown.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import dmd  # noqa: E402
import flow  # noqa: E402
from model import Condition, MMDiT, MMDiTConfig  # noqa: E402
from support import plan  # noqa: E402
from support.lora import add_role, new_lora, role_lora  # noqa: E402
from support.trainee import Network, recompute  # noqa: E402

TOY = MMDiTConfig(
    num_layers=8, num_attention_heads=3, attention_head_dim=64, context_in_dim=128, axes_dims_rope=(16, 24, 24)
)
MIDDLE = MMDiTConfig(
    num_layers=12, num_attention_heads=6, attention_head_dim=128, context_in_dim=768, axes_dims_rope=(16, 56, 56)
)
SIGMAS = flow.student_sigmas(4)
FLOOR = {"t2i": 268, "edit": 370, "edit, no prefix cache": 571}  # TFLOP a picture, 1024 x 1024, 4 NFE
PEAK = 989  # TFLOP/s, bf16, H100 and H200


def random_network(config: MMDiTConfig, device: str, dtype: torch.dtype) -> MMDiT:
    with torch.device("meta"):
        model = MMDiT(config)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.data.fill_(1.0)
    return model


def random_condition(config: MMDiTConfig, batch: int, words: int, side: int, sources: int, like: Tensor) -> Condition:
    """`words` text tokens, and `sources` pictures of side x side latents before them."""
    slots, length = [], 8
    for _ in range(sources):
        slots.append((length, length + side * side // 4))
        length += side * side // 4 + 4
    states = torch.randn(batch, length + words, config.context_in_dim)
    pictures = [torch.randn(batch, 64, side, side) for _ in slots]
    mask = torch.ones(states.shape[:2], dtype=torch.bool)
    return Condition(states, mask, pictures, slots).to(like.device, like.dtype)


class Theirs(torch.nn.Module):
    """diffusers' class with our weights, called as ours is."""

    def __init__(self, model: MMDiT):
        super().__init__()
        from diffusers import QwenImage21Transformer2DModel

        with torch.device("meta"):
            self.network = QwenImage21Transformer2DModel(**asdict(model.config))
        # What has tables that no file holds is built anew, and only the blocks, which have none, without memory.
        for name, child in QwenImage21Transformer2DModel(**asdict(model.config) | {"num_layers": 1}).named_children():
            if name != "transformer_blocks":
                setattr(self.network, name, child)
        self.network.load_state_dict(model.state_dict(), assign=True)
        self.network.to(model.proj_out.weight.device)

    def forward(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        h, w = z.shape[-2:]
        # The latents of the sources and of the target in one sequence, and which states are pictures.
        parts = [x.flatten(2).mT for x in (*condition.sources, z.to(condition.states.dtype))]
        shapes = [[(1, *x.shape[-2:]) for x in (*condition.sources, z)]] * len(z)
        length = condition.mask.shape[1]
        is_slot = torch.arange(length + h * w // 4, device=z.device).expand(len(z), -1) >= length
        for start, stop in condition.slots:
            is_slot[:, start:stop] = True
        v = self.network(
            hidden_states=torch.cat(parts, 1),
            timestep=t.to(condition.states.dtype),
            encoder_hidden_states=condition.states,
            encoder_hidden_states_mask=condition.mask,
            img_shapes=shapes,
            img_mask=is_slot,
            return_dict=False,
        )[0]
        return v[:, -h * w :].mT.unflatten(2, (h, w))


def seconds(work: Callable[[], object], device: str) -> float:
    """On a GPU from one stop of its queue to the next; on a CPU what this process spent, whoever else is on the machine."""
    if device == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(first: Callable, second: Callable, device: str, times: int) -> tuple[float, float, float]:
    """(median seconds of the first, of the second, median of the pairs' ratios)."""
    first(), second()
    pairs = [(seconds(first, device), seconds(second, device)) for _ in range(times)]
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    return a, b, statistics.median(x / y for x, y in pairs)


def row(*cells: object) -> None:
    print("| " + " | ".join(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells) + " |", flush=True)


def draw(network: Callable, prefix: list | None, noise: Tensor, condition: Condition) -> Tensor:
    def velocity(z: Tensor, t: Tensor) -> Tensor:
        z = z.to(condition.states.dtype)
        return network(z, t, condition) if prefix is None else network(z, t, condition, prefix)

    return flow.euler(velocity, noise, SIGMAS)


def update(student, fake, teacher, optimizers, condition: Condition, noise: Tensor, xi: Tensor, t: Tensor) -> None:
    """A whole DMD update at k = 3, one of the fake score and one of the student; three callables (z, t) under a condition."""
    with torch.no_grad():
        x = dmd.rollout(student(), noise, SIGMAS, 3)
    dmd.fake_score_loss(fake(), x, xi, t).mean().backward()
    optimizers[1].step(), optimizers[1].zero_grad()
    x = dmd.rollout(student(), noise, SIGMAS, 3)
    g = dmd.dmd_gradient(teacher(), fake(), x, xi, t).g
    dmd.surrogate_loss(x, g).backward()
    optimizers[0].step(), optimizers[0].zero_grad()


def plain(network, condition: Condition) -> Callable:
    """A player without a prefix cache, as diffusers' class is."""
    return lambda: lambda z, t: network(z, t, condition)


def cached(network: MMDiT, condition: Condition, role: str | None = None) -> Callable:
    """The same as Network.velocity, which is what a training run calls."""

    return lambda: Network(network, role).velocity(condition)


@torch.no_grad()
def look(network, z: Tensor, t: Tensor, condition: Condition) -> None:
    network(z, t, condition)


def learn(network, z: Tensor, t: Tensor, condition: Condition) -> None:
    network(z, t, condition).square().mean().backward()
    network.zero_grad()


@torch.no_grad()
def look4(network, z: Tensor, condition: Condition) -> None:
    draw(network, None, z, condition)


@torch.no_grad()
def picture(network, prefix: bool, z: Tensor, condition: Condition) -> None:
    draw(network, network.prefix(condition) if prefix else None, z, condition)


def cpu(quick: bool) -> None:
    threads = torch.get_num_threads()
    print(f"CPU seconds, fp32, {threads} thread(s), torch {torch.__version__}; medians, and the pairs' median ratio\n")
    row("what", "ours", "diffusers'", "ours / diffusers'")
    row("---", "---", "---", "---")
    compare("toy", TOY, side=8, batch=4, times=7)
    if not quick:
        compare("100M", MIDDLE, side=16, batch=1, times=5)


def compare(name: str, config: MMDiTConfig, side: int, batch: int, times: int) -> None:
    torch.manual_seed(0)
    model = random_network(config, "cpu", torch.float32)
    theirs, z, t = Theirs(model), torch.randn(batch, 64, side, side), torch.rand(batch)
    for task in ("t2i", "edit"):
        condition = random_condition(config, batch, 24, side, int(task == "edit"), z)
        with torch.no_grad():
            gap = (model(z, t, condition) - theirs(z, t, condition)).abs().max()
        if gap > 1e-3:
            raise ValueError(f"the two disagree by {gap}")
        for what, work in (("forward", look), ("forward and backward", learn)):
            both = [partial(work, network, z, t, condition) for network in (model, theirs)]
            row(f"{name} {task}, {what}", *in_turns(*both, "cpu", times))
    both = [partial(picture, model, prefix, z, condition) for prefix in (True, False)]
    row(f"{name} edit, 4 NFE, with / without prefix cache", *in_turns(*both, "cpu", times))
    both = []
    for play in (cached, plain):
        players = [random_network(config, "cpu", torch.float32) for _ in range(3)]
        players = players if play is cached else [Theirs(player) for player in players]
        optimizers = [torch.optim.AdamW(p.parameters(), lr=1e-5, fused=True) for p in players[:2]]
        parts = [play(player, condition) for player in players]
        both.append(partial(update, *parts, optimizers, condition, z, z, t))
    row(f"{name} edit, a DMD update (fake score and student once)", *in_turns(*both, "cpu", 3))


def gpu(config: MMDiTConfig, side: int) -> None:
    device, dtype = "cuda", torch.bfloat16
    name, words = torch.cuda.get_device_name(), 200
    print(f"{name}, bf16, torch {torch.__version__}, {plan.parameters(config) / 1e9:.2f} billion random parameters\n")
    model = random_network(config, device, dtype).requires_grad_(False)
    noise = torch.randn(1, 64, side, side, device=device)
    row("what", "seconds", "floor, s", "peak memory, GB")
    row("---", "---", "---", "---")

    def timed(what: str, work: Callable, floor: float | str) -> None:
        work(), work()  # the second, too: compiled code and chosen kernels
        torch.cuda.reset_peak_memory_stats()
        took = statistics.median(seconds(work, device) for _ in range(5))
        row(what, took, floor, torch.cuda.max_memory_allocated() / 1e9)

    conditions = {
        "t2i": random_condition(config, 1, words, side, 0, noise.to(dtype)),
        "edit": random_condition(config, 1, words, side, 1, noise.to(dtype)),
    }
    eager = [block.forward for block in model.transformer_blocks]
    for compiled in (False, True):
        for block, forward in zip(model.transformer_blocks, eager, strict=True):
            block.forward = torch.compile(forward) if compiled else forward
        for task, condition in conditions.items():
            for prefix in (True, False):
                floor = FLOOR[task if prefix or task == "t2i" else "edit, no prefix cache"] / PEAK
                timed(
                    f"{task}, 4 NFE, prefix cache {prefix}, compile {compiled}",
                    partial(picture, model, prefix, noise, condition),
                    floor,
                )
    for block, forward in zip(model.transformer_blocks, eager, strict=True):
        block.forward = forward

    theirs = Theirs(model)  # on the same weights, so it fits
    for task, condition in conditions.items():
        timed(f"diffusers' class: {task}, 4 NFE", partial(look4, theirs, noise, condition), FLOOR[task] / PEAK)
    del theirs

    recompute(model)
    optimizers = []
    for role in ("student", "fake"):
        add_role(model, role, new_lora(model, 32))
        factors = [p for a, b, _ in role_lora(model, role).values() for p in (a, b)]
        optimizers.append(torch.optim.AdamW(factors, lr=1e-5, fused=True))
    for task, condition in conditions.items():
        parts = [cached(model, condition, role) for role in ("student", "fake", None)]
        times = torch.full((1,), 0.5, device=device)
        work = sum(
            plan.sample_flops(config, kind, words + (side * side if task == "edit" else 0), side * side, 3, 1)
            for kind in ("fake", "student")
        )
        step = partial(update, *parts, optimizers, condition, noise, torch.randn_like(noise), times)
        timed(f"{task}, LoRA update, rank 32, one sample, k = 3 (fake and student)", step, work / PEAK / 1e12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("half", choices=["cpu", "gpu"])
    parser.add_argument("--quick", action="store_true", help="cpu: the toy's config alone")
    args = parser.parse_args()
    if args.half == "cpu":
        cpu(args.quick)
    elif torch.cuda.is_available():
        gpu(MMDiTConfig(), 64)
    else:
        sys.exit("benchmark.py: no GPU here; `cpu` runs anywhere")


if __name__ == "__main__":
    main()
