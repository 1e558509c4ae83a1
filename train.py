"""Training: distil a few-step student (--objective dmd, the default), or pretrain and specialise a teacher (flow).

    pool       every prompt is encoded once: words to states, source (and target) pictures to latents, in the run's
               conditions/. The encoders are freed afterwards: their memory is the trained networks'
    batches    recipe.py decides which task and category comes next; which prompts, which noise and which times follow from
               (seed, step, sample, purpose) alone, so a step counter is all there is to remember of them
    updates    forty lines between two rulers in `train`: who learns, in which order, and what is frozen
    the rest   metrics.jsonl, panels/, grid.png, checkpoints/; nothing there changes a weight

A STEP is one update of the student (dmd) or teacher (flow); the fake score has its own, faster count. SAMPLES are
numbered over the whole update, whatever the number of micro-batches and processes that share it. A MICRO-BATCH is one
turn of the recipe, for all processes together: each takes an equal part of it, so nothing depends on their number.

    python train.py                                                the laptop run, a quarter of an hour or more
    python train.py --prompts mine.jsonl --out runs/mine           the same on prompts and pictures of one's own
    python train.py --objective flow --prompts pairs.jsonl --out runs/teacher            every line needs a "target"
    python train.py --plan --gpus 8 --checkpoint DIR                  what it would take; nothing is loaded or written
    torchrun --nproc_per_node=8 train.py --checkpoint DIR --prompts mine.jsonl           all weights, sharded (FSDP2)
    python train.py --lora-rank 32 --checkpoint DIR --prompts mine.jsonl                 LoRA roles, on one GPU

Exit status: 0 finished; 2 bad input; 1 a value that is not finite; 130 and 143 after Ctrl-C and SIGTERM, which save
first. `--resume` goes on from there, on any number of processes; on a CPU, with as many as before, the run ends with the
bits of an uninterrupted one. With several other programs on the machine, OMP_WAIT_POLICY=passive in the environment
keeps idle threads from taking their cores.

Paper: Qwen-Image-Flash, arXiv 2606.03746. Symbols and conventions: flow.py and dmd.py.
"""

import argparse
import gc
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from types import NoneType
from typing import NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dmd
import flow
import recipe as recipes
import sample
from encoders.conditions import Entry, Pool, cached_pool, encode_pool
from model import Condition, MMDiT, MMDiTConfig, new_lora, open_weights, read_json, write_json, write_tensors
from muon import Muon
from recipe import Prompt
from tools import plan, watch

__all__ = ["Args", "Entry", "FlowArgs", "Pool", "encode_pool", "open_run", "train"]  # what toy/build.py stands on

TOY = Path(__file__).parent / "toy" / "checkpoint"


# ---- the numbers -----------------------------------------------------------------------------------------------------


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    """Every option of a run; the text behind each is its --help. The values are those of the laptop's distillation.

    A network of more than a billion parameters gets LargeArgs' values instead.
    """

    objective: str = option("dmd", "dmd: distil a few-step student; flow: pretrain or specialise a teacher")
    checkpoint: Path = option(TOY, "folder in the published layout: where every network starts")  # noqa: RUF009
    prompts: tuple[Path, ...] = option((), "files of JSON lines; without any, the toy world's own prompts")
    pool: int = option(1024, "without --prompts: how many of the toy's prompts of each task")
    recipe: str = option("flash", "composition, ratio and teachers, by its name in recipe.py")
    out: Path | None = option(None, "folder of this run; default: runs/OBJECTIVE-RECIPE")
    cache: Path | None = option(None, "folder of encoded prompts, which runs may share; default: conditions/ in --out")
    teacher: tuple[str, ...] = option((), "NAME=FOLDER_OR_LORA: specialised teachers besides those in the checkpoint")
    lora_rank: int = option(0, "train LoRAs of this rank, on one copy of the weights for all roles; 0: all weights")
    guidance: float | None = option(None, "the teachers' guidance w, 1 is off; default: model_index.json's")
    resolution: int | None = option(None, "side of sources' and targets' area; default: model_index.json's")
    student_steps: int = option(4, "the student's number of steps, its NFE")
    steps: int = option(500, "updates of the student")
    batch: int = option(12, "samples per update, over all its micro-batches")
    micro_batch: int = option(6, "samples that run at once, over all processes, of one category and bucket")
    seed: int = option(0, "all random draws follow from it")
    resume: bool = option(False, "go on from the newest checkpoint in --out")
    save_every: int = option(50, "steps from one checkpoint to the next")
    panel_every: int = option(50, "steps from one panel and grid to the next")
    device: str | None = option(None, "default: cuda if there is one")
    dtype: str | None = option(None, "of the working weights, bfloat16 or float32; default: the faster one")
    compile: bool = option(False, "torch.compile every block: the first step takes minutes; a CPU wins little")
    recompute: bool = option(False, "compute blocks again in the backward pass: far less memory, a third more work")
    plan: bool = option(False, "print memory, work and time of such a run, and do nothing else")
    gpus: int | None = option(None, "--plan: for so many processes; default: as many as there are")
    peak_tflops: float | None = option(None, "of one GPU in the working dtype; default: known for a few, by name")
    utilisation: float = option(0.4, "--plan: share of that peak which the time is stated for")

    # The optimisation. These are ours, from a prototype of the laptop's size, unless a source is named.
    muon_lr: float = option(0.002, "Muon, for the blocks' matrices; 0: AdamW for those too")
    lr: float = option(2e-4, "AdamW, for all other tensors")
    fake_muon_lr: float = option(0.005, "the fake score's, higher because it has to keep up with the student")
    fake_lr: float = option(5e-4, "the fake score's")
    fake_updates: int = option(2, "updates of the fake score before each of the student; DMD2 takes 5")
    warmup: int = option(10, "steps over which the learning rates rise from 0")
    decay: float = option(0.4, "share of the run, at its end, over which they fall to 0 again")
    clip: float = option(1.0, "largest norm of a gradient (2.0 report, section 4)")
    ema: float = option(0.97, "decay per step of the averaged weights, which are what a run exports")
    time_shift: float = option(1.5, "shift of p(t) towards noise; dmd: of the times at which x_theta is noised again")
    text_dropout: float = option(0.1, "flow: share of samples that see an empty prompt (2.0 report, section 4)")

    @property
    def home(self) -> Path:
        return self.out or Path("runs") / f"{self.objective}-{self.recipe}"

    @property
    def sizes(self) -> list[int]:
        """Sizes of an update's micro-batches; the last is smaller where they do not divide the batch."""
        return [min(self.micro_batch, self.batch - i) for i in range(0, self.batch, self.micro_batch)]


