"""Training: distil a few-step student (--objective dmd, the default), or pretrain and specialise a teacher (flow).

    pool       every prompt is encoded once: words to states, source (and target) pictures to latents. The encoders are
               freed afterwards: their memory is the trained networks'
    batches    recipe.py decides which task and category comes next; which prompts, which noise and which times follow from
               (seed, step, sample, purpose) alone, so a step counter is all there is to remember of them
    updates    forty lines between two rulers in `train`: who learns, in which order, and what is frozen
    the rest   metrics.jsonl, panels/, grid.png, checkpoints/; nothing there changes a weight

A STEP is one update of the student (dmd) or teacher (flow); the fake score has its own, faster count. SAMPLES are
numbered over the whole update, whatever the number of micro-batches that share it.

    python train.py                                                the laptop run, about five minutes on two cores
    python train.py --prompts mine.jsonl --out runs/mine           the same on prompts and pictures of one's own
    python train.py --objective flow --prompts pairs.jsonl --out runs/teacher            every line needs a "target"

Exit status: 0 finished; 2 bad input; 1 a value that is not finite; 130 and 143 after Ctrl-C and SIGTERM, which save
first. `--resume` goes on from there; on a CPU the run ends with the bits of an uninterrupted one. With several other
programs on the machine, OMP_WAIT_POLICY=passive in the environment keeps idle threads from taking their cores.

Paper: Qwen-Image-Flash, arXiv 2606.03746. Symbols and conventions: flow.py and dmd.py.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
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
    """Every option of a run; the text behind each is its --help. The values are those of the laptop's distillation.

    For the published 7B networks neither paper gives numbers. Others' DMD of Qwen-Image and its like: AdamW alone
    (muon_lr and fake_muon_lr 0), lr and fake_lr 2e-6 to 1e-5 for full weights, batch 32 to 128, 5 fake updates for each
    of the student, clip 1 to 10, EMA .98 to .99, 1,000 to 3,000 steps. The paper: AdamW, 2,000 iterations.
    """

    objective: str = option("dmd", "dmd: distil a few-step student; flow: pretrain or specialise a teacher")
    checkpoint: Path = option(TOY, "folder in the published layout: where every network starts")  # noqa: RUF009
    prompts: tuple[Path, ...] = option((), "files of JSON lines; without any, the toy world's own prompts")
    pool: int = option(1024, "without --prompts: how many of the toy's prompts of each task")
    recipe: str = option("flash", "composition, ratio and teachers, by its name in recipe.py")
    out: Path | None = option(None, "folder of this run; default: runs/OBJECTIVE-RECIPE")
    teacher: tuple[str, ...] = option((), "NAME=FOLDER: specialised teachers besides those in the checkpoint")
    guidance: float | None = option(None, "the teachers' guidance w, 1 is off; default: model_index.json's")
    resolution: int | None = option(None, "side of sources' and targets' area; default: model_index.json's")
    student_steps: int = option(4, "the student's number of steps, its NFE")
    steps: int = option(80, "updates of the student")
    batch: int = option(48, "samples per update, over all its micro-batches")
    micro_batch: int = option(16, "samples that run at once, of one category and layout")
    seed: int = option(0, "all random draws follow from it")
    resume: bool = option(False, "go on from the newest checkpoint in --out")
    save_every: int = option(40, "steps from one checkpoint to the next")
    panel_every: int = option(20, "steps from one panel and grid to the next")
    device: str | None = option(None, "default: cuda if there is one")
    dtype: str | None = option(None, "of the working weights, bfloat16 or float32; default: the faster one")
    compile: bool = option(False, "torch.compile every block: two slow minutes, then a sixth faster (flow)")

    # The optimisation. These are ours, from a prototype of the laptop's size, unless a source is named.
    muon_lr: float = option(0.004, "Muon, for the blocks' matrices; 0: AdamW for those too")
    lr: float = option(4e-4, "AdamW, for all other tensors")
    fake_muon_lr: float = option(0.01, "the fake score's, higher because it has to keep up with the student")
    fake_lr: float = option(1e-3, "the fake score's")
    fake_updates: int = option(2, "updates of the fake score before each of the student; DMD2 takes 5")
    warmup: int = option(10, "steps over which the learning rates rise from 0")
    decay: float = option(0.0, "share of the run, at its end, over which they fall to 0 again")
    clip: float = option(1.0, "largest norm of a gradient (2.0 report, section 4)")
    ema: float = option(0.97, "decay per step of the averaged weights, which are what a run exports")
    time_shift: float = option(3.0, "shift of p(t) towards noise; dmd: of the times at which x_theta is noised again")
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
    save_every: int = 500
    panel_every: int = 500
    muon_lr: float = 0.02
    lr: float = 2e-3
    warmup: int = 100
    decay: float = 0.5
    ema: float = 0.999
    time_shift: float = 1.0


def parse(argv: list[str] | None = None) -> Args:
    """The command line as Args or FlowArgs, one flag for each field."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--objective", choices=["dmd", "flow"], default="dmd")
    kind = {"dmd": Args, "flow": FlowArgs}[first.parse_known_args(argv)[0].objective]
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    texts = {f.name: f.metadata["help"] for f in fields(Args)}
    for f in fields(kind):
        flag, text = "--" + f.name.replace("_", "-"), texts[f.name] + (f" [{f.default}]" if f.default else "")
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
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


