"""What a run shows: a line of metrics for each step, the progress line, pictures. It changes no weight."""

import json
import os
import resource
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import flow
from data.batches import condition_of, generator
from data.encode import Pool
from data.pictures import to_pictures
from networks.vae import VAE
from program.ranks import all_gather, on_rank0, raise_on_all_ranks, rank
from training.options import TrainOptions
from training.trainee import Network, Record, Trainee

BINS = 5  # of t: when a run goes wrong, look at the loss by time first


def note(options: TrainOptions, trainees: dict[str, Trainee], step: int, lr_factor: float, seconds: float) -> str:
    """Add a step that took so many seconds to metrics.jsonl, and forget its records. Returns the progress line's text."""
    pace = {"seconds": round(seconds, 4), "images_per_second": round(options.batch / seconds, 2)}
    pace |= {"memory_gb": memory(options.device)}
    line = {"step": step, "rate": lr_factor} | pace | metrics(trainees, all_gather)
    for trainee in trainees.values():
        trainee.records.clear()
    with raise_on_all_ranks(), open(options.out / "metrics.jsonl" if rank() == 0 else os.devnull, "a") as file:
        file.write(json.dumps(line) + "\n")
    norms = [name for name in line if name.endswith("grad_norm")]
    norms = ", ".join(f"{name.replace('_', ' ')} {line[name]:.2f}" for name in norms)
    return f"loss {line['loss']:.4f}, {norms}, {line['images_per_second']:.1f} images/s, {line['memory_gb']} GB"


def metrics(trainees: dict[str, Trainee], all_gather: Callable[[list], list]) -> dict:
    """What metrics.jsonl says of a step's updates, about the samples of all processes.

    Losses are means over samples, by t and by task; those of the first network in `trainees` are called loss and
    grad_norm, those of another NAME_loss and NAME_grad_norm. A gradient's norm is that of the last update. all_gather:
    gives the lists of all processes.
    """
    prefixes = {name: "" if name == next(iter(trainees)) else f"{name}_" for name in trainees}
    mine = [
        (name, record.task, t, loss)
        for name, trainee in trainees.items()
        for record in trainee.records
        for t, loss in zip(record.times, record.losses.tolist(), strict=True)
    ]
    gathered = all_gather(mine)  # the one exchange of a step's log
    samples = [sample for of_rank in gathered for sample in of_rank]

    totals, norms, parts = {}, {}, {}
    for name, prefix in prefixes.items():
        own = [(task, t, loss) for owner, task, t, loss in samples if owner == name]
        totals[f"{prefix}loss"] = sum(loss for _, _, loss in own) / len(own)
        norms[f"{prefix}grad_norm"] = trainees[name].grad_norm
        parts[f"{prefix}loss_by_t"] = by_time([(t, loss) for _, t, loss in own])
        tasks = sorted({task for task, _, _ in own})
        of_task = {task: [loss for other, _, loss in own if other == task] for task in tasks}
        parts[f"{prefix}loss_by_task"] = {task: mean(losses) for task, losses in of_task.items()}

    records = [record for trainee in trainees.values() for record in trainee.records]
    counts = Counter()
    for record in records:
        counts[f"{record.task} {record.category}"] += len(record.losses) * len(gathered)
    contents = {
        "tasks": [record.task for record in records],
        "k": [record.k for record in records],
        "categories": counts,
    }
    return totals | norms | contents | parts


def by_time(losses: list[tuple[float, float]]) -> list[float | None]:
    """The mean of (t, loss) in each of BINS equal parts of [0, 1]; None where there is no sample."""
    bins: list[list[float]] = [[] for _ in range(BINS)]
    for t, loss in losses:
        bins[min(int(t * BINS), BINS - 1)].append(loss)
    return [mean(values) for values in bins]


def mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 5) if values else None


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
def draw_pictures(
    options: TrainOptions, pool: Pool, network: Network, step: int, record: Record, panel: dict[str, Tensor]
) -> None:
    """Write panels/STEP.png, from the last micro-batch, and grid.png: two prompts of every category, edits below their
    last source. panel: (B, 64, h, w) each, under its row's name; record: of the same micro-batch. The weights may be
    divided among the ranks, so all of them draw; rank 0 decodes."""
    flows = options.objective == "flow"
    sigmas = flow.student_sigmas(20 if flows else options.student_steps)
    t2i, edit = Block({"t2i": []}, []), Block({"source": [], "edit": []}, [])
    shown = [entry for entries in pool.places.values() for entry in entries[:2]]
    for number, entry in enumerate(shown):
        rng, dtype = generator(options.seed, 0, number, "grid"), getattr(torch, options.dtype)
        condition = condition_of([entry], options.device, dtype)
        noises = torch.randn(options.noises, 64, *entry.size, generator=rng)[:, None]  # (K, 1, 64, h, w)
        velocity = network.velocity(condition, calls=len(sigmas) - 1)
        if flows and options.guidance != 1:
            empty = condition_of([entry], options.device, dtype, empty=True)
            velocity = flow.guided(velocity, network.velocity(empty, calls=len(sigmas) - 1), options.guidance)
        block = edit if entry.task == "edit" else t2i
        block.heads.append(entry.words)
        block.rows[entry.task].append(flow.walk(velocity, noises.to(options.device), sigmas)[0])  # (64, h, w)
        if entry.task == "edit":
            block.rows["source"].append(condition.sources[-1][0])  # (64, h, w)
    k = "" if record.k is None else f"k {record.k}, "
    panel_block = Block({name: list(z[:8]) for name, z in panel.items()}, [f"{k}t {t:.2f}" for t in record.times[:8]])

    def paint_both() -> None:
        vae = options.checkpoint / "vae"
        paint(vae, options.device, [panel_block], options.out / "panels" / f"{step:06d}.png")
        paint(vae, options.device, [t2i, edit], options.out / "grid.png")

    on_rank0(paint_both)
