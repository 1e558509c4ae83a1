"""The plane: one picture of the whole method in two dimensions, and the paper's claims there, knob by knob.

    python -m toy.plane                            trains students, prints a table, draws a picture and an animation
    python -m toy.plane --experiment composition   the paper's claims: composition, teachers, mixture, all; or sweeps

The teachers, the students and their training are in toy/plane_method.py, what was found is in results/plane/findings.md.
Claims and rows are those of the picture world (toy/experiments.py), word for word. A score is the precision here, fidelity
the share within one standard deviation. Each claim is judged a second time by the energy distance, which also sees missing
modes. Intervals are 95%, over seeds, of differences that are paired: all rows see the same draws.

Written down before the runs. Premises, each printed with its verdict: PREMISES, and in the rows of the base teacher that
it is worst at text. What each knob should do: the text in SWEEPS. No knob was set by looking at a verdict.
"""

import argparse
import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dmd import dmd_gradient
from flow import Velocity, add_noise, euler
from recipe import RECIPES, Recipe, specialists
from toy import figures
from toy.experiments import E1, E3, E4, E5, EXPERIMENTS, FIRST_STEP, HALFWAY, SPECIALISTS, START, TEACHER, Above, T
from toy.plane_method import (
    CATEGORIES,
    SIGMAS,
    TEACHER_SIGMAS,
    Model,
    Training,
    World,
    draw,
    drawn_by,
    evaluate,
    teacher,
    train,
)

PARTS = {"score": "precision", "attributes": "precision", "fidelity": "fine", "coverage": "coverage"}
PREMISES = {
    "Four plain steps lose at drawing.": [Above(TEACHER, START)],
    "Four plain steps lose at editing.": [Above(TEACHER, START, bench="edit")],
    "The specialist is better at text.": [Above(SPECIALISTS, TEACHER, "text")],
    "The specialist is better at edits.": [Above(SPECIALISTS, TEACHER, bench="edit")],
    "It is narrower.": [Above(SPECIALISTS, TEACHER, "text", part="fidelity")],
}
BASE, SPECIAL, AVERAGE, STEPS, REVERSED = "base only", "specialised only", "average", "step-wise", "reversed"
LAST, EDITS_BASE = "last step alone", "5:5, base only"
LAMBDAS = {  # ours: of the specialist at the student's four steps
    LAST: specialists(0, 0, 0, 1),
    "last three": specialists(0, 0.5, 1, 1),
    "first step alone": specialists(1, 0, 0, 0),
    REVERSED: specialists(1, 0.5, 0, 0),
}
OURS = {EDITS_BASE: Recipe(EDITS_BASE, (5, 5))} | {
    row: Recipe(row, (10, 0), specialists=LAMBDAS[row]) for row in LAMBDAS
}
ROWS = {row: name for table in EXPERIMENTS.values() for row, name in table.rows.items()} | {row: row for row in OURS}
TABLES = {name: (list(table.rows), table.claims) for name, table in EXPERIMENTS.items()}  # rows, claims
TABLES["composition"] = TABLES["composition"][0], PREMISES | TABLES["composition"][1]
TABLES["lambdas"] = (
    [BASE, STEPS, SPECIAL, AVERAGE, *LAMBDAS],
    {
        "(Ours) Late is better than early.": [Above(STEPS, REVERSED, "text")],
        "(Ours) The last step alone is enough to be above the base.": [Above(LAST, BASE, "text")],
        "(Ours) Late is better than always.": [Above(STEPS, SPECIAL, "text")],
        "(Ours) A first-step loss keeps more modes.": [Above(FIRST_STEP, SPECIAL, part="coverage")],
    },
)

