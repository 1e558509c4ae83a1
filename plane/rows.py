"""Rows of the plane's tables: students and teachers by name, their scores, and the difference of two rows.

Names, recipes and claims are those of the picture world (experiments/claims.py), word for word.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from checkpoint.files import write_json
from experiments.claims import EXPERIMENTS, HALFWAY, LONGER, SPECIALISTS, START, TEACHER, Above
from plane.method import CATEGORIES, SIGMAS, TEACHER_SIGMAS, Setting, evaluate, train
from recipe import RECIPES, Recipe, routing
from scores.rows import markdown
from scores.statistics import mean_over_seeds

Scores = dict[str, dict[str, Tensor]]  # category -> measure -> (S,)
MEASURES = {"score": "precision", "attributes": "precision", "fidelity": "fine", "coverage": "coverage"}  # of a claim
SHOWN = ("precision", "coverage", "distance")  # in a table's cell
RECORDED = ("precision", "fine", "distance")  # in a row's file: all that claims need
BASE, SPECIAL, AVERAGE, STEPS, REVERSED = "base only", "specialised only", "average", "step-wise", "reversed"
LAST, EDITS_BASE, EDITS_SPECIAL = "last step alone", "5:5, base only", "5:5, specialised only"
LAMBDAS = {LAST: (0, 0, 0, 1), "last three": (0, 0.5, 1, 1), "first step alone": (1, 0, 0, 0), REVERSED: (1, 0.5, 0, 0)}
OURS = {row: Recipe(row, (10, 0), rules=routing(*LAMBDAS[row])) for row in LAMBDAS}
OURS |= {EDITS_BASE: RECIPES["base-5-5"], EDITS_SPECIAL: RECIPES["specialised-5-5"]}
# Rows of the picture world's tables, by recipe: two of them may be one student.
PAPERS = {row: RECIPES[name] for table in EXPERIMENTS.values() for row, name in table.rows.items()}
ROWS = PAPERS | {"5:5": RECIPES["flash"]} | OURS
UNTRAINED = (START, TEACHER, SPECIALISTS)


# ---- scores ----------------------------------------------------------------------------------------------------------


def untrained(setting: Setting, row: str) -> Scores:
    """Scores of a teacher; START is the base teacher in the students' four steps."""
    return evaluate(setting, setting.teacher(row == SPECIALISTS), SIGMAS if row == START else TEACHER_SIGMAS)


@cache
def scores(setting: Setting, row: str) -> Scores:
    """Scores of a row. Students are trained first."""
    if row in UNTRAINED:
        return untrained(setting, row)
    if row.endswith(HALFWAY):
        return scores(replace(setting, updates=setting.updates // 2), row.removesuffix(HALFWAY))
    return of_recipe(setting, ROWS[row].name)


@cache  # two rows may share one recipe
def of_recipe(setting: Setting, name: str) -> Scores:
    recipe = next(recipe for recipe in ROWS.values() if recipe.name == name)
    ((_, students, _),) = train(setting, recipe, {setting.updates})
    return evaluate(setting, students, SIGMAS)


def as_lines(scored: Scores) -> dict[str, dict[str, str]]:
    """category -> recorded measure -> the values of all seeds in one line, as a row's file keeps them."""
    lines = {}
    for category, measures in scored.items():
        lines[category] = {name: " ".join(f"{v:.4g}" for v in measures[name].tolist()) for name in RECORDED}
    return lines


def from_lines(lines: dict[str, dict[str, str]]) -> Scores:
    """What as_lines wrote."""
    scored = {}
    for category, measures in lines.items():
        scored[category] = {name: torch.tensor([float(v) for v in line.split()]) for name, line in measures.items()}
    return scored


def average(scored: Scores, categories: list[str], measure: str) -> Tensor:
    """Over categories: (S,)."""
    return torch.stack([scored[category][measure] for category in categories]).mean(0)


def difference(row: Scores, other: Scores, part: Above, by: str = "precision") -> tuple[float, float]:
    """By how much row is better than other, and the half-width of the interval.

    by: "precision", for which a part may ask for another measure of single pictures; or "distance".
    """
    measure = MEASURES[part.measure] if by == "precision" else by
    categories = CATEGORIES[part.task] if part.category == "average" else [part.category]
    gain = average(row, categories, measure) - average(other, categories, measure)  # (S,)
    if by == "distance":
        gain = -gain  # the smaller the distance, the better
    return mean_over_seeds(gain.tolist())


# ---- tables ----------------------------------------------------------------------------------------------------------


def label(part: Above) -> str:
    return f"{part.row} - {part.other}, {part.task} {part.category}".replace(LONGER, "")


def cell(difference: tuple[float, float]) -> str:
    return f"{difference[0]:+.3f} ± {difference[1]:.3f}"


def values_cell(measures: dict[str, float]) -> str:
    return " / ".join(f"{measures[name]:.3f}" for name in SHOWN)


def ends(difference: tuple[float, float]) -> list[float]:
    """An interval as a curve takes it: low end, mean, high end. One seed has a mean alone."""
    mean, half = difference
    return [mean - half, mean, mean + half] if half < float("inf") else [mean]


def heading(setting: Setting) -> str:
    return f"{setting.seeds} seeds, {setting.updates} updates."


def means(scored: Scores) -> dict[str, dict[str, float]]:
    """category -> measures, averaged over seeds."""
    averages = {}
    for category, measures in scored.items():
        averages[category] = {name: values.mean().item() for name, values in measures.items()}
    return averages


def write(place: Path, title: str, table: list[list[str]], result: dict) -> None:
    """PLACE.md: a title, and a table whose first row is the head. PLACE.json: the result with all digits."""
    text = f"{title}\n\n{markdown(table)}"
    place.with_suffix(".md").write_text(text + "\n")
    write_json(place.with_suffix(".json"), result)
    print(f"{text}\n\nwritten to {place.with_suffix('.md')}")
