"""Training: distil a few-step student (--objective dmd, the default), or pretrain and specialise a teacher (flow).

What happens, in this order:

    pool       every prompt is encoded once: words to states, source (and target) pictures to latents. The language
               model is freed afterwards, so that it never shares memory with the networks in training
    turns      recipe.py decides which task and category a micro-batch has; which prompts, which noise and which times
               follow from (seed, step, sample, purpose) alone. A step counter is all there is to remember of them
    updates    the forty lines between two rulers in `train`: who learns, in which order, and what is frozen
    the rest   metrics.jsonl, panels, grid.png, checkpoints; nothing there changes a weight

Numbering: a STEP is one update of the student (dmd) or of the teacher (flow); the fake score has its own, faster count.
SAMPLES are numbered over the whole update, whatever the number of micro-batches (or, later, processes) that share it.

Exit status: 0 finished; 2 bad input; 1 a value that is not finite; 130 and 143 after Ctrl-C and SIGTERM, which save
first. `--resume` goes on from there; on a CPU the run ends with the bits of an uninterrupted one.

    python train.py                                                the laptop run, about five minutes on two cores
    python train.py --prompts mine.jsonl --out runs/mine           the same with prompts and pictures of one's own
    python train.py --objective flow --prompts pairs.jsonl --out runs/teacher         every line needs a "target"

Paper: Qwen-Image-Flash, arXiv 2606.03746. Symbols: flow.py and dmd.py.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import dmd
import flow
import recipe as recipes
import sample
from encoders.vae import VAE
from model import Condition, MMDiT, read_json, write_json
from recipe import Prompt

TOY = Path(__file__).parent / "toy" / "checkpoint"


# ---- the numbers -----------------------------------------------------------------------------------------------------


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    """Every option of a run; the text behind each is its --help. The values are the laptop's distillation.

    The 7B published networks: neither paper gives its numbers. Seen in others' DMD of Qwen-Image and its like: AdamW alone
    (muon_lr and fake_muon_lr 0) with lr and fake_lr 2e-6 to 1e-5 for full weights, batch 32 to 128, 5 fake updates for
    each student update, clip 1 to 10, EMA .98 to .99, 1,000 to 3,000 steps; the paper itself: AdamW, 2,000 iterations.
    """

    objective: str = option("dmd", "dmd: distil a few-step student; flow: pretrain or specialise a teacher")
    checkpoint: Path = option(TOY, "folder in the published layout: where every network starts")
    prompts: tuple[Path, ...] = option((), "files of JSON lines; without any, the toy world's own prompts")
    pool: int = option(1024, "without --prompts: how many of the toy's prompts of each task")
    recipe: str = option("flash", "composition, ratio and teachers, by its name in recipe.py")
    out: Path | None = option(None, "folder of this run (default: runs/OBJECTIVE-RECIPE)")
    teacher: tuple[str, ...] = option((), "NAME=FOLDER: a specialised teacher besides the checkpoint's teachers/")
    guidance: float | None = option(None, "the teachers' guidance w (default: model_index.json's, else 1 = off)")
    resolution: int | None = option(None, "side of the area of sources and targets (default: model_index.json's)")
    student_steps: int = option(4, "the student's number of steps (NFE)")
    steps: int = option(150, "updates of the student")
    batch: int = option(48, "samples per update, over all micro-batches")
    micro_batch: int = option(16, "samples that run at once; dmd: of one task and category")
    seed: int = option(0, "all random draws follow from it")
    resume: bool = option(False, "go on from the newest checkpoint in --out")
    save_every: int = option(100, "steps between two checkpoints")
    panel_every: int = option(50, "steps between two panels and grids")
    device: str | None = option(None, "default: cuda if there is one")
    dtype: str | None = option(None, "of the working weights: bfloat16 or float32 (default: the faster one)")
    compile: bool = option(False, "torch.compile every block: a minute at first, pays in long runs")

    # The optimisation. All of these are ours, from a prototype of this size, unless a source is named.
    muon_lr: float = option(0.004, "Muon, for the blocks' matrices; 0: AdamW for those too")
    lr: float = option(4e-4, "AdamW, for all other tensors")
    fake_muon_lr: float = option(0.01, "the same two for the fake score, which has to keep up with the student")
    fake_lr: float = option(1e-3, "AdamW")
    fake_updates: int = option(2, "updates of the fake score before each of the student (5 in DMD2)")
    warmup: int = option(10, "steps over which the learning rates rise from 0")
    decay: float = option(0.0, "share of the run, at its end, over which they fall to 0 again")
    clip: float = option(1.0, "largest norm of a gradient (2.0 report, section 4)")
    ema: float = option(0.97, "decay per step of the averaged weights, which are what the run exports")
    time_shift: float = option(3.0, "dmd: shift of the uniform p(t) at which x_theta is noised again")
    text_dropout: float = option(0.1, "flow: share of samples that see an empty prompt (2.0 report, section 4)")

    @property
    def sizes(self) -> list[int]:
        """Sizes of an update's micro-batches: the last one is smaller where they do not divide the batch."""
        return [min(self.micro_batch, self.batch - i) for i in range(0, self.batch, self.micro_batch)]


