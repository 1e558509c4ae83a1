"""Measures that need no judge, over several seeds: each model's, and the students' differences from it, with intervals.

What they measure, and how: scores/measures.py. Here are the statistics over cases and seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scores.rows import markdown, scores_of_cases, with_interval
from scores.statistics import resampled_difference

LEAST_MEASURED = 6  # cases with a value; with fewer, a seed has no measure


@dataclass(frozen=True)
class Measure:
    """One number for all cases of a task."""

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
        students = scores_of_cases(rows, measure.task, measure.part)  # (seeds, categories, cases)
        zero = np.zeros_like(students[:1])
        models = {"students": measured_difference(students, zero, measure)}
        minus = {}
        for name, other_rows in others.items():
            other = scores_of_cases(other_rows, measure.task, measure.part)
            models[name] = measured_difference(other, zero, measure)
            minus[name] = measured_difference(students, other, measure)
        measures[measure.title] = {"models": models, "students minus": minus}
    return measures


def measured_difference(a: np.ndarray, b: np.ndarray, measure: Measure) -> dict[str, float | None]:
    """Of two models' values, (seeds, categories, cases) each. None where a seed has too few."""
    fewest = min((~np.isnan(values)).sum(axis=(1, 2)).min() for values in (a, b))
    if fewest < LEAST_MEASURED:
        return number(None, None)
    return number(*resampled_difference(a, b, measure.statistic))


def number(mean: float | None, half: float | None) -> dict[str, float | None]:
    """A mean and half the width of its interval, as they stand in JSON."""
    return {"mean": mean, "half": half}


def measured_edits(rows: list[dict]) -> str:
    """A sentence on the cases behind the measures of edits."""
    measured = np.mean([row["edit_shift"]["measured"] for row in rows])
    of = rows[0]["edit_shift"]["of"]
    return (
        "Shift, scale, colour drift and chroma are medians over the edits with unchanged parts (scores/measures.py): "
        f"{measured:.0f} of the students' {of} edits. Families that draw a new scene have none."
    )


def table_of(measures: dict[str, dict[str, dict]], of: str) -> str:
    """Markdown: a line for each measure. of: "models" or "students minus"."""
    names = list(next(iter(measures.values()))[of])
    lines = [[of, *names]]
    for title, of_measure in measures.items():
        sign = "+" if of == "students minus" else ""
        lines.append([title, *(with_interval(**of_measure[of][name], sign=sign) for name in names)])
    return markdown(lines)
