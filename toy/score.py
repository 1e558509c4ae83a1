"""The toy world's T2I-Bench and Editing-Bench, and the comparison of a student with its teacher.

The cases are fixed and held out: no training prompt has a benched case's source, or the picture that it was made from
(toy/world.py). Every model starts from the same noise. The judge is exact (toy/judge.py). What a row is: eval.py.
"""

import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import flow
from checkpoint.files import read_json, write_json
from checkpoint.layout import check_stage, fingerprint, read_index, teachers_in
from data.pictures import to_pictures
from model import Condition, MMDiT
from sample import Pipeline
from scores.rows import averages, interval, markdown
from toy import judge, world
from toy.figures import contact_sheet
from toy.world import Case

RESOLUTION = world.SIDE * world.ENLARGE  # of the toy world's pictures, in pixels
BATCH = 32  # pictures drawn at once
CASES = {"t2i": 192, "edit": 96}  # in a category or family
COMPARED = {"t2i": 48, "edit": 24}  # for `compare`, which ends a run of minutes
CATEGORIES = dict(world.BENCHES)
SHOWN = {"t2i": 4, "edit": 2}  # in the contact sheet
VARIETY = (2, 8)  # prompts in a category, and pictures of each, from which diversity is measured
PARTS: dict[str, Callable[[judge.Verdict], float]] = {  # what a row has the means of
    "score": lambda v: v.score,
    "compliance": lambda v: float(v.compliance),
    "attributes": lambda v: sum(v.right.values()) / max(1, len(v.right)),
    "fidelity": lambda v: v.fidelity,
}


@dataclass
class Sampler:
    """How pictures are drawn. renoise: new noise after every step (flow.renoise), else Euler's method."""

    name: str
    sigmas: list[float]  # with the final 0
    guidance: float = 1.0
    renoise: bool = False
    specialists: dict[tuple[str, str], MMDiT] = field(default_factory=dict)  # (task, category) -> instead of the base

    @property
    def nfe(self) -> int:
        """Network evaluations for one picture: the steps, and twice as many with guidance."""
        return (len(self.sigmas) - 1) * (2 if self.guidance > 1 else 1)


@torch.no_grad()
def draw_cases(
    pipeline: Pipeline, sampler: Sampler, cases: list[Case], seeds: list[int]
) -> tuple[list[Image.Image], float]:
    """One picture for each case, and the seconds that it took. All cases have one task and category.

    A picture's noise follows from its seed alone. Prompts run together, at most BATCH of them, where they are equally
    long: padding is masked, but it moves the rotary positions of the picture's tokens, and a picture would depend on its
    neighbours. ValueError where latents or pixels are not finite.
    """
    if own := sampler.specialists.get((cases[0].task, cases[0].category)):
        pipeline = copy(pipeline)
        pipeline.mmdit = own
    side, began, named = pipeline.resolution // 16, time.perf_counter(), f"{pipeline.directory}: {sampler.name}"
    images = [case.images for case in cases]
    conditions = [pipeline.condition([case.prompt for case in cases], images)]
    if sampler.guidance > 1:  # the same sources with other words
        states, mask, slots = pipeline.encoder.encode([""] * len(cases), images)
        conditions.append(Condition(states, mask, conditions[0].sources, slots))
    latents = torch.empty(len(cases), 64, side, side)
    lengths = conditions[0].mask.sum(1)  # (N,)
    for length in lengths.unique():
        for rows in (lengths == length).nonzero()[:, 0].split(BATCH):
            noises = []  # (B, 64, h, w) each: one for the start, and one for every stop that is noised again
            for stop in range(len(sampler.sigmas) - 1 if sampler.renoise else 1):
                rngs = [torch.Generator().manual_seed(1000 * seeds[row] + stop) for row in rows]
                noise = torch.stack([torch.randn(64, side, side, generator=rng) for rng in rngs])
                noises.append(noise.to(pipeline.device))
            velocity, *negative = [pipeline.velocity(excerpt(condition, rows)) for condition in conditions]
            if negative:
                velocity = flow.guided(velocity, negative[0], sampler.guidance)
            z = flow.walk(velocity, torch.stack(noises), sampler.sigmas)  # (B, 64, h, w)
            latents[rows.cpu()] = check_stage(f"{named}: latents", z, pipeline.dtype).cpu()
    pictures = []
    for z in latents.to(pipeline.device, pipeline.dtype).split(BATCH):
        pictures += to_pictures(check_stage(f"{named}: decoded pixels", pipeline.vae.decode(z), pipeline.dtype))
    return pictures, time.perf_counter() - began


def excerpt(condition: Condition, rows: Tensor) -> Condition:
    """The condition of some of its prompts, rows (B,), without padding. They are equally long."""
    length = int(condition.mask[rows[0]].sum())
    sources = [source[rows] for source in condition.sources]
    return Condition(condition.states[rows, :length], condition.mask[rows, :length], sources, condition.slots)


