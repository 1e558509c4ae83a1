"""What a run shows: a line of metrics for each step, the progress line, pictures. Nothing here changes a weight."""

import json
import resource
import sys
from collections import Counter, defaultdict
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
from program.ranks import all_gather, on_rank0, ranks
from training.options import TrainOptions
from training.trainee import Network, Record, Trainee

BINS = 5  # of t: when a run goes wrong, look at the loss by time first


def note(
    options: TrainOptions, trainees: dict[str, Trainee], step: int, lr_factor: float, seconds: float, passes: int
) -> str:
    """Add a step to metrics.jsonl, and clear its records. Returns the text of the progress line.

    seconds: how long the step took; passes: those of this process, which has an equal part of the step.
    """
    line = {
        "step": step,
        "rate": lr_factor,
        "seconds": round(seconds, 4),
        "images_per_second": round(options.batch / seconds, 2),
        "passes": passes * ranks(),
        "memory_gb": memory(options.device),
        **metrics(trainees, all_gather),
    }
    for trainee in trainees.values():
        trainee.records.clear()

    def append() -> None:
        with open(options.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    on_rank0(append)
    norms = [f"{name.replace('_', ' ')} {line[name]:.2f}" for name in line if name.endswith("grad_norm")]
    pace = f"{line['images_per_second']:.1f} images/s, {line['memory_gb']} GB"
    return f"loss {line['loss']:.4f}, {', '.join(norms)}, {pace}"


def metrics(trainees: dict[str, Trainee], all_gather: Callable[[list], list]) -> dict:
    """The part of a step's line that is about its updates, over the samples of all processes.

    Losses are means over samples, by t and by task. Those of the first network in `trainees` are called loss and
    grad_norm, those of another NAME_loss and NAME_grad_norm. A gradient's norm is that of the last update. all_gather:
    the lists of all processes.
    """
    mine = []
    for name, trainee in trainees.items():
        for record in trainee.records:
            pairs = zip(record.times, record.losses.tolist(), strict=True)
            mine += [(name, record.task, t, loss) for t, loss in pairs]
    of_ranks = all_gather(mine)  # one exchange for all of these numbers
    samples = sum(of_ranks, [])

    means, norms, details = {}, {}, {}
    for number, (name, trainee) in enumerate(trainees.items()):
        prefix = f"{name}_" if number > 0 else ""
        by_task, by_t, total = defaultdict(list), [], 0.0
        for _, task, t, loss in (sample for sample in samples if sample[0] == name):
            by_task[task].append(loss)
            by_t.append((t, loss))
            total += loss
        means[f"{prefix}loss"] = total / len(by_t)
        norms[f"{prefix}grad_norm"] = trainee.grad_norm
        details[f"{prefix}loss_by_t"] = by_time(by_t)
        details[f"{prefix}loss_by_task"] = {task: mean(by_task[task]) for task in sorted(by_task)}

    records = [record for trainee in trainees.values() for record in trainee.records]
    categories = Counter()
    for record in records:
        categories[f"{record.task} {record.category}"] += len(record.losses) * len(of_ranks)
    tasks, steps = [record.task for record in records], [record.k for record in records]
    return {**means, **norms, "tasks": tasks, "k": steps, "categories": categories, **details}


def by_time(losses: list[tuple[float, float]]) -> list[float | None]:
    """The mean of (t, loss) in each of BINS equal parts of [0, 1]; None where there is no sample."""
    bins: list[list[float]] = [[] for _ in range(BINS)]
    for t, loss in losses:
        bins[min(int(t * BINS), BINS - 1)].append(loss)
    return [mean(values) for values in bins]


def mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 5) if values else None


def memory(device: str) -> float:
    """The peak memory of this process so far, in GB: on its GPU, or on the machine."""
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated()
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return round(peak / 1e9, 2)


@torch.no_grad()
def draw_pictures(
    options: TrainOptions, pool: Pool, network: Network, step: int, record: Record, panel: dict[str, Tensor]
) -> None:
    """Write panels/STEP.png, from the last micro-batch, and grid.png: two prompts of every category, edits below their
    last source.

    panel: the rows (B, 64, h, w) by name; record: of the same micro-batch. The weights may be sharded, so all ranks draw;
    rank 0 decodes.
    """
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
    noises = torch.randn(options.noises, 64, *entry.size, generator=rng)[:, None]  # (K or 1, 1, 64, h, w)
    velocities = [network.velocity(condition_of([entry], options.device, dtype), calls)]
    if options.objective == "flow" and options.guidance != 1:
        empty = condition_of([entry], options.device, dtype, empty=True)
        velocities.append(network.velocity(empty, calls))
    return flow.draw(velocities, noises.to(options.device), sigmas, options.guidance)[0]  # (64, h, w)