RISES = [Above(BASE, START), Above(SPECIAL, START)]
FALLS = [Above(BASE + HALFWAY, BASE), Above(SPECIAL + HALFWAY, SPECIAL)]
ROUTING = [Above(STEPS, SPECIAL, "text"), Above(STEPS, AVERAGE, "text")]
EDITING = [Above("5:5", "10:0", bench="edit"), Above("5:5", "10:0")]
SWEEPS = {  # a knob of World or Training: its values, what should happen, and which differences show it
    "blur": (
        (1.0, 2.0, 3.0, 4.0),
        "A student becomes its teacher. Text prompts help text while the base is good at it. Once it is very blurred, "
        "what carries over from landscapes is as good, and text prompts are the worst choice.",
        [Above(E1, E3, "text"), Above(E1, E3), Above(E4, E5, "text"), Above(E1, START, "text")],
    ),
    "sharp": ((0.25, 0.5, 1.0), "The sharper the specialist, the more step-wise wins over it alone.", ROUTING),
    "displaced": ((0.0, 0.5, 1.0, 2.0), "The farther it is displaced, the more step-wise wins over it alone.", ROUTING),
    "open": (
        (0.0, 0.5, 1.0, 1.5),
        "With one answer four plain steps suffice and edits bring nothing. The more open, the more 5:5 wins over 10:0.",
        [Above(TEACHER, START, bench="edit"), *EDITING, Above("10:0", "9:1", bench="edit")],
    ),
    "fake_updates": ((1, 2, 5), "More updates: less lag, a better student, above all under specialists.", RISES),
    "fake_lr": ((0.001, 0.005, 0.01), "Too slow lags behind the student, too fast is noise.", RISES),
    "step_aware": (
        (0, 1),
        "One fake score for all steps can match one teacher. Told the step, it can match another teacher at each step. "
        "Where the teachers agree it is worth nothing.",
        [Above(STEPS, BASE, "text"), ROUTING[0], Above("5:5", EDITS_BASE, bench="edit"), Above("5:5", EDITS_BASE)]
        + EDITING,
    ),
    "oracle": (
        (0, 1),
        "If a specialist's collapse goes away, lag was its cause. If it stays, the reverse KL is.",
        RISES + FALLS,
    ),
    "updates": (
        (500, 1000, 2000, 5000),
        "Specialised teachers alone rise and then fall; base and step-wise do not.",
        [*RISES, Above(STEPS, START), *FALLS, Above(STEPS + HALFWAY, STEPS)],
    ),
}
CHOICES = {name: [name] for name in [*TABLES, *SWEEPS]}
CHOICES |= {"all": ["composition", "teachers", "mixture"], "sweeps": ["lambdas", *SWEEPS]}


# ---- claims --------------------------------------------------------------------------------------------------------


@cache
def student(world: World, recipe: str, args: Training) -> dict[str, dict[str, Tensor]]:
    """Trains the students of a recipe and measures them."""
    ((_, network, _),) = train(world, (RECIPES | OURS)[recipe], args, {args.updates})
    return evaluate(world, drawn_by(world, network), SIGMAS, args.seeds)