# ---- the pool: every prompt, encoded once ----------------------------------------------------------------------------


@dataclass
class Entry:
    """One encoded prompt, in bf16 on the CPU. One of the toy's takes about 30 KB."""

    task: str
    category: str
    states: Tensor  # (L, C) of the language model, without padding
    empty: Tensor | None  # (L0, C) of an empty prompt with the same sources, for guidance and text dropout
    slots: list[tuple[int, int]]  # of the sources in states, and in empty too: they stand before the words
    sources: list[Tensor]  # (64, h_i, w_i) each
    target: Tensor | None  # (64, h, w), for the flow objective
    size: tuple[int, int]  # (h, w) of what is to be drawn

    @property
    def layout(self) -> tuple:
        """What entries must have in common to share a batch: the sizes of all blocks of the sequence.

        The text's length, too. Padding is masked, but it would count: the target's rotary position is behind the batch's
        longest text, and a network trained there is asked to draw elsewhere when a prompt comes alone.
        """
        return len(self.states), tuple(s.shape for s in self.sources), self.size


class Pool:
    """Entries, to be drawn by (task, category) or (task, category, layout). `Pool(a.entries + b.entries)` joins two."""

    def __init__(self, entries: list[Entry]):
        self.entries = entries
        self.places: dict[tuple, list[Entry]] = defaultdict(list)
        for entry in entries:
            self.places[entry.task, entry.category].append(entry)
            self.places[entry.task, entry.category, entry.layout].append(entry)

    def draw(self, rng: torch.Generator, *key) -> Entry:
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
    """Encode every prompt once, with the pipeline's encoder and VAE; the pool keeps the prompts' order.

    empty: also each prompt's twin without words, for guidance and text dropout. targets: also the target pictures, where
    a missing one is a ValueError. Prompts whose pictures have equal sizes are encoded `batch` at a time.
    """
    waiting, done = defaultdict(list), {}  # sizes -> [(number, prompt, sources, target)], number -> Entry

    def states(words: list[str], images: list) -> tuple[list[Tensor], list]:
        padded, mask, slots = pipeline.encoder.encode(words, images)
        lengths = mask.sum(1).tolist()
        return [s[:n].to("cpu", torch.bfloat16).clone() for s, n in zip(padded, lengths, strict=True)], slots

    def latents(pictures: Iterable[Image.Image]) -> list[Tensor]:
        like = pipeline.vae.quant_conv.weight
        images = sample.to_tensor(list(pictures)).to(like.device, like.dtype)  # (B, 4, H, W)
        return list(pipeline.vae.encode(images).to("cpu", torch.bfloat16))  # B of (64, h, w)

    blank = states([""], [[]])[0] if empty else [None]  # without sources one twin serves all prompts

    def encode(group: list[tuple]) -> None:
        numbers, some, images, goals = zip(*group, strict=True)
        read, slots = states([prompt.prompt for prompt in some], list(images))
        twins = states([""] * len(some), list(images))[0] if empty and images[0] else blank * len(some)
        sources = [latents(column) for column in zip(*images, strict=True)]
        ends = latents(goals) if targets else [None] * len(some)
        for i, number in enumerate(numbers):
            prompt, own = some[i], [column[i] for column in sources]
            # An edit is drawn at the size of its last source; text to image at the target's, or else a square.
            h, w = own[-1].shape[1:] if own else ends[i].shape[1:] if targets else [resolution // 32 * 2] * 2
            done[number] = Entry(prompt.task, prompt.category, read[i], twins[i], slots, own, ends[i], (h, w))

    for number, prompt in enumerate(tqdm(prompts, desc="encode", unit="prompt", leave=False)):
        if targets and prompt.target is None:
            raise ValueError(f"the flow objective learns pictures, and the prompt {prompt.prompt!r} has no target")
        images = [sample.fit(image, resolution) for image in prompt.images]
        goal = sample.fit(prompt.target, resolution) if targets else None
        if goal and images and goal.size != images[-1].size:
            goal = sample.open_picture(prompt.target).resize(images[-1].size, Image.Resampling.LANCZOS)
        group = waiting[(*(image.size for image in images), goal and goal.size)]
        group.append((number, prompt, images, goal))
        if len(group) == batch:
            encode(group)
            group.clear()
    for group in filter(None, waiting.values()):
        encode(group)
    return Pool([done[number] for number in sorted(done)])


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


# ---- batches ---------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Samples of one task and layout, on the device. Draws and target are fp32, conditions of the working dtype."""

    task: str
    category: str
    condition: Condition
    empty: Condition | None  # the same without words
    target: Tensor | None  # (B, 64, h, w)
    noise: Tensor  # (B, 64, h, w): where a path or a rollout starts
    xi: Tensor  # (B, 64, h, w): noise for x_theta
    t: Tensor  # (B,) in [0, 1]
    k: int | None = None  # the student's step (dmd)


def batches(args: Args, pool: Pool, recipe: recipes.Recipe, purpose: str, update: int) -> Iterator[tuple[Batch, float]]:
    """The micro-batches of one update, each with its share of the update's samples.

    One task, category and layout in each, and for DMD one k, because the teachers' weights depend on them. The networks
    (`purpose`) count their own updates. Were student and fake score to share one count, then at a ratio of 1:1 and five
    fake updates for each of the student, the student would see one task for ever.
    """
    for micro, size in enumerate(args.sizes):
        task, category, _ = recipe.turn(update * len(args.sizes) + micro)
        rngs = [generator(args.seed, update, micro * args.micro_batch + i, purpose) for i in range(size)]
        first = pool.draw(rngs[0], task, category)  # its layout is the micro-batch's
        entries = [first, *(pool.draw(rng, task, category, first.layout) for rng in rngs[1:])]
        rng = generator(args.seed, update, micro, purpose + " micro-batch")
        if args.objective == "flow":
            wordless = torch.rand((), generator=rng).item() < args.text_dropout  # all at once: one layout
            batch = make_batch(args, entries, rngs, wordless=wordless)
        else:
            lowest = 1 if recipe.first_step_weight and args.student_steps > 1 else 0  # step 0 has a loss of its own
            batch = make_batch(args, entries, rngs, torch.randint(lowest, args.student_steps, (), generator=rng).item())
        yield batch, size / args.batch


def make_batch(
    args: Args, entries: list[Entry], rngs: list[torch.Generator], k: int | None = None, wordless: bool = False
) -> Batch:
    """Entries of one layout, and for each the generator that its noises and its time are drawn from, in this order."""
    device, dtype, shape = args.device, getattr(torch, args.dtype), (64, *entries[0].size)
    noise = torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(device)  # (B, 64, h, w)
    xi = torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(device)  # (B, 64, h, w)
    u = torch.stack([torch.rand((), generator=rng) for rng in rngs])  # (B,)
    shift = args.time_shift
    t = flow.logit_normal(u, math.log(shift)) if args.objective == "flow" else flow.shifted_uniform(u, shift)  # (B,)
    sources = [torch.stack(column).to(device, dtype) for column in zip(*(e.sources for e in entries), strict=True)]

    def condition(states: list[Tensor]) -> Condition:
        stacked = torch.stack(states)  # (B, L, C)
        real = torch.ones(stacked.shape[:2], dtype=torch.bool)  # (B, L)
        return Condition(stacked, real, sources, entries[0].slots).to(device, dtype)

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


def load(args: Args, folder: Path) -> MMDiT:
    """A transformer folder in fp32 on the device."""
    model = MMDiT.from_pretrained(folder, device=args.device)
    for block in model.transformer_blocks if args.compile else ():
        block.compile()
    return model


def velocity(model: MMDiT, condition: Condition) -> flow.Velocity:
    """The network under one condition, as flow.py and dmd.py take it. Good until the weights change.

    Where no gradient is wanted, keys and values of text and sources are computed once and serve all further calls: the
    first steps of a rollout, and all of them for the fake score. With gradient they are part of the graph.
    """
    prefix = None

    def call(z: Tensor, t: Tensor) -> Tensor:
        nonlocal prefix
        if torch.is_grad_enabled() or not model.config.causal_condition:
            return model(z, t, condition)  # (B, 64, h, w)
        prefix = prefix or model.prefix(condition)
        return model(z, t, condition, prefix)  # (B, 64, h, w)

    return call


def guided(args: Args, model: MMDiT, words: Condition, empty: Condition | None) -> flow.Velocity:
    """A teacher, with the run's guidance: away from what it would draw from the same sources without words."""
    v = velocity(model, words)
    return v if args.guidance == 1 else flow.guided(v, velocity(model, empty), args.guidance)


def first_step(v: flow.Velocity, teacher: flow.Velocity, sigmas: list[float], batch: Batch) -> Tensor:
    """The first-step loss, (): the teacher walks to where the student's first step ends, in 5 steps (ours)."""
    walk = [sigmas[0] + (sigmas[1] - sigmas[0]) * i / 5 for i in range(6)]
    return dmd.first_step_loss(v, batch.noise, flow.euler(teacher, batch.noise, walk), walk[-1]).mean()


class Trainee:
    """A network in training: `model` computes in the working dtype, fp32 `masters` learn, `average` is their EMA.

    Masters, because bf16 has 8 bits: an update below 1/512 of its weight is rounded away, and most are. Those of an fp32
    model are its own weights, not a copy. Muon trains the blocks' matrices, AdamW the rest.
    """

    def __init__(self, name: str, model: MMDiT, args: Args, muon_lr: float, lr: float, ema: float):
        self.name, self.clip, self.ema, self.updates = name, args.clip, ema, 0
        names, self.weights = zip(*model.named_parameters(), strict=True)
        self.masters = [w.detach() for w in self.weights]  # one storage with the fp32 model, until it is cast
        self.model = model.to(getattr(torch, args.dtype))
        self.average = [m.clone() for m in self.masters] if ema else []
        muon, rest = [], []
        for n, m in zip(names, self.masters, strict=True):
            m.grad = torch.zeros_like(m)
            (muon if muon_lr and m.ndim == 2 and n.startswith("transformer_blocks.") else rest).append(m)
        self.optimizers = [torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, fused=True)]
        if muon:
            self.optimizers.append(torch.optim.Muon(muon, lr=muon_lr, weight_decay=0.0))
        self.rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.seen: list[tuple[str, int | None, Tensor]] = []  # task, k and t of what is in the gradient

    def backward(self, losses: Tensor, share: float, batch: Batch) -> None:
        """Add `share` times the mean of losses, (B,) or (), to the gradient. Between micro-batches it is fp32."""
        if not losses.isfinite().all():
            bad = batch.t[~losses.isfinite()] if losses.ndim else batch.t
            raise FloatingPointError(f"the {self.name}'s loss is not finite at t = {bad.tolist()}")
        (share * losses.mean()).backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            if weight.grad is not None:
                master.grad += weight.grad
                weight.grad = None
        self.seen.append((batch.task, batch.k, batch.t))

    def update(self, rate: float) -> float:
        """Clip, one step at `rate` times the learning rates, average. Returns the gradient's norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.masters, self.clip).item()
        if not math.isfinite(norm):
            seen = "; ".join(f"task {task}, k = {k}, t = {t.tolist()}" for task, k, t in self.seen)
            raise FloatingPointError(f"the {self.name}'s gradient has norm {norm} after {seen}")
        for optimizer, full in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * full
            optimizer.step()
        self.updates += 1
        self.seen.clear()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
            torch._foreach_zero_([m.grad for m in self.masters])
            if self.ema:  # a young average forgets faster, or a short run would export its initial weights
                decay = min(self.ema, (1 + self.updates) / (10 + self.updates))
                torch._foreach_lerp_(self.average, self.masters, 1 - decay)
        return norm

    def averaged(self) -> MMDiT:
        """The average as a network of its own."""
        with torch.device("meta"):
            model = MMDiT(self.model.config)
        model = model.to(self.model.proj_out.weight.dtype).to_empty(device=self.model.proj_out.weight.device)
        torch._foreach_copy_([p.requires_grad_(False) for p in model.parameters()], self.average)
        return model

    def state(self) -> dict:
        optimizers = [o.state_dict() for o in self.optimizers]
        return {"updates": self.updates, "masters": self.masters, "average": self.average, "optimizers": optimizers}

    def restore(self, state: dict) -> None:
        self.updates = state["updates"]
        with torch.no_grad():
            torch._foreach_copy_(self.masters + self.average, state["masters"] + state["average"])
            torch._foreach_copy_(self.weights, self.masters)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def find_teachers(args: Args) -> dict[str, Path]:
    """Specialised teachers by name: the checkpoint's teachers/NAME, and --teacher NAME=FOLDER, which goes first."""
    found = {f.name: f for f in sorted((args.checkpoint / "teachers").glob("*")) if f.is_dir()}
    for given in args.teacher:
        name, _, folder = given.partition("=")
        if not name or name == "base" or not Path(folder).is_dir() or not folder:
            raise ValueError(f"--teacher {given}: NAME=FOLDER is expected, a name other than base and a folder")
        found[name] = Path(folder)
    return found


