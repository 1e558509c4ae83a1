"""Speed and memory, side by side with diffusers' class. Not a test: pytest does not collect it.

    python tools/benchmark.py gpu                the first hour on a GPU: all parts below, within ten minutes and 75 GB
    python tools/benchmark.py gpu checks         which attention kernels run; the NaN of pytorch issue 196678; first calls
    python tools/benchmark.py gpu draw           4 NFE at 1024 x 1024, by kernel, prefix and compile, beside diffusers'
    python tools/benchmark.py gpu update         a LoRA update of one sample, and its memory
    python tools/benchmark.py gpu train          two steps of training with LoRA roles, as train.py takes them
    python tools/benchmark.py gpu --dry          walks through all of it with a tiny network on the CPU
    python tools/benchmark.py cpu                ratios at the toy's config and at about 100M parameters, anywhere
    python tools/benchmark.py cpu --quick        the same with the toy's config alone

On a GPU the network has the published 7.1B config and random weights. The table is printed, and with --out written.

On a CPU every comparison takes the two in turns within one process and reports the median of the pairs' ratios, ours /
diffusers': below 1 is faster. On a shared machine single times mean little; such ratios do (with one thread:
OMP_NUM_THREADS=1). Prints Markdown.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))
import dmd  # noqa: E402
import flow  # noqa: E402
import recipe  # noqa: E402
import train  # noqa: E402
from checkpoint.lora import new_lora  # noqa: E402
from data.encode import Entry  # noqa: E402
from model import Condition, MMDiT, MMDiTConfig  # noqa: E402
from networks import attention  # noqa: E402
from training import plan, presets, watch  # noqa: E402
from training.options import TrainOptions  # noqa: E402
from training.roles import add_role  # noqa: E402
from training.trainee import Network, recompute  # noqa: E402

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
        # Parts with tables that no file holds are built in memory. The blocks have no tables and stay on "meta" for now.
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
    """On a GPU the time until its queue is empty again; on a CPU the time that this process alone spent."""
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


def row(*cells: object) -> str:
    """Print a line of a table in Markdown, and return it."""
    texts = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells]
    line = "| " + " | ".join(texts) + " |"
    print(line, flush=True)
    return line


def update(student, fake, teacher, optimizers, condition: Condition, noise: Tensor, xi: Tensor, t: Tensor) -> None:
    """A whole DMD update at k = 3: one of the fake score and one of the student.

    student, fake, teacher: each returns a velocity (z, t) under the condition. optimizers: of student and fake score.
    """

    def make_round() -> dmd.Round:
        real = dmd.RealScore({"base": 1.0}, {"base": teacher()})
        noises = noise.expand(4, *noise.shape)
        return dmd.Round(
            student(), fake(), real, noises, SIGMAS, 3, xi, t, fresh=lambda name, shape: torch.randn(shape)
        )

    for_student, for_fake = optimizers
    dmd.fake_losses(make_round()).mean().backward()
    for_fake.step()
    for_fake.zero_grad()
    dmd.student_losses(make_round())[0].mean().backward()
    for_student.step()
    for_student.zero_grad()


def plain(network, condition: Condition) -> Callable:
    """A player without a prefix cache, as diffusers' class is."""
    return lambda: lambda z, t: network(z, t, condition)


def cached(network: MMDiT, condition: Condition, role: str | None = None) -> Callable:
    """The same by Network.velocity, which is what a training run calls."""
    return lambda: Network(network, role).velocity(condition, calls=math.inf)


@torch.no_grad()
def forward(network, z: Tensor, t: Tensor, condition: Condition) -> None:
    network(z, t, condition)


def forward_backward(network, z: Tensor, t: Tensor, condition: Condition) -> None:
    network(z, t, condition).square().mean().backward()
    network.zero_grad()


@torch.no_grad()
def draw4(network, z: Tensor, condition: Condition) -> None:
    flow.euler(lambda z, t: network(z.to(condition.states.dtype), t, condition), z, SIGMAS)


@torch.no_grad()
def picture(network, prefix: bool, z: Tensor, condition: Condition) -> None:
    flow.euler(Network(network).velocity(condition, calls=math.inf if prefix else 1), z, SIGMAS)


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
        for what, work in (("forward", forward), ("forward and backward", forward_backward)):
            both = [partial(work, network, z, t, condition) for network in (model, theirs)]
            row(f"{name} {task}, {what}", *in_turns(*both, "cpu", times))
    both = [partial(picture, model, prefix, z, condition) for prefix in (True, False)]
    row(f"{name} edit, 4 NFE, with / without prefix cache", *in_turns(*both, "cpu", times))
    both = []
    for play in (cached, plain):
        players = [random_network(config, "cpu", torch.float32) for _ in range(3)]
        if play is plain:
            players = [Theirs(player) for player in players]
        optimizers = [torch.optim.AdamW(player.parameters(), lr=1e-5, fused=True) for player in players[:2]]
        velocities = [play(player, condition) for player in players]
        both.append(partial(update, *velocities, optimizers, condition, z, z, t))
    row(f"{name} edit, a DMD update (fake score and student once)", *in_turns(*both, "cpu", 3))


