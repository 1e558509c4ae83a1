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
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from dmd import dmd_gradient
from flow import Velocity, euler, path
from recipe import RECIPES, Recipe, specialists
from toy.experiments import E1, E2, E3, E4, E5, EXPERIMENTS, FIRST_STEP, HALFWAY, SPECIALISTS, START, TEACHER, Above
from toy.experiments import Experiment, T
from toy.figures import chart
from toy.plane import (
    CATEGORIES,
    SIGMAS,
    TEACHER_SIGMAS,
    Mixture,
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
OURS |= {
    EDITS_BASE: Recipe(EDITS_BASE, (5, 5)),
    "reversed 5:5": Recipe("reversed 5:5", (5, 5), specialists=specialists(1, 0.5, 0, 0)),
}
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


ROUTING = (Above(STEPS, BASE, "text"), Above(STEPS, SPECIAL, "text"), Above(STEPS, AVERAGE, "text"))
ROUTED = (*ROUTING[:2], Above("5:5", EDITS_BASE, bench="edit"), Above("5:5", EDITS_BASE))
RISES = (Above(BASE, START), Above(SPECIAL, START), Above(STEPS, START))
FALLS = tuple(Above(row + HALFWAY, row) for row in (BASE, SPECIAL, STEPS))
SWEEPS = {
    "blur": Sweep(
        (1.0, 1.5, 2.0, 3.0, 4.0),
        "A student becomes its teacher. Text prompts help text while the base is good at it; once it is very blurred, "
        "what carries over from landscapes is as good, and text prompts are the worst choice.",
        (Above(E1, E3, "text"), Above(E2, E3), Above(E4, E5, "text"), Above(E1, START, "text")),
    ),
    "sharp": Sweep((0.25, 0.5, 0.75, 1.0), "The sharper the specialist, the more step-wise wins over it alone.", ROUTING),
    "displaced": Sweep((0.0, 0.5, 1.0, 2.0), "The farther it is displaced, the more step-wise wins over it alone.", ROUTING),
    "open": Sweep(
        (0.0, 0.5, 1.0, 1.5),
        "With one answer four plain steps suffice and edits bring nothing; the more open, the more 5:5 wins over 10:0.",
        (Above(TEACHER, START, bench="edit"), Above("5:5", "10:0", bench="edit"), Above("10:0", "9:1", bench="edit"), Above("5:5", "10:0")),
    ),
    "fake_updates": Sweep((1, 2, 5), "More updates: less lag, a better student, above all under specialists.", RISES),
    "fake_lr": Sweep((0.001, 0.0025, 0.005, 0.01), "Too slow lags behind the student, too fast is noise.", RISES),
    "step_aware": Sweep(
        (0, 1),
        "One fake score for all steps can match one teacher; told the step, it can match another teacher at each step. "
        "Where the teachers agree it is worth nothing.",
        ROUTED,
    ),
    "oracle": Sweep((0, 1), "If a specialist's collapse goes away, lag was its cause; if it stays, the reverse KL is.", (*RISES, *FALLS[:2])),
    "updates": Sweep((500, 1000, 2000, 5000), "Specialised teachers alone rise and then fall; base and step-wise do not.", RISES + FALLS),
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
    lines = [
        f"# {name}",
        "",
        f"{args.seeds} seeds, {args.updates} updates. Precision, energy distance in brackets.",
        "",
    ]
    lines += [
        "| row | " + " | ".join(c for some in CATEGORIES.values() for c in some) + " | coverage |",
        "|---" * 7 + "|",
    ]
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
    plan, lines = SWEEPS[knob], [f"# {knob}", "", SWEEPS[knob].expected, ""]
    result, longest = {}, max(plan.values) if knob == "updates" else args.updates
    panels = {f"difference in {m}, along {knob}": {} for m in ("precision", "distance (better is above 0)")}
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
                points.append((v, [mean - half, mean + half]))
            panels[title][label] = points
            result[f"{label}, {measured}"] = points
            lines.append(f"| {label} | {measured} | " + " | ".join(cells) + " |")
    chart(panels, out / f"{knob}.png")
    write(out / knob, lines, result)


def write(place: Path, lines: list[str], result: dict) -> None:
    place.with_suffix(".md").write_text("\n".join(lines) + "\n")
    place.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(lines), f"\n\nwritten to {place.with_suffix('.md')}")


# ---- the picture ---------------------------------------------------------------------------------------------------

FINE = 3  # pictures are drawn so many times larger and then reduced: smooth edges
SIDE, HEAD, EDGE = 400, 56, 3.0  # a panel's pixels, its title's, and how much of the plane it shows
BLUE, RED, GREEN, GREY, BLACK = "#1f5fb4", "#d0312d", "#1f8a4c", "#8c8c8c", "#202020"


class Panel:
    """A square window on the plane, [-3, 3] x [-3, 3]."""

    def __init__(self, canvas: Image.Image, column: int, row: int, title: str, note: str, truth: Mixture | None):
        self.pen, self.left, self.top = ImageDraw.Draw(canvas, "RGBA"), column * SIDE * FINE, row * (SIDE + HEAD) * FINE
        self.write((8, 6), title, BLACK, 17)
        self.write((8, 28), note, GREY, 13)
        if truth:  # its density, as a shade
            line = torch.linspace(-EDGE, EDGE, 120)
            places = torch.cartesian_prod(line.flip(0), line).flip(1)
            density = (-torch.cdist(places, truth.modes).square() / (2 * truth.sd**2)).exp().sum(1).clamp(max=1)
            shade = (
                torch.stack([255 - 60 * density, 255 - 40 * density, 255 - 5 * density], 1).byte().reshape(120, 120, 3)
            )
            shade = Image.fromarray(shade.numpy()).resize(((SIDE - 12) * FINE, SIDE * FINE), Image.BICUBIC)
            canvas.paste(shade, (self.left + 6 * FINE, self.top + HEAD * FINE))

    def write(self, place: tuple[float, float], words: str, colour: str, size: int) -> None:
        """place: pixels from the panel's corner."""
        xy = (self.left + place[0] * FINE, self.top + place[1] * FINE)
        self.pen.text(xy, words, fill=colour, font=ImageFont.load_default(size * FINE))

    def at(self, points: Tensor) -> list[tuple[float, float]]:
        x, y = ((points + EDGE * torch.tensor([1.0, 1.0])) / (2 * EDGE)).unbind(-1)
        return [
            (self.left + a * SIDE * FINE, self.top + (HEAD + (1 - b) * SIDE) * FINE)
            for a, b in zip(x.tolist(), y.tolist())
        ]

    def dots(self, points: Tensor, colour: str, radius: float = 2.0) -> None:
        for x, y in self.at(points):
            r = radius * FINE
            self.pen.ellipse([x - r, y - r, x + r, y + r], fill=colour)

    def line(self, points: Tensor, colour: str, width: float = 1.5) -> None:
        self.pen.line(self.at(points), fill=colour, width=round(width * FINE), joint="curve")

    def arrow(self, start: Tensor, end: Tensor, colour: str) -> None:
        along = (end - start) / (end - start).norm().clamp(min=1e-6) * 0.12
        across = torch.stack([-along[1], along[0]]) * 0.5
        self.line(torch.stack([start, end - along * 0.5]), colour)
        self.pen.polygon(self.at(torch.stack([end, end - along + across, end - along - across])), fill=colour)


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
