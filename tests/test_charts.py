"""Charts: the ticks of an axis, and where lines stand."""

import numpy as np
import pytest
from PIL import Image

from scores import charts
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


def test_chart_draws_every_line_at_its_height(tmp_path):
    lines = {"up": [(0, [0.0]), (10, [1.0, 1.0])], "down": [(0, [1.0]), (10, [0.0, 0.2])]}
    charts.chart({"T2I": lines, "edit": {"up": lines["up"]}}, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    for panel, colours in ((pixels[:300, 60:520], charts.COLOURS[:2]), (pixels[:300, 580:1040], charts.COLOURS[:1])):
        for colour, rises in zip(colours, (True, False)):
            rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            y, x = np.nonzero((np.abs(panel - rgb) < 30).all(axis=2))
            assert len(x) > 300  # a line from left to right
            left, right = y[x < x.min() + 40].mean(), y[x > x.max() - 40].mean()
            assert (left > right) == rises  # y counts downwards
