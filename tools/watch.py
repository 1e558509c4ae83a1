"""What a run shows: a line of metrics for each step, the progress line, pictures. Nothing here changes a weight."""

import json
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import sample
from encoders.vae import VAE


class Log:
    """One step's line of metrics.jsonl. The loss by time is the first place to look when a run goes wrong."""

    BINS = 5  # of t

    def __init__(self):
        self.losses: list[tuple] = []  # name, train.Batch, losses (B,)
        self.norms: dict[str, float] = {}

    def add(self, name: str, losses: Tensor, batch) -> None:
        self.losses.append((name, batch, losses.detach()))

    def line(self, everyone: Callable[[list], list], **numbers) -> dict:
        """`everyone` gives what every process has of a list: the line is about the samples of all of them."""
        mine = [(name, batch.task, losses.tolist(), batch.t.tolist()) for name, batch, losses in self.losses]
        found: dict[str, list[tuple[str, float, int]]] = {}  # name -> (task, loss, bin of t) of each sample
        for name, task, losses, times in (record for records in everyone(mine) for record in records):
            bins = [min(int(t * self.BINS), self.BINS - 1) for t in times]
            found.setdefault(name, []).extend(zip([task] * len(losses), losses, bins, strict=True))

        def mean(values: list[float]) -> float | None:
            return round(sum(values) / len(values), 5) if values else None

        total, parts = {}, {}
        for name, rows in found.items():
            total[name] = sum(loss for _, loss, _ in rows) / len(rows)
            parts[name + "_by_t"] = [mean([loss for _, loss, bin in rows if bin == i]) for i in range(self.BINS)]
            tasks = sorted({task for task, _, _ in rows})
            parts[name + "_by_task"] = {task: mean([loss for t, loss, _ in rows if t == task]) for task in tasks}
        batches, counts = [batch for _, batch, _ in self.losses], Counter()
        for b in batches:
            counts[f"{b.task} {b.category}"] += len(b.t) * len(everyone([]))
        each = {"tasks": [b.task for b in batches], "k": [b.k for b in batches], "categories": counts}
        return numbers | total | self.norms | each | parts


def memory(device: str) -> float:
    """The most that this process has held so far, in GB: on its GPU, or of the machine's memory."""
    kept = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return round((torch.cuda.max_memory_allocated() if device.startswith("cuda") else kept) / 1e9, 2)


def record(line: dict, metrics: TextIO, board) -> None:
    metrics.write(json.dumps(line) + "\n")
    metrics.flush()
    for name, value in line.items() if board else ():
        if isinstance(value, (int, float)) and name != "step":
            board.add_scalar(name, value, line["step"])


def summary(line: dict) -> str:
    """What the progress line says beside the time left."""
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
    """One picture of rows of latents, (64, h, w) each, row below row, each with its name before it and `heads` above the
    columns (an empty list: nothing). Rows without latents are left out. The VAE is not kept between two: memory."""
    decoder = VAE.from_pretrained(vae, device=device)
    decoded = {
        name: [sample.to_pictures(decoder.decode(z[None].float()))[0] for z in row] for name, row in rows.items()
    }
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
