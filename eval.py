"""T2I-Bench and Editing-Bench, and the paper's three experiments.

The paper scores four-step students with two benches (section 3 and 5; appendix A): three categories of prompts, six
families of edits, a judge who weighs compliance and quality equally. There are two of that kind here:

    the toy world's    the judge is exact (toy/judge.py), the cases are fixed and held out (toy/world.py: no training
                       prompt shares a benched combination of attributes), every model starts from the same noise
    of files           for checkpoints of the real world: cases from JSON lines, pictures drawn once and kept, the judge a
                       vision-language model (encoders/judge.py)

    python eval.py --checkpoint toy/checkpoint --guidance 2 --json teacher.json --out results/teacher
    python eval.py --checkpoint DIR --prompts bench/ --out results/turbo --judge http://localhost:8000/v1 --judge-model NAME
    python eval.py --table results/turbo/row.json results/mine/row.json
    python eval.py --experiment composition                      one of the paper's tables, from training to verdict
    python eval.py --write-prompts 20000 --category portrait --endpoint http://localhost:8000/v1 --out portrait.jsonl

A ROW is a dictionary, as --json writes it: nfe, guidance, seconds_per_image, t2i and edit (score by category, and their
average; from 0 to 1 in the toy world, from 1 to 5 with "scale": 5), and for each of these the half-width of a 95% interval;
in the toy world also the two halves of the score, and diversity. NFE counts network evaluations per
picture: steps, times two with guidance.
"""

import argparse
import hashlib
import json
import math
import os
import sys
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
import recipe as recipes
from encoders import chat
from encoders import judge as language_judge
from model import Condition, MMDiT, read_json, write_json
from sample import Pipeline, read_index, save, to_pictures
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
    "exact": lambda v: float(v.exact),
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
def draw(pipeline: Pipeline, sampler: Sampler, cases: list[Case], seeds: list[int]) -> tuple[list[Image.Image], float]:
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
            pictures, spent = draw(pipeline, sampler, some, list(range(len(some))))
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
        pictures, _ = draw(pipeline, sampler, cases, [10**6 + i for i in range(len(cases))])
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
            for half, name in (("exact", "compliance"), ("fidelity", "fidelity")):
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


# ----------------------------------------------------------------------------- benches of files


