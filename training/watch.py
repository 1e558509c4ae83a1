"""What a run shows: a line of metrics for each step, the progress line, pictures. It changes no weight."""

import json
import os
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from PIL import Image
from torch import Tensor

import flow
from data.batches import condition_of, generator
from data.pictures import to_pictures
from data.pool import Entry, Pool
from data.sheets import Grid, write_sheet
from networks.vae import VAE
from program.ranks import all_gather, on_rank0, raise_on_all_ranks, rank, ranks
from training.options import TrainOptions
from training.trainee import Network, Record, Trainee

BINS = 5  # of t: when a run goes wrong, look at the loss by time first


def note(
    options: TrainOptions, trainees: dict[str, Trainee], step: int, lr_factor: float, seconds: float, passes: int
) -> str:
    """Add a step that took so many seconds, and passes of this process, to metrics.jsonl, and forget its records. Returns
    the progress line's text. The processes have equal parts of every step."""
    pace = {"seconds": round(seconds, 4), "images_per_second": round(options.batch / seconds, 2)}
    pace["passes"] = passes * ranks()
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


@torch.no_grad()
def draw_pictures(
    options: TrainOptions, pool: Pool, network: Network, step: int, record: Record, panel: dict[str, Tensor]
) -> None:
    """Write panels/STEP.png, from the last micro-batch, and grid.png: two prompts of every category, edits below their
    last source. panel: (B, 64, h, w) each, under its row's name; record: of the same micro-batch. The weights may be
    divided among the ranks, so all of them draw; rank 0 decodes."""
    shown = [entry for entries in pool.places.values() for entry in entries[:2]]
    drawn = [draw_entry(options, network, entry, number) for number, entry in enumerate(shown)]
    k = "" if record.k is None else f"k {record.k}, "
    times = [f"{k}t {t:.2f}" for t in record.times[:8]]
    t2i = [i for i, entry in enumerate(shown) if entry.task == "t2i"]
    edits = [i for i, entry in enumerate(shown) if entry.task == "edit"]

    def write_both() -> None:
        vae = VAE.from_pretrained(options.checkpoint / "vae", device=options.device)  # not kept between two pictures

        def decoded(latents: Iterable[Tensor]) -> list[Image.Image]:
            return [to_pictures(vae.decode(z[None].to(options.device).float()))[0] for z in latents]

        panels = Grid({name: decoded(z[:8]) for name, z in panel.items()}, times)
        write_sheet([panels], options.out / "panels" / f"{step:06d}.png")
        above = Grid({"t2i": decoded(drawn[i] for i in t2i)}, [shown[i].words for i in t2i])
        sources = decoded(shown[i].sources[-1] for i in edits)
        below = Grid({"source": sources, "edit": decoded(drawn[i] for i in edits)}, [shown[i].words for i in edits])
        write_sheet([above, below], options.out / "grid.png")

    on_rank0(write_both)


def draw_entry(options: TrainOptions, network: Network, entry: Entry, number: int) -> Tensor:
    """The latent (64, h, w) of an entry, always from the same noise."""
    sigmas = flow.student_sigmas(options.student_steps if options.objective == "dmd" else 20)
    dtype, calls = getattr(torch, options.dtype), len(sigmas) - 1
    rng = generator(options.seed, 0, number, "grid")
    noises = torch.randn(options.noises, 64, *entry.size, generator=rng)[:, None]  # (K, 1, 64, h, w)
    velocities = [network.velocity(condition_of([entry], options.device, dtype), calls)]
    if options.objective == "flow" and options.guidance != 1:
        empty = condition_of([entry], options.device, dtype, empty=True)
        velocities.append(network.velocity(empty, calls))
    return flow.draw(velocities, noises.to(options.device), sigmas, options.guidance)[0]  # (64, h, w)
