"""The paper's claims in the plane, knob by knob; and one picture of the method. The commands are toy/plane.py's.

The claims and rows are those of the picture world (toy/experiments.py), word for word: a score is the precision here,
fidelity the share within one standard deviation. A judge sees no more. Each claim is judged a second time by the energy
distance, which also sees missing modes. Intervals are 95%, over seeds, of paired differences.

Written down before the runs. Premises, each printed with its verdict: PREMISES, and in the rows of the base teacher that
it is worst at text. What each knob should do: the text in SWEEPS. No knob was set by looking at a verdict.
"""

import argparse
import json
import math
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
SIDE, HEAD = 400, 56  # a panel's pixels, and its title's
BLUE, RED, GREEN, GREY, BLACK = "#1f5fb4", "#d0312d", "#1f8a4c", "#8c8c8c", "#202020"


class Panel:
    """A square window on the plane, from -edge to edge."""

    def __init__(self, canvas: Image.Image, column: int, row: int, title: str, note: str, truth: Mixture | None, edge=2.7):
        self.pen, self.edge = ImageDraw.Draw(canvas, "RGBA"), edge
        self.left, self.top = column * SIDE * FINE, row * (SIDE + HEAD) * FINE
        if truth:  # its density, as a shade
            line = torch.linspace(-edge, edge, 100)
            places = torch.cartesian_prod(-line, line).flip(1)  # from the upper left, row by row
            density = (-torch.cdist(places, truth.modes + truth.centre).square() / (2 * truth.sd**2)).exp().sum(1)
            shade = 255 - density.clamp(max=1)[:, None] * torch.tensor([70.0, 45.0, 5.0])
            shade = Image.fromarray(shade.byte().reshape(100, 100, 3).numpy()).resize((SIDE * FINE, SIDE * FINE), Image.BICUBIC)
            canvas.paste(shade, (self.left, self.top + HEAD * FINE))
        self.write((8, 6), title, BLACK, 18)
        self.write((8, 30), note, GREY, 14)

    def write(self, place: tuple[float, float], words: str, colour: str, size: int) -> None:
        """place: pixels from the panel's corner."""
        xy = (self.left + place[0] * FINE, self.top + place[1] * FINE)
        self.pen.text(xy, words, fill=colour, font=ImageFont.load_default(size * FINE))

    def at(self, points: Tensor) -> list[tuple[float, float]]:
        x, y = ((points / self.edge + 1) / 2 * SIDE * FINE).unbind(-1)  # y runs upwards
        return [(self.left + a, self.top + HEAD * FINE + SIDE * FINE - b) for a, b in zip(x.tolist(), y.tolist())]

    def label(self, place: Tensor, words: str, colour: str) -> None:
        """Words beside a place of the plane."""
        ((x, y),) = self.at(place[None])
        self.pen.text((x + 8 * FINE, y), words, colour, ImageFont.load_default(13 * FINE), "lm")

    def dots(self, points: Tensor, colour: str, radius: float = 2.0) -> None:
        for x, y in self.at(points):
            r = radius * FINE
            self.pen.ellipse([x - r, y - r, x + r, y + r], fill=colour)

    def line(self, points: Tensor, colour: str, width: float = 1.5) -> None:
        self.pen.line(self.at(points), fill=colour, width=round(width * FINE), joint="curve")

    def arrow(self, start: Tensor, end: Tensor, colour: str) -> None:
        along = (end - start) / (end - start).norm().clamp(min=1e-6) * 0.04 * self.edge
        across = torch.stack([-along[1], along[0]]) * 0.5
        self.line(torch.stack([start, end - along * 0.5]), colour)
        self.pen.polygon(self.at(torch.stack([end, end - along + across, end - along - across])), fill=colour)