def fingerprint(checkpoint: Path) -> str:
    """Changes with the weights. Of large files it reads the two ends: training moves every weight."""
    digest = hashlib.sha256((checkpoint / "model_index.json").read_bytes())
    for folder, _, files in sorted(os.walk(checkpoint, followlinks=True)):
        for path in sorted(Path(folder, name) for name in files if Path(folder) != checkpoint):
            with open(path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                digest.update(f"{path.relative_to(checkpoint)} {size}".encode())
                for start in (0, max(0, size - 2**20)):
                    file.seek(start)
                    digest.update(file.read(2**20))
    return digest.hexdigest()[:16]


def draw_files(
    cases: dict,
    folder: Path,
    checkpoint: Path,
    steps: int | None,
    guidance: float | None,
    seed: int,
    offload: bool,
) -> None:
    """Draw the cases that have no picture in the folder yet. Every picture knows what made it, and pictures of other
    weights or settings are a ValueError: a bench is of one model. A case's noise is the same for every model."""
    index = read_index(checkpoint)
    guidance = index["guidance"] if guidance is None else guidance
    made = {"steps": steps or len(index["sample_sigmas"] or [0] * 40), "guidance": guidance, "seed": seed}
    made["weights"] = fingerprint(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.part"):  # of a killed run
        leftover.unlink()
    for name in cases:
        if (folder / name).exists() and {key: made_by(folder / name).get(key) for key in made} != made:
            raise ValueError(f"{folder / name}: drawn by other weights or settings; name another --out for these")
    missing = [name for name in cases if not (folder / name).exists()]
    if missing:
        cuda = torch.cuda.is_available()
        dtype, device = (torch.bfloat16, "cuda") if cuda else (torch.float32, "cpu")
        pipeline = Pipeline.from_pretrained(checkpoint, dtype, device, offload, keep_encoder=True)
        pipeline.progress = False
    for name in tqdm(missing, desc="draw", unit="picture"):
        began, own = time.perf_counter(), int(name[-20:-4], 16) % 2**31
        images = list(cases[name].images)
        picture = pipeline(cases[name].prompt, images, steps=made["steps"], guidance=guidance, seed=seed + own)
        seconds = round(time.perf_counter() - began, 3)
        save(picture, folder / name, made | {"prompt": cases[name].prompt, "seconds": seconds})


def made_by(picture: Path) -> dict:
    """What `save` wrote into a picture; {} for one from elsewhere. ValueError: not a whole picture."""
    try:
        with Image.open(picture) as image:
            notes = image.info.get("parameters", "{}")
            image.verify()
        return json.loads(notes)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{picture}: no whole picture ({error})") from None


def score_files(args: argparse.Namespace) -> None:
    """Draw and judge one model's pictures. All that can be wrong is looked at first: a question costs money.

    SystemExit(1) at the end if something could not be scored; the same command asks for it again, and for nothing else.
    """
    files = [file for path in args.prompts for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"--prompts {args.prompts[0]}: no *.jsonl in it")
    cases = language_judge.name_cases(recipes.read_prompts(files))
    if args.list:
        print("\n".join(json.dumps({"picture": name, "prompt": case.prompt}) for name, case in cases.items()))
        return
    if not args.out:
        raise ValueError("--prompts needs --out DIR, for pictures and answers")
    judges = [open_chat(args, i) for i in range(max(len(args.judge), len(args.judge_model or ())) if args.judge else 0)]
    if len({asked.model for asked in judges}) < len(judges):
        raise ValueError("two judges need two names: --judge URL [URL] --judge-model NAME NAME")
    folder = args.pictures or args.out / "pictures"
    there = {path.name for path in folder.iterdir() if path.suffix != ".part"} if folder.is_dir() else set()
    if extra := sorted(there - cases.keys()):
        raise ValueError(f"{folder / extra[0]}: belongs to no case ({len(extra)} such in all); take it away")
    if not args.pictures:
        draw_files(cases, folder, args.checkpoint, args.steps, args.guidance, args.seed, args.offload)
    elif missing := sorted(cases.keys() - there):
        case = cases[missing[0]]
        raise ValueError(
            f"{folder / missing[0]}: missing ({len(missing)} in all); it is {case.category!r}, {case.prompt!r}"
        )
    notes = [made_by(folder / name) for name in cases]

    args.out.mkdir(parents=True, exist_ok=True)
    row = {"name": args.name or args.out.name, "nfe": None, "guidance": notes[0].get("guidance"), "scale": 5}
    if all("seconds" in note for note in notes):  # ours
        row["nfe"] = notes[0]["steps"] * (2 if row["guidance"] > 1 else 1)
        row["seconds_per_image"] = sum(note["seconds"] for note in notes) / len(notes)
    row |= {"bench": hashlib.sha256(" ".join(sorted(cases)).encode()).hexdigest()[:16], "judges": {}}
    for asked in judges:
        name = asked.model or "judge"
        kept = args.out / f"judge-{''.join(c if c.isalnum() or c in '-.' else '_' for c in name)}.jsonl"
        answers, unscored = language_judge.judge(asked, cases, folder, kept, args.parallel)
        row["judges"][name] = language_judge.summary(cases, answers, unscored)
    if not judges:
        print(f"{len(cases)} pictures in {folder}")
        return
    first, *_ = row["judges"].values()  # its numbers are the row's
    row |= {key: value for key, value in first.items() if key not in ("scored", "unscored")}
    write_json(args.json or args.out / "row.json", row)
    print(language_judge.table([row]))
    for name, judge_row in row["judges"].items():
        for picture, reason in judge_row["unscored"].items():
            print(f"not scored by {name}: {picture}, {cases[picture].prompt!r}: {reason}", file=sys.stderr)
    if any(judge_row["unscored"] for judge_row in row["judges"].values()):
        sys.exit(1)


def open_chat(args: argparse.Namespace, i: int = 0) -> chat.Chat:
    """The i-th judge, or the one that writes. The last of the addresses, and of the keys, serves all further ones."""
    urls, models, variables = args.judge or [args.endpoint], args.judge_model or [None], args.judge_key
    url, model, variable = (some[min(i, len(some) - 1)] for some in (urls, models, variables))
    return chat.Chat(url, model, os.environ.get(variable), args.timeout)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path(__file__).parent / "toy" / "checkpoint", help="published layout")
    add("--json", type=Path, metavar="FILE", help="write the row there")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="write table and contact sheet there; with --prompts pictures and row.json",
    )
    add("--steps", type=int, help="default: the checkpoint's own sigmas, else 40. --experiment: a student's updates")
    add("--guidance", type=float, help="default: the checkpoint's own")
    add("--bench", choices=["t2i", "edit", "all"], default="all", help="of the toy world")
    add("--cases", type=int, help=f"of the toy world, per category (default: {CASES})")
    add = parser.add_argument_group("benches of files").add_argument
    add("--prompts", type=Path, nargs="+", metavar="PATH", help="JSON lines as train.py reads them, or folders of them")
    add("--pictures", type=Path, metavar="DIR", help="judge these, which something else drew; their names: --list")
    add("--list", action="store_true", help="print each case with its picture's name and do nothing else")
    add("--seed", type=int, default=0, help="of the pictures' noise")
    add("--offload", action="store_true", help="the networks take turns on the GPU: half the memory, slower")
    add("--name", help="the model's name in the table; default: that of --out")
    add("--judge", nargs="+", metavar="URL", help="chat endpoints, such as http://localhost:8000/v1")
    add("--judge-model", nargs="+", metavar="NAME", help="the judges, side by side (or the one that writes)")
    add(
        "--judge-key",
        nargs="+",
        metavar="VARIABLE",
        default=["JUDGE_API_KEY"],
        help="environment variables with the keys",
    )
    add("--parallel", type=int, default=8, help="questions under way at once")
    add("--timeout", type=float, default=180.0, help="seconds for an answer")
    add("--table", type=Path, nargs="+", metavar="FILE", help="rows that --json or --prompts wrote, as one table")
    add = parser.add_argument_group("writing prompts").add_argument
    add("--write-prompts", type=int, metavar="N", help="until --out FILE.jsonl has N different ones")
    add("--category", help="landscape, portrait, text, or any other words that say what to describe")
    add("--endpoint", metavar="URL", help="the chat endpoint that writes")
    add = parser.add_argument_group("the paper's experiments, in the toy world").add_argument
    add("--experiment", choices=["composition", "teachers", "mixture"])
    add("--seeds", type=int, default=3, help="students a row")
    add("--nfe", type=int, default=4, help="the students' number of steps")
    add("--runs", type=Path, default=Path("runs/experiments"), metavar="DIR", help="where students and scores are kept")
    args = parser.parse_args(argv)

    modes = ("experiment", "prompts", "table", "write_prompts")
    chosen = [mode for mode in modes if vars(args)[mode] is not None]
    if len(chosen) > 1:
        raise ValueError(f"--{chosen[0].replace('_', '-')} and --{chosen[1].replace('_', '-')}: one of them at a time")
    for needed, mode in (
        ("judge", "prompts"),
        ("pictures", "prompts"),
        ("list", "prompts"),
        ("category", "write_prompts"),
    ):
        if vars(args)[needed] and vars(args)[mode] is None:
            raise ValueError(f"--{needed} goes with --{mode.replace('_', '-')}")
    for number in ("parallel", "timeout", "seeds", "nfe"):
        if vars(args)[number] <= 0:
            raise ValueError(f"--{number} {vars(args)[number]}: a number above 0 is expected")
    if args.guidance is not None and not 1 <= args.guidance < math.inf:
        raise ValueError(f"--guidance {args.guidance}: a number from 1 (off) on is expected")

    if args.write_prompts is not None:
        if not (args.category and args.endpoint and args.out):
            raise ValueError("--write-prompts needs --category, --endpoint URL and --out FILE.jsonl")
        count = chat.write_prompts(open_chat(args), args.category, args.write_prompts, args.out, args.parallel)
        print(f"{args.out}: {count} prompts")
    elif args.table:
        rows = [read_json(path) for path in args.table]
        judged = ["judges" in row for row in rows]
        if any(judged) != all(judged):
            raise ValueError("rows of the toy world and of files cannot share a table")
        print(language_judge.table(rows) if all(judged) else table(rows))
    elif args.experiment:
        from toy import experiments  # which needs this file

        suffix = "" if args.nfe == 4 else f"-{args.nfe}nfe"
        out = args.out or Path("results") / f"{args.experiment}{suffix}"
        steps = experiments.STUDENT.steps if args.steps is None else args.steps
        experiments.run(args.experiment, args.checkpoint, out, args.runs, args.seeds, steps, args.nfe)
    elif args.prompts:
        score_files(args)
    else:
        score_toy(args)


def score_toy(args: argparse.Namespace) -> None:
    # Everything that can be wrong is looked at now: the scores take minutes, and should not be lost at the end.
    if args.cases is not None and args.cases < 2:
        raise ValueError(f"--cases {args.cases}: at least 2 are needed, for an interval")
    for folder in filter(None, (args.json and args.json.parent, args.out)):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder}: no folder that can be written to")
    if args.json and args.json.is_dir():
        raise ValueError(f"--json {args.json}: is a folder; name a file")
    pipeline = open_checkpoint(args.checkpoint)
    sampler = default_sampler(pipeline, args.steps, pipeline.guidance if args.guidance is None else args.guidance)
    sampler.name = args.checkpoint.resolve().name
    benches = ["t2i", "edit"] if args.bench == "all" else [args.bench]
    row, shown = evaluate(pipeline, sampler, benches, {b: args.cases or CASES[b] for b in benches})
    if args.json:
        write_json(args.json, row)
    print(table([row]))
    if args.out:
        (args.out / "table.md").write_text(table([row]) + "\n")
        contact_sheet({sampler.name: shown}, 2, args.out / "sheet.png")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"eval.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