# ---- a GPU's first hour ----------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A random network with conditions of both tasks, and the table that is made."""

    device: str
    dtype: torch.dtype
    model: MMDiT
    words: int
    noise: Tensor  # (1, 64, side, side)
    conditions: dict[str, Condition]
    times: int
    rows: list[str]

    def row(self, what: str, *cells: object) -> None:
        missing = 4 - len(cells)
        self.rows.append(row(what, *cells, *[""] * missing))

    def timed(self, what: str, work: Callable, floor: float | str = "") -> None:
        """First call (which compiles and chooses kernels), the median of later ones, and the most memory of these."""
        first = seconds(work, self.device)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        later = statistics.median(seconds(work, self.device) for _ in range(self.times))
        self.row(what, first, later, floor, watch.memory(self.device))

    @contextmanager
    def compiled(self) -> Iterator[None]:
        torch._dynamo.config.recompile_limit = 64  # as in training: one block has many forms
        blocks = self.model.transformer_blocks
        eager = [block.forward for block in blocks]
        for block in blocks:
            block.forward = torch.compile(block.forward, backend="inductor" if self.device == "cuda" else "eager")
        try:
            yield
        finally:
            for block, forward in zip(blocks, eager, strict=True):
                block.forward = forward


def checks(bench: Bench) -> None:
    """What only a GPU can say before anything is timed."""
    config, z = bench.model.config, bench.noise
    bench.row(attention.kernels(config.attention_head_dim, bench.dtype, bench.device))
    # pytorch issue 196678: a mask, 64 queries modulo 128, a very negative logsumexp. Ours must be finite.
    rows = 4160 if bench.device == "cuda" else 192
    heads, d = config.num_attention_heads, config.attention_head_dim
    q, k, v = (torch.randn(1, heads, rows, d, device=z.device, dtype=bench.dtype) for _ in range(3))
    q, k = q + 5, k - 5  # all scores are about -25 sqrt(d)
    mask = q.new_zeros(1, 1, 1, rows).masked_fill(torch.arange(rows, device=z.device) >= rows - 64, -torch.inf)

    def finite(work: Callable) -> str:
        inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        try:
            work(*inputs, mask).float().square().sum().backward()
        except RuntimeError as error:
            return f"not run: {str(error).splitlines()[0]}"
        return "finite" if all(x.grad.isfinite().all() for x in inputs) else "NaN"

    def by_cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    ours = finite(attention.attend)
    bench.row(f"gradient with a mask, {rows} queries: ours {ours}; cuDNN, for the record: {finite(by_cudnn)}")
    if ours != "finite":
        raise ArithmeticError("attention with a padding mask gives a gradient that is not finite: do not train here")
    t = torch.full((1,), 0.5, device=z.device)
    for task, condition in bench.conditions.items():
        bench.timed(f"{task}, one forward", partial(forward, bench.model, z, t, condition))
        with bench.compiled():
            bench.timed(f"{task}, one forward, compiled", partial(forward, bench.model, z, t, condition))


def drawing(bench: Bench) -> None:
    """4 NFE of a picture and of an edit with one source."""

    def floor(task: str, prefix: bool) -> float:
        return FLOOR[task if prefix or task == "t2i" else "edit, no prefix cache"] / PEAK

    for task, condition in bench.conditions.items():
        for prefix in (True, False):
            work = partial(picture, bench.model, prefix, bench.noise, condition)
            bench.timed(f"{task}, 4 NFE, prefix {prefix}", work, floor(task, prefix))
            with bench.compiled():
                bench.timed(f"{task}, 4 NFE, prefix {prefix}, compiled", work, floor(task, prefix))
        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            if bench.device == "cuda":
                try:
                    with sdpa_kernel(kernel):
                        work = partial(picture, bench.model, True, bench.noise, condition)
                        bench.timed(f"{task}, 4 NFE, prefix True, {kernel.name}", work, floor(task, True))
                except RuntimeError as error:
                    bench.row(f"{task}, 4 NFE, {kernel.name}: not run: {str(error).splitlines()[0]}")
    theirs = Theirs(bench.model)  # on the same weights
    for task, condition in bench.conditions.items():
        work = partial(draw4, theirs, bench.noise, condition)
        bench.timed(f"{task}, 4 NFE, diffusers' class", work, floor(task, False))


def lora_roles(bench: Bench, args: TrainOptions) -> list[train.Trainee]:
    """Student and fake score on the network, fresh. The network is used up: its blocks are recomputed from now on."""
    recompute(bench.model)
    for role in ("student", "fake"):
        add_role(bench.model, role, new_lora(bench.model, args.lora_rank))
    networks = [Network(bench.model, role) for role in ("student", "fake")]
    return [train.Trainee(n.role, n, args, 0.0, args.lr, ema) for n, ema in zip(networks, (args.ema, 0.0), strict=True)]