# ---- the run's folder ------------------------------------------------------------------------------------------------


def open_run(args: Args) -> tuple[Args, dict | None]:
    """Settle the arguments and open the run's folder: the arguments, and the state to go on from (None: a new run).

    A folder that holds anything is only ever continued, with --resume and the same arguments; else ValueError.
    """
    out, before = args.home, read_json(args.home / "args.json")["arguments"] if args.resume else None
    if not before and out.is_dir() and {f.name for f in out.iterdir()} - {"args.json"}:  # more than a failed start
        raise ValueError(f"{out}: not empty; --resume goes on with the run in it, --out names another folder")
    args = settle(replace(args, dtype=args.dtype or before["dtype"]) if before else args)  # not measured a second time
    now = json.loads(json.dumps(asdict(args), default=str))
    for name in now.keys() - {"resume", "out", "steps", "save_every", "panel_every", "device", "compile"}:
        if before and now[name] != before[name]:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {now[name]}, but the run in {out} was started with {before[name]}")
    out.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    write_json(out / "args.json", {"arguments": now, "versions": versions})
    return args, load_newest(out) if before else None


def save(out: Path, state: dict) -> None:
    """Write checkpoints/STEP/state.pt aside, rename the folder into place, keep the last two.

    A rename happens or does not: a writer killed before it leaves a folder that is not named by a number, which nothing
    reads. The bytes are forced to the disk first, or a power cut could keep the new name without them.
    """
    aside, place = out / "checkpoints" / "unfinished", out / "checkpoints" / f"{state['step']:08d}"
    for leftover in aside, place:
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    with open(aside / "state.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, place)
    for old in whole_checkpoints(out)[:-2]:
        shutil.rmtree(old)


def whole_checkpoints(out: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted(f for f in (out / "checkpoints").glob("*") if f.name.isdigit() and (f / "state.pt").is_file())


def load_newest(out: Path) -> dict | None:
    """The newest checkpoint's state; None for a run that ended before its first. The metrics are cut back to its step."""
    state = None
    if checkpoints := whole_checkpoints(out):
        state = torch.load(checkpoints[-1] / "state.pt", map_location="cpu", weights_only=True)
    if (metrics := out / "metrics.jsonl").is_file():
        lines = metrics.read_text().splitlines(keepends=True)
        metrics.write_text("".join(lines[: state["step"] if state else 0]))
    return state


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


# ---- what a run shows ------------------------------------------------------------------------------------------------


class Log:
    """One step's line of metrics.jsonl. The loss by time is the first place to look when a run goes wrong."""

    BINS = 5  # of t

    def __init__(self):
        self.losses: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # name -> losses (B,), t (B,)
        self.norms: dict[str, float] = {}
        self.batches: list[Batch] = []

    def add(self, name: str, losses: Tensor, batch: Batch) -> None:
        self.losses[name].append((losses.detach(), batch.t))
        self.batches.append(batch)

    def line(self, **numbers) -> dict:
        mean, by_t = {}, {}
        for name, pairs in self.losses.items():
            losses, times = (torch.cat(column).cpu() for column in zip(*pairs, strict=True))  # (B,) each
            mean[name] = losses.mean().item()
            bins = [losses[(times * self.BINS).long().clamp(max=self.BINS - 1) == i] for i in range(self.BINS)]
            by_t[name + "_by_t"] = [round(b.mean().item(), 5) if len(b) else None for b in bins]
        counts = Counter()
        for b in self.batches:
            counts[f"{b.task} {b.category}"] += len(b.t)
        each = {"tasks": [b.task for b in self.batches], "k": [b.k for b in self.batches], "categories": counts}
        return numbers | mean | self.norms | each | by_t


@torch.no_grad()
def draw(args: Args, pool: Pool, model: MMDiT, panel: list[Tensor], step: int) -> None:
    """panels/STEP.png; and grid.png: two prompts of every category, edits below their (last) source."""
    grid = {"t2i": [], "source": [], "edit": []}
    chosen = [entry for key, place in pool.places.items() if len(key) == 2 for entry in place[:2]]
    for number, entry in enumerate(chosen):
        batch = make_batch(args, [entry], [generator(args.seed, 0, number, "grid")])
        v, sigmas = velocity(model, batch.condition), flow.student_sigmas(args.student_steps)
        if args.objective == "flow":
            v, sigmas = guided(args, model, batch.condition, batch.empty), flow.student_sigmas(20)
        grid["source"] += [source[0] for source in batch.condition.sources[-1:]]  # (64, h, w)
        grid[entry.task].append(flow.euler(v, batch.noise, sigmas)[0])  # (64, h, w)
    vae = VAE.from_pretrained(args.checkpoint / "vae", device=args.device)  # not kept between panels: memory
    panel = [row[:8] for row in panel]
    for rows, path in ((panel, args.out / "panels" / f"{step:06d}.png"), (grid.values(), args.out / "grid.png")):
        pictures = [[sample.to_pictures(vae.decode(z[None].float()))[0] for z in row] for row in rows if len(row)]
        heights = [max(picture.height for picture in row) for row in pictures]
        width = max(sum(picture.width for picture in row) for row in pictures)
        canvas = Image.new("RGBA", (width, sum(heights)), "white")
        for i, row in enumerate(pictures):
            for j, picture in enumerate(row):
                canvas.alpha_composite(picture, (sum(p.width for p in row[:j]), sum(heights[:i])))
        path.parent.mkdir(exist_ok=True)
        canvas.convert("RGB").save(path)


# ---- the loop --------------------------------------------------------------------------------------------------------


def train(args: Args, pool: Pool, state: dict | None) -> Path:
    """Train on the pool; args and state are open_run's. Returns out/student, or out/transformer for the flow objective.

    SystemExit(128 + signal) after a Ctrl-C or SIGTERM, when all is saved. FloatingPointError, before the update, where
    a loss or gradient is not finite.
    """
    flows = args.objective == "flow"
    folders = {} if flows else find_teachers(args)
    recipe = recipes.find(args.recipe)
    if not flows and (missing := sorted(recipe.teachers - folders.keys())):
        print(f"no teacher {', '.join(missing)} here: the base teacher takes its part")
    recipe = recipe.resolve(recipes.categories(pool.entries), folders)

    base = args.checkpoint / "transformer"
    student = Trainee("teacher" if flows else "student", load(args, base), args, args.muon_lr, args.lr, args.ema)
    trainees = {"student": student}
    if not flows:
        trainees["fake"] = fake = Trainee("fake score", load(args, base), args, args.fake_muon_lr, args.fake_lr, ema=0)
        folders = {"base": base} | {name: folders[name] for name in sorted(recipe.teachers)}
        teachers = {name: load(args, f).to(getattr(torch, args.dtype)) for name, f in folders.items()}
        sigmas = flow.student_sigmas(args.student_steps)
    start = state["step"] if state else 0
    for name, trainee in trainees.items() if state else ():
        trainee.restore(state[name])

    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.objective, unit="step")
    here = located(lambda: f"step {step + 1}, task {batch.task}, k = {batch.k}")
    with here, noted_signals() as signals, open(args.out / "metrics.jsonl", "a") as metrics:
        for step in bar:
            began, log = time.perf_counter(), Log()
            rate = min(1, (step + 1) / args.warmup) if args.warmup else 1.0
            rate *= min(1, (args.steps - step) / (args.decay * args.steps)) if args.decay else 1.0
            # ==========================================================================================================
            if flows:
                for batch, share in batches(args, pool, recipe, "flow", step):
                    v = velocity(student.model, batch.condition)
                    losses = flow.flow_matching_loss(v, batch.target, batch.noise, batch.t)  # (B,)
                    student.backward(losses, share, batch)
                    log.add("loss", losses, batch)
                log.norms["grad_norm"] = student.update(rate)
            else:
                # 1. The fake score learns what the student draws by now. The student draws, and does not learn.
                for update in range(step * args.fake_updates, (step + 1) * args.fake_updates):
                    for batch, share in batches(args, pool, recipe, "fake", update):
                        drawing, learning = (velocity(m.model, batch.condition) for m in (student, fake))
                        with torch.no_grad():
                            x_theta = dmd.rollout(drawing, batch.noise, sigmas, batch.k)
                        losses = dmd.fake_score_loss(learning, x_theta, batch.xi, batch.t)  # (B,)
                        fake.backward(losses, share, batch)
                        log.add("fake_loss", losses, batch)
                    log.norms["fake_grad_norm"] = fake.update(rate)
                # 2. The student learns once. Teachers and fake score look on, without gradient (dmd_gradient has none).
                for batch, share in batches(args, pool, recipe, "student", step):
                    v = velocity(student.model, batch.condition)
                    x_theta = dmd.rollout(v, batch.noise, sigmas, batch.k)  # gradient through its step k alone
                    weights = recipe.weights(batch.k, args.student_steps, batch.task, batch.category)
                    chosen = {m: guided(args, teachers[m], batch.condition, batch.empty) for m in weights}
                    real, seen = dmd.mixture(weights, chosen), velocity(fake.model, batch.condition)
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
            line = log.line(step=done, rate=rate, **pace)
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            bar.set_postfix_str(f"loss {line['loss']:.4f}, {args.batch / seconds:.0f} images/s", refresh=False)
            if done % args.panel_every == 0 or done == args.steps:
                if flows:
                    z = flow.path(batch.target, batch.noise, batch.t)
                    with torch.no_grad():
                        panel = [
                            batch.target,
                            z,
                            flow.x0_from_velocity(z, v(z, batch.t), batch.t),
                        ]  # (B, 64, h, w) each
                else:
                    panel = [x_theta.detach(), x0_real, x0_fake]
                draw(args, pool, student.averaged(), panel, done)
            if done % args.save_every == 0 or done == args.steps or signals:
                save(args.out, {"step": done} | {name: trainee.state() for name, trainee in trainees.items()})
            if signals and done < args.steps:
                bar.close()
                print(f"stopped after step {done}; --resume goes on from there")
                raise SystemExit(128 + signals[0])
    bar.close()
    if flows:
        student.averaged().save_pretrained(args.out / "transformer")
        return args.out / "transformer"
    sample.export(args.checkpoint, student.averaged(), sigmas[:-1], args.out / "student")
    return args.out / "student"


def main(argv: list[str] | None = None) -> None:
    args, state = open_run(parse(argv))
    flows, cuda = args.objective == "flow", args.device.startswith("cuda")
    prompts = recipes.read_prompts(args.prompts) if args.prompts else toy_prompts(args)
    recipes.find(args.recipe).resolve(recipes.categories(prompts), ())  # what is missing, before the encoding
    pipeline = sample.Pipeline.from_pretrained(args.checkpoint, torch.bfloat16 if cuda else torch.float32, args.device)
    pool = encode_pool(pipeline, prompts, args.resolution, empty=flows or args.guidance != 1, targets=flows)
    del pipeline, prompts
    folder = train(args, pool, state)
    print(f"finished: {folder}")
    if not flows and not args.prompts:  # the toy world has a judge
        from eval import compare

        compare(folder, args.checkpoint, args.out)


if __name__ == "__main__":
    try:
        main()
    except FloatingPointError as error:  # the checkpoints are from before it
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(1)
    except (ValueError, OSError) as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