@dataclass
class FlowArgs(Args):
    """The same options with the values of the laptop's pretraining (toy/build.py changes some of them)."""

    objective: str = "flow"
    steps: int = option(2000, "updates of the teacher")
    batch: int = option(96, "samples per update")
    micro_batch: int = option(96, "samples that run at once; flow: of one layout")
    save_every: int = option(500, "steps between two checkpoints")
    panel_every: int = option(500, "steps between two panels and grids")
    muon_lr: float = option(0.02, "Muon, for the blocks' matrices; 0: AdamW for those too")
    lr: float = option(2e-3, "AdamW, for all other tensors")
    warmup: int = option(100, "steps over which the learning rates rise from 0")
    decay: float = option(0.5, "share of the run, at its end, over which they fall to 0 again")
    ema: float = option(0.999, "decay per step of the averaged weights, which are what the run exports")


def parse(argv: list[str] | None = None) -> Args:
    """The command line as an Args (or FlowArgs): one flag per field, an unknown one is argparse's error (status 2)."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--objective", choices=["dmd", "flow"], default="dmd")
    kind = {"dmd": Args, "flow": FlowArgs}[first.parse_known_args(argv)[0].objective]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for f in fields(kind):
        flag, text = "--" + f.name.replace("_", "-"), f"{f.metadata.get('help', '')} [{f.default}]".replace("%", "%%")
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            one = next((t for t in get_args(f.type) if t is not NoneType), f.type)  # X | None, tuple[X, ...] -> X
            nargs = "+" if isinstance(f.default, tuple) else None
            parser.add_argument(flag, type=one, default=f.default, nargs=nargs, help=text)
    return kind(**vars(parser.parse_args(argv)))


def settle(args: Args) -> Args:
    """Fill in what depends on the checkpoint and the machine. ValueError or FileNotFoundError say what does not fit."""
    index = sample.read_index(args.checkpoint)
    for name in ("steps", "batch", "micro_batch", "student_steps", "fake_updates", "pool", "save_every", "panel_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 is needed")
    if args.dtype not in (None, "bfloat16", "float32"):
        raise ValueError(f"--dtype {args.dtype}: bfloat16 and float32 are known")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return replace(
        args,
        out=args.out or Path("runs") / f"{args.objective}-{args.recipe}",
        guidance=float(index["guidance"]) if args.guidance is None else args.guidance,
        resolution=args.resolution or index["resolution"],
        device=device,
        dtype=args.dtype or faster_dtype(device),
    )


def faster_dtype(device: str) -> str:
    """bfloat16 on a GPU; on a CPU whichever multiplies faster (some have no bf16 units and emulate them)."""
    seconds = {}
    for name in ("float32", "bfloat16") if device == "cpu" else ():
        a, b = torch.ones(2048, 256, dtype=getattr(torch, name)), torch.ones(256, 768, dtype=getattr(torch, name))
        a @ b  # the first product also plans it
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        seconds[name] = time.perf_counter() - start
    return min(seconds, key=seconds.get) if seconds else "bfloat16"


def generator(seed: int, step: int, number: int, purpose: str) -> torch.Generator:
    """The source of every random draw of this file: always on the CPU, so that a GPU draws the same; from these four alone,
    so that neither a resumed run nor another number of processes changes a single draw."""
    digest = hashlib.blake2b(f"{seed}/{step}/{number}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


# ---- the pool: every prompt, encoded once ----------------------------------------------------------------------------


@dataclass
class Entry:
    """One encoded prompt. bf16 on the CPU: it is what the 7B computes in, and a toy entry is about 30 KB."""

    task: str
    category: str
    states: Tensor  # (L, C) of the language model, without padding
    empty: Tensor | None  # (L0, C) of an empty prompt with the same sources: guidance and text dropout
    slots: list[tuple[int, int]]  # where the sources stand in states, and in empty too: they come before the words
    sources: list[Tensor]  # (64, h_i, w_i) each
    target: Tensor | None  # (64, h, w), flow objective alone
    size: tuple[int, int]  # (h, w) of the latent to be drawn

    @property
    def layout(self) -> tuple:
        """Entries of one layout can share a batch: the places and shapes of all blocks of the sequence are equal."""
        return self.task, tuple(self.slots), tuple(s.shape for s in self.sources), self.size


class Pool:
    """Entries by task and category. `Pool(a.entries + b.entries)` joins two; the entries may come from anywhere."""

    def __init__(self, entries: list[Entry]):
        self.entries = entries
        self.places = defaultdict(list)  # (task, category) -> entries; (task, category, layout) -> entries
        for entry in entries:
            self.places[entry.task, entry.category].append(entry)
            self.places[entry.task, entry.category, entry.layout].append(entry)

    def categories(self) -> dict[str, list[str]]:
        found = {"t2i": [], "edit": []}
        for task, category in sorted(key for key in self.places if len(key) == 2):
            found[task].append(category)
        return found

    def draw(self, key: tuple, rng: torch.Generator) -> Entry:
        """One entry of (task, category) or of (task, category, layout)."""
        place = self.places[key]
        return place[torch.randint(len(place), (), generator=rng).item()]


@torch.no_grad()
def encode_pool(
    pipeline: sample.Pipeline,
    prompts: Iterable[Prompt],
    resolution: int,
    empty: bool = True,
    targets: bool = False,
    batch: int = 32,
) -> Pool:
    """The first pass: encode prompts (and, with `targets`, target pictures), with the pipeline's networks.

    `empty`: also each prompt's unconditional twin, which guidance and text dropout need. Batched over prompts whose
    pictures have equal sizes; the pool keeps the prompts' order. ValueError names a prompt without its target.
    """
    waiting, entries = defaultdict(list), {}  # sizes -> [(number, prompt, sources, target)], number -> Entry
    blank: list[Tensor] = []  # states of the empty prompt without sources: one for all

    def flush(group: list) -> None:
        numbers, some, sources, pictures = zip(*group, strict=True)
        states, slots = words(pipeline, [p.prompt for p in some], sources)
        if not empty:
            twins = [None] * len(some)
        elif sources[0]:
            twins = words(pipeline, [""] * len(some), sources)[0]
        else:
            blank[:] = blank or words(pipeline, [""], [()])[0]
            twins = blank * len(some)
        latents = [encode_pictures(pipeline.vae, column) for column in zip(*sources, strict=True)]
        goals = encode_pictures(pipeline.vae, pictures) if targets else [None] * len(some)
        for i, prompt in enumerate(some):
            last = sources[i][-1] if sources[i] else None  # an edit is drawn at the size of its last source
            size = goals[i].shape[1:] if targets else (last.height // 16, last.width // 16) if last else default
            own = [column[i] for column in latents]
            entry = Entry(prompt.task, prompt.category, states[i], twins[i], slots, own, goals[i], tuple(size))
            entries[numbers[i]] = entry

    default = (resolution // 32 * 2, resolution // 32 * 2)  # sides are multiples of 32 pixels, two latents
    for number, prompt in enumerate(tqdm(prompts, desc="encode", unit="prompt", leave=False)):
        if targets and prompt.target is None:
            raise ValueError(f'the flow objective learns from pictures, and "{prompt.prompt}" has no target')
        sources = [sample.fit(image, resolution) for image in prompt.images]
        target = sample.fit(prompt.target, resolution) if targets else None
        if target and sources and target.size != sources[-1].size:
            target = sample.open_picture(prompt.target).resize(sources[-1].size, Image.Resampling.LANCZOS)
        key = (*(s.size for s in sources), target and target.size)
        waiting[key].append((number, prompt, sources, target))
        if len(waiting[key]) == batch:
            flush(waiting.pop(key))
    for group in waiting.values():
        flush(group)
    return Pool([entries[number] for number in sorted(entries)])


def words(pipeline: sample.Pipeline, prompts: list[str], sources: Iterable) -> tuple[list[Tensor], list]:
    """Prompts with sources of one layout -> states (L, C) of each, without padding, in bf16; and the sources' slots."""
    states, mask, slots = pipeline.encoder.encode(prompts, [list(s) for s in sources])
    lengths = mask.sum(1).tolist()
    return [s[:n].to("cpu", torch.bfloat16).clone() for s, n in zip(states, lengths, strict=True)], slots


