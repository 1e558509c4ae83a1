"""The toy world's T2I-Bench and Editing-Bench, and the comparison of a student with its teacher.

The judge is exact (toy/judge.py). The cases are fixed and held out (toy/world.py: no training prompt shares a benched
combination of attributes). Every model starts from the same noise.

A ROW is a dictionary, as `eval.py --json` writes it: nfe, guidance, seconds_per_image, t2i and edit (score by category and
their average, from 0 to 1), for each of these the half-width of a 95% interval and the two halves of the score, and
diversity. NFE counts network evaluations per picture: steps, times two with guidance.
"""

import math
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import flow
from model import Condition, MMDiT
from sample import Pipeline
from support.checkpoint import read_index
from support.files import write_json
from support.pictures import to_pictures
from toy import judge, world
from toy.figures import contact_sheet
from toy.world import Case

RESOLUTION = world.SIDE * world.ENLARGE  # of the toy world's pictures, in pixels
BATCH = 32  # pictures drawn at once
CASES = {"t2i": 64, "edit": 48}  # per category; by the spread in results/main an average to +-0.03 (arithmetic)
COMPARED = {"t2i": 24, "edit": 16}  # for `compare`, which is part of a run of minutes: +-0.05 and 0.06 there
CATEGORIES = {"t2i": world.CATEGORIES, "edit": world.FAMILIES}
VARIETY = (2, 8)  # prompts per category, and pictures of each: what diversity is measured on
PARTS: dict[str, Callable[[judge.Verdict], float]] = {  # of a verdict, what a row has the means of
    "score": lambda v: v.score,
    "compliance": lambda v: float(v.compliance),
    "attributes": lambda v: sum(v.right.values()) / len(v.right),
    "fidelity": lambda v: v.fidelity,
}


@dataclass
class Sampler:
    """How pictures are drawn. `renoise`: new noise at every stop (flow.renoise), else Euler's straight steps."""

    name: str
    sigmas: list[float]  # with the final 0
    guidance: float = 1.0
    renoise: bool = False
    specialists: dict[tuple[str, str], MMDiT] = field(default_factory=dict)  # (task, category) -> instead of the base

    @property
    def nfe(self) -> int:
        return (len(self.sigmas) - 1) * (2 if self.guidance > 1 else 1)


@torch.no_grad()
def draw_cases(
    pipeline: Pipeline, sampler: Sampler, cases: list[Case], seeds: list[int]
) -> tuple[list[Image.Image], float]:
    """One picture per case (all of one task and category), from noise that follows from its seed alone; and the seconds it took.

    Only prompts of equal length run together, at most BATCH of them. Padding would be masked, yet it moves the target's
    rotary position: a picture would depend on its neighbours. So each is drawn as sample.py draws it, alone.
    """
    if own := sampler.specialists.get((cases[0].task, cases[0].category)):
        pipeline = copy(pipeline)
        pipeline.mmdit = own
    side, began = pipeline.resolution // 16, time.perf_counter()
    images = [case.images for case in cases]
    conditions = [pipeline.condition([case.prompt for case in cases], images)]
    if sampler.guidance > 1:  # the same sources with other words
        states, mask, slots = pipeline.encoder.encode([""] * len(cases), images)
        conditions.append(Condition(states, mask, conditions[0].sources, slots))
    latents = torch.empty(len(cases), 64, side, side)
    lengths = conditions[0].mask.sum(1)  # (N,)
    for length in lengths.unique():
        for rows in (lengths == length).nonzero()[:, 0].split(BATCH):
            noises = []  # one (B, 64, h, w) for the start, and one for every stop that is noised again
            for stop in range(len(sampler.sigmas) - 1 if sampler.renoise else 1):
                rngs = [torch.Generator().manual_seed(1000 * seeds[row] + stop) for row in rows]
                noise = torch.stack([torch.randn(64, side, side, generator=rng) for rng in rngs])
                noises.append(noise.to(pipeline.device))
            velocity, *negative = [pipeline.velocity(excerpt(condition, rows)) for condition in conditions]
            if negative:
                velocity = flow.guided(velocity, negative[0], sampler.guidance)
            if sampler.renoise:
                z = flow.renoise(velocity, noises[0], sampler.sigmas, noises[1:])  # (B, 64, h, w)
            else:
                z = flow.euler(velocity, noises[0], sampler.sigmas)  # (B, 64, h, w)
            latents[rows.cpu()] = z.cpu()
    latents = latents.to(pipeline.device, pipeline.dtype).split(BATCH)
    pictures = [picture for z in latents for picture in to_pictures(pipeline.vae.decode(z))]
    return pictures, time.perf_counter() - began


