"""The paper's claims in the plane, knob by knob; and one picture of the method. The commands are toy/plane.py's.

The claims and rows are those of the picture world (toy/experiments.py), word for word: a score is the precision here,
fidelity the share within one standard deviation. A judge sees no more. Each claim is judged a second time by the energy
distance, which also sees missing modes. Intervals are 95%, over seeds, of paired differences.

Written down before the runs. Premises, each printed with its verdict: PREMISES, and in the rows of the base teacher that
it is worst at text. What each knob should do: the text in SWEEPS. No knob was set by looking at a verdict.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flow import euler
from recipe import RECIPES, Recipe, specialists
from toy import plane_pictures as pictures
from toy.experiments import (
    E1,
    E3,
    E4,
    E5,
    EXPERIMENTS,
    FIRST_STEP,
    HALFWAY,
    SPECIALISTS,
    START,
    TEACHER,
    Above,
    Experiment,
    T,
)
from toy.plane import (
    CATEGORIES,
    SIGMAS,
    TEACHER_SIGMAS,
    Training,
    World,
    draw,
    drawn_by,
    evaluate,
    teacher,
    train,
)

PARTS = {"score": "precision", "attributes": "precision", "fidelity": "fine"}
PREMISES = {
    "Four plain steps lose at drawing.": [Above(TEACHER, START)],
    "Four plain steps lose at editing.": [Above(TEACHER, START, bench="edit")],
    "The specialist is better at text.": [Above(SPECIALISTS, TEACHER, "text")],
    "The specialist is better at edits.": [Above(SPECIALISTS, TEACHER, bench="edit")],
    "It is narrower.": [Above(SPECIALISTS, TEACHER, "text", part="fidelity")],
}
BASE, SPECIAL, AVERAGE, STEPS, REVERSED = "base only", "specialised only", "average", "step-wise", "reversed"
EDITS_BASE = "5:5, base only"
LAMBDAS = {  # of the specialist at the student's four steps
    "last step alone": (0, 0, 0, 1),
    "last three": (0, 0.5, 1, 1),
    "first step alone": (1, 0, 0, 0),
    REVERSED: (1, 0.5, 0, 0),
}
OURS = {name: Recipe(name, (10, 0), specialists=specialists(*some)) for name, some in LAMBDAS.items()}
OURS[EDITS_BASE] = Recipe(EDITS_BASE, (5, 5))
TABLES = EXPERIMENTS | {
    "lambdas": Experiment(
        {BASE: "e5-all", STEPS: "step-wise", SPECIAL: "specialised-only", AVERAGE: "average"}
        | {name: name for name in LAMBDAS},
        {"t2i": {}},
        {
            "(Ours) Late is better than early.": [Above(STEPS, REVERSED, "text")],
            "(Ours) The last step alone is enough to be above the base.": [Above("last step alone", BASE, "text")],
            "(Ours) Late is better than always.": [Above(STEPS, SPECIAL, "text")],
            "(Ours) A first-step loss keeps more modes.": [Above(FIRST_STEP, SPECIAL, part="coverage")],
        },
    ),
}
ROWS = {label: name for table in TABLES.values() for label, name in table.rows.items()} | {name: name for name in OURS}


@dataclass(frozen=True)
class Sweep:
    """One knob, of World or Training: what should happen, and which differences show it."""

    values: tuple
    expected: str
    parts: tuple[Above, ...]


RISES = (Above(BASE, START), Above(SPECIAL, START))
FALLS = (Above(BASE + HALFWAY, BASE), Above(SPECIAL + HALFWAY, SPECIAL))
ROUTING = (Above(STEPS, SPECIAL, "text"), Above(STEPS, AVERAGE, "text"))
EDITING = (Above("5:5", "10:0", bench="edit"), Above("5:5", "10:0"))
SWEEPS = {
    "blur": Sweep(
        (1.0, 2.0, 3.0, 4.0),
        "A student becomes its teacher. Text prompts help text while the base is good at it. Once it is very blurred, "
        "what carries over from landscapes is as good, and text prompts are the worst choice.",
        (Above(E1, E3, "text"), Above(E1, E3), Above(E4, E5, "text"), Above(E1, START, "text")),
    ),
    "sharp": Sweep((0.25, 0.5, 1.0), "The sharper the specialist, the more step-wise wins over it alone.", ROUTING),
    "displaced": Sweep((0.0, 0.5, 1.0, 2.0), "The farther it is displaced, the more step-wise wins over it alone.", ROUTING),
    "open": Sweep(
        (0.0, 0.5, 1.0, 1.5),
        "With one answer four plain steps suffice and edits bring nothing. The more open, the more 5:5 wins over 10:0.",
        (Above(TEACHER, START, bench="edit"), *EDITING, Above("10:0", "9:1", bench="edit")),
    ),
    "fake_updates": Sweep((1, 2, 5), "More updates: less lag, a better student, above all under specialists.", RISES),
    "fake_lr": Sweep((0.001, 0.005, 0.01), "Too slow lags behind the student, too fast is noise.", RISES),
    "step_aware": Sweep(
        (0, 1),
        "One fake score for all steps can match one teacher. Told the step, it can match another teacher at each step. "
        "Where the teachers agree it is worth nothing.",
        (Above(STEPS, BASE, "text"), *ROUTING[:1], Above("5:5", EDITS_BASE, bench="edit"), Above("5:5", EDITS_BASE), *EDITING),
    ),
    "oracle": Sweep((0, 1), "If a specialist's collapse goes away, lag was its cause. If it stays, the reverse KL is.", RISES + FALLS),
    "updates": Sweep(
        (500, 1000, 2000, 5000),
        "Specialised teachers alone rise and then fall; base and step-wise do not.",
        (*RISES, Above(STEPS, START), *FALLS, Above(STEPS + HALFWAY, STEPS)),
    ),
}  # fmt: skip


# ---- claims --------------------------------------------------------------------------------------------------------


@cache
def student(world: World, name: str, args: Training) -> dict[int, dict]:
    """The scores of a recipe's students, after some numbers of updates."""
    looks = {args.updates, args.updates // 2}
    if args.updates == max(SWEEPS["updates"].values):
        looks |= {n // part for n in SWEEPS["updates"].values for part in (1, 2)}
    run = train(world, OURS.get(name) or RECIPES[name], args, looks)
    return {n: evaluate(world, drawn_by(world, network), SIGMAS, args.seeds) for n, network, _ in run}


@cache
def scores(world: World, row: str, args: Training, longest: int) -> dict[str, dict[str, Tensor]]:
    """category -> measures of a row, (S,) each. longest: how long the run goes on from which this is a look."""
    if row in (TEACHER, SPECIALISTS, START):
        sigmas = SIGMAS if row == START else TEACHER_SIGMAS
        return evaluate(world, teacher(world, row == SPECIALISTS), sigmas, args.seeds)
    updates = args.updates // 2 if row.endswith(HALFWAY) else args.updates
    return student(world, ROWS[row.removesuffix(HALFWAY)], replace(args, updates=longest))[updates]


def value(scored: dict[str, dict[str, Tensor]], bench: str, category: str, measured: str) -> Tensor:
    """(S,), larger is better: of a category, or the average of a bench."""
    some = CATEGORIES[bench] if category == "average" else [category]
    mean = torch.stack([scored[c][measured] for c in some]).mean(0)
    return -mean if measured == "distance" else mean


def difference(part: Above, world: World, args: Training, measured: str, longest: int) -> tuple[float, float]:
    """Mean over seeds of row - other, and the half-width of its 95% interval."""
    sides = [scores(world, row, args, longest) for row in (part.row, part.other)]
    a, b = (value(side, part.bench, part.category, measured) for side in sides)
    n = len(a)
    half = T[min(n - 1, len(T)) - 1] * (a - b).std().item() / n**0.5 if n > 1 else float("inf")
    return (a - b).mean().item(), half


def verdict(halves: list[tuple[float, float]]) -> str:
    """agree: all differences are above 0 with their whole intervals; disagree: one is below; else cannot tell."""
    if any(mean < -half for mean, half in halves):
        return "disagree"
    return "agree" if all(mean > half for mean, half in halves) else "cannot tell"


def experiment(name: str, world: World, args: Training, out: Path) -> None:
    """One table of rows, one of verdicts: out/NAME.md and out/NAME.json."""
    table = TABLES[name]
    rows, result = [TEACHER, SPECIALISTS, START, *table.rows], {"rows": {}, "claims": {}}
    columns = ["row", *CATEGORIES["t2i"], *CATEGORIES["edit"], "coverage"]
    lines = [
        f"# {name}",
        "",
        f"{args.seeds} seeds, {args.updates} updates. Precision, in brackets the energy distance.",
        "",
    ]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in tqdm(rows, name):
        scored = scores(world, row, args, args.updates)
        result["rows"][row] = {c: {key: some.mean().item() for key, some in scored[c].items()} for c in scored}
        cells = [f"{some['precision']:.3f} ({some['distance']:.3f})" for some in result["rows"][row].values()]
        cells.append(f"{sum(some['coverage'] for some in result['rows'][row].values()) / len(cells):.2f}")
        lines.append("| " + " | ".join([row, *cells]) + " |")
    lines += ["", "| claim | by precision | by distance | precision: differences |", "|---|---|---|---|"]
    for claim, parts in ((PREMISES if name == "composition" else {}) | table.claims).items():
        words, evidence = [], []
        for measured in ("", "distance"):
            halves = [difference(p, world, args, measured or PARTS.get(p.part, p.part), args.updates) for p in parts]
            words.append(verdict(halves))
            evidence += [
                f"{p.row} - {p.other}, {p.bench} {p.category}: {m:+.3f} ± {h:.3f}" for p, (m, h) in zip(parts, halves)
            ]
        result["claims"][claim] = {"precision": words[0], "distance": words[1], "evidence": evidence}
        lines.append(f"| {claim} | **{words[0]}** | {words[1]} | {'; '.join(evidence[: len(parts)])} |")
    write(out / name, lines, result)


def sweep(knob: str, world: World, args: Training, out: Path) -> None:
    """Differences of rows along a knob: out/KNOB.md, .json and .png (the shadow is the interval; above 0: row is better)."""
    plan = SWEEPS[knob]
    lines = [f"# {knob}", "", f"{args.seeds} seeds, {args.updates} updates. Expected: {plan.expected}", ""]
    result, longest = {}, max(plan.values) if knob == "updates" else args.updates
    panels = {"Difference in precision": {}, "In energy distance, higher is better": {}}
    lines += [
        "| row - other | measure | " + " | ".join(f"{v:g}" for v in plan.values) + " |",
        "|---" * (2 + len(plan.values)) + "|",
    ]
    for part in tqdm(plan.parts, knob):
        label = f"{part.row} - {part.other}, {part.bench} {part.category}"
        for title, measured in zip(panels, ("precision", "distance")):
            cells, points = [], []
            for v in plan.values:
                there = replace(world, **{knob: v}) if knob in asdict(world) else world
                then = args if there is not world else replace(args, **{knob: v})
                mean, half = difference(part, there, then, measured, longest)
                cells.append(f"{mean:+.3f} ± {half:.3f}")
                points.append((float(v), mean, half))
            panels[title][label] = points
            result[f"{label}, {measured}"] = points
            lines.append(f"| {label} | {measured} | " + " | ".join(cells) + " |")
    pictures.chart(panels, knob, out / f"{knob}.png")
    write(out / knob, lines, result)


def write(place: Path, lines: list[str], result: dict) -> None:
    place.with_suffix(".md").write_text("\n".join(lines) + "\n")
    place.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(lines), f"\n\nwritten to {place.with_suffix('.md')}")


# ---- the main job --------------------------------------------------------------------------------------------------


def show(world: World, args: Training, out: Path) -> None:
    """Students of the base teacher learn to draw and to edit. Prints a table, writes dmd.md, dmd.json, dmd.png, dmd.gif.

    With two settings that the sweeps found better than the tables': a fake score told the step, and Adam without momentum.
    """
    args = replace(args, step_aware=True, beta1=0.0)
    early = min(30, args.updates)  # when the gradient is looked at: at the start it is zero, as all three are the same
    looks = sorted({round(args.updates ** (i / 39)) for i in range(40)} | {0, early})
    noise, _, source, _ = draw(world, args.seeds * 300, 1.0, torch.Generator().manual_seed(args.seed + 1))
    source = source[:1].expand_as(source)  # one edit, for which there are several right answers
    truth = {c: world.mixture("truth", c, source[:1]) for some in CATEGORIES.values() for c in some}
    picture, frames, curve, condition = pictures.blank(3, 2), [], {}, ("t2i", "portrait", source)
    base = teacher(world)
    for step, network, fake in train(world, OURS[EDITS_BASE], args, set(looks)):
        model = drawn_by(world, network)
        frames.append(pictures.moving(model, step, noise, source, truth))
        if step in looks[::4] or step == args.updates:
            curve[step] = evaluate(world, model, SIGMAS, args.seeds)
        if step == early:
            scored = base(*condition), drawn_by(world, fake)(*condition), euler(model(*condition), noise, SIGMAS)
            pictures.one_gradient(picture, *scored, truth["portrait"])
            pictures.field(picture, *scored, truth["portrait"])
    rows = {
        "1. Teacher, 40 steps": (base, TEACHER_SIGMAS, "small steps follow the curve to a mode"),
        "2. Teacher, 4 steps": (base, SIGMAS, "long steps leave it, and many end between the modes"),
        "3. Student, 4 steps": (model, SIGMAS, "trained, the same four steps end in a mode, or near"),
    }
    for column, (title, (drawing, sigmas, note)) in enumerate(rows.items()):
        pictures.paths(picture, column, title, note, drawing(*condition), noise, sigmas, truth["portrait"])
    found = {title[3:]: evaluate(world, drawing, sigmas, args.seeds) for title, (drawing, sigmas, _) in rows.items()}

    def mean(scored: dict, key: str) -> float:
        return value(scored, "t2i", "average", key).mean().item()

    keys = ("precision", "coverage")
    lines = {key: {step: mean(scored, key) for step, scored in curve.items()} for key in keys}
    pictures.progress(picture, lines, {key: [mean(scored, key) for scored in list(found.values())[:2]] for key in keys})
    pictures.save(picture, out / "dmd.png")
    frames[0].save(out / "dmd.gif", save_all=True, append_images=frames[1:] + frames[-1:] * 12, duration=140, loop=0)
    result = {row: {c: {k: v.mean().item() for k, v in some[c].items()} for c in truth} for row, some in found.items()}
    table = [
        f"{args.seeds} seeds, {args.updates} updates: precision / coverage / energy distance to exact samples.",
        "",
    ]
    table += ["| | " + " | ".join(truth) + " |", "|---" * (1 + len(truth)) + "|"]
    for row, some in result.items():
        cells = [" / ".join(f"{some[c][key]:.3f}" for key in (*keys, "distance")) for c in truth]
        table.append("| " + " | ".join([row, *cells]) + " |")
    write(out / "dmd", table, result)


# ---- the command line ----------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="toy.plane", description="DMD in two dimensions.")
    chosen = {name: [name] for name in [*TABLES, *SWEEPS]}
    chosen |= {"all": ["composition", "teachers", "mixture"], "sweeps": ["lambdas", *SWEEPS]}
    parser.add_argument("--experiment", choices=list(chosen), metavar="NAME", help=f"one of {', '.join(chosen)}")
    parser.add_argument("--seeds", type=int, default=32, help="students of a row (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=1000, help="of each student (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/plane"), help="folder to write to (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    for name in ("seeds", "updates"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / ".write").touch()
        (args.out / ".write").unlink()
    except OSError as error:
        parser.error(f"--out {args.out}: cannot be written, {error.strerror}; name another folder")
    training = Training(seeds=args.seeds, updates=args.updates)
    for name in chosen.get(args.experiment, []):
        (sweep if name in SWEEPS else experiment)(name, World(), training, args.out)
    if not args.experiment:
        show(World(), training, args.out)
