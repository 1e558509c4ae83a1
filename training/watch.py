"""What a run shows: a line of metrics for each step, the progress line, pictures. It changes no weight."""

import json
import math
import os
import resource
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import flow
from data.encode import Pool
from data.pictures import to_pictures
from networks.vae import VAE
from program.ranks import all_gather, on_rank0, raise_on_all_ranks, rank
from training.batches import Batch, generator, make_batch


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
        note.condition = note.empty = note.target = note.noises = note.xi = note.t = None
        self.losses.append((note, losses.detach()))

    @property
    def batch(self) -> Batch:
        """The last micro-batch, which the panel shows."""
        return self.losses[-1][0]


BINS = 5  # of t: when a run goes wrong, look at the loss by time first


def metrics(records: list[Record], all_gather: Callable[[list], list]) -> dict:
    """What metrics.jsonl says of a step's updates, about the samples of all processes.

    all_gather: gives the lists of all processes. Losses are means over samples, by t and by task. A gradient's norm is that
    of the last update.
    """
    batches = [(r.loss_name, batch, losses.tolist()) for r in records for batch, losses in r.losses]
    mine = [(name, b.task, t, loss) for name, b, losses in batches for t, loss in zip(b.times, losses, strict=True)]
    shared = all_gather(mine)  # the one exchange of a step's log

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
    line = {"step": step, "rate": lr_factor} | pace | metrics(records, all_gather)
    with raise_on_all_ranks(), open(args.out / "metrics.jsonl" if rank() == 0 else os.devnull, "a") as file:
        file.write(json.dumps(line) + "\n")
    norms = [name for name in ("fake_grad_norm", "grad_norm") if name in line]
    norms = ", ".join(f"{name.replace('_', ' ')} {line[name]:.2f}" for name in norms)
    return f"loss {line['loss']:.4f}, {norms}, {line['images_per_second']:.1f} images/s, {line['memory_gb']} GB"


def memory(device: str) -> float:
    """The most memory that this process has held so far, in GB: of its GPU, or of the machine."""
    kept = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return round((torch.cuda.max_memory_allocated() if device.startswith("cuda") else kept) / 1e9, 2)


@dataclass
class Block:
    """Rows of latents to be decoded, (64, h, w) each. Each row has its name on the left, each column its words above."""

    rows: dict[str, list[Tensor]]
    heads: list[str]


@torch.no_grad()
def paint(vae: Path, device: str, blocks: list[Block], path: Path) -> None:
    """Decode blocks into one picture, one below the other. Rows and blocks without latents are left out. The VAE is not
    kept in memory between two pictures."""
    decoder = VAE.from_pretrained(vae, device=device)

    def decoded(latents: list[Tensor]) -> list[Image.Image]:
        return [to_pictures(decoder.decode(z[None].float()))[0] for z in latents]

    shown = [({name: decoded(row) for name, row in block.rows.items() if row}, block.heads) for block in blocks]
    shown = [(rows, heads) for rows, heads in shown if rows]
    sizes = [picture.size for rows, _ in shown for row in rows.values() for picture in row]
    width, height = map(max, zip(*sizes, strict=True))
    font, small = ImageFont.load_default(height // 8), ImageFont.load_default(max(10, height // 13))
    columns = int(1.7 * width / small.size)  # letters of a line above a picture, about
    heads = [
        "\n".join(textwrap.wrap(head, columns, max_lines=6, placeholder=" ...")) for _, some in shown for head in some
    ]
    left = int(max(font.getlength(name) for rows, _ in shown for name in rows)) + 8
    top = int(1.3 * small.size * (1 + max(head.count("\n") for head in heads))) + 4
    size = left + width * max(len(some) for _, some in shown), sum(top + height * len(rows) for rows, _ in shown)
    canvas = Image.new("RGBA", size, "white")
    pen, y = ImageDraw.Draw(canvas), 0
    for rows, some in shown:
        for j in range(len(some)):
            x = left + j * width + 2
            pen.multiline_text((x, y + top - 2), heads.pop(0), fill="black", font=small, anchor="ld", spacing=1)
        y += top
        for name, row in rows.items():
            pen.text((4, y + height // 2), name, fill="black", font=font, anchor="lm")
            for j, picture in enumerate(row):
                canvas.alpha_composite(picture, (left + j * width, y))
            y += height
    path.parent.mkdir(exist_ok=True)
    canvas.convert("RGB").save(path)


@torch.no_grad()
def draw_pictures(args, pool: Pool, network, record: Record, step: int) -> None:
    """Write panels/STEP.png, from the record's last micro-batch, and grid.png: two prompts of every category, edits below
    their last source. The weights may be divided among the ranks, so all of them draw; the first one decodes."""
    flows = args.objective == "flow"
    t2i, edit = Block({"t2i": []}, []), Block({"source": [], "edit": []}, [])
    sigmas = flow.student_sigmas(20 if flows else args.student_steps)
    chosen = [entry for place in pool.places.values() for entry in place[:2]]
    for number, entry in enumerate(chosen):
        one = make_batch(args, [entry], [generator(args.seed, 0, number, "grid")])
        velocity = network.velocity(one.condition, keep=True)
        if flows and args.guidance != 1:
            velocity = flow.guided(velocity, network.velocity(one.empty, keep=True), args.guidance)
        block = edit if entry.task == "edit" else t2i
        block.heads.append(entry.words)
        block.rows[entry.task].append(flow.walk(velocity, one.noises, sigmas)[0])  # (64, h, w)
        if entry.task == "edit":
            block.rows["source"].append(one.condition.sources[-1][0])  # (64, h, w)
    k = "" if flows else f"k {record.batch.k}, "  # the student's step
    heads = [f"{k}t {t:.2f}" for t in record.batch.times[:8]]
    panel = Block({name: list(z[:8]) for name, z in record.panel.items()}, heads)
    pictures = {args.out / "panels" / f"{step:06d}.png": [panel], args.out / "grid.png": [t2i, edit]}
    vae = args.checkpoint / "vae"
    on_rank0(lambda: [paint(vae, args.device, blocks, path) for path, blocks in pictures.items()] and None)
