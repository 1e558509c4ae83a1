"""What a run shows: a line of metrics for each step, the progress line, pictures. It changes no weight."""

import json
import math
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import flow
from encoders.vae import VAE
from model import MMDiTConfig
from support import plan
from support.batches import Batch, generator, make_batch
from support.conditions import Pool
from support.pictures import to_pictures
from support.ranks import by_first, everyone, rank, together


@dataclass
class Record:
    """What the log and the pictures need of one update."""

    loss_name: str
    norm_name: str
    losses: list[tuple[Batch, Tensor]] = field(default_factory=list)  # of each micro-batch, (B,) a sample
    grad_norm: float = math.nan
    panel: dict[str, Tensor] = field(default_factory=dict)  # of the last micro-batch, (B, 64, h, w) each

    def add(self, batch: Batch, losses: Tensor) -> None:
        note = copy(batch)  # without its tensors: those of all micro-batches of a step are gigabytes
        note.condition = note.empty = note.target = note.noise = note.xi = note.t = None
        self.losses.append((note, losses.detach()))

    @property
    def batch(self) -> Batch:
        """The last micro-batch, which the panel shows."""
        return self.losses[-1][0]


BINS = 5  # of t: when a run goes wrong, look at the loss by time first


def metrics_line(records: list[Record], everyone: Callable[[list], list], **numbers) -> dict:
    """One step's line of metrics.jsonl, about the samples of all processes.

    everyone: gives the lists of all processes. Losses are means over samples, by t and by task. A gradient's norm is that
    of the last update.
    """
    mine = [(r.loss_name, b.task, losses.tolist(), b.times) for r in records for b, losses in r.losses]
    shared = everyone(mine)  # the one exchange of a step's log
    found: dict[str, list[tuple[str, float, int]]] = {}  # name -> (task, loss, bin of t) of each sample
    for name, task, losses, times in (part for parts in shared for part in parts):
        bins = [min(int(t * BINS), BINS - 1) for t in times]
        found.setdefault(name, []).extend(zip([task] * len(losses), losses, bins, strict=True))

    def mean(values: list[float]) -> float | None:
        return round(sum(values) / len(values), 5) if values else None

    total, parts = {}, {}
    for name, rows in found.items():
        total[name] = sum(loss for _, loss, _ in rows) / len(rows)
        parts[name + "_by_t"] = [mean([loss for _, loss, bin in rows if bin == i]) for i in range(BINS)]
        tasks = sorted({task for task, _, _ in rows})
        parts[name + "_by_task"] = {task: mean([loss for t, loss, _ in rows if t == task]) for task in tasks}
    norms = {r.norm_name: r.grad_norm for r in records}
    batches, counts = [batch for r in records for batch, _ in r.losses], Counter()
    for b in batches:
        counts[f"{b.task} {b.category}"] += len(b.times) * len(shared)
    each = {"tasks": [b.task for b in batches], "k": [b.k for b in batches], "categories": counts}
    return numbers | total | norms | each | parts


class Diary:
    """metrics.jsonl and TensorBoard's files of a run. `write` adds a step. Only rank 0 writes."""

    def __init__(self, args, recipe):
        self.args, self.recipe = args, recipe

    def __enter__(self) -> "Diary":
        self.board = open_board(self.args.out) if rank() == 0 else None
        self.metrics = open(self.args.out / "metrics.jsonl" if rank() == 0 else os.devnull, "a")
        return self

    def __exit__(self, *_) -> None:
        self.metrics.close()

    def write(self, step: int, rate: float, records: list[Record], config: MMDiTConfig) -> str:
        """Add a step that has just ended. Returns the text of the progress line."""
        seconds = time.perf_counter() - self.began
        pace = {"seconds": round(seconds, 4), "images_per_second": round(self.args.batch / seconds, 2)}
        pace |= {"mfu": plan.utilisation(self.args, config, self.recipe, records, seconds)}
        pace |= {"memory_gb": memory(self.args.device)}
        line = metrics_line(records, everyone, step=step, rate=rate, **pace)
        with together():
            record(line, self.metrics, self.board)
        return summary(line)

    def next_step(self) -> None:
        """Start the clock of the next step."""
        self.began = time.perf_counter()