def excerpt(condition: Condition, rows: Tensor) -> Condition:
    """Some rows (B,) of a condition, which are equally long, without padding."""
    length = int(condition.mask[rows[0]].sum())
    sources = [source[rows] for source in condition.sources]
    return Condition(condition.states[rows, :length], condition.mask[rows, :length], sources, condition.slots)


@torch.no_grad()
def reconstruct(pipeline: Pipeline, pictures: np.ndarray) -> np.ndarray:
    """(B, 128, 128, 3) in [0, 1] through the autoencoder: what a perfect model's picture would look like."""
    again = []
    for part in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(BATCH):
        images = torch.cat([part, torch.ones_like(part[:, :1])], dim=1) * 2 - 1  # (b, 4, 128, 128), opaque
        images = images.to(pipeline.device, pipeline.dtype)
        decoded = pipeline.vae.decode(pipeline.vae.encode(images)).float().cpu().clamp(-1, 1) / 2 + 0.5
        again.append(decoded[:, :3] * decoded[:, 3:] + 1 - decoded[:, 3:])  # over white, as the judge sees pictures
    return torch.cat(again).permute(0, 2, 3, 1).numpy()


def evaluate(
    pipeline: Pipeline, sampler: Sampler, benches: list[str], cases: dict[str, int] = CASES, each: bool = False
) -> tuple[dict, dict[str, list[Image.Image]]]:
    """Scores one model: the row, and its pictures by category (in the order of the bench).

    each: the row says case by case what its means are of. All models draw the same cases, so that differences of two
    models can be taken in pairs.
    """
    row = {"name": sampler.name, "nfe": sampler.nfe, "guidance": sampler.guidance}
    row |= {"seconds_per_image": 0.0, "cases": cases}
    shown, seconds, count = {}, 0.0, 0
    bar = tqdm(total=sum(len(CATEGORIES[b]) for b in benches), desc=sampler.name, leave=False)
    for bench in benches:
        verdicts = {}
        for category in CATEGORIES[bench]:
            some = world.bench(bench, category, cases[bench])
            pictures, spent = draw_cases(pipeline, sampler, some, list(range(len(some))))
            seconds, count = seconds + spent, count + len(some)
            verdicts[category] = judge.judge(pictures, some, lambda x: reconstruct(pipeline, x))
            shown[f"{bench} {category}"] = pictures
            bar.update()
        row |= summary(bench, verdicts)
        if each:
            named = {
                part: {c: [value(v) for v in some] for c, some in verdicts.items()} for part, value in PARTS.items()
            }
            row[f"{bench}_each"] = named
    if "t2i" in benches:
        row["diversity"] = diversity(pipeline, sampler)
    row["seconds_per_image"] = seconds / count
    return row, shown


def summary(bench: str, verdicts: dict[str, list[judge.Verdict]]) -> dict:
    """Mean score by category, the average over categories, and what they are made of."""
    out = {}
    for part, value in PARTS.items():
        means = {category: float(np.mean([value(v) for v in some])) for category, some in verdicts.items()}
        out[bench if part == "score" else f"{bench}_{part}"] = means | {"average": float(np.mean(list(means.values())))}
    kept = [v.kept for some in verdicts.values() for v in some if v.kept is not None]
    if kept:
        out["edit_kept"] = float(np.mean(kept))
    # Half-width of the 95% interval of the average: categories are drawn independently.
    variances = [np.var([v.score for v in some], ddof=1) / len(some) for some in verdicts.values()]
    out[f"{bench}_interval"] = 1.96 * math.sqrt(sum(variances)) / len(verdicts)
    letters = [v.right[name] for v in verdicts.get("text", []) for name in v.right if name.startswith("letter")]
    if letters:
        out[f"{bench}_letters"] = float(np.mean(letters))
    return out


