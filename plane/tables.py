"""The plane: one picture of the whole method in two dimensions, and the paper's claims there, knob by knob.

    python -m plane                            trains students, prints a table, draws a picture and an animation
    python -m plane --experiment composition   the paper's claims: composition, teachers, mixture, all; or sweeps

The method is in plane/method.py. Claims and rows are those of the picture world (experiments/tables.py), word for word.
What was expected of each knob, what was found, and how to read it: results/plane/findings.md.
"""

import argparse
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint.files import may_write, write_json
from dmd import dmd_gradient
from experiments.tables import (
    E1,
    E3,
    E4,
    E5,
    EXPERIMENTS,
    FIRST_STEP,
    HALFWAY,
    LONGER,
    SPECIALISTS,
    START,
    TEACHER,
    Above,
)
from flow import Velocity, add_noise, euler, predict_x0
from plane import panels
from plane.method import CATEGORIES, SIGMAS, TASKS, TEACHER_SIGMAS, Setting, evaluate, train
from program.ranges import check_range
from recipe import RECIPES, Recipe, routing
from scores import charts
from scores.rows import markdown, paired, verdict

# ---- the tables, as data -------------------------------------------------------------------------------------------

MEASURES = {"score": "precision", "attributes": "precision", "fidelity": "fine", "coverage": "coverage"}  # of a part
BASE, SPECIAL, AVERAGE, STEPS, REVERSED = "base only", "specialised only", "average", "step-wise", "reversed"
LAST, EDITS_BASE = "last step alone", "5:5, base only"
LAMBDAS = {LAST: (0, 0, 0, 1), "last three": (0, 0.5, 1, 1), "first step alone": (1, 0, 0, 0), REVERSED: (1, 0.5, 0, 0)}
OURS = {row: Recipe(row, (10, 0), rules=routing(*LAMBDAS[row])) for row in LAMBDAS}
OURS[EDITS_BASE] = Recipe(EDITS_BASE, (5, 5))
# A row of OURS is its own. All students here are long ones.
RECIPE_OF = {row: name for table in EXPERIMENTS.values() for row, name in table.rows.items()}

PREMISES = {
    "Four plain steps lose at drawing.": [Above(TEACHER, START)],
    "Four plain steps lose at editing.": [Above(TEACHER, START, bench="edit")],
    "The specialist is better at text.": [Above(SPECIALISTS, TEACHER, "text")],
    "The specialist is better at edits.": [Above(SPECIALISTS, TEACHER, bench="edit")],
    "It is narrower.": [Above(SPECIALISTS, TEACHER, "text", part="fidelity")],
}
TABLES = {  # rows, claims
    name: ([row for row in table.rows if not row.endswith(LONGER)], table.claims) for name, table in EXPERIMENTS.items()
}
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
AGREEING = [Above("5:5", EDITS_BASE, bench="edit"), Above("5:5", EDITS_BASE)]
TEXT = [Above(E1, E3, "text"), Above(E1, E3), Above(E4, E5, "text"), Above(E1, START, "text")]
DISTILLED = [Above(TEACHER, EDITS_BASE), Above(TEACHER, EDITS_BASE, bench="edit")]
OPEN = [Above(TEACHER, START, bench="edit"), *EDITING, Above("10:0", "9:1", bench="edit")]
SWEEPS = {  # a knob of Setting: its values, and the differences to look at
    "blur": ((1.0, 2.0, 3.0, 4.0), TEXT),
    "sharp": ((0.25, 0.5, 1.0), ROUTING),
    "displaced": ((0.0, 0.5, 1.0, 2.0), ROUTING),
    "open": ((0.0, 0.5, 1.0, 1.5), OPEN),
    "fake_updates": ((1, 2, 5), RISES),
    "fake_lr": ((0.001, 0.005, 0.01), RISES),
    "step_aware": ((0, 1), [Above(STEPS, BASE, "text"), ROUTING[0], *AGREEING, *EDITING]),
    "oracle": ((0, 1), RISES + FALLS),
    "renoise": ((0, 1), [Above(TEACHER, START), Above(TEACHER, START, bench="edit"), *RISES, *DISTILLED]),
    "updates": ((500, 1000, 2000, 5000), [*RISES, Above(STEPS, START), *FALLS, Above(STEPS + HALFWAY, STEPS)]),
}
CHOICES = {name: [name] for name in [*TABLES, *SWEEPS]}
CHOICES |= {"all": ["composition", "teachers", "mixture"], "sweeps": ["lambdas", *SWEEPS]}


# ---- claims --------------------------------------------------------------------------------------------------------


