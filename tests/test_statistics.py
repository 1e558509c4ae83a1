"""Means and intervals, against closed forms and simulation."""

import math

import numpy as np
import pytest

from scores.statistics import (
    averages,
    difference_of_models,
    interval_over_cases,
    mean_over_cases,
    mean_over_seeds,
    median_interval,
    resampled_difference,
)


def test_a_category_without_scores_leaves_no_average():
    assert averages({"a": [1.0, 3.0], "b": [5.0]}) == {"a": 2.0, "b": 5.0, "average": 3.5}
    assert averages({"a": [1.0], "b": []}) == {"a": 1.0, "b": None, "average": None}


def test_interval_over_cases_is_that_of_an_average_of_averages():
    """Against 20,000 benches drawn at random from known scores."""
    rng = np.random.default_rng(0)
    probabilities = {"portrait": 0.9, "text": 0.5, "landscape": 0.2}
    draws = {name: 0.5 + 0.5 * (rng.random((20_000, 30)) < p) for name, p in probabilities.items()}
    benches = np.mean([scores.mean(1) for scores in draws.values()], axis=0)  # (20000,)
    halves = [interval_over_cases({name: list(scores[i]) for name, scores in draws.items()}) for i in range(40)]
    assert np.mean(halves) == pytest.approx(1.96 * benches.std(), rel=0.05)


def test_mean_over_seeds_uses_students_t():
    assert mean_over_seeds([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.30 / 3**0.5))  # two degrees of freedom
    assert mean_over_seeds([0.5]) == (0.5, math.inf)


def test_difference_of_models_holds_what_it_promises():
    """Two students of 3 seeds on 2 x 30 cases, drawn 2,000 times: the true difference lies in 95% of the intervals."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        ease = rng.normal(0, 0.3, (1, 2, 30))  # of a case, for all students
        liking = rng.normal(0, 0.15, (2, 1, 2, 30))  # of a recipe for a case
        luck = rng.normal(0, 0.04, (2, 3, 1, 1))  # of a seed
        a, b = (0.5 + ease + liking[i] + luck[i] for i in range(2))
        mean, half = difference_of_models(a + 0.1, b)
        inside += abs(mean - 0.1) <= half
    assert 0.94 <= inside / 2000 <= 0.985  # adding the two parts is a little wide


def test_difference_of_models_of_known_numbers():
    a = np.array([0.2, 0.4, 0.6])[:, None, None] + np.zeros((3, 2, 5))
    assert difference_of_models(a, np.zeros((1, 2, 5))) == pytest.approx((0.4, 4.30 * 0.2 / 3**0.5))
    assert difference_of_models(a, a) == pytest.approx((0, 2.78 * (2 * 0.04 / 3) ** 0.5))
    b = np.array([[[0.0, 1.0], [0.0, 0.0]]])  # only cases scatter
    assert difference_of_models(b, 0 * b) == pytest.approx((0.25, 1.96 * (0.5 / 2) ** 0.5 / 2))
    assert difference_of_models(b, b) == (0, 0)


def test_a_resampled_mean_has_the_interval_of_a_mean_and_a_median_holds_its_own():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, (3, 1, 200)), rng.normal(0, 1, (1, 1, 200))
    mean, half = resampled_difference(a, b, np.mean)
    assert (mean, half) == pytest.approx(difference_of_models(a, b), rel=0.1)
    normal = rng.normal(5, 1, (1, 1, 400))
    normal[..., ::4] = np.nan  # cases without a value do not count
    middle, half = resampled_difference(normal, np.zeros_like(normal), np.median)
    assert middle == pytest.approx(np.nanmedian(normal)) and abs(middle - 5) < half
    assert half == pytest.approx(1.96 * (np.pi / 2 / 300) ** 0.5, rel=0.35)  # of a normal distribution's median


def test_interval_of_a_median_holds_what_it_promises():
    """In 95% of 2,000 samples of 25 skewed numbers it holds the true median."""
    rng = np.random.default_rng(0)
    ends = np.array([median_interval(list(rng.exponential(size=25))) for _ in range(2000)])
    assert 0.94 <= np.mean((ends[:, 0] <= np.log(2)) & (np.log(2) <= ends[:, 1])) <= 0.985
    assert median_interval([1.0] * 5) is None


def test_mean_over_cases_is_the_interval_of_one_category():
    scores = [0.1, 0.5, 0.3, 0.9]
    assert mean_over_cases(scores) == pytest.approx((0.45, interval_over_cases({"a": scores})))
    assert mean_over_cases([]) == (None, None) and mean_over_cases([2.0]) == (2.0, None)