@dataclass
class FlowArgs(Args):
    """The same options with the values of the toy's pretraining, which are ours."""

    objective: str = "flow"
    steps: int = 2000
    batch: int = 96
    micro_batch: int = 16
    save_every: int = 500
    panel_every: int = 500
    muon_lr: float = 0.02
    lr: float = 2e-3
    warmup: int = 100
    decay: float = 0.5
    ema: float = 0.999
    time_shift: float = 1.0


@dataclass
class LargeArgs(Args):
    """The same options with values for a network of the 7B's size. Neither paper gives any. Others' DMD of Qwen-Image and
    its like: AdamW alone, lr and fake_lr 2e-6 to 1e-5, batch 32 to 128, 5 fake updates, clip 1 to 10, EMA .98 to .99,
    1,000 to 3,000 steps. The paper: AdamW, 2,000 iterations. Not run by us."""

    steps: int = 1000
    batch: int = 32
    micro_batch: int = 8
    panel_every: int = 20
    dtype: str | None = "bfloat16"  # a GPU's, also where a CPU only plans
    recompute: bool = True
    muon_lr: float = 0.0
    lr: float = 1e-5
    fake_muon_lr: float = 0.0
    fake_lr: float = 1e-5
    fake_updates: int = 5
    warmup: int = 20
    decay: float = 0.0
    ema: float = 0.98
    time_shift: float = 3.0


@dataclass
class LargeLoraArgs(LargeArgs):
    """With --lora-rank: LightX2V's, which distilled Qwen-Image at rank 32; micro-batches for one GPU."""

    micro_batch: int = 2
    lr: float = 1e-4
    fake_lr: float = 2e-5
    fake_updates: int = 2


