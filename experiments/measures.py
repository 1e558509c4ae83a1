"""Measures that need no judge, of several seeds' rows: each model's, and the students' differences, with intervals.

What each measures, and how: scores/measures.py. Here are the statistics over cases and seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scores.rows import markdown, scores_of_cases
from scores.statistics import resampled_difference

LEAST_MEASURED = 6  # cases with a value, for a measure that needs no judge


@dataclass(frozen=True)
class Measure:
    """A measure that needs no judge (scores/measures.py), of all cases of a task."""

    title: str
    task: str
    part: str  # of the row's TASK_each
    statistic: Callable[[np.ndarray], float] = np.median  # of the cases that have a value, (N,)


def share_above_a_latent_pixel(shifts: np.ndarray) -> float:
    return float((shifts > 16).mean())


MEASURES = (
    Measure("edits: shift, pixels", "edit", "shift"),
    Measure("edits: share above 16 pixels", "edit", "shift", share_above_a_latent_pixel),
    Measure("edits: shift to the right, pixels", "edit", "right"),
    Measure("edits: shift down, pixels", "edit", "down"),
    Measure("edits: scale, %", "edit", "scale"),
    Measure("edits: colour drift, CIELAB", "edit", "drift"),
    Measure("edits: change of chroma, %", "edit", "chroma"),
    Measure("T2I: saturation, CIELAB", "t2i", "saturation", np.mean),
    Measure("T2I: contrast, CIELAB", "t2i", "contrast", np.mean),
)


def measures_of(rows: list[dict], others: dict[str, list[dict]]) -> dict[str, dict[str, dict]]:
    """title -> "models" -> model -> the measure with its interval, and "students minus" -> model -> the difference."""
    measures = {}
    for measure in MEASURES:
        models = {"students": rows} | others
        values = {name: scores_of_cases(models[name], measure.task, measure.part) for name in models}
        zero = np.zeros_like(values["students"][:1])
        measures[measure.title] = {
            "models": {name: measured_difference(values[name], zero, measure) for name in models},
            "students minus": {name: measured_difference(values["students"], values[name], measure) for name in others},
        }
    return measures


def measured_difference(a: np.ndarray, b: np.ndarray, measure: Measure) -> dict[str, float | None]:
    """Of two models' values, (seeds, categories, cases) each. None where a seed has too few."""
    fewest = min(int((~np.isnan(values)).sum(axis=(1, 2)).min()) for values in (a, b))
    return interval(*(resampled_difference(a, b, measure.statistic) if fewest >= LEAST_MEASURED else (None, None)))


def interval(mean: float | None, half: float | None) -> dict[str, float | None]:
    return {"mean": mean, "half": half}


def measured_edits(rows: list[dict]) -> str:
    """What the measures of edits are about."""
    measured, of = np.mean([row["edit_shift"]["measured"] for row in rows]), rows[0]["edit_shift"]["of"]
    return (
        "Shift, scale, colour drift and chroma are medians over the edits with unchanged parts (scores/measures.py): "
        f"{measured:.0f} of the students' {of} edits. Families that draw a new scene have none."
    )


def table_of(measures: dict[str, dict[str, dict]], of: str) -> str:
    """Markdown: a line for each measure that needs no judge. of: "models" or "students minus"."""
    names = list(next(iter(measures.values()))[of])
    lines = [[of, *names]]
    for title, of_measure in measures.items():
        numbers = [of_measure[of][name] for name in names]
        sign = "+" if of == "students minus" else ""
        cells = ["-" if n["mean"] is None else f"{n['mean']:{sign}.3f} ± {n['half']:.3f}" for n in numbers]
        lines.append([title, *cells])
    return markdown(lines)