def encode_pictures(vae: nn.Module, pictures: Iterable[Image.Image]) -> list[Tensor]:
    """Pictures of one size -> latents (64, h, w) of each, in bf16 on the CPU."""
    weight = next(vae.parameters())
    latents = vae.encode(sample.to_tensor(list(pictures)).to(weight.device, weight.dtype))  # (B, 64, h, w)
    return list(latents.to("cpu", torch.bfloat16))


def toy_prompts(args: Args) -> list[Prompt]:
    """`args.pool` prompts of each task, spread evenly over the toy world's categories and editing families."""
    from toy import world  # only here: a run on one's own prompts does not touch the toy

    kinds = [("t2i", c, len(world.CATEGORIES)) for c in world.CATEGORIES]
    kinds += [("edit", f, len(world.FAMILIES)) for f in world.FAMILIES]
    prompts = []
    for task, category, share in kinds:
        prompts += world.training_prompts(task, category, -(-args.pool // share), args.seed, args.objective == "flow")
    return prompts


# ---- batches ---------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Samples of one layout, on the device: what one forward takes. The draws are fp32, the condition working dtype."""

    task: str
    categories: list[str]
    condition: Condition
    empty: Condition | None  # the same with an empty prompt
    target: Tensor | None  # (B, 64, h, w)
    noise: Tensor  # (B, 64, h, w), eps: where a rollout or a path starts
    xi: Tensor  # (B, 64, h, w): noise for x_theta
    t: Tensor  # (B,) in [0, 1)
    k: int | None = None  # the student's step (dmd)

    def where(self, times: list[float]) -> str:
        return f"task {self.task}, k = {self.k}, t = {[round(t, 4) for t in times]}"


def collate(entries: list[Entry], states: list[Tensor], device: str, dtype: torch.dtype) -> Condition:
    """One Condition of entries of one layout, text padded with zeros to the longest."""
    lengths = torch.tensor([len(s) for s in states])  # (B,)
    padded = pad_sequence(states, batch_first=True)  # (B, L, C)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]  # (B, L)
    sources = [torch.stack(column).to(device, dtype) for column in zip(*(e.sources for e in entries), strict=True)]
    return Condition(padded.to(device, dtype), mask.to(device), sources, entries[0].slots)


def make_batch(args: Args, entries: list[Entry], rngs: list[torch.Generator], k: int | None = None) -> Batch:
    """Entries of one layout and their generators (each already used to draw its entry) -> a Batch.

    The order of the draws from each generator is part of the format: eps, xi, u, dropout.
    """
    device, dtype = args.device, getattr(torch, args.dtype)
    shape = (64, *entries[0].size)
    noise = torch.stack([torch.randn(shape, generator=g) for g in rngs]).to(device)  # (B, 64, h, w)
    xi = torch.stack([torch.randn(shape, generator=g) for g in rngs]).to(device)  # (B, 64, h, w)
    u = torch.stack([torch.rand((), generator=g) for g in rngs])  # (B,)
    states = [e.states for e in entries]
    if args.objective == "flow":
        t = flow.logit_normal(u)
        dropped = [torch.rand((), generator=g).item() < args.text_dropout for g in rngs]
        states = [e.empty if drop else e.states for e, drop in zip(entries, dropped, strict=True)]
    else:
        t = flow.shifted_uniform(u, args.time_shift)
    return Batch(
        entries[0].task,
        [e.category for e in entries],
        collate(entries, states, device, dtype),
        collate(entries, [e.empty for e in entries], device, dtype) if entries[0].empty is not None else None,
        torch.stack([e.target for e in entries]).to(device).float() if entries[0].target is not None else None,
        noise,
        xi,
        t.to(device),
        k,
    )


def flow_batches(args: Args, pool: Pool, recipe: recipes.Recipe, step: int) -> list[Batch]:
    """One update of the flow objective: every sample has a turn of its own; those of one layout run together."""
    groups = defaultdict(list)  # layout -> [(entry, generator)]
    for number in range(args.batch):
        task, category, _ = recipe.turn(step * args.batch + number)
        rng = generator(args.seed, step, number, "flow")
        entry = pool.draw((task, category), rng)
        groups[entry.layout].append((entry, rng))
    chunks = [g[i : i + args.micro_batch] for g in groups.values() for i in range(0, len(g), args.micro_batch)]
    return [make_batch(args, *zip(*chunk, strict=True)) for chunk in chunks]


def dmd_batch(args: Args, pool: Pool, recipe: recipes.Recipe, purpose: str, update: int, micro: int) -> Batch:
    """Micro-batch number `micro` of one update: one task, one category and one k, because the teachers' weights depend on
    all three. Student and fake score (`purpose`) count their own updates: were they to share one count, five fake updates
    for each student update and a ratio of 1:1 would show the student one task for ever."""
    count = len(args.sizes)
    task, category, _ = recipe.turn(update * count + micro)
    numbers = range(micro * args.micro_batch, micro * args.micro_batch + args.sizes[micro])
    rngs = [generator(args.seed, update, number, purpose) for number in numbers]
    first = pool.draw((task, category), rngs[0])  # its layout is the micro-batch's
    entries = [first] + [pool.draw((task, category, first.layout), rng) for rng in rngs[1:]]
    lowest = 1 if recipe.first_step_weight and args.student_steps > 1 else 0  # then the first step has a loss of its own
    k = torch.randint(lowest, args.student_steps, (), generator=generator(args.seed, update, micro, purpose + " k"))
    return make_batch(args, entries, rngs, k.item())


# ---- networks --------------------------------------------------------------------------------------------------------


def load(args: Args, folder: Path) -> MMDiT:
    model = MMDiT.from_pretrained(folder, device=args.device)
    if args.compile:
        for block in model.transformer_blocks:
            block.compile()
    return model


def velocity(model: MMDiT, condition: Condition) -> flow.Velocity:
    """The network under one condition, as flow.py and dmd.py take it.

    Where no gradient is wanted, keys and values of text and sources are computed once and serve all further steps: a
    rollout's first steps, and the whole of it for the fake score. With gradient they are part of the graph.
    """
    dtype = model.proj_out.weight.dtype
    prefix = None

    def call(z: Tensor, t: Tensor) -> Tensor:
        nonlocal prefix
        if torch.is_grad_enabled() or not model.config.causal_condition:
            return model(z.to(dtype), t, condition)  # (B, 64, h, w)
        prefix = prefix or model.prefix(condition)
        return model(z.to(dtype), t, condition, prefix)  # (B, 64, h, w)

    return call


def guided(args: Args, model: MMDiT, batch: Batch) -> flow.Velocity:
    """A teacher: guidance is about the words, the sources stay."""
    v = velocity(model, batch.condition)
    return v if args.guidance == 1 else flow.guided(v, velocity(model, batch.empty), args.guidance)


def first_step(v: flow.Velocity, teacher: flow.Velocity, sigmas: list[float], batch: Batch) -> Tensor:
    """The first-step loss, (B,): the teacher walks from the noise to where the student's first step ends, in 5 steps (ours)."""
    walk = [sigmas[0] + (sigmas[1] - sigmas[0]) * i / 5 for i in range(6)]
    return dmd.first_step_loss(v, batch.noise, flow.euler(teacher, batch.noise, walk), walk[-1])


class Trainee:
    """A network in training: `model` computes in the working dtype, fp32 `masters` learn, `average` is their EMA.

    Masters, because in bf16 (8 bits) an update below 1/512 of its weight is rounded away, which is most of them. With an
    fp32 model the masters are the model's own weights, not a copy. Muon has the blocks' matrices, AdamW all the rest.
    """

    def __init__(self, name: str, model: MMDiT, dtype: torch.dtype, muon_lr: float, lr: float, clip: float, ema: float):
        self.name, self.clip, self.ema, self.updates = name, clip, ema, 0
        names, self.weights = zip(*model.named_parameters(), strict=True)
        self.masters = [w.detach() for w in self.weights]  # share storage with the fp32 model, until it is cast
        self.model = model.to(dtype)
        self.average = [m.clone() for m in self.masters] if ema else []
        for m in self.masters:
            m.grad = torch.zeros_like(m)
        matrix = [muon_lr > 0 and n.startswith("transformer_blocks.") and m.ndim == 2 for n, m in zip(names, self.masters)]
        muon = [m for m, yes in zip(self.masters, matrix, strict=True) if yes]
        rest = [m for m, yes in zip(self.masters, matrix, strict=True) if not yes]
        self.optimizers = [torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, fused=True)]
        if muon:
            self.optimizers.append(torch.optim.Muon(muon, lr=muon_lr, weight_decay=0.0))
        self.rates = [group["lr"] for o in self.optimizers for group in o.param_groups]
        self.seen: list[str] = []  # what went into the gradient so far

    def backward(self, losses: Tensor, share: float, batch: Batch) -> None:
        """Add `share` times the mean of losses (B,) or () to the gradient, which is summed in fp32."""
        if not losses.isfinite().all():
            bad = batch.t[~losses.isfinite()].tolist() if losses.ndim else batch.t.tolist()
            raise FloatingPointError(f"the {self.name}'s loss is not finite: {batch.where(bad)}")
        self.seen.append(batch.where(batch.t.tolist()))
        (share * losses.mean()).backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            if weight.grad is not None:
                master.grad += weight.grad
                weight.grad = None

    def update(self, scale: float) -> float:
        """One step of the optimisers at `scale` times their rates; returns the gradient's norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.masters, self.clip).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the {self.name}'s gradient is not finite: {'; '.join(self.seen)}")
        groups = [group for o in self.optimizers for group in o.param_groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = scale * rate
        for optimizer in self.optimizers:
            optimizer.step()
        self.updates += 1
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)  # fp32 -> working dtype
            torch._foreach_zero_([m.grad for m in self.masters])
            if self.ema:  # a young average forgets faster: else a short run exports its initial weights
                decay = min(self.ema, (1 + self.updates) / (10 + self.updates))
                torch._foreach_lerp_(self.average, self.masters, 1 - decay)
        self.seen.clear()
        return norm

    def averaged(self) -> MMDiT:
        """A copy of the model that holds the average, in the working dtype."""
        model = MMDiT(self.model.config).to(self.weights[0].device, self.weights[0].dtype)
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), self.average)
        return model.requires_grad_(False)

    def state_dict(self) -> dict:
        optimizers = [o.state_dict() for o in self.optimizers]
        return {"updates": self.updates, "masters": self.masters, "average": self.average, "optimizers": optimizers}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        with torch.no_grad():
            for mine, saved in ((self.masters, state["masters"]), (self.average, state["average"])):
                for tensor, value in zip(mine, saved, strict=True):
                    tensor.copy_(value)
            torch._foreach_copy_(self.weights, self.masters)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def find_teachers(args: Args) -> dict[str, Path]:
    """Specialised teachers by name: the checkpoint's teachers/NAME, and --teacher NAME=FOLDER, which wins."""
    found = {f.name: f for f in sorted((args.checkpoint / "teachers").glob("*")) if f.is_dir()}
    for given in args.teacher:
        name, separator, folder = given.partition("=")
        if not (name and separator and folder) or name == "base":
            raise ValueError(f"--teacher {given}: expected NAME=FOLDER, with a name other than base")
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"--teacher {given}: no folder {folder}")
        found[name] = Path(folder)
    return found


