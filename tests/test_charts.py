"""scores/charts.py: the ticks of an axis."""

import pytest

from scores.charts import ticks


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.58, 1.0, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),  # a share ends at 1
        (0.0, 0.346, [0.0, 0.1, 0.2, 0.3, 0.4]),
        (-0.013, 0.021, [-0.02, -0.01, 0.0, 0.01, 0.02, 0.03]),
        (-3.0, 12.0, [-5.0, 0.0, 5.0, 10.0, 15.0]),
        (0.7, 0.7, [0.7, 0.702, 0.704, 0.706, 0.708, 0.71]),  # one value alone has an axis, too
    ],
)
def test_ticks_are_round_and_reach_both_ends(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_are_never_more_than_asked_for():
    for i in range(1, 400):
        for most in (3, 5, 6):
            found = ticks(-0.37, i * 0.0173, most)
            assert 2 <= len(found) <= most and found[0] <= -0.37 and found[-1] >= i * 0.0173 - 1e-9