def gradients(canvas: Image.Image, real: Velocity, fake: Velocity, x_theta: Tensor, seeds: int, truth: Mixture) -> None:
    """Panels 4 and 5: where one sample's gradient comes from; and its mean over noises, for many samples."""
    panel = Panel(canvas, 0, 1, "4. One sample's gradient", "noise what the student drew; ask both what it was", truth, 1.5)
    n, rng = len(x_theta) // seeds, torch.Generator().manual_seed(0)
    chosen = torch.argmin((x_theta[:n] - torch.tensor([0.3, 0.9])).norm(dim=1))
    x, xi, t = x_theta[chosen], torch.tensor([0.9, -0.1]), torch.full((len(x_theta),), 0.5)
    _, x0_real, x0_fake = (one[0] for one in dmd_gradient(real, fake, x.expand_as(x_theta), xi.expand_as(x_theta), t))
    x_t, better = path(x[None], xi[None], t[:1])[0], x + x0_real - x0_fake
    panel.line(torch.stack([x, x_t]), GREY)
    panel.arrow(x_t, x0_real, BLUE)
    panel.arrow(x_t, x0_fake, RED)
    panel.line(torch.stack([x0_fake, x0_real]), GREEN)
    panel.arrow(x, better, GREEN)
    legend = (
        (x, BLACK, "x_theta: drawn by the student"),
        (x_t, GREY, "x_t: the same with noise"),
        (x0_real, BLUE, "x0_real: the teacher's answer"),
        (x0_fake, RED, "x0_fake: the fake score's answer"),
        (better, GREEN, "-g: x_theta moves as from red to blue"),
    )
    for i, (place, colour, words) in enumerate(legend):
        panel.dots(place[None], colour, 5)
        panel.write((16, 350 + 20 * i), words, colour, 14)
    panel = Panel(canvas, 1, 1, "5. The field -g", "its mean over noises: samples are carried to the modes", truth)
    total, again = torch.zeros_like(x_theta), 60
    for _ in range(again):
        xi, t = torch.randn(x_theta.shape, generator=rng), 0.02 + 0.96 * torch.rand(len(x_theta), generator=rng)
        total += dmd_gradient(real, fake, x_theta, xi, t).g / again
    for i in range(150):
        panel.dots(x_theta[i : i + 1], BLACK, 2)
        panel.arrow(x_theta[i], x_theta[i] - 0.35 * total[i], GREEN)


