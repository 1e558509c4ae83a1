"""What a run shows: a line of metrics for each step, the progress line, pictures. It changes no weight."""

import json
import math
import os
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import flow
from encoders.vae import VAE
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


def metrics(records: list[Record], everyone: Callable[[list], list]) -> dict:
    """What metrics.jsonl says of a step's updates, about the samples of all processes.

    everyone: gives the lists of all processes. Losses are means over samples, by t and by task. A gradient's norm is that
    of the last update.
    """
    batches = [(r.loss_name, batch, losses.tolist()) for r in records for batch, losses in r.losses]
    mine = [(name, b.task, t, loss) for name, b, losses in batches for t, loss in zip(b.times, losses, strict=True)]
    shared = everyone(mine)  # the one exchange of a step's log

    def mean(values: list[float]) -> float | None:
        return round(sum(values) / len(values), 5) if values else None

    total, parts = {}, {}
    for name in dict.fromkeys(r.loss_name for r in records):
        rows = [(task, t, loss) for part in shared for n, task, t, loss in part if n == name]
        total[name] = sum(loss for _, _, loss in rows) / len(rows)
        bins = [[loss for _, t, loss in rows if min(int(t * BINS), BINS - 1) == i] for i in range(BINS)]
        parts[name + "_by_t"] = list(map(mean, bins))
        tasks = sorted({task for task, _, _ in rows})
        parts[name + "_by_task"] = {task: mean([loss for one, _, loss in rows if one == task]) for task in tasks}
    norms, counts = {r.norm_name: r.grad_norm for r in records}, Counter()
    for _, b, losses in batches:
        counts[f"{b.task} {b.category}"] += len(losses) * len(shared)
    each = {"tasks": [b.task for _, b, _ in batches], "k": [b.k for _, b, _ in batches], "categories": counts}
    return total | norms | each | parts


def note(args, records: list[Record], step: int, lr_factor: float, seconds: float) -> str:
    """Add a step that took so many seconds to metrics.jsonl. Returns the text of the progress line."""
    pace = {"seconds": round(seconds, 4), "images_per_second": round(args.batch / seconds, 2)}
    pace |= {"memory_gb": memory(args.device)}
    line = {"step": step, "rate": lr_factor} | pace | metrics(records, everyone)
    with together(), open(args.out / "metrics.jsonl" if rank() == 0 else os.devnull, "a") as file:
        file.write(json.dumps(line) + "\n")
    norms = [name for name in ("fake_grad_norm", "grad_norm") if name in line]
    norms = ", ".join(f"{name.replace('_', ' ')} {line[name]:.2f}" for name in norms)
    return f"loss {line['loss']:.4f}, {norms}, {line['images_per_second']:.1f} images/s, {line['memory_gb']} GB"


def memory(device: str) -> float:
    """The most memory that this process has held so far, in GB: of its GPU, or of the machine."""
    kept = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return round((torch.cuda.max_memory_allocated() if device.startswith("cuda") else kept) / 1e9, 2)


@torch.no_grad()
def paint(vae: Path, device: str, rows: dict[str, Iterable[Tensor]], heads: list[str], path: Path) -> None:
    """Decode rows of latents, (64, h, w) each, into one picture: each row has its name on the left, each column its head
    above (heads may be empty). Rows without latents are left out. The VAE is not kept in memory between two pictures."""
    decoder = VAE.from_pretrained(vae, device=device)
    decoded = {name: [to_pictures(decoder.decode(z[None].float()))[0] for z in row] for name, row in rows.items()}
    shown = {name: row for name, row in decoded.items() if row}
    width, height = (max(sides) for sides in zip(*(picture.size for row in shown.values() for picture in row)))
    font = ImageFont.load_default(height // 8)
    left, top = int(max(font.getlength(name) for name in shown)) + 8, font.size + 8 if heads else 0
    size = left + width * max(map(len, shown.values())), top + height * len(shown)
    canvas = Image.new("RGBA", size, "white")
    pen = ImageDraw.Draw(canvas)
    for i, (name, row) in enumerate(shown.items()):
        pen.text((4, top + i * height + height // 2), name, fill="black", font=font, anchor="lm")
        for j, picture in enumerate(row):
            canvas.alpha_composite(picture, (left + j * width, top + i * height))
    for j, head in enumerate(heads):
        pen.text((left + j * width + width // 2, top // 2), head, fill="black", font=font, anchor="mm")
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
