"""What all benches share: the means of scores, their interval, and Markdown tables."""

import math

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


def markdown(lines: list[list[str]]) -> str:
    """A table whose first line is its head; aligned, so that it reads in a terminal too."""
    lines = [[" ".join(cell.replace("|", "/").split()) for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)
