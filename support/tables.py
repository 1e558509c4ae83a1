"""What all benches share: the means of scores with their interval, the check of such means in a file, Markdown tables."""

import math
from collections.abc import Iterable

import numpy as np


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


def check_number(where: str, value: object, low: float, high: float) -> None:
    """ValueError unless the value is a number from low to high."""
    if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
        raise ValueError(f"{where} is {value!r}, a number from {low:g} to {high:g} is expected")


def check_averages(where: str, means: object, categories: Iterable[str], low: float, high: float) -> None:
    """ValueError unless `means` is what `averages` makes of scores from low to high in these categories."""
    if type(means) is not dict or means.keys() != {*categories, "average"}:
        raise ValueError(f"{where}: the keys {', '.join(categories)} and average are expected")
    known = {category: mean for category, mean in means.items() if mean is not None}
    for category, mean in known.items():
        check_number(f"{where}: {category}", mean, low, high)
    right = averages({c: [known[c]] if c in known else [] for c in categories})["average"]
    if (right is None) != (means["average"] is None) or (right is not None and abs(right - means["average"]) > 1e-6):
        raise ValueError(f"{where}: the average is {means['average']}, but the categories give {right}")


def markdown(lines: list[list[str]]) -> str:
    """A table whose first line is its head; aligned, so that it reads in a terminal too."""
    lines = [[" ".join(cell.replace("|", "/").split()) for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)