@torch.no_grad()
def reconstruct(pipeline: Pipeline, pictures: np.ndarray) -> np.ndarray:
    """(B, 128, 128, 3) in [0, 1], through the autoencoder and back: what a perfect model's picture would look like."""
    again = []
    for part in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(BATCH):
        images = torch.cat([part, torch.ones_like(part[:, :1])], dim=1) * 2 - 1  # (b, 4, 128, 128), opaque
        images = images.to(pipeline.device, pipeline.dtype)
        decoded = pipeline.vae.decode(pipeline.vae.encode(images))
        check_stage(f"{pipeline.directory}: the autoencoder's pixels", decoded, pipeline.dtype)
        decoded = decoded.float().cpu().clamp(-1, 1) / 2 + 0.5  # (b, 4, 128, 128)
        again.append(decoded[:, :3] * decoded[:, 3:] + 1 - decoded[:, 3:])  # over white, as the judge sees pictures
    return torch.cat(again).permute(0, 2, 3, 1).numpy()


def evaluate(
    pipeline: Pipeline,
    sampler: Sampler,
    benches: list[str],
    cases: dict[str, int] = CASES,
    each: bool = False,
    only: tuple[str, ...] = (),
) -> tuple[dict, dict[str, list[Image.Image]]]:
    """Score one model: its row, and its pictures by bench and category.

    each: the row also has the numbers of every single case. All models draw the same cases, so that the difference of two
    models can be taken case by case. only: these categories; (): all.
    """
    row = {"name": sampler.name, "nfe": sampler.nfe, "guidance": sampler.guidance}
    row |= {"seconds_per_image": 0.0, "cases": {bench: cases[bench] for bench in benches}}
    shown, seconds, count = {}, 0.0, 0
    with tqdm(total=sum(len(only or CATEGORIES[bench]) for bench in benches), desc=sampler.name, leave=False) as bar:
        for bench in benches:
            verdicts = {}
            for category in only or CATEGORIES[bench]:
                some = world.bench(bench, category, cases[bench])
                pictures, spent = draw_cases(pipeline, sampler, some, list(range(len(some))))
                verdicts[category] = judge.judge(pictures, some, lambda x: reconstruct(pipeline, x))
                shown[f"{bench} {category}"] = pictures
                seconds, count = seconds + spent, count + len(some)
                bar.update()
            row |= summary(bench, verdicts)
            if each:
                row[f"{bench}_each"] = {part: numbers(part, verdicts) for part in PARTS}
            row[f"{bench}_diversity"] = diversity(pipeline, sampler, bench, only)
    row["seconds_per_image"] = seconds / count
    return row, shown


def numbers(part: str, verdicts: dict[str, list[judge.Verdict]]) -> dict[str, list[float]]:
    """One of PARTS of every verdict, by category."""
    return {category: [PARTS[part](verdict) for verdict in some] for category, some in verdicts.items()}


def summary(bench: str, verdicts: dict[str, list[judge.Verdict]]) -> dict:
    """A bench's part of a row: the means of score, compliance, attributes and fidelity, and the score's interval."""
    out = {bench if part == "score" else f"{bench}_{part}": averages(numbers(part, verdicts)) for part in PARTS}
    return out | {f"{bench}_interval": interval(numbers("score", verdicts))}


def diversity(pipeline: Pipeline, sampler: Sampler, bench: str, only: tuple[str, ...] = ()) -> dict:
    """How different several pictures of ONE prompt are. A student that always draws the same picture loses both numbers.

    distance   between two of them, root mean square over large pixels, 0 to 1; by category, and their average
    modes      how many of them differ in what the prompt leaves open, 1 to `of`; the same
    """
    prompts, samples = VARIETY
    distances, modes = {}, {}
    for category in only or CATEGORIES[bench]:
        some = [case for case in world.bench(bench, category, 4 * prompts) if case.free][:prompts]
        cases = [case for case in some for _ in range(samples)]
        pictures, _ = draw_cases(pipeline, sampler, cases, [10**6 + i for i in range(len(cases))])
        small = [world.shrink(picture) for picture in pictures]
        found = [judge.fit_free(picture, case) for picture, case in zip(small, cases)]
        groups = range(0, len(cases), samples)
        distances[category] = [_spread(small[i : i + samples]) for i in groups]
        modes[category] = [len(set(found[i : i + samples])) for i in groups]
    return {"distance": averages(distances), "modes": averages(modes), "of": samples}


def _spread(pictures: list[np.ndarray]) -> float:
    return float(np.mean([np.sqrt(np.square(a - b).mean()) for a, b in combinations(pictures, 2)]))


# ----------------------------------------------------------------------------- rows in tables and files