def show(world: World, args: Training, out: Path) -> None:
    """The main job: students of the base teacher, drawing and editing. Prints a table, writes dmd.png and dmd.gif."""
    n, condition, still = 300, ("t2i", "portrait"), min(30, args.updates)
    noise, _, source, _ = draw(world, args.seeds * n, 1.0, torch.Generator().manual_seed(args.seed + 1))
    source = source[:1].expand_as(source)  # one edit, for which there are several right answers
    truth = {c: world.mixture("truth", c, source[:1]) for some in CATEGORIES.values() for c in some}
    canvas = Image.new("RGB", (3 * SIDE * FINE, 2 * (SIDE + HEAD) * FINE), "white")
    looks = sorted({round(args.updates ** (i / 39)) for i in range(40)} | {0, still})
    frames, curve = [], {}
    for step, student, fake in train(world, OURS[EDITS_BASE], args, set(looks)):
        model = drawn_by(world, student)
        frame = Image.new("RGB", (3 * SIDE * FINE, (SIDE + HEAD) * FINE), "white")
        for column, (task, category, note) in enumerate((
            ("t2i", "portrait", "shade: what is right"), ("t2i", "text", "many narrow modes"), ("edit", "object", "black: the source; three right answers"),
        )):  # fmt: skip
            panel = Panel(frame, column, 0, f"{category}: {step} updates", note, truth[category])
            panel.dots(euler(model(task, category, source), noise, SIGMAS)[:n], BLUE + "c0", 3)
            if task == "edit":
                panel.dots(source[:1], BLACK, 6)
        frames.append(frame.resize((frame.width // FINE * 3 // 5, frame.height // FINE * 3 // 5), Image.LANCZOS))
        if step in looks[::4] or step == args.updates:
            curve[step] = evaluate(world, model, SIGMAS, args.seeds)
        if step == still:
            learnt, x_theta = drawn_by(world, fake)(*condition, source), euler(model(*condition, source), noise, SIGMAS)
            gradients(canvas, teacher(world)(*condition, source), learnt, x_theta, args.seeds, truth["portrait"])

    base = teacher(world)
    rows = {"teacher, 40 steps": (base, TEACHER_SIGMAS), "teacher, 4 steps": (base, SIGMAS), "student, 4 steps": (model, SIGMAS)}
    notes = "small steps follow the curve to a mode", "long steps leave it: most end between the modes", "trained, the same four steps end in the modes"
    for column, ((title, (drawing, sigmas)), note) in enumerate(zip(rows.items(), notes)):
        panel = Panel(canvas, column, 0, f"{column + 1}. {title}", note, truth["portrait"])
        v, stops = drawing(*condition, source), [noise]
        for pair in zip(sigmas, sigmas[1:]):
            stops.append(euler(v, stops[-1], pair))
        panel.dots(stops[-1][:n], BLUE + "a0")
        for i in range(14):
            stop = torch.stack([z[i] for z in stops])
            panel.line(stop, BLACK)
            panel.dots(stop[:1], GREY, 4)
            panel.dots(stop[1:-1], BLACK, 1 if len(stop) > 5 else 3)
            panel.dots(stop[-1:], RED, 4)
    panel = Panel(canvas, 2, 1, "6. As training goes on", "means of landscape, portrait and text", None, 1.15)
    scored = {row: evaluate(world, drawing, sigmas, args.seeds) for row, (drawing, sigmas) in rows.items()}

    def at(step: float, height: float) -> list[float]:  # the panel shows [-1.15, 1.15]: updates on a logarithmic axis
        return [2 * math.log1p(step) / math.log1p(args.updates) - 1, 2 * height - 1]

    for height in (0.0, 0.5, 1.0):
        panel.label(torch.tensor(at(0, height)) - torch.tensor([0.15, 0.0]), f"{height:g}", GREY)
    for step in (0, 10, 100, args.updates):
        panel.label(torch.tensor(at(step, 0)) - torch.tensor([0.12, 0.09]), f"{step}", GREY)
    for colour, key in ((BLUE, "precision"), (GREEN, "coverage")):
        heights = {name: value(some, "t2i", "average", key).mean().item() for name, some in (scored | curve).items()}
        for row in ("teacher, 40 steps", "teacher, 4 steps"):
            panel.line(torch.tensor([at(0, heights[row]), at(args.updates, heights[row])]), colour + "70", 0.8)
        panel.label(torch.tensor(at(0, heights["teacher, 40 steps"] - 0.03)), f"{key}, teacher, 40 steps", colour)
        panel.label(torch.tensor(at(0, heights["teacher, 4 steps"] - 0.03)), "its 4 steps, and the student, thick", colour)
        panel.line(torch.tensor([at(step, heights[step]) for step in curve]), colour, 3)
    canvas.resize((canvas.width // FINE, canvas.height // FINE), Image.LANCZOS).quantize(128).save(out / "dmd.png", optimize=True)
    frames[0].save(out / "dmd.gif", save_all=True, append_images=frames[1:] + frames[-1:] * 12, duration=140, loop=0)
    lines = ["| | " + " | ".join(truth) + " |", "|---" * 6 + "|"]
    for row, some in scored.items():
        cells = [" / ".join(f"{some[c][key].mean():.3f}" for key in ("precision", "coverage", "distance")) for c in truth]
        lines.append("| " + " | ".join([row, *cells]) + " |")
    write(out / "dmd", [f"Precision / coverage / energy distance to exact samples, {args.seeds} seeds, {args.updates} updates", "", *lines], {})


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