def training(bench: Bench, parts: list[str]) -> None:
    """A LoRA update of one sample at k = 3, and two steps as train.py takes them, beside the plan."""
    side, config = bench.noise.shape[-1], bench.model.config
    numbers = presets.LARGE_LORA | dict(batch=4, lora_rank=32, guidance=1.0, device=bench.device)
    args = TrainOptions(**numbers | dict(dtype=str(bench.dtype).removeprefix("torch.")))
    trainees = lora_roles(bench, args)
    for task, condition in bench.conditions.items() if "update" in parts else ():
        players = [cached(bench.model, condition, role) for role in ("student", "fake", None)]
        t, prefix = torch.full((1,), 0.5, device=bench.device), bench.words + (side * side if task == "edit" else 0)
        work = sum(plan.sample_flops(config, kind, prefix, side * side, 3, 1, True) for kind in ("fake", "student"))
        optimizers = [trainee.optimizers[0] for trainee in trainees]
        step = partial(update, *players, optimizers, condition, bench.noise, torch.randn_like(bench.noise), t)
        bench.timed(f"{task}, LoRA update, one sample, k = 3 (fake and student once)", step, work / PEAK / 1e12)
    if "train" not in parts:
        return

    def entry(task: str) -> Entry:
        slots = [(8, 8 + side * side // 4)] if task == "edit" else []
        states = torch.randn(bench.words, config.context_in_dim).bfloat16()
        sources = [torch.randn(64, side, side).bfloat16() for _ in slots]
        return Entry(task, "any", states, None, slots, sources, None, (side, side))

    pool = train.Pool([entry(task) for task in ("t2i", "edit") for _ in range(8)])
    flash = recipe.find("flash").resolve({"t2i": ["any"], "edit": ["any"]}, ())
    job = train.Job(
        args,
        pool,
        flash,
        SIGMAS,
        {"base": Network(bench.model)},
        dict(zip(("student", "fake"), trainees)),
        {"fake": args.fake_updates, "student": 1},
    )
    layouts = {"t2i": (bench.words, side * side), "edit": (bench.words + side * side, side * side)}
    planned = plan.make_plan(args, config, flash, 1, 1, layouts)

    def step(number: int) -> None:
        for name, count in job.updates_per_step.items():
            for i in range(count):
                train.update(job, name, count * number + i, 1.0)

    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(2):
        took = seconds(partial(step, number), bench.device)
        what = f"training step {number + 1}, LoRA, batch {args.batch} (fake score {args.fake_updates} times)"
        bench.row(what, took, "", planned.update_flops / PEAK / 1e12, watch.memory(bench.device))
    bench.row("the plan's peak for these steps, GB", "", "", "", planned.peak / 1e9)


def gpu(parts: list[str], dry: bool, out: Path | None) -> None:
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    config, side, words = MMDiTConfig(), 64, 200
    if dry:
        config, side, words = replace(TOY, num_layers=2), 4, 12
    name = "dry, CPU" if dry else torch.cuda.get_device_name()
    head = f"{name}, {dtype}, torch {torch.__version__}, {plan.parameters(config) / 1e9:.2f} billion random parameters"
    noise = torch.randn(1, 64, side, side, device=device)
    model = random_network(config, device, dtype).requires_grad_(False)
    conditions = {
        task: random_condition(config, 1, words - 8, side, sources, noise.to(dtype))
        for task, sources in (("t2i", 0), ("edit", 1))
    }
    bench = Bench(device, dtype, model, words, noise, conditions, times=1 if dry else 3, rows=[])
    print(head + "\n")
    bench.row("what", "first, s", "later, s", "floor, s", "memory, GB")
    bench.row(*["---"] * 5)
    try:
        if "checks" in parts:
            checks(bench)
        if "draw" in parts:
            drawing(bench)
        if "update" in parts or "train" in parts:
            training(bench, parts)
    finally:  # what was measured before an error is kept
        if out:
            out.write_text("\n".join([head, "", *bench.rows, ""]))


PARTS = ["checks", "draw", "update", "train"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("half", choices=["cpu", "gpu"])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"gpu: of {', '.join(PARTS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="cpu: the toy's config alone")
    parser.add_argument("--dry", action="store_true", help="gpu: a tiny network on the CPU")
    parser.add_argument("--out", type=Path, help="gpu: file of the table")
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if args.half == "cpu":
        cpu(args.quick)
    elif args.dry or torch.cuda.is_available():
        gpu(args.parts or PARTS, args.dry, args.out)
    else:
        sys.exit("benchmark.py: no GPU here; `cpu` and `gpu --dry` run anywhere")


if __name__ == "__main__":
    main()
