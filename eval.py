"""T2I-Bench and Editing-Bench on the toy world: any checkpoint, any sampler, one table and one picture.

The paper scores four-step students with two benches (section 3 and 5; appendix A): three categories of prompts, six
families of edits, a judge who weighs compliance and quality equally. Here the judge is exact (toy/judge.py), the cases are
fixed and held out (toy/world.py: no training prompt shares a benched combination of attributes), and every model starts
from the same noise, so that rows can be compared case by case.

    python eval.py --checkpoint toy/checkpoint --guidance 2 --json teacher.json --out results/teacher
    python eval.py --checkpoint runs/dmd-flash/student --bench edit

A ROW is a dictionary, as --json writes it: nfe, guidance, seconds_per_image, t2i and edit (score from 0 to 1 by category,
and their average), and for each of these the half-width of a 95% interval, the two halves of the score, diversity.
NFE counts network evaluations per picture: steps, times two with guidance.
"""

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import flow
from model import Condition, write_json
from sample import Pipeline, to_pictures
from toy import judge, world
from toy.world import Case

BATCH = 32  # pictures drawn at once
CASES = {"t2i": 64, "edit": 48}  # per category: an average to about +-0.03
CATEGORIES = {"t2i": world.CATEGORIES, "edit": world.FAMILIES}
VARIETY = (2, 8)  # prompts per category, and pictures of each: what diversity is measured on


@dataclass
class Sampler:
    """How pictures are drawn. `renoise`: new noise at every stop (flow.renoise), else Euler's straight steps."""

    name: str
    sigmas: list[float]  # with the final 0
    guidance: float = 1.0
    renoise: bool = False

    @property
    def nfe(self) -> int:
        return (len(self.sigmas) - 1) * (2 if self.guidance > 1 else 1)


@torch.no_grad()
def draw(pipeline: Pipeline, sampler: Sampler, cases: list[Case], seeds: list[int]) -> tuple[list[Image.Image], float]:
    """One picture per case (all of one task), from noise that follows from its seed alone; and the seconds it took."""
    side = pipeline.resolution // 16
    pictures, began = [], time.perf_counter()
    for start in range(0, len(cases), BATCH):
        some, numbers = cases[start : start + BATCH], seeds[start : start + BATCH]
        noises = []  # one (B, 64, h, w) for the start, and one for every stop that is noised again
        for stop in range(len(sampler.sigmas) - 1 if sampler.renoise else 1):
            rngs = [torch.Generator().manual_seed(1000 * number + stop) for number in numbers]
            noises.append(torch.stack([torch.randn(64, side, side, generator=rng) for rng in rngs]))
        images = [case.images for case in some]
        positive = pipeline.condition([case.prompt for case in some], images)
        velocity = pipeline.velocity(positive)
        if sampler.guidance > 1:
            states, mask, slots = pipeline.encoder.encode([""] * len(some), images)
            negative = pipeline.velocity(Condition(states, mask, positive.sources, slots))
            velocity = flow.guided(velocity, negative, sampler.guidance)
        if sampler.renoise:
            z = flow.renoise(velocity, noises[0], sampler.sigmas, noises[1:])  # (B, 64, h, w)
        else:
            z = flow.euler(velocity, noises[0], sampler.sigmas)  # (B, 64, h, w)
        pictures += to_pictures(pipeline.vae.decode(z.to(pipeline.dtype)))
    return pictures, time.perf_counter() - began