def memory(device: str) -> float:
    """The most memory that this process has held so far, in GB: of its GPU, or of the machine."""
    kept = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return round((torch.cuda.max_memory_allocated() if device.startswith("cuda") else kept) / 1e9, 2)


def record(line: dict, metrics: TextIO, board) -> None:
    metrics.write(json.dumps(line) + "\n")
    metrics.flush()
    for name, value in line.items() if board else ():
        if isinstance(value, (int, float)) and name != "step":
            board.add_scalar(name, value, line["step"])


def summary(line: dict) -> str:
    """The text of the progress line, without the time left."""
    norms = [name for name in ("fake_grad_norm", "grad_norm") if name in line]
    norms = ", ".join(f"{name.replace('_', ' ')} {line[name]:.2f}" for name in norms)
    mfu = "" if line["mfu"] is None else f", MFU {line['mfu']:.0%}"
    return f"loss {line['loss']:.4f}, {norms}, {line['images_per_second']:.1f} images/s{mfu}, {line['memory_gb']} GB"


def source() -> str:
    """The commit of this source, with "-dirty" where something differs from it; "unknown" without git."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def open_board(out: Path):
    """TensorBoard's writer, where it is installed; else None, and metrics.jsonl has it all."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(out / "tensorboard")


@torch.no_grad()
def paint(vae: Path, device: str, rows: dict[str, Iterable[Tensor]], heads: list[str], path: Path) -> None:
    """Decode rows of latents, (64, h, w) each, into one picture: each row has its name on the left, each column its head
    above (heads may be empty). Rows without latents are left out. The VAE is not kept in memory between two pictures."""
    decoder = VAE.from_pretrained(vae, device=device)
    decoded = {name: [to_pictures(decoder.decode(z[None].float()))[0] for z in row] for name, row in rows.items()}
    shown = {name: row for name, row in decoded.items() if row}
    heights = [max(picture.height for picture in row) for row in shown.values()]
    font = ImageFont.load_default(max(heights) // 8)
    left, top = int(max(font.getlength(name) for name in shown)) + 8, font.size + 8 if heads else 0
    width = left + max(sum(picture.width for picture in row) for row in shown.values())
    canvas = Image.new("RGBA", (width, top + sum(heights)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (name, row) in enumerate(shown.items()):
        y = top + sum(heights[:i])
        pen.text((4, y + heights[i] // 2), name, fill="black", font=font, anchor="lm")
        for j, picture in enumerate(row):
            x = left + sum(p.width for p in row[:j])
            canvas.alpha_composite(picture, (x, y))
            if i == 0 and heads:
                pen.text((x + picture.width // 2, top // 2), heads[j], fill="black", font=font, anchor="mm")
    path.parent.mkdir(exist_ok=True)
    canvas.convert("RGB").save(path)


@torch.no_grad()
def draw_pictures(args, pool: Pool, network, record: Record, step: int) -> None:
    """Write panels/STEP.png, from the record's last micro-batch, and grid.png: two prompts of every category, edits below
    their last source. The weights may be divided among the ranks, so all of them draw; the first one decodes."""
    flows, grid = args.objective == "flow", {"t2i": [], "source": [], "edit": []}
    sigmas = flow.student_sigmas(20 if flows else args.student_steps)
    chosen = [entry for place in pool.places.values() for entry in place[:2]]
    for number, entry in enumerate(chosen):
        one = make_batch(args, [entry], [generator(args.seed, 0, number, "grid")])
        velocity = network.velocity(one.condition, keep=True)
        if flows and args.guidance != 1:
            velocity = flow.guided(velocity, network.velocity(one.empty, keep=True), args.guidance)
        grid["source"] += [source[0] for source in one.condition.sources[-1:]]  # (64, h, w)
        grid[entry.task].append(flow.euler(velocity, one.noise, sigmas)[0])  # (64, h, w)
    k = "" if flows else f"k {record.batch.k}, "  # the student's step
    heads = [f"{k}t {t:.2f}" for t in record.batch.times[:8]]
    rows = {name: z[:8] for name, z in record.panel.items()}
    pictures = {args.out / "panels" / f"{step:06d}.png": (rows, heads), args.out / "grid.png": (grid, [])}
    vae = args.checkpoint / "vae"
    by_first(lambda: [paint(vae, args.device, *what, path) for path, what in pictures.items()] and None)