@cache
def scores(world: World, row: str, args: Training) -> dict[str, dict[str, Tensor]]:
    """category -> measures of a row, (S,) each."""
    if row in (TEACHER, SPECIALISTS, START):
        sigmas = SIGMAS if row == START else TEACHER_SIGMAS
        return evaluate(world, teacher(world, row == SPECIALISTS), sigmas, args.seeds)
    if row.endswith(HALFWAY):
        return scores(world, row.removesuffix(HALFWAY), replace(args, updates=args.updates // 2))
    return student(world, ROWS[row], args)  # two rows may be one recipe


def difference(part: Above, world: World, args: Training, by: str) -> tuple[float, float]:
    """Mean over seeds of how much better row is than other, and the half-width of its 95% interval.

    by: "precision", or what the part asks for in its place; or "distance".
    """
    measured = "distance" if by == "distance" else PARTS[part.part]
    some = CATEGORIES[part.bench] if part.category == "average" else [part.category]

    def value(row: str) -> Tensor:
        scored = scores(world, row, args)
        return torch.stack([scored[c][measured] for c in some]).mean(0)  # (S,)

    better = value(part.row) - value(part.other)
    if measured == "distance":  # the smaller, the better
        better = -better
    n = len(better)
    half = T[min(n - 1, len(T)) - 1] * better.std().item() / n**0.5 if n > 1 else float("inf")
    return better.mean().item(), half


def verdict(differences: list[tuple[float, float]]) -> str:
    """agree: all differences are above 0 with their whole intervals; disagree: one is below; else cannot tell."""
    if any(mean < -half for mean, half in differences):
        return "disagree"
    return "agree" if all(mean > half for mean, half in differences) else "cannot tell"


def means(scored: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """category -> measures, averaged over seeds."""
    return {category: {key: some.mean().item() for key, some in scored[category].items()} for category in scored}


def write(place: Path, lines: list[str], tables: list[list[list[str]]], result: dict) -> None:
    """PLACE.md and PLACE.json. A table is a list of rows of cells; the first row is its head."""
    for head, *rows in tables:
        written = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
        lines = [*lines, "", written[0], "|---" * len(head) + "|", *written[1:]]
    place.with_suffix(".md").write_text("\n".join(lines) + "\n")
    place.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(lines), f"\n\nwritten to {place.with_suffix('.md')}")


def experiment(name: str, world: World, args: Training, out: Path) -> None:
    """One table of rows, one of verdicts."""
    names, claims = TABLES[name]
    rows = [["row", *CATEGORIES["t2i"], *CATEGORIES["edit"], "coverage"]]
    verdicts = [["claim", "by precision", "by distance", "precision: differences"]]
    result = {"rows": {}, "claims": {}}
    for row in tqdm([TEACHER, SPECIALISTS, START, *names], name):
        found = result["rows"][row] = means(scores(world, row, args))
        cells = [f"{some['precision']:.3f} ({some['distance']:.3f})" for some in found.values()]
        rows.append([row, *cells, f"{sum(some['coverage'] for some in found.values()) / len(found):.2f}"])
    for claim, parts in claims.items():
        words, evidence = {}, []
        for by in ("precision", "distance"):
            found = [difference(part, world, args, by) for part in parts]
            words[by] = verdict(found)
            evidence += [
                f"{p.row} - {p.other}, {p.bench} {p.category}: {m:+.3f} ± {h:.3f}" for p, (m, h) in zip(parts, found)
            ]
        verdicts.append([claim, f"**{words['precision']}**", words["distance"], "; ".join(evidence[: len(parts)])])
        result["claims"][claim] = words | {"evidence": evidence}
    lines = [
        f"# {name}",
        "",
        f"{args.seeds} seeds, {args.updates} updates. Precision, in brackets the energy distance.",
    ]
    write(out / name, lines, [rows, verdicts], result)


def sweep(knob: str, world: World, args: Training, out: Path) -> None:
    """Differences of rows along a knob, as a table and as curves; above 0 row is better. The shadow is the interval."""
    values, expected, parts = SWEEPS[knob]
    rows, result = [["row - other", "measure", *(f"{v:g}" for v in values)]], {}
    curves = {"precision": {}, "distance": {}}
    for part in tqdm(parts, knob):
        label = f"{part.row} - {part.other}, {part.bench} {part.category}"
        for by in curves:
            points = []
            for v in values:
                there = replace(world, **{knob: v}) if knob in vars(world) else world
                then = replace(args, **{knob: v}) if knob in vars(args) else args
                points.append((float(v), *difference(part, there, then, by)))
            rows.append([label, by, *(f"{mean:+.3f} ± {half:.3f}" for _, mean, half in points)])
            result[f"{label}, {by}"] = points
            curves[by][label] = [
                (v, [mean - half, mean, mean + half] if half < float("inf") else [mean]) for v, mean, half in points
            ]
    panels = {
        "Difference in precision": curves["precision"],
        "In energy distance, above 0 is better": curves["distance"],
    }
    figures.chart(panels, out / f"{knob}.png", along=knob)
    write(
        out / knob,
        [f"# {knob}", "", f"{args.seeds} seeds, {args.updates} updates. Expected: {expected}"],
        [rows],
        result,
    )


# ---- the main job --------------------------------------------------------------------------------------------------


def frame(world: World, model: Model, step: int, noise: Tensor, source: Tensor) -> Image.Image:
    """Of the animation: what students draw after so many updates."""
    picture = figures.blank(3, 1)
    shown = {
        "portrait": ("t2i", "shade: where right samples are"),
        "text": ("t2i", "many narrow modes"),
        "object": ("edit", "black: the source; three answers are right"),
    }
    for i, (category, (task, note)) in enumerate(shown.items()):
        truth = world.mixture("truth", category, source[:1])
        panel = figures.Panel(picture, (i, 0), truth, f"{category}: {step} updates", note, 2.7)
        panel.dots(euler(model(task, category, source), noise, SIGMAS), figures.BLUE + "c0", 3)
    panel.dots(source[:1], figures.BLACK, 6)
    return picture.reduce(5)


def gradients(one: figures.Panel, field: figures.Panel, real: Velocity, fake: Velocity, x_theta: Tensor) -> None:
    """Panels 4 and 5: -g at one sample with one noise, and at many, averaged over 60 noises; x_theta (N, 2)."""
    x = x_theta[(x_theta - torch.tensor([0.3, 0.9])).norm(dim=1).argmin()].expand_as(x_theta)  # between two modes
    xi, t = torch.tensor([0.9, -0.1]).expand_as(x), torch.full((len(x),), 0.5)
    _, x0_real, x0_fake = dmd_gradient(real, fake, x, xi, t)
    one.guesses(x[0], add_noise(x, xi, t)[0], x0_real[0], x0_fake[0])
    rng, g = torch.Generator().manual_seed(0), torch.zeros_like(x_theta)
    for _ in range(60):
        xi, t = torch.randn(x_theta.shape, generator=rng), 0.02 + 0.96 * torch.rand(len(x_theta), generator=rng)
        g += dmd_gradient(real, fake, x_theta, xi, t).g / 60
    for start, end in zip(x_theta[::2], (x_theta - 0.2 * g)[::2]):
        field.dots(start[None], figures.BLACK, 2)
        field.arrow(start, end, figures.GREEN)


def show(world: World, args: Training, out: Path) -> None:
    """Students of the base teacher learn to draw and to edit: a table, a picture of six panels, and an animation.

    With two settings that the sweeps found better than the tables': a fake score told the step, and Adam without momentum.
    """
    args = replace(args, step_aware=True, beta1=0.0)
    early = min(30, args.updates)  # when the gradient is looked at: at the start it is zero, as all three are the same
    frames_at = {round(args.updates ** (i / 23)) for i in range(24)} | {0}
    marks = {round(args.updates * i / 5) for i in range(6)}
    n = args.seeds * max(1, 300 // args.seeds)  # samples to draw, of all seeds
    noise, _, source, _ = draw(world, n, torch.Generator().manual_seed(args.seed + 1))
    source = source[:1].expand_as(source)  # one edit, for which there are several right answers
    base, portrait, truth = teacher(world), ("t2i", "portrait", source), world.mixture("truth", "portrait", source)
    picture, frames, curve = figures.blank(3, 2), [], {}
    for step, network, fake in train(world, OURS[EDITS_BASE], args, {early, *frames_at, *marks}):
        model = drawn_by(world, network)
        if step in frames_at:
            frames.append(frame(world, model, step, noise, source))
        if step in marks:
            curve[step] = evaluate(world, model, SIGMAS, args.seeds)
        if step == early:
            note = "put noise on it; both networks guess what it was"
            one = figures.Panel(picture, (0, 1), truth, "4. How one sample is corrected", note, 1.5)
            note = f"the mean of -g after {early} updates: out to the modes"
            field = figures.Panel(picture, (1, 1), truth, "5. How all samples are corrected", note, 2.4)
            velocities = base(*portrait), drawn_by(world, fake)(*portrait)
            gradients(one, field, *velocities, euler(model(*portrait), noise, SIGMAS))

    rows = {
        "Teacher, 40 steps": (base, TEACHER_SIGMAS, "from noise (grey) to a sample (red); blue: other samples"),
        "Teacher, 4 steps": (base, SIGMAS, "too few: many samples end between the shaded modes"),
        "Student, 4 steps": (model, SIGMAS, "after training more of them end in a mode"),
    }
    for i, (row, (drawing, sigmas, note)) in enumerate(rows.items()):
        stops = [noise]
        for pair in pairwise(sigmas):
            stops.append(euler(drawing(*portrait), stops[-1], pair))
        panel = figures.Panel(picture, (i, 0), truth, f"{i + 1}. {row}", note, 2.4)
        panel.paths(torch.stack(stops))
    found = {row: evaluate(world, drawing, sigmas, args.seeds) for row, (drawing, sigmas, _) in rows.items()}

    def mean(scored: dict, key: str) -> float:
        return torch.stack([scored[c][key] for c in CATEGORIES["t2i"]]).mean().item()

    lines = {}  # of panel 6
    for key, meaning in (("precision", "samples in a mode"), ("coverage", "modes that are drawn")):
        for row in rows:
            at = curve if row.startswith("Student") else {0: found[row], args.updates: found[row]}
            lines[f"{key} ({meaning}): {row.lower()}"] = [(step, [mean(scored, key)]) for step, scored in at.items()]
    picture = picture.reduce(figures.FINE)
    title = "6. As training goes on (landscape, portrait and text)"
    last = figures.curves({title: lines}, "updates of the student", figures.SIDE, 326)
    picture.paste(last, (2 * figures.SIDE, picture.height - last.height))
    picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(out / "dmd.png", optimize=True)
    frames[0].save(out / "dmd.gif", save_all=True, append_images=frames[1:] + frames[-1:] * 8, duration=200, loop=0)

    result = {row: means(scored) for row, scored in found.items()}
    table = [["model", *result["Student, 4 steps"]]]
    for row, some in result.items():
        table.append(
            [row, *(f"{m['precision']:.3f} / {m['coverage']:.3f} / {m['distance']:.3f}" for m in some.values())]
        )
    heading = f"{args.seeds} seeds, {args.updates} updates: precision / coverage / energy distance to exact samples."
    write(out / "dmd", [heading], [table], result)


# ---- the command line ----------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="toy.plane", description="DMD in two dimensions.")
    parser.add_argument("--experiment", choices=list(CHOICES), metavar="NAME", help=f"one of {', '.join(CHOICES)}")
    parser.add_argument("--seeds", type=int, default=32, help="students of a row (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=1000, help="of each student (default: %(default)s)")
    parser.add_argument("--out", type=Path, default="runs/plane", help="folder to write to (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in ("seeds", "updates"):
        if vars(args)[name] < 1:
            parser.error(f"--{name} {vars(args)[name]}: must be at least 1")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / ".write").touch()
        (args.out / ".write").unlink()
    except OSError as error:
        parser.error(f"--out {args.out}: cannot be written, {error.strerror}; name another folder")
    training = Training(seeds=args.seeds, updates=args.updates)
    for name in CHOICES.get(args.experiment, []):
        (sweep if name in SWEEPS else experiment)(name, World(), training, args.out)
    if not args.experiment:
        show(World(), training, args.out)


if __name__ == "__main__":
    main()