@torch.no_grad()
def reconstruct(pipeline: Pipeline, pictures: np.ndarray) -> np.ndarray:
    """(B, 128, 128, 3) in [0, 1] through the autoencoder: what a perfect model's picture would look like."""
    again = []
    for part in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(BATCH):
        images = torch.cat([part, torch.ones_like(part[:, :1])], dim=1) * 2 - 1  # (b, 4, 128, 128), opaque
        images = images.to(pipeline.device, pipeline.dtype)
        again.append(pipeline.vae.decode(pipeline.vae.encode(images))[:, :3].float().cpu())
    return (torch.cat(again).clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy()


def evaluate(
    pipeline: Pipeline, sampler: Sampler, benches: list[str], cases: dict[str, int] = CASES
) -> tuple[dict, dict[str, list[Image.Image]]]:
    """Scores one model: the row, and its pictures by category (in the order of the bench)."""
    row = {"name": sampler.name, "nfe": sampler.nfe, "guidance": sampler.guidance}
    row |= {"seconds_per_image": 0.0, "cases": cases}
    shown, seconds, count = {}, 0.0, 0
    bar = tqdm(total=sum(len(CATEGORIES[b]) for b in benches), desc=sampler.name, leave=False)
    for bench in benches:
        verdicts = {}
        for category in CATEGORIES[bench]:
            some = world.bench(bench, category, cases[bench])
            pictures, spent = draw(pipeline, sampler, some, list(range(len(some))))
            seconds, count = seconds + spent, count + len(some)
            verdicts[category] = judge.judge(pictures, some, lambda x: reconstruct(pipeline, x))
            shown[f"{bench} {category}"] = pictures
            bar.update()
        row |= summary(bench, verdicts)
    if "t2i" in benches:
        row["diversity"] = diversity(pipeline, sampler)
    row["seconds_per_image"] = seconds / count
    return row, shown


def summary(bench: str, verdicts: dict[str, list[judge.Verdict]]) -> dict:
    """Mean score by category, the average over categories, and what they are made of."""
    parts = {
        bench: lambda v: v.score,
        f"{bench}_exact": lambda v: float(v.exact),
        f"{bench}_attributes": lambda v: sum(v.right.values()) / len(v.right),
        f"{bench}_fidelity": lambda v: v.fidelity,
    }
    if bench == "edit":
        parts["edit_kept"] = lambda v: v.kept
    out = {}
    for name, value in parts.items():
        out[name] = {category: float(np.mean([value(v) for v in some])) for category, some in verdicts.items()}
        out[name]["average"] = float(np.mean(list(out[name].values())))
    # Half-width of the 95% interval of the average: categories are drawn independently.
    variances = [np.var([v.score for v in some], ddof=1) / len(some) for some in verdicts.values() if len(some) > 1]
    out[f"{bench}_interval"] = 1.96 * math.sqrt(sum(variances)) / len(verdicts)
    letters = [v.right[name] for v in verdicts.get("text", []) for name in v.right if name.startswith("letter")]
    if letters:
        out[f"{bench}_letters"] = float(np.mean(letters))
    return out


def diversity(pipeline: Pipeline, sampler: Sampler) -> dict:
    """Of several pictures of ONE prompt: their mean distance (root mean square over large pixels, 0 to 1), and how many of
    them differ in what the prompt leaves open. A student that always draws the same picture loses both."""
    prompts, samples = VARIETY
    distances, modes = [], []
    for category in world.CATEGORIES:
        cases = [case for case in world.bench("t2i", category, prompts) for _ in range(samples)]
        pictures, _ = draw(pipeline, sampler, cases, [10**6 + i for i in range(len(cases))])
        small = [world.shrink(picture) for picture in pictures]
        found = [judge.fit_open(picture, case) for picture, case in zip(small, cases)]
        for i in range(0, len(cases), samples):
            distances += [np.sqrt(np.square(a - b).mean()) for a, b in combinations(small[i : i + samples], 2)]
            modes.append(len(set(found[i : i + samples])))
    return {"distance": float(np.mean(distances)), "modes": float(np.mean(modes)), "of": samples}


# ----------------------------------------------------------------------------- tables and pictures


def table(rows: list[dict]) -> str:
    """Markdown, one line per row."""
    columns = [(bench, c) for bench in ("t2i", "edit") for c in (*CATEGORIES[bench], "average") if bench in rows[0]]
    heads = ["model", "NFE"] + [("T2I" if b == "t2i" else "edit") + " " + c for b, c in columns]
    heads += ["modes", "distance"] * ("diversity" in rows[0]) + ["s/image"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        line = [row["name"], str(row["nfe"])]
        for bench, c in columns:
            interval = f" ± {row[f'{bench}_interval']:.3f}" if c == "average" else ""
            line.append(f"{row[bench][c]:.3f}{interval}")
        if "diversity" in row:
            line += [f"{row['diversity']['modes']:.1f}", f"{row['diversity']['distance']:.3f}"]
        lines.append(line + [f"{row['seconds_per_image']:.4f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def contact_sheet(models: dict[str, dict[str, list[Image.Image]]], each: int, path: Path) -> None:
    """The same cases under every model, one model a row: T2I above, edits below with their sources first."""
    first = next(iter(models.values()))
    blocks = defaultdict(lambda: defaultdict(list))  # bench -> row name -> pictures
    for key in first:
        bench, category = key.split()
        cases = world.bench(bench, category, each)
        if bench == "edit":
            blocks[bench]["source"] += [case.images[0] for case in cases]
        for name, shown in models.items():
            blocks[bench][name] += shown[key][:each]
        truth = [world.enlarge(world.render(case.target, case.edit and case.edit.style)) for case in cases]
        blocks[bench]["one right answer"] += truth
    rows = [(name, pictures) for block in blocks.values() for name, pictures in block.items()]
    side, left = rows[0][1][0].width + 4, 190
    canvas = Image.new("RGB", (left + side * max(len(p) for _, p in rows), side * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    for y, (name, pictures) in enumerate(rows):
        pen.text((8, y * side + side // 2 - 10), name, fill="black", font=ImageFont.load_default(16))
        for x, picture in enumerate(pictures):
            canvas.paste(picture, (left + x * side, y * side), picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def samplers(pipeline: Pipeline, steps: int | None, guidance: float) -> Sampler:
    """The sampler that `sample.py` would use."""
    sigmas = pipeline.sigmas(steps, (pipeline.resolution // 16) ** 2)
    nfe = (len(sigmas) - 1) * (2 if guidance > 1 else 1)
    return Sampler(f"{nfe} NFE", sigmas, guidance)


def compare(student: Path, teacher: Path, out: Path, cases: dict[str, int] = CASES) -> list[dict]:
    """What a distillation was for: the teacher at 80 NFE, the same teacher in the student's few steps by both samplers,
    and the student. Writes out/comparison.{json,md,png} and prints the table."""
    base = Pipeline.from_pretrained(teacher)
    base.progress = False
    pupil = Pipeline.from_pretrained(student)
    pupil.progress = False
    full = samplers(base, 40, base.guidance)
    short = samplers(pupil, None, 1.0)
    few = len(short.sigmas) - 1
    runs = [
        (base, Sampler("teacher", full.sigmas, full.guidance)),
        (base, Sampler(f"teacher, {few} Euler steps", short.sigmas)),
        (base, Sampler(f"teacher, {few} re-noising steps", short.sigmas, renoise=True)),
        (pupil, Sampler(f"student, {few} steps", short.sigmas)),
    ]
    rows, models = [], {}
    for pipeline, sampler in runs:
        row, shown = evaluate(pipeline, sampler, ["t2i", "edit"], cases)
        rows.append(row)
        models[f"{sampler.name}"] = shown
    write_json(out / "comparison.json", rows)
    (out / "comparison.md").write_text(table(rows) + "\n")
    contact_sheet(models, 2, out / "comparison.png")
    print(table(rows))
    print(f"pictures side by side: {out / 'comparison.png'}")
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path(__file__).parent / "toy" / "checkpoint", help="published layout")
    add("--bench", choices=["t2i", "edit", "all"], default="all")
    add("--json", type=Path, metavar="FILE", help="write the row there")
    add("--out", type=Path, metavar="DIR", help="write table.md and a contact sheet there")
    add("--steps", type=int, help="default: the checkpoint's own sigmas, else 40")
    add("--guidance", type=float, help="default: the checkpoint's own")
    add("--cases", type=int, help=f"per category (default: {CASES})")
    args = parser.parse_args(argv)
    if args.cases is not None and args.cases < 1:
        raise ValueError(f"--cases {args.cases}: at least 1 is needed")
    for path in filter(None, (args.json and args.json.parent, args.out)):
        path.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = Pipeline.from_pretrained(args.checkpoint, device=device)
    pipeline.progress = False
    sampler = samplers(pipeline, args.steps, pipeline.guidance if args.guidance is None else args.guidance)
    sampler.name = args.checkpoint.resolve().name
    benches = ["t2i", "edit"] if args.bench == "all" else [args.bench]
    row, shown = evaluate(pipeline, sampler, benches, {b: args.cases or CASES[b] for b in benches})
    print(table([row]))
    if args.json:
        write_json(args.json, row)
    if args.out:
        (args.out / "table.md").write_text(table([row]) + "\n")
        contact_sheet({sampler.name: shown}, 2, args.out / "sheet.png")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"eval.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