def table(rows: list[dict]) -> str:
    """Markdown, one model in a column. What a row does not have is "-" there."""

    def line(title: str, key: str, name: str = "average") -> list[str]:
        return [title, *(f"{row[key][name]:.3f}" if name in row.get(key, ()) else "-" for row in rows)]

    lines = [["", *(row["name"] for row in rows)], ["network evaluations", *(str(row["nfe"]) for row in rows)]]
    for bench, title in (("t2i", "T2I"), ("edit", "edit")):
        if any(bench in row for row in rows):
            lines += [line(f"{title} {category}", bench, category) for category in CATEGORIES[bench]]
            scores = [
                f"**{row[bench]['average']:.3f}** ± {row[f'{bench}_interval']:.3f}" if bench in row else "-"
                for row in rows
            ]
            lines.append([f"**{title} average**", *scores])
            lines += [line(f"{title} {half}", f"{bench}_{half}") for half in ("compliance", "fidelity")]
            found = [row.get(f"{bench}_diversity") for row in rows]
            shown = [f"{some['modes']['average']:.1f} of {some['of']}" if some else "-" for some in found]
            lines.append([f"{title} modes", *shown])
            shown = [f"{some['distance']['average']:.3f}" if some else "-" for some in found]
            lines.append([f"{title} distance", *shown])
    return markdown([*lines, ["seconds per image", *(f"{row['seconds_per_image']:.4f}" for row in rows)]])


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


def default_sampler(name: str, pipeline: Pipeline, steps: int | None, guidance: float) -> Sampler:
    """What `sample.py` would do with this many steps (None: the checkpoint's own)."""
    sigmas = pipeline.sigmas(steps, (pipeline.resolution // 16) ** 2)
    return Sampler(name, sigmas, guidance, renoise=pipeline.scheduler.stochastic_sampling)


def teacher_samplers(pipeline: Pipeline, short: list[float]) -> list[Sampler]:
    """A teacher at 80 NFE, and in the student's few steps by both samplers."""
    few = len(short) - 1
    return [
        default_sampler("teacher", pipeline, 40, pipeline.guidance),
        Sampler(f"teacher, {few} Euler steps", short),
        Sampler(f"teacher, {few} re-noising steps", short, renoise=True),
    ]


def build_log(checkpoint: Path) -> dict:
    """What `python -m toy.build` measured of this checkpoint. Empty where it did not make it, or where weights were changed
    since."""
    file = checkpoint / "build.json"
    log = read_json(file) if file.is_file() else {}
    return log if log.get("fingerprint") == fingerprint_with_teachers(checkpoint) else {}


def fingerprint_with_teachers(checkpoint: Path) -> str:
    return fingerprint(checkpoint, *teachers_in(checkpoint).values())


def recorded(teacher: Path, cases: dict[str, int]) -> dict[str, dict]:
    """The rows of a checkpoint's own teacher in its log, by name, over the first of their cases: those of this bench."""
    log = build_log(teacher)
    rows = {}
    for row in log["score base"]["rows"] if log else []:
        row = dict(row) | {"cases": cases}
        for bench, count in cases.items():
            each = row.pop(f"{bench}_each")
            first = {part: {name: some[:count] for name, some in found.items()} for part, found in each.items()}
            row |= {bench if part == "score" else f"{bench}_{part}": averages(found) for part, found in first.items()}
            row[f"{bench}_interval"] = interval(first["score"])
        rows[row["name"]] = row
    return rows


def compare(student: Path, teacher: Path, out: Path, cases: dict[str, int] = COMPARED) -> list[dict]:
    """What a distillation was for: the teacher at 80 NFE, the same teacher in the student's few steps by both samplers,
    and the student. Writes out/comparison.json, .md and .png, and prints the table.

    Of the toy's own teacher only the pictures of the contact sheet are drawn: what it scores was measured when it was made.
    """
    base, pupil = open_checkpoint(teacher), open_checkpoint(student)
    own = default_sampler("student", pupil, None, 1.0)
    own.name = f"student, {own.nfe} steps"
    runs = [(base, sampler) for sampler in teacher_samplers(base, own.sigmas)]
    runs.append((pupil, own))
    rows, models, known = [], {}, recorded(teacher, cases)
    for pipeline, sampler in runs:
        models[sampler.name], seconds = first_pictures(pipeline, sampler)
        row = known.get(sampler.name) or evaluate(pipeline, sampler, ["t2i", "edit"], cases)[0]
        rows.append(row | {"seconds_per_image": seconds})
    write_json(out / "comparison.json", rows)
    (out / "comparison.md").write_text(table(rows) + "\n")
    contact_sheet(models, SHOWN, out / "comparison.png")
    print(table(rows))
    print(f"pictures side by side: {out / 'comparison.png'}")
    return rows


def first_pictures(pipeline: Pipeline, sampler: Sampler) -> tuple[dict[str, list[Image.Image]], float]:
    """The pictures that the contact sheet shows, by bench and category, and the seconds that each took."""
    shown, seconds = {}, 0.0
    for bench, categories in CATEGORIES.items():
        for category in categories:
            cases = world.bench(bench, category, SHOWN[bench])
            shown[f"{bench} {category}"], spent = draw_cases(pipeline, sampler, cases, list(range(len(cases))))
            seconds += spent
    return shown, seconds / sum(map(len, shown.values()))