def parse(argv: list[str] | None = None) -> Args:
    """The command line as Args or a kind of it, one flag for each field."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--objective", choices=["dmd", "flow"], default="dmd")
    first.add_argument("--checkpoint", type=Path, default=TOY)
    first.add_argument("--lora-rank", type=int, default=0)
    given, config = first.parse_known_args(argv)[0], None
    if (path := given.checkpoint / "transformer" / "config.json").is_file():  # where it is missing, `settle` says so
        config = MMDiTConfig.from_json(path)
    kind = {"dmd": Args, "flow": FlowArgs}[given.objective]
    if config and kind is Args and plan.parameters(config) > 1e9:
        kind = LargeLoraArgs if given.lora_rank else LargeArgs
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    texts = {f.name: f.metadata["help"] for f in fields(Args)}
    for f in fields(kind):
        flag, text = "--" + f.name.replace("_", "-"), texts[f.name] + (f" [{f.default}]" if f.default else "")
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        else:
            one = next((t for t in get_args(f.type) if t is not NoneType), f.type)  # X | None, tuple[X, ...] -> X
            nargs = "+" if isinstance(f.default, tuple) else None
            parser.add_argument(flag, type=one, default=f.default, nargs=nargs, help=text)
    return kind(**vars(parser.parse_args(argv)))


def settle(args: Args) -> Args:
    """Fill in what depends on the checkpoint and the machine. ValueError, FileNotFoundError: what does not fit."""
    index = sample.read_index(args.checkpoint)
    for name in ("steps", "batch", "micro_batch", "student_steps", "fake_updates", "pool", "save_every", "panel_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 is needed")
    if args.dtype not in (None, "bfloat16", "float32"):
        raise ValueError(f"--dtype {args.dtype}: bfloat16 or float32 is expected")
    if uneven := [size for size in args.sizes if size % ranks()]:
        parts = f"--batch {args.batch} in --micro-batch {args.micro_batch} makes parts of {uneven[0]}"
        raise ValueError(f"{parts} samples, not to be shared equally by {ranks()} processes; take multiples of these")
    recipes.find(args.recipe), find_teachers(args)  # their errors, before anything takes time
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    guidance = float(index["guidance"] if args.guidance is None else args.guidance)
    resolution, dtype = args.resolution or index["resolution"], args.dtype or faster_dtype(device)
    return replace(args, out=args.home, guidance=guidance, resolution=resolution, device=device, dtype=dtype)


def faster_dtype(device: str) -> str:
    """bfloat16 on a GPU; on a CPU whichever multiplies faster, for some have no bf16 units and emulate them."""

    def seconds(dtype: torch.dtype) -> float:
        a, b, spent = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 768, dtype=dtype), []
        for _ in range(20):
            start = time.perf_counter()
            _ = a @ b
            spent.append(time.perf_counter() - start)
        return min(spent)  # the least disturbed one

    return "bfloat16" if device != "cpu" or seconds(torch.bfloat16) < seconds(torch.float32) else "float32"


def generator(seed: int, step: int, number: int, purpose: str) -> torch.Generator:
    """The source of every random draw in this file. It depends on these four alone, so neither a resumed run nor another
    number of processes changes a draw; and it is the CPU's everywhere, so a GPU draws the same numbers."""
    digest = hashlib.blake2b(f"{seed}/{step}/{number}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


# ---- one process or many: all that knows of ranks --------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined() -> Iterator[None]:
    """Within, the processes that torchrun started are one group; a process of its own needs none."""
    if outermost := "RANK" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # from here on "cuda" is this process's own
        # Patient, because ranks wait while rank 0 writes a student. Notes among them travel by gloo, tensors by nccl.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    try:
        yield
    finally:
        if outermost:
            dist.destroy_process_group()


def everyone(mine) -> list:
    """This value of every rank, on every rank."""
    values = [mine] * ranks()
    if ranks() > 1:
        dist.all_gather_object(values, mine)
    return values


@contextmanager
def together() -> Iterator[None]:
    """All ranks leave this at the same time, and an error of one is an error of all: else the others would wait in their
    next exchange, for ever, or take an update without it."""
    error = None
    try:
        yield
    except (FloatingPointError, ValueError, OSError) as caught:
        error = caught
    if errors := list(filter(None, everyone(error))):
        raise error or errors[0]


def by_first(work: Callable):
    """What `work` returns to rank 0, which alone does it."""
    result = None
    with together():
        result = work() if rank() == 0 else None
    return everyone(result)[0]


def shard(model: MMDiT, args: Args) -> None:
    """FSDP2: a rank keeps its rows of every tensor, and a block's are gathered, in the working dtype, while it computes.
    What is kept stays as it was loaded, fp32 for a network that learns; gradients come back as their fp32 mean."""
    from torch.distributed.device_mesh import init_device_mesh  # these take seconds to import; a laptop does not wait
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # we do not write to what it returns
    how = {
        "mesh": init_device_mesh(torch.device(args.device).type, (ranks(),)),
        # The network casts its inputs itself; z and t in bf16 would be rounded too early.
        "mp_policy": MixedPrecisionPolicy(getattr(torch, args.dtype), torch.float32, cast_forward_inputs=False),
        # The root's too: by default what it gathered stays, and after a forward without backward outlives an update.
        "reshard_after_forward": True,
    }
    for block in model.transformer_blocks:
        fully_shard(block, **how)
    fully_shard(model, **how)
    register_fsdp_forward_method(model, "prefix")


def own(tensor: Tensor) -> Tensor:
    """A sharded tensor's rows of this rank, in the same memory; any other tensor as it is."""
    if not dist.is_initialized():
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, by all ranks at once; any other as it is."""
    return tensor if own(tensor) is tensor else tensor.full_tensor()


def say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


def average_over_ranks(tensors: list[Tensor]) -> None:
    for tensor in tensors if ranks() > 1 else ():
        dist.all_reduce(tensor)
        tensor /= ranks()


# ---- batches ---------------------------------------------------------------------------------------------------------


def toy_prompts(args: Args) -> list[Prompt]:
    """`args.pool` prompts of each task that the recipe has, in equal parts from each of its categories."""
    from toy import world  # a run on one's own prompts does not need the toy

    prompts, wanted = [], recipes.find(args.recipe)
    kinds = {"t2i": wanted.t2i or world.CATEGORIES, "edit": wanted.edit or world.FAMILIES}
    for task, parts in zip(recipes.TASKS, wanted.ratio, strict=True):
        for kind in kinds[task] if parts else ():
            count = math.ceil(args.pool / len(kinds[task]))
            prompts += world.training_prompts(task, kind, count, args.seed, targets=args.objective == "flow")
    return prompts


@dataclass
class Batch:
    """A rank's samples of one task and bucket, on the device. Draws and target are fp32, conditions of the working dtype."""

    task: str
    category: str
    condition: Condition
    empty: Condition | None  # the same without words
    target: Tensor | None  # (B, 64, h, w)
    noise: Tensor  # (B, 64, h, w): where a path or a rollout starts
    xi: Tensor  # (B, 64, h, w): noise for x_theta
    t: Tensor  # (B,) in [0, 1]
    k: int | None = None  # the student's step (dmd)

    @property
    def tokens(self) -> tuple[int, int]:
        """Of one sample, in the prefix and in the target."""
        more = sum(3 * (stop - start) for start, stop in self.condition.slots)  # a slot stands for four
        return self.condition.states.shape[1] + more, self.noise[0, 0].numel()


def batches(args: Args, pool: Pool, recipe: recipes.Recipe, purpose: str, update: int) -> Iterator[tuple[Batch, float]]:
    """The micro-batches of one update, this rank's part of each, with the micro-batch's share of the update's samples.

    One task, category and bucket in each, and for DMD one k, because the teachers' weights depend on them: so they are
    the same on all ranks, and so is the number of forwards. The networks (`purpose`) count their own updates. Were
    student and fake score to share one count, then at a ratio of 1:1 and five fake updates for each of the student, the
    student would see one task for ever.
    """
    for micro, size in enumerate(args.sizes):
        task, category, _ = recipe.turn(update * len(args.sizes) + micro)
        rngs = [generator(args.seed, update, micro * args.micro_batch + i, purpose) for i in range(size)]
        entries = pool.draw(rngs, task, category)
        mine = slice(rank() * size // ranks(), (rank() + 1) * size // ranks())
        length, k, wordless = max(len(e.states) for e in entries), None, False  # padded as the whole is, on every rank
        rng = generator(args.seed, update, micro, purpose + " micro-batch")
        if args.objective == "flow":
            wordless = torch.rand((), generator=rng).item() < args.text_dropout  # all at once: one layout
        else:
            lowest = 1 if recipe.first_step_weight and args.student_steps > 1 else 0  # step 0 has a loss of its own
            k = torch.randint(lowest, args.student_steps, (), generator=rng).item()
        yield make_batch(args, entries[mine], rngs[mine], length, k, wordless), size / args.batch


def make_batch(
    args: Args,
    entries: list[Entry],
    rngs: list[torch.Generator],
    length: int = 0,
    k: int | None = None,
    wordless: bool = False,
) -> Batch:
    """Entries of one bucket, and for each the generator that its noises and its time are drawn from, in this order; texts
    are padded to the longest, or to `length`."""
    device, dtype, shape = args.device, getattr(torch, args.dtype), (64, *entries[0].size)
    noise = torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(device)  # (B, 64, h, w)
    xi = torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(device)  # (B, 64, h, w)
    u = torch.stack([torch.rand((), generator=rng) for rng in rngs])  # (B,)
    shift = args.time_shift
    t = flow.logit_normal(u, math.log(shift)) if args.objective == "flow" else flow.shifted_uniform(u, shift)  # (B,)
    sources = [torch.stack(column).to(device, dtype) for column in zip(*(e.sources for e in entries), strict=True)]

    def condition(states: list[Tensor]) -> Condition:
        lengths = torch.tensor([len(s) for s in states])  # (B,)
        longest = max(length if states is words else 0, *lengths.tolist())
        padded = torch.stack([F.pad(s, (0, 0, 0, longest - len(s))) for s in states])  # (B, L, C)
        real = torch.arange(longest) < lengths[:, None]  # (B, L)
        return Condition(padded, real, sources, entries[0].slots).to(device, dtype)

    words, empty = [e.states for e in entries], [e.empty for e in entries]
    return Batch(
        entries[0].task,
        entries[0].category,
        condition(empty if wordless else words),
        condition(empty) if empty[0] is not None else None,
        torch.stack([e.target for e in entries]).to(device).float() if entries[0].target is not None else None,
        noise,
        xi,
        t.to(device),
        k,
    )


# ---- networks --------------------------------------------------------------------------------------------------------


class Network(NamedTuple):
    """One player: a model, and where several play on the same weights its role there (None: the weights alone)."""

    model: MMDiT
    role: str | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """What the role's training changes, by name."""
        if self.role is None:
            return dict(self.model.named_parameters())
        lora = self.model.lora(self.role)
        return {f"{layer}.{x}": p for layer, (a, b, _) in lora.items() for x, p in (("A", a), ("B", b))}


def load(args: Args, folder: Path, dtype: torch.dtype) -> MMDiT:
    """A transformer folder on the device."""
    with together():
        model = MMDiT.from_pretrained(folder, dtype, args.device)
    model.gradient_checkpointing = args.recompute
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # forms of one block: gradient or none, prefix or whole, each role
        for block in model.transformer_blocks:
            block.forward = torch.compile(block.forward, dynamic=True)  # not the block: FSDP's part stays outside
    return model


def learner(args: Args, role: str, base: Network | None) -> Network:
    """A network to train: with weights of its own in fp32, or as a fresh LoRA on those of `base`."""
    if base is None:
        return Network(load(args, args.checkpoint / "transformer", torch.float32))
    base.model.add_role(role, new_lora(base.model, args.lora_rank, rng=generator(args.seed, 0, 0, role)))
    return Network(base.model, role)


def frozen(args: Args, places: dict[str, Path]) -> dict[str, Network]:
    """Networks that never learn, in the working dtype: the base's own weights, and the specialised teachers. One that is
    a LoRA file plays on the base's weights."""
    dtype = getattr(torch, args.dtype)
    networks = {"base": Network(load(args, args.checkpoint / "transformer", dtype))}
    for name, place in places.items():
        if place.is_dir():
            networks[name] = Network(load(args, place, dtype))
        else:
            base = networks["base"].model
            base.add_role(name, sample.read_lora(place, base)[0])
            networks[name] = Network(base, name)
    for model in {id(n.model): n.model for n in networks.values()}.values():
        model.requires_grad_(False).to(dtype)
        if dist.is_initialized() and not args.lora_rank:  # with LoRA one GPU holds them whole, and each rank does
            shard(model, args)
    return networks


def velocity(network: Network, condition: Condition) -> flow.Velocity:
    """The network under one condition, as flow.py and dmd.py take it. Good until the weights change.

    Where no gradient is wanted, keys and values of text and sources are computed once and serve all further calls: the
    first steps of a rollout, and all of them for the fake score. With gradient they are part of the graph.
    """
    model, prefix = network.model, None

    def call(z: Tensor, t: Tensor) -> Tensor:
        nonlocal prefix
        with model.playing(network.role):
            if torch.is_grad_enabled() or not model.config.causal_condition:
                return model(z, t, condition)  # (B, 64, h, w)
            prefix = prefix or model.prefix(condition)
            return model(z, t, condition, prefix)  # (B, 64, h, w)

    return call


def guided(args: Args, network: Network, words: Condition, empty: Condition | None) -> flow.Velocity:
    """A teacher, with the run's guidance: away from what it would draw from the same sources without words."""
    v = velocity(network, words)
    return v if args.guidance == 1 else flow.guided(v, velocity(network, empty), args.guidance)


def first_step(v: flow.Velocity, teacher: flow.Velocity, sigmas: list[float], batch: Batch) -> Tensor:
    """The first-step loss, (): the teacher walks to where the student's first step ends, in 5 steps (ours)."""
    walk = [sigmas[0] + (sigmas[1] - sigmas[0]) * i / 5 for i in range(6)]
    return dmd.first_step_loss(v, batch.noise, flow.euler(teacher, batch.noise, walk), walk[-1]).mean()


class Trainee:
    """A network in training: `weights` compute in the working dtype, fp32 `masters` learn, `average` is their EMA.

    Masters, because bf16 has 8 bits: an update below 1/512 of its weight is rounded away, and most are. An fp32 network,
    a LoRA's factors and the rows that a rank keeps under FSDP are their own masters. Muon trains the blocks' matrices
    (but not a LoRA's), AdamW the rest.
    """

    def __init__(self, name: str, network: Network, args: Args, muon_lr: float, lr: float, ema: float):
        self.name, self.network, self.clip, self.ema, self.updates = name, network, args.clip, ema, 0
        self.sharded = dist.is_initialized() and network.role is None
        if self.sharded:
            shard(network.model, args)
        self.names, self.weights = (list(column) for column in zip(*network.parameters().items(), strict=True))
        self.masters = self.weights
        if not self.sharded and network.role is None and args.dtype != "float32":
            self.masters = [w.detach() for w in self.weights]  # hold the fp32 storage when the model is cast
            network.model.to(getattr(torch, args.dtype))
        self.average = [m.detach().clone() for m in self.masters] if ema else []
        self.optimizers: list[torch.optim.Optimizer] = []
        matrices = muon_lr and network.role is None
        muon, rest = [], []
        for n, m in zip(self.names, self.masters, strict=True):
            (muon if matrices and m.ndim == 2 and n.startswith("transformer_blocks.") else rest).append(m)
        self.optimizers = [torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, fused=True)]
        if muon:
            self.optimizers.append(Muon(muon, lr=muon_lr))
        self.rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.seen: list[tuple[str, int | None, list[float]]] = []  # task, k and t of what is in the gradient

    def backward(self, losses: Tensor, share: float, batch: Batch) -> None:
        """Add `share` times the mean of losses, (B,) or (), to the gradient. Between micro-batches it is fp32."""
        with together():
            if not losses.isfinite().all():
                bad = batch.t[~losses.isfinite()] if losses.ndim else batch.t
                raise FloatingPointError(f"the {self.name}'s loss is not finite at t = {bad.tolist()}")
        (share * losses.mean()).backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            if master is not weight:
                master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                weight.grad = None
        self.seen.append((batch.task, batch.k, batch.t.tolist()))

    def update(self, rate: float) -> float:
        """Clip, one step at `rate` times the learning rates, average. Returns the gradient's norm before clipping."""
        if not self.sharded:  # sharded ones are averaged in the backward pass
            average_over_ranks([m.grad for m in self.masters])
        norm = whole(nn.utils.clip_grad_norm_(self.masters, self.clip)).item()
        if not math.isfinite(norm):  # on all ranks, for it is the norm of the mean over them
            seen = "; ".join(f"task {task}, k = {k}, t = {t}" for task, k, t in sum(everyone(self.seen), []))
            raise FloatingPointError(f"the {self.name}'s gradient has norm {norm} after {seen}")
        for optimizer, full in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * full
            optimizer.step()
            optimizer.zero_grad()
        self.updates += 1
        self.seen.clear()
        with torch.no_grad():
            self.refresh()
            if self.ema:  # a young average forgets faster, or a short run would export its initial weights
                decay = min(self.ema, (1 + self.updates) / (10 + self.updates))
                torch._foreach_lerp_(list(map(own, self.average)), list(map(own, self.masters)), 1 - decay)
        return norm

    def refresh(self) -> None:
        if self.masters is not self.weights:
            torch._foreach_copy_(self.weights, self.masters)

    @contextmanager
    def averaged(self) -> Iterator[Network]:
        """Within, the network is its own average. The two change places, which takes no memory."""
        self.swap()
        try:
            yield self.network
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for average, master in zip(self.average, self.masters, strict=True) if self.ema else ():
            kept = own(master).clone()
            own(master).copy_(own(average))
            own(average).copy_(kept)
        self.refresh()

    def export(self) -> MMDiT | None:
        """The network on the CPU, in bf16, by itself, a LoRA merged; to rank 0, the others help to gather it."""
        model = self.network.model
        if self.network.role is None:
            tensors = {}
            for name, weight in zip(self.names, self.weights, strict=True):
                tensor = whole(weight.detach())
                tensors[name] = tensor.to("cpu", torch.bfloat16) if rank() == 0 else None
        elif rank() == 0:  # no copies where they are on the CPU in bf16 already, so `merge` must not see these
            weights = model.state_dict().items()
            tensors = {n: w.to("cpu", torch.bfloat16, copy=True) for n, w in weights if ".adapters." not in n}
        if rank() > 0:
            return None
        with torch.device("meta"):
            alone = MMDiT(model.config)
        alone.load_state_dict(tensors, assign=True)
        if self.network.role is not None:
            alone.merge(model.lora(self.network.role))
        return alone

    def state(self) -> dict[str, Tensor]:
        """All that the next update depends on, by name; of sharded tensors this rank's rows."""
        found = {"updates": torch.tensor(self.updates)}
        for kind, tensors in (("master", self.masters), ("average", self.average)):
            found |= {f"{kind} {n}": t for n, t in zip(self.names, tensors, strict=False)}
        for n, master in zip(self.names, self.masters, strict=True):
            for optimizer in self.optimizers:
                found |= {f"{kind} {n}": t for kind, t in optimizer.state.get(master, {}).items()}
        return {name: own(t.detach()).to("cpu").contiguous() for name, t in found.items()}

    @torch.no_grad()
    def restore(self, files: list[Path]) -> None:
        """From `state` as any number of ranks wrote it: their rows together are the whole, of which this rank takes its own."""
        masters = dict(zip(self.names, self.masters, strict=True))
        averages = dict(zip(self.names, self.average, strict=False))
        states = {m: o.state[m] for o in self.optimizers for m in o.param_groups[0]["params"]}
        with ExitStack() as stack:
            opened = [stack.enter_context(open_weights(file)) for file in files]
            for name in opened[0].keys():
                parts = [file.get_tensor(name) for file in opened]
                tensor = torch.cat(parts) if parts[0].ndim else parts[0]
                kind, _, n = name.partition(" ")
                if kind == "updates":
                    self.updates = tensor.item()
                    continue
                target = {"master": masters, "average": averages}.get(kind, {}).get(n)
                if target is None:  # one of the optimiser's
                    like = masters[n] if tensor.ndim else tensor.to(masters[n].device)
                    target = states[masters[n]][kind] = torch.zeros_like(like)
                if own(target) is not target:  # as FSDP2 divides: the last ranks may have fewer rows, or none
                    tensor = [*tensor.chunk(ranks()), *[tensor[:0]] * ranks()][rank()]
                own(target).copy_(tensor)
        self.refresh()


def find_teachers(args: Args) -> dict[str, Path]:
    """Specialised teachers by name: the checkpoint's teachers/NAME (a folder, or a LoRA's NAME.safetensors), and --teacher
    NAME=FOLDER_OR_LORA, which goes first."""
    places = sorted((args.checkpoint / "teachers").glob("*"))
    found = {p.stem: p for p in places if p.is_dir() or p.suffix == ".safetensors"}
    for given in args.teacher:
        name, _, place = given.partition("=")
        if not name or name in ("base", "student", "fake") or not place or not Path(place).exists():
            raise ValueError(f"--teacher {given}: NAME=FOLDER_OR_LORA is expected; NAME is not base, student or fake")
        found[name] = Path(place)
    return found


# ---- the run's folder ------------------------------------------------------------------------------------------------


def open_run(args: Args) -> tuple[Args, Path | None]:
    """Settle the arguments and open the run's folder: the arguments, and the checkpoint to go on from (None: a new run).

    A folder that holds anything is only ever continued, with --resume and the same arguments; else ValueError.
    """
    return by_first(lambda: _open_run(args))


def _open_run(args: Args) -> tuple[Args, Path | None]:
    out, before = args.home, None
    if args.resume:
        if not (out / "args.json").is_file():
            raise ValueError(f"{out}: no run to go on with; start one without --resume, or name its folder with --out")
        before = read_json(out / "args.json")["arguments"]
    if not before and out.is_dir() and {f.name for f in out.iterdir()} - {"args.json", "conditions"}:  # a failed start
        raise ValueError(f"{out}: not empty; --resume goes on with the run in it, --out names another folder")
    args = settle(replace(args, dtype=args.dtype or before["dtype"]) if before else args)  # not measured a second time
    now = json.loads(json.dumps(asdict(args), default=str))
    contents = {p: hashlib.sha256(p.read_bytes()).hexdigest()[:8] if p.is_file() else "missing" for p in args.prompts}
    now["prompts"] = [f"{path} ({content})" for path, content in contents.items()]
    free = {"resume", "out", "steps", "save_every", "panel_every", "device", "compile", "recompute", "cache"}
    for name in now.keys() - free - {"plan", "gpus", "peak_tflops", "utilisation"}:
        if before and now[name] != before.get(name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {now[name]}, but the run in {out} was started with {before.get(name)}")
    out.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    here = {"host": platform.node(), "pid": os.getpid(), "processes": ranks()}
    write_json(out / "args.json", {"arguments": now, "versions": versions, "source": watch.source(), "started": here})
    return args, newest(out) if before else None


def save(out: Path, step: int, trainees: dict[str, Trainee]) -> None:
    """Write checkpoints/STEP/NAME-RANK-of-RANKS.safetensors aside, rename the folder into place, keep the last two.

    A rename happens or does not: a writer killed before it leaves a folder that is not named by a number, which nothing
    reads. The bytes are forced to the disk first, or a power cut could keep the new name without them. OSError: the disk
    is full, say; what was written aside is removed, and the checkpoint before it stays.
    """
    aside, place = out / "checkpoints" / "unfinished", out / "checkpoints" / f"{step:08d}"

    def publish() -> None:
        shutil.rmtree(place, ignore_errors=True)
        os.replace(aside, place)
        for old in whole_checkpoints(out)[:-2]:
            shutil.rmtree(old)

    try:
        by_first(lambda: (shutil.rmtree(aside, ignore_errors=True), aside.mkdir(parents=True)) and None)
        with together():
            for name, trainee in trainees.items():
                if trainee.sharded or rank() == 0:
                    mine, all = (rank(), ranks()) if trainee.sharded else (0, 1)
                    path = aside / f"{name}-{mine:04d}-of-{all:04d}.safetensors"
                    write_tensors(path, trainee.state())
                    with open(path, "rb+") as file:
                        os.fsync(file.fileno())
        by_first(publish)
    except OSError as error:
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        kept = ", ".join(f.name for f in whole_checkpoints(out)[-1:]) or "none yet"
        raise OSError(f"no checkpoint of step {step} ({error}); the last whole one: {kept}") from None


def whole_checkpoints(out: Path) -> list[Path]:
    """A run's whole checkpoints, oldest first."""
    return sorted(f for f in (out / "checkpoints").glob("*") if f.name.isdigit())


def newest(out: Path) -> Path | None:
    """The newest checkpoint; None for a run that ended before its first. The metrics are cut back to its step."""
    found = [None, *whole_checkpoints(out)][-1]
    if (metrics := out / "metrics.jsonl").is_file():
        lines = metrics.read_text().splitlines(keepends=True)
        metrics.write_text("".join(lines[: int(found.name) if found else 0]))
    return found


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within, Ctrl-C and SIGTERM only add their number to the list; who works there ends when it suits."""
    noted: list[int] = []
    before = {s: signal.signal(s, lambda number, frame: noted.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextmanager
def located(where: Callable[[], str]) -> Iterator[None]:
    """Within, a FloatingPointError says where it happened."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{where()}: {error}") from None


# ---- the loop --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(args: Args, pool: Pool, network: Network, panel: dict[str, Tensor], batch: Batch, step: int) -> None:
    """panels/STEP.png, of a micro-batch; and grid.png: two prompts of every category, edits below their (last) source.
    All ranks draw, as the weights may be spread over them, and the first one paints."""
    grid = {"t2i": [], "source": [], "edit": []}
    chosen = [entry for place in pool.places.values() for entry in place[:2]]
    for number, entry in enumerate(chosen):
        one = make_batch(args, [entry], [generator(args.seed, 0, number, "grid")])
        v, sigmas = velocity(network, one.condition), flow.student_sigmas(args.student_steps)
        if args.objective == "flow":
            v, sigmas = guided(args, network, one.condition, one.empty), flow.student_sigmas(20)
        grid["source"] += [source[0] for source in one.condition.sources[-1:]]  # (64, h, w)
        grid[entry.task].append(flow.euler(v, one.noise, sigmas)[0])  # (64, h, w)
    turn = "" if args.objective == "flow" else f"k {batch.k}, "  # the student's step
    heads, rows = [f"{turn}t {t:.2f}" for t in batch.t.tolist()[:8]], {what: z[:8] for what, z in panel.items()}
    pictures = {args.out / "panels" / f"{step:06d}.png": (rows, heads), args.out / "grid.png": (grid, [])}
    vae = args.checkpoint / "vae"
    by_first(lambda: [watch.paint(vae, args.device, *what, path) for path, what in pictures.items()] and None)


def train(args: Args, pool: Pool, state: Path | None) -> Path:
    """Train on the pool; args and state are open_run's. Returns out/student, or out/transformer for the flow objective.

    SystemExit(128 + signal) after a Ctrl-C or SIGTERM, when all is saved. FloatingPointError, before the update, where
    a loss or gradient is not finite.
    """
    flows = args.objective == "flow"
    found = {} if flows else find_teachers(args)
    recipe = recipes.find(args.recipe)
    if not flows and (missing := sorted(recipe.teachers - found.keys())):
        say(f"no teacher {', '.join(missing)} here: the base teacher takes its part")
    recipe = recipe.resolve(recipes.categories(pool.entries), found)

    teachers = {} if flows and not args.lora_rank else frozen(args, {n: found[n] for n in sorted(recipe.teachers)})
    base = teachers["base"] if args.lora_rank else None
    student = learner(args, "student", base)
    student = Trainee("teacher" if flows else "student", student, args, args.muon_lr, args.lr, args.ema)
    trainees = {"student": student}
    if not flows:
        fake = Trainee("fake score", learner(args, "fake", base), args, args.fake_muon_lr, args.fake_lr, ema=0)
        trainees["fake"], sigmas = fake, flow.student_sigmas(args.student_steps)
    start = int(state.name) if state else 0
    with together():
        for name, trainee in trainees.items() if state else ():
            trainee.restore(sorted(state.glob(f"{name}-*.safetensors")))

    bar = tqdm(range(start, args.steps), args.objective, args.steps, initial=start, unit="step", disable=rank() > 0)
    here = located(lambda: f"step {step + 1}, task {batch.task}, k = {batch.k}")
    board = watch.open_board(args.out) if rank() == 0 else None
    metrics = args.out / "metrics.jsonl" if rank() == 0 else os.devnull
    with here, noted_signals() as signals, open(metrics, "a") as metrics:
        for step in bar:
            began, log = time.perf_counter(), watch.Log()
            rate = min(1, (step + 1) / args.warmup) if args.warmup else 1.0
            rate *= min(1, (args.steps - step) / (args.decay * args.steps)) if args.decay else 1.0
            # ==========================================================================================================
            if flows:
                for batch, share in batches(args, pool, recipe, "flow", step):
                    v = velocity(student.network, batch.condition)
                    losses = flow.flow_matching_loss(v, batch.target, batch.noise, batch.t)  # (B,)
                    student.backward(losses, share, batch)
                    log.add("loss", losses, batch)
                log.norms["grad_norm"] = student.update(rate)
            else:
                # 1. The fake score learns what the student draws by now. The student draws, and does not learn.
                for update in range(step * args.fake_updates, (step + 1) * args.fake_updates):
                    for batch, share in batches(args, pool, recipe, "fake", update):
                        drawing, learning = (velocity(m.network, batch.condition) for m in (student, fake))
                        with torch.no_grad():
                            x_theta = dmd.rollout(drawing, batch.noise, sigmas, batch.k)
                        losses = dmd.fake_score_loss(learning, x_theta, batch.xi, batch.t)  # (B,)
                        fake.backward(losses, share, batch)
                        log.add("fake_loss", losses, batch)
                    log.norms["fake_grad_norm"] = fake.update(rate)
                # 2. The student learns once. Teachers and fake score look on, without gradient (dmd_gradient has none).
                for batch, share in batches(args, pool, recipe, "student", step):
                    v = velocity(student.network, batch.condition)
                    x_theta = dmd.rollout(v, batch.noise, sigmas, batch.k)  # gradient through its step k alone
                    weights = recipe.weights(batch.k, args.student_steps, batch.task, batch.category)
                    chosen = {m: guided(args, teachers[m], batch.condition, batch.empty) for m in weights}
                    real, seen = dmd.mixture(weights, chosen), velocity(fake.network, batch.condition)
                    with together():  # a value that is not finite on one rank stops all of them
                        g, x0_real, x0_fake = dmd.dmd_gradient(real, seen, x_theta, batch.xi, batch.t)
                    loss = dmd.surrogate_loss(x_theta, g)  # ()
                    if recipe.first_step_weight:
                        loss = loss + recipe.first_step_weight * first_step(v, real, sigmas, batch)
                    student.backward(loss, share, batch)
                    log.add("loss", 0.5 * g.square().flatten(1).mean(1), batch)  # the surrogate's value, per sample
                log.norms["grad_norm"] = student.update(rate)
            # ==========================================================================================================
            seconds, done = time.perf_counter() - began, step + 1
            pace = {"seconds": round(seconds, 4), "images_per_second": round(args.batch / seconds, 2)}
            pace |= {"mfu": plan.utilisation(args, student.network.model.config, recipe, log.losses, seconds)}
            pace |= {"memory_gb": watch.memory(args.device)}
            line = log.line(everyone, step=done, rate=rate, **pace)
            with together():
                watch.record(line, metrics, board)
            bar.set_postfix_str(watch.summary(line), refresh=False)
            if done % args.panel_every == 0 or done == args.steps:
                if flows:
                    z = flow.path(batch.target, batch.noise, batch.t)
                    with torch.no_grad():
                        x0 = flow.x0_from_velocity(z, v(z, batch.t), batch.t)
                    panel = {"clean": batch.target, "noised": z, "x0": x0}  # (B, 64, h, w) each
                else:
                    panel = {"x_theta": x_theta.detach(), "x0_real": x0_real, "x0_fake": x0_fake}
                with student.averaged() as network:
                    draw(args, pool, network, panel, batch, done)
            stop = max(everyone(signals[0] if signals else 0))
            if done % args.save_every == 0 or done == args.steps or stop:
                save(args.out, done, trainees)
            if stop and done < args.steps:
                bar.close()
                say(f"stopped after step {done}; --resume goes on from there")
                raise SystemExit(128 + stop)
    bar.close()
    folder = args.out / ("transformer" if flows else "student")
    with student.averaged() as network, together():
        alone = student.export()
        if rank() == 0:
            if args.lora_rank:  # for the base checkpoint, here and elsewhere; for a teacher, what --teacher reads
                lora, file = network.model.lora(network.role), args.out / "lora.safetensors"
                sample.write_lora(file, lora) if flows else sample.export_lora(file, lora, sigmas[:-1])
            if flows:
                alone.save_pretrained(folder)
            else:
                sample.export(args.checkpoint, alone, sigmas[:-1], folder)
    return folder


def run(args: Args) -> None:
    if args.plan:
        args = settle(args)
        return say(plan.describe(args, args.gpus or ranks(), find_teachers(args)))
    args, state = open_run(args)
    flows, cuda = args.objective == "flow", args.device.startswith("cuda")
    if not args.prompts and args.resolution != 128:
        raise ValueError(f"--resolution {args.resolution}: the toy world's own prompts have 128; give --prompts FILE")
    prompts = recipes.read_prompts(args.prompts) if args.prompts else toy_prompts(args)
    recipes.find(args.recipe).resolve(recipes.categories(prompts), ())  # what is missing, before the encoding
    counts = Counter(f"{prompt.task} {prompt.category}" for prompt in prompts)
    say("prompts: " + ", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    cache, dtype = args.cache or args.out / "conditions", torch.bfloat16 if cuda else torch.float32
    kinds = {"resolution": args.resolution, "empty": flows or args.guidance != 1, "targets": flows}
    ours = {"share": (rank(), ranks()), "together": together}
    pool = cached_pool(cache, prompts, args.checkpoint, dtype=dtype, device=args.device, **kinds, **ours)
    del prompts
    gc.collect(), torch.cuda.empty_cache()  # of the encoders
    say(f"{args.out}: kill -TERM {os.getpid()} stops after the step at hand, and --resume goes on")
    folder = train(args, pool, state)
    say(f"finished: {folder}")
    if not flows and not args.prompts:  # the toy world has a judge
        from eval import compare

        by_first(lambda: compare(folder, args.checkpoint, args.out) and None)


def main(argv: list[str] | None = None) -> None:
    with joined():
        run(parse(argv))


if __name__ == "__main__":
    try:
        main()
    except (FloatingPointError, ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)  # the checkpoints are from before it