def diversity(pipeline: Pipeline, sampler: Sampler) -> dict:
    """Of several pictures of ONE prompt: their mean distance (root mean square over large pixels, 0 to 1), and the modes,
    how many of them differ in what the prompt leaves open. A student that always draws the same picture loses both."""
    prompts, samples = VARIETY
    distances, modes = [], []
    for category in world.CATEGORIES:
        cases = [case for case in world.bench("t2i", category, prompts) for _ in range(samples)]
        pictures, _ = draw_cases(pipeline, sampler, cases, [10**6 + i for i in range(len(cases))])
        small = [world.shrink(picture) for picture in pictures]
        found = [judge.fit_open(picture, case) for picture, case in zip(small, cases)]
        for i in range(0, len(cases), samples):
            distances += [np.sqrt(np.square(a - b).mean()) for a, b in combinations(small[i : i + samples], 2)]
            modes.append(len(set(found[i : i + samples])))
    return {"distance": float(np.mean(distances)), "modes": float(np.mean(modes)), "of": samples}


# ----------------------------------------------------------------------------- tables and pictures


def table(rows: list[dict]) -> str:
    """Markdown, one column per model; aligned, so that it reads in a terminal too."""
    lines = [["", *(row["name"] for row in rows)], ["network evaluations", *(str(row["nfe"]) for row in rows)]]
    for bench, title in (("t2i", "T2I"), ("edit", "edit")):
        if bench in rows[0]:
            for category in CATEGORIES[bench]:
                lines.append([f"{title} {category}", *(f"{row[bench][category]:.3f}" for row in rows)])
            scores = [f"**{row[bench]['average']:.3f}** ± {row[f'{bench}_interval']:.3f}" for row in rows]
            lines.append([f"**{title} average**", *scores])
            for half, name in (("compliance", "compliance"), ("fidelity", "fidelity")):
                lines.append([f"{title} {name}", *(f"{row[f'{bench}_{half}']['average']:.3f}" for row in rows)])
    if "diversity" in rows[0]:
        modes = [f"{row['diversity']['modes']:.1f} of {row['diversity']['of']}" for row in rows]
        lines.append(["modes", *modes])
        lines.append(["distance", *(f"{row['diversity']['distance']:.3f}" for row in rows)])
    lines.append(["seconds per image", *(f"{row['seconds_per_image']:.4f}" for row in rows)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def open_checkpoint(folder: Path) -> Pipeline:
    """A checkpoint to be scored. ValueError before anything is loaded if it does not draw the toy world's pictures."""
    resolution = read_index(folder)["resolution"]
    if resolution != RESOLUTION:
        raise ValueError(
            f"{folder}: draws {resolution} x {resolution} pixels (resolution in model_index.json); these benches judge "
            f"pictures of the toy world, {RESOLUTION} x {RESOLUTION}"
        )
    pipeline = Pipeline.from_pretrained(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    pipeline.vae.to(memory_format=torch.channels_last)  # on a CPU it decodes in half the time, a student's largest part
    pipeline.progress = False
    return pipeline


def default_sampler(pipeline: Pipeline, steps: int | None, guidance: float) -> Sampler:
    """The sampler that `sample.py` would use."""
    sigmas = pipeline.sigmas(steps, (pipeline.resolution // 16) ** 2)
    sampler = Sampler("", sigmas, guidance)
    return replace(sampler, name=f"{sampler.nfe} NFE")


def compare(student: Path, teacher: Path, out: Path, cases: dict[str, int] = COMPARED) -> list[dict]:
    """What a distillation was for: the teacher at 80 NFE, the same teacher in the student's few steps by both samplers,
    and the student. Writes out/comparison.{json,md,png} and prints the table."""
    base, pupil = open_checkpoint(teacher), open_checkpoint(student)
    full = default_sampler(base, 40, base.guidance)
    short = default_sampler(pupil, None, 1.0)
    few = len(short.sigmas) - 1
    runs = [
        (base, Sampler("teacher", full.sigmas, full.guidance)),
        (base, Sampler(f"teacher, {few} Euler steps", short.sigmas)),
        (base, Sampler(f"teacher, {few} re-noising steps", short.sigmas, renoise=True)),
        (pupil, Sampler(f"student, {few} steps", short.sigmas)),
    ]
    rows, models = [], {}
    for pipeline, sampler in runs:
        row, models[sampler.name] = evaluate(pipeline, sampler, ["t2i", "edit"], cases)
        rows.append(row)
    write_json(out / "comparison.json", rows)
    (out / "comparison.md").write_text(table(rows) + "\n")
    contact_sheet(models, 2, out / "comparison.png")
    print(table(rows))
    print(f"pictures side by side: {out / 'comparison.png'}")
    return rows