# ---- the run's folder ------------------------------------------------------------------------------------------------


def open_run(args: Args) -> tuple[Args, dict | None]:
    """Settle the arguments and open the run's folder -> the arguments, and the state to go on from (None: a new run).

    A folder that holds anything is only ever continued, with --resume and the same arguments; ValueError otherwise.
    """
    note = (args.out or Path("runs") / f"{args.objective}-{args.recipe}") / "args.json"
    if args.resume:
        recorded = read_json(note)["arguments"]
        args = settle(replace(args, dtype=args.dtype or recorded["dtype"]))  # a measured default may have turned
        free = {"resume", "out", "steps", "save_every", "panel_every", "device", "compile"}
        for name, value in plain(args).items():
            if name not in free and value != recorded[name]:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is {value}, but the run in {args.out} was started with {recorded[name]}")
    else:
        args = settle(args)
        if args.out.is_dir() and any(args.out.iterdir()):
            raise ValueError(f"{args.out}: not empty; --resume goes on with the run in it, --out names another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    write_json(note, {"arguments": plain(args), "versions": versions})
    return args, load_newest(args.out) if args.resume else None


def plain(args: Args) -> dict:
    """The arguments as JSON holds them."""
    return json.loads(json.dumps(asdict(args), default=str))


def save(out: Path, state: dict) -> None:
    """Write checkpoints/STEP/state.pt aside and rename the folder into place; keep the last two.

    The rename is one operation of the file system: a writer that is killed leaves a folder whose name is no number, which
    nothing reads. Flushed to the disk before it, or a power cut could leave the new name with old bytes.
    """
    aside, place = out / "checkpoints" / "unfinished", out / "checkpoints" / f"{state['step']:08d}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with open(aside / "state.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(place, ignore_errors=True)
    os.replace(aside, place)
    for old in saved(out)[:-2]:
        shutil.rmtree(old)


def saved(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(f for f in (out / "checkpoints").glob("*") if f.name.isdigit() and (f / "state.pt").is_file())


def load_newest(out: Path) -> dict | None:
    """The newest checkpoint's state; None where a run ended before its first. Its metrics are cut back to its step."""
    checkpoints = saved(out)
    state = torch.load(checkpoints[-1] / "state.pt", map_location="cpu", weights_only=True) if checkpoints else None
    metrics = out / "metrics.jsonl"
    if metrics.is_file():
        lines = metrics.read_text().splitlines()[: state["step"] if state else 0]
        metrics.write_text("".join(line + "\n" for line in lines))
    return state


class Signals:
    """Ctrl-C and SIGTERM are noted and the step in progress is finished; a second one ends the program at once."""

    def __enter__(self):
        self.number = 0
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number

    def __exit__(self, *error) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


# ---- what a run shows ------------------------------------------------------------------------------------------------


class Log:
    """Collects one step's line of metrics.jsonl. The loss by time is the first place to look when a run goes wrong."""

    BINS = 5  # of t

    def __init__(self):
        self.losses = defaultdict(list)  # name -> [(loss, t) of each sample]
        self.norms: dict[str, float] = {}
        self.batches: list[Batch] = []

    def add(self, name: str, losses: Tensor, batch: Batch) -> None:
        self.losses[name] += zip(losses.tolist(), batch.t.tolist(), strict=True)
        self.batches.append(batch)

    def mean(self, name: str) -> float:
        return sum(loss for loss, _ in self.losses[name]) / len(self.losses[name])

    def line(self, step: int, scale: float, seconds: float, samples: int) -> dict:
        by_t = {}
        for name, pairs in self.losses.items():
            bins = [[loss for loss, t in pairs if min(int(t * self.BINS), self.BINS - 1) == i] for i in range(self.BINS)]
            by_t[name] = [round(sum(b) / len(b), 5) if b else None for b in bins]
        return {
            "step": step,
            **{name: self.mean(name) for name in self.losses},
            **self.norms,
            "rate": scale,  # of the full learning rates
            "seconds": round(seconds, 4),
            "images_per_second": round(samples / seconds, 2),
            "tasks": [b.task for b in self.batches],
            "k": [b.k for b in self.batches],
            "categories": Counter(f"{b.task} {c}" for b in self.batches for c in b.categories),
            "by_t": by_t,
        }


def sheet(vae: nn.Module, rows: Iterable[Tensor], path: Path) -> None:
    """Latents, one (B, 64, h, w) a row, decoded and pasted on white."""
    weight = next(vae.parameters())
    pictures = [sample.to_pictures(vae.decode(row.to(weight.device, weight.dtype))) for row in rows]
    width = max(sum(p.width + 4 for p in row) for row in pictures)
    canvas = Image.new("RGBA", (width, sum(row[0].height + 4 for row in pictures)), "white")
    y = 0
    for row in pictures:
        x = 0
        for picture in row:
            canvas.alpha_composite(picture, (x, y))
            x += picture.width + 4
        y += row[0].height + 4
    path.parent.mkdir(exist_ok=True)
    canvas.convert("RGB").save(path)


@torch.no_grad()
def draw(args: Args, pool: Pool, model: MMDiT, panel: list[Tensor], step: int) -> None:
    """panels/STEP.png, and grid.png: two prompts of every category, the sources of edits above their results."""
    vae = VAE.from_pretrained(args.checkpoint / "vae", device=args.device)  # not kept: it would cost memory all the time
    sheet(vae, [row[:8] for row in panel], args.out / "panels" / f"{step:06d}.png")
    groups = defaultdict(list)
    for entry in [e for key, place in pool.places.items() if len(key) == 2 for e in place[:2]][:24]:
        groups[entry.layout].append(entry)
    rows = []
    for group in groups.values():
        rngs = [generator(args.seed, 0, number, "grid") for number in range(len(group))]
        batch = make_batch(replace(args, text_dropout=0.0), group, rngs)
        if args.objective == "flow":
            result = flow.euler(guided(args, model, batch), batch.noise, flow.student_sigmas(20))
        else:
            v = velocity(model, batch.condition)
            result = flow.euler(v, batch.noise, flow.student_sigmas(args.student_steps))
        rows += [*batch.condition.sources, result]
    sheet(vae, rows, args.out / "grid.png")


# ---- the loop --------------------------------------------------------------------------------------------------------


def train(args: Args, pool: Pool, state: dict | None) -> Path:
    """Train on the pool and return the finished folder: `out`/student, or `out`/transformer for the flow objective.

    args and state are open_run's. SystemExit(128 + signal) after a Ctrl-C or SIGTERM, when all is saved;
    FloatingPointError, before the update, for a value that is not finite.
    """
    dtype = getattr(torch, args.dtype)
    distils = args.objective == "dmd"
    folders = find_teachers(args) if distils else {}
    recipe = recipes.find(args.recipe)
    if distils and (missing := sorted(recipe.teachers - folders.keys())):
        print(f"no teacher {', '.join(missing)}: the base teacher takes its part")
    recipe = recipe.resolve(pool.categories(), folders)

    base = args.checkpoint / "transformer"
    student = Trainee("student", load(args, base), dtype, args.muon_lr, args.lr, args.clip, args.ema)
    trainees = {"student": student}
    if distils:
        fake = Trainee("fake score", load(args, base), dtype, args.fake_muon_lr, args.fake_lr, args.clip, ema=0)
        trainees["fake"] = fake
        folders = {"base": base} | {name: folders[name] for name in sorted(recipe.teachers)}
        teachers = {name: load(args, f).to(dtype).requires_grad_(False) for name, f in folders.items()}
        sigmas = flow.student_sigmas(args.student_steps)
    start = 0
    if state:
        start = state["step"]
        for name, trainee in trainees.items():
            trainee.load_state_dict(state[name])

    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.objective, unit="step")
    with Signals() as signals, open(args.out / "metrics.jsonl", "a") as metrics:
        for step in bar:
            began, log = time.perf_counter(), Log()
            scale = min(1, (step + 1) / args.warmup) if args.warmup else 1.0
            scale *= min(1, (args.steps - step) / (args.decay * args.steps)) if args.decay else 1.0
            # ==========================================================================================================
            if not distils:
                for batch in flow_batches(args, pool, recipe, step):
                    v = velocity(student.model, batch.condition)
                    losses = flow.flow_matching_loss(v, batch.target, batch.noise, batch.t)  # (B,)
                    student.backward(losses, len(losses) / args.batch, batch)
                    log.add("loss", losses, batch)
                log.norms["grad_norm"] = student.update(scale)
            else:
                # 1. The fake score learns what the student draws now. The student rolls out and does not learn.
                for update in range(step * args.fake_updates, (step + 1) * args.fake_updates):
                    for micro, size in enumerate(args.sizes):
                        batch = dmd_batch(args, pool, recipe, "fake", update, micro)
                        with torch.no_grad():
                            v = velocity(student.model, batch.condition)
                            x_theta = dmd.rollout(v, batch.noise, sigmas, batch.k)
                        v = velocity(fake.model, batch.condition)
                        losses = dmd.fake_score_loss(v, x_theta, batch.xi, batch.t)  # (B,)
                        fake.backward(losses, size / args.batch, batch)
                        log.add("fake_loss", losses, batch)
                    log.norms["fake_grad_norm"] = fake.update(scale)
                # 2. The student learns once. The fake score and the teachers only look.
                for micro, size in enumerate(args.sizes):
                    batch = dmd_batch(args, pool, recipe, "student", step, micro)
                    v_student = velocity(student.model, batch.condition)
                    x_theta = dmd.rollout(v_student, batch.noise, sigmas, batch.k)  # gradient through step k alone
                    with torch.no_grad():
                        weights = recipe.weights(batch.k, args.student_steps, batch.task, batch.categories[0])
                        real = dmd.mixture(weights, {name: guided(args, teachers[name], batch) for name in weights})
                        v_fake = velocity(fake.model, batch.condition)
                        g, x0_real, x0_fake = dmd.dmd_gradient(real, v_fake, x_theta, batch.xi, batch.t)
                    loss = dmd.surrogate_loss(x_theta, g)  # ()
                    if recipe.first_step_weight:
                        loss = loss + recipe.first_step_weight * first_step(v_student, real, sigmas, batch).mean()
                    student.backward(loss, size / args.batch, batch)
                    log.add("loss", 0.5 * g.square().flatten(1).mean(1), batch)  # the surrogate's value, by sample
                log.norms["grad_norm"] = student.update(scale)
            # ==========================================================================================================
            seconds = time.perf_counter() - began
            metrics.write(json.dumps(log.line(step + 1, scale, seconds, args.batch)) + "\n")
            metrics.flush()
            bar.set_postfix_str(f"loss {log.mean('loss'):.4f}, {args.batch / seconds:.0f} images/s", refresh=False)
            last = step + 1 == args.steps
            if last or (step + 1) % args.panel_every == 0:
                if distils:
                    rows = [x_theta, x0_real, x0_fake]
                else:
                    z = flow.path(batch.target, batch.noise, batch.t)
                    with torch.no_grad():
                        rows = [batch.target, z, flow.x0_from_velocity(z, v(z, batch.t), batch.t)]
                draw(args, pool, student.averaged(), rows, step + 1)
            if last or signals.number or (step + 1) % args.save_every == 0:
                save(args.out, {"step": step + 1} | {name: t.state_dict() for name, t in trainees.items()})
            if signals.number and not last:
                bar.close()
                print(f"stopped after step {step + 1}; --resume goes on from there")
                raise SystemExit(128 + signals.number)
    model = student.averaged()
    if not distils:
        model.save_pretrained(args.out / "transformer")
        return args.out / "transformer"
    sample.export(args.checkpoint, model, sigmas[:-1], args.out / "student")
    return args.out / "student"


def main(argv: list[str] | None = None) -> None:
    args, state = open_run(parse(argv))
    cuda = args.device.startswith("cuda")
    pipeline = sample.Pipeline.from_pretrained(args.checkpoint, torch.bfloat16 if cuda else torch.float32, args.device)
    prompts = recipes.read_prompts(args.prompts) if args.prompts else toy_prompts(args)
    learns = args.objective == "flow"
    pool = encode_pool(pipeline, prompts, args.resolution, empty=learns or args.guidance != 1, targets=learns)
    del pipeline, prompts  # the encoders' memory is the trained networks' now
    folder = train(args, pool, state)
    print(f"finished: {folder}")
    if args.objective == "dmd" and args.checkpoint == TOY:
        from eval import compare  # only the toy world has a judge

        compare(folder, args.checkpoint, args.out)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # bad input
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:  # the last checkpoint is from before it
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(1)
