"""Means of scores and the intervals of these means: one formula for each source of randomness.

    interval_over_cases      one model on one bench: another bench would have asked for other pictures
    mean_over_cases, median_interval      one number for each case of one kind
    mean_over_seeds          one number for each seed: another run would have ended elsewhere
    difference_of_models     two models on the same cases, with one or several seeds each: both kinds of chance
    resampled_difference     the same for what is not a mean, such as a median

Each function gives half the width of a 95% interval. Each interval holds at 95% by itself, not all of them together: of
twenty comparisons, one is wrong by chance.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

# Student's t at 97.5%, by degrees of freedom from 1 on, for means over few seeds.
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)
NORMAL = 1.96  # the same for a normal distribution, for means over many cases
RESAMPLED = 1000  # sets of cases that `resampled_difference` draws


def student_t(freedom: int) -> float:
    return T[min(freedom, len(T)) - 1]


def averages(scores: dict[str, list[float]]) -> dict[str, float | None]:
    """Scores by category -> {category: mean, ..., "average": the mean of these means}.

    A category without any score has the mean None. Then the average is None too, because it would leave that category out.
    """
    means = {category: float(np.mean(numbers)) if numbers else None for category, numbers in scores.items()}
    if None in means.values():
        return means | {"average": None}
    return means | {"average": float(np.mean(list(means.values())))}


def interval_over_cases(scores: dict[str, list[float]]) -> float:
    """Scores by category, n_c >= 2 in each of C categories -> 1.96 sqrt(sum_c var_c / n_c) / C, for their average.

    The cases of the categories are drawn independently.
    """
    variances = [np.var(numbers, ddof=1) / len(numbers) for numbers in scores.values()]
    return NORMAL * math.sqrt(sum(variances)) / len(scores)


def mean_over_cases(numbers: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean of one number for each case, and half the width of its interval; None without cases, or with one alone."""
    if len(numbers) < 2:
        return (float(numbers[0]), None) if len(numbers) else (None, None)
    return float(np.mean(numbers)), NORMAL * float(np.std(numbers, ddof=1)) / math.sqrt(len(numbers))


def median_interval(numbers: Sequence[float]) -> list[float] | None:
    """The ends of the 95% interval of a median: the values that have as many below them as the binomial distribution
    allows. It assumes nothing about how the numbers scatter. None for fewer than six numbers, which have no such interval.
    """
    n = len(numbers)
    if n < 6:
        return None
    ordered, reach = sorted(numbers), NORMAL * math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    return [float(ordered[low]), float(ordered[high])]


def mean_over_seeds(numbers: list[float]) -> tuple[float, float]:
    """The mean of one number for each seed, and half the width of its interval by Student's t; infinite for one seed."""
    n = len(numbers)
    half = student_t(n - 1) * float(np.std(numbers, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return float(np.mean(numbers)), half


def difference_of_models(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean of a - b, (seeds, categories, cases) each, and half the width of its interval.

    It adds two kinds of chance. Seeds: there are few, hence Student's t. A model with one "seed" adds nothing, so between
    two such models the interval is over cases alone. Cases: a and b have the same ones, so what counts is how their
    differences scatter within each category.
    """
    from_seeds = seeds_half(a.mean(axis=(1, 2)), b.mean(axis=(1, 2)))
    pairs = a.mean(axis=0) - b.mean(axis=0)  # (categories, cases)
    from_cases = (pairs.var(axis=1, ddof=1) / pairs.shape[1]).sum() ** 0.5 / len(pairs)
    return float(a.mean() - b.mean()), math.hypot(from_seeds, NORMAL * from_cases)


def seeds_half(a: np.ndarray, b: np.ndarray) -> float:
    """Half the width of the interval of mean(a) - mean(b), over the seeds of two models, one number for each seed."""
    several = [means for means in (a, b) if len(means) > 1]
    freedom = sum(len(means) - 1 for means in several)
    if not several:
        return 0.0
    return student_t(freedom) * sum(means.var(ddof=1) / len(means) for means in several) ** 0.5


def resampled_difference(a: np.ndarray, b: np.ndarray, statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """`difference_of_models` for a statistic of all cases that is not their mean, such as a median.

    a, b: (seeds, categories, cases), NaN where a case has no value. statistic: of one seed's values, (N,). For the chance of
    the cases, those of each category are drawn again with replacement (bootstrap), the same for both models and all seeds;
    what counts is how the difference scatters.
    """

    def of_seeds(model: np.ndarray) -> np.ndarray:  # (seeds,)
        return np.array([statistic(values[~np.isnan(values)]) for values in model])

    _, categories, cases = a.shape
    rng = np.random.default_rng(0)
    differences = []
    for _ in range(RESAMPLED):
        drawn = np.arange(categories)[:, None], rng.integers(cases, size=(categories, cases))
        differences.append(of_seeds(a[:, *drawn]).mean() - of_seeds(b[:, *drawn]).mean())
    own, other = of_seeds(a), of_seeds(b)
    from_cases = float(np.std(differences))
    return float(own.mean() - other.mean()), math.hypot(seeds_half(own, other), NORMAL * from_cases)


def agreement(differences: list[tuple[float, float]]) -> str:
    """Whether a claim holds, given (mean, half the width of its interval) for each of its parts: "agree" if all intervals
    are above 0, "disagree" if one is below, else "cannot tell"."""
    if any(mean < -half for mean, half in differences):
        return "disagree"
    return "agree" if all(mean > half for mean, half in differences) else "cannot tell"