@cache
def scores(setting: Setting, row: str) -> dict[str, dict[str, Tensor]]:
    """category -> measures of a row, (S,) each. Students are trained first."""
    if row.endswith(HALFWAY):
        return scores(replace(setting, updates=setting.updates // 2), row.removesuffix(HALFWAY))
    if row in (START, TEACHER, SPECIALISTS):
        return evaluate(setting, setting.teacher(row == SPECIALISTS), SIGMAS if row == START else TEACHER_SIGMAS)
    if (recipe := RECIPE_OF.get(row, row)) != row:  # two rows may be one recipe, which is trained once
        return scores(setting, recipe)
    ((_, students, _),) = train(setting, (RECIPES | OURS)[recipe], {setting.updates})
    return evaluate(setting, students, SIGMAS)


def difference(setting: Setting, part: Above, by: str) -> tuple[float, float]:
    """By how much row is better than other, and the half-width of the interval; by "precision" (or what the part asks for
    in its place) or by "distance"."""
    key = MEASURES[part.part] if by == "precision" else by
    categories = CATEGORIES[part.bench] if part.category == "average" else [part.category]
    scored = [scores(setting, row) for row in (part.row, part.other)]
    row, other = (torch.stack([some[category][key] for category in categories]).mean(0) for some in scored)  # (S,)
    return paired((other - row if by == "distance" else row - other).tolist())  # the smaller the distance, the better


def label(part: Above) -> str:
    return f"{part.row} - {part.other}, {part.bench} {part.category}".replace(LONGER, "")


def experiment(name: str, setting: Setting, out: Path) -> None:
    """A table of rows, and one of verdicts by precision and by distance."""
    rows, claims = TABLES[name]
    lines, result = [["row", *TASKS, "coverage"]], {"rows": {}, "claims": {}}
    verdicts = [["claim", "by precision", "by distance", "precision: differences"]]
    for row in tqdm([TEACHER, SPECIALISTS, START, *rows], name):
        found = result["rows"][row] = means(scores(setting, row))
        cells = [f"{some['precision']:.3f} ({some['distance']:.3f})" for some in found.values()]
        lines.append([row, *cells, f"{sum(some['coverage'] for some in found.values()) / len(found):.2f}"])
    for claim, parts in claims.items():
        found = {by: [difference(setting, part, by) for part in parts] for by in ("precision", "distance")}
        words = {by: verdict(some) for by, some in found.items()}
        evidence = [f"{label(p)}: {m:+.3f} ± {h:.3f}" for some in found.values() for p, (m, h) in zip(parts, some)]
        verdicts.append([claim, f"**{words['precision']}**", words["distance"], "; ".join(evidence[: len(parts)])])
        result["claims"][claim] = words | {"evidence": evidence}
    title = f"# {name}\n\n{heading(setting)} Precision, in brackets the energy distance."
    write(out / name, title, [lines, verdicts], result)


def sweep(knob: str, setting: Setting, out: Path) -> None:
    """Differences of rows along a knob, as a table and as curves; above 0 row is better. The shadow is the interval."""
    values, parts = SWEEPS[knob]
    lines, curves, result = [["row - other", "measure", *(f"{v:g}" for v in values)]], {}, {}
    for part in tqdm(parts, knob):
        for by in ("precision", "distance"):
            found = [difference(replace(setting, **{knob: v}), part, by) for v in values]
            lines.append([label(part), by, *(f"{mean:+.3f} ± {half:.3f}" for mean, half in found)])
            result[f"{label(part)}, {by}"] = [(v, *some) for v, some in zip(values, found)]
            title = f"Difference in {by}, above 0 is better"
            ends = [[mean - half, mean, mean + half] if half < float("inf") else [mean] for mean, half in found]
            curves.setdefault(title, {})[label(part)] = list(zip(values, ends))
    charts.chart(curves, out / f"{knob}.png", along=knob)
    write(out / knob, f"# {knob}\n\n{heading(setting)}", [lines], result)


def heading(setting: Setting) -> str:
    return f"{setting.seeds} seeds, {setting.updates} updates."


def means(scored: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """category -> measures, averaged over seeds."""
    return {category: {key: some.mean().item() for key, some in scored[category].items()} for category in scored}


def write(place: Path, title: str, tables: list[list[list[str]]], result: dict) -> None:
    """PLACE.md, a title and tables whose first row is the head; and PLACE.json, the same with all digits."""
    text = "\n\n".join([title, *map(markdown, tables)])
    place.with_suffix(".md").write_text(text + "\n")
    write_json(place.with_suffix(".json"), result)
    print(f"{text}\n\nwritten to {place.with_suffix('.md')}")


# ---- the main job --------------------------------------------------------------------------------------------------


def look(real: Velocity, fake: Velocity, x_theta: Tensor, xi: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g, x0_real and x0_fake, (N, 2) each, of samples x_theta that are noised again by xi (N, 2) at times t (N,)."""
    x_t = add_noise(x_theta, xi, t)
    x0_real, x0_fake = predict_x0(real, x_t, t), predict_x0(fake, x_t, t)
    return dmd_gradient(x_theta, x0_real, x0_fake), x0_real, x0_fake


@torch.no_grad()
def gradients(real: Velocity, fake: Velocity, x_theta: Tensor) -> tuple[list[Tensor], Tensor]:
    """Of one sample with one noise: x_theta, x_t, x0_real, x0_fake, (2,) each. Of all, (N, 2): g, the mean of 60 noises."""
    x = x_theta[(x_theta - torch.tensor([0.3, 0.9])).norm(dim=1).argmin()].expand_as(x_theta)  # between two modes
    xi, t = torch.tensor([0.9, -0.1]).expand_as(x), torch.full((len(x),), 0.5)
    _, x0_real, x0_fake = look(real, fake, x, xi, t)
    one, rng, g = [x[0], add_noise(x, xi, t)[0], x0_real[0], x0_fake[0]], torch.Generator().manual_seed(0), 0
    for _ in range(60):
        xi, t = torch.randn(x.shape, generator=rng), 0.02 + 0.96 * torch.rand(len(x), generator=rng)
        g = g + look(real, fake, x_theta, xi, t)[0] / 60
    return one, g


def show(setting: Setting, out: Path) -> None:
    """Students of the base teacher learn to draw and to edit: a table, a picture of six panels, and an animation.

    With two settings that the sweeps found better than the tables': a fake score told the step, and Adam without momentum.
    """
    setting = replace(setting, step_aware=True, beta1=0.0)
    updates, base, student = setting.updates, setting.teacher(), "Student, 4 steps"
    early = min(30, updates)  # when the gradient is looked at: at the start it is zero, as all three are the same
    frames_at, marks = {0, *(round(updates ** (i / 23)) for i in range(24))}, {round(updates * i / 5) for i in range(6)}
    n = setting.seeds * max(1, 300 // setting.seeds)  # samples to draw, of all seeds
    (noise, *_), _, source, _ = setting.draw(n, torch.Generator().manual_seed(setting.seed + 1))
    source = source[:1].expand_as(source)  # one edit, for which there are several right answers
    truths = {category: setting.mixture("truth", category, source[:1]) for category in TASKS}
    frames, found = [], {student: {}}  # found: model -> updates -> category -> measures
    for step, students, fake in train(setting, OURS[EDITS_BASE], {early, *frames_at, *marks}):
        with torch.no_grad():
            samples = {category: euler(students(category, source), noise, SIGMAS) for category in TASKS}
        if step in frames_at:
            frames.append(panels.frame(step, samples, truths, source[:1]))
        if step in marks:
            found[student][step] = means(evaluate(setting, students, SIGMAS))
        if step == early:
            velocities, x_theta = (base("portrait", source), fake("portrait", source)), samples["portrait"]
            corrections = *gradients(*velocities, x_theta), x_theta

    models = {"Teacher, 40 steps": (base, TEACHER_SIGMAS), "Teacher, 4 steps": (base, SIGMAS)}
    found = {row: dict.fromkeys((0, updates), means(evaluate(setting, *models[row]))) for row in models} | found
    models[student] = students, SIGMAS
    ways = {}  # of samples from noise to picture, (steps + 1, N, 2)
    for row, (model, sigmas) in models.items():
        with torch.no_grad():
            stops = [euler(model("portrait", source), noise, sigmas[: i + 1]) for i in range(len(sigmas))]
        ways[row] = torch.stack(stops)
    panels.six_panels(truths["portrait"], ways, early, corrections, found).save(out / "dmd.png", optimize=True)
    frames[0].save(out / "dmd.gif", save_all=True, append_images=frames[1:] + frames[-1:] * 8, duration=200, loop=0)

    lines, result = [["model", *TASKS]], {row: scored[updates] for row, scored in found.items()}
    for row, some in result.items():
        cells = [f"{m['precision']:.3f} / {m['coverage']:.3f} / {m['distance']:.3f}" for m in some.values()]
        lines.append([row, *cells])
    title = f"{heading(setting)[:-1]}: precision / coverage / energy distance to exact samples."
    write(out / "dmd", title, [lines], result)


# ---- the command line ----------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="plane", description="DMD in two dimensions.")
    parser.add_argument("--experiment", choices=list(CHOICES), metavar="NAME", help=f"one of {', '.join(CHOICES)}")
    parser.add_argument("--seeds", type=int, default=32, help="students of a row (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=1000, help="of each student (default: %(default)s)")
    parser.add_argument("--out", type=Path, default="runs/plane", help="folder to write to (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        check_range("--seeds", args.seeds, "[1, 1000]")
        check_range("--updates", args.updates, "[1, 1000000]")
        for name in CHOICES.get(args.experiment, ["dmd"]):
            may_write(args.out / f"{name}.json", overwrite=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    setting = Setting(seeds=args.seeds, updates=args.updates)
    for name in CHOICES.get(args.experiment, []):
        (sweep if name in SWEEPS else experiment)(name, setting, args.out)
    if not args.experiment:
        show(setting, args.out)


if __name__ == "__main__":
    main()
