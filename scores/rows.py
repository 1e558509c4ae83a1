"""What all benches share: the means of scores with their interval, rows in files, and Markdown tables."""

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from checkpoint.files import digest, may_write, read_json, write_json

# Student's t at 97.5%, by degrees of freedom from 1 on.
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)


def averages(scores: dict[str, list[float]]) -> dict[str, float | None]:
    """Scores by category -> {category: mean, ..., "average": the mean of these means}.

    A category without any score has the mean None. Then the average is None too, for it would leave that category out.
    """
    means = {category: float(np.mean(some)) if some else None for category, some in scores.items()}
    whole = None not in means.values()
    return means | {"average": float(np.mean(list(means.values()))) if whole else None}


def interval(scores: dict[str, list[float]]) -> float:
    """Half the width of the average's 95% interval: 1.96 sqrt(sum_c var_c / n_c) / C, for C categories of n_c >= 2 cases.
    The cases of the categories are drawn independently."""
    variances = [np.var(some, ddof=1) / len(some) for some in scores.values()]
    return 1.96 * math.sqrt(sum(variances)) / len(scores)


def paired(differences: list[float]) -> tuple[float, float]:
    """The mean of paired differences, one for each seed, and half the width of its 95% interval by Student's t."""
    n = len(differences)
    half = T[min(n - 1, len(T)) - 1] * float(np.std(differences, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return float(np.mean(differences)), half


def verdict(differences: list[tuple[float, float]]) -> str:
    """Of (mean, half-width of its interval) for each part of a claim. agree: all intervals are above 0; disagree: one is
    below; else cannot tell."""
    if any(mean < -half for mean, half in differences):
        return "disagree"
    return "agree" if all(mean > half for mean, half in differences) else "cannot tell"


def write_row(path: Path, row: dict) -> None:
    """Write a row with a checksum of its numbers and words."""
    write_json(path, row | {"checksum": checksum(row)})


def read_row(path: Path) -> dict:
    """A row that `write_row` wrote; ValueError for any other file, and for a row that was changed afterwards."""
    row = read_json(path)
    if row.pop("checksum", None) != checksum(row):
        raise ValueError(f"{path}: not a row as eval.py wrote it, or changed since; score the model again")
    return row


def checksum(row: dict) -> str:
    return digest(json.dumps(row, sort_keys=True))[:16]


def check_place(path: Path, made: dict, overwrite: bool, beside: Iterable[str] = ()) -> None:
    """Before the work begins: ValueError or OSError if results cannot be written to the JSON file `path`, and to the files
    `beside` it, or if others are there. Results with all the values in `made` are replaced; others only with `overwrite`."""
    with suppress(OSError, ValueError):  # no JSON: not ours
        found = read_json(path)
        overwrite = overwrite or all(found.get(key) == value for key, value in made.items())
    for file in (path, *(path.parent / name for name in beside)):
        may_write(file, overwrite=overwrite)


def markdown(lines: list[list[str]]) -> str:
    """A table whose first line is its head; aligned, so that it reads in a terminal too."""
    lines = [[" ".join(cell.replace("|", "/").split()) for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)
