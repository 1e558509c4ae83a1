"""Pictures as arrays, and their colours in CIELAB."""

import numpy as np
import pytest
from PIL import Image

from scores.colours import colours, lab, pixels


def test_lab_of_known_colours():
    """Against the CIE's values for sRGB's corners."""
    expected = {
        (1, 1, 1): (100, 0, 0),
        (0, 0, 0): (0, 0, 0),
        (1, 0, 0): (53.24, 80.09, 67.20),
        (0, 1, 0): (87.73, -86.18, 83.18),
        (0, 0, 1): (32.30, 79.19, -107.86),
    }
    assert lab(np.array(list(expected), dtype=float)) == pytest.approx(np.array(list(expected.values())), abs=0.05)


def test_saturation_and_contrast():
    flat = np.full((8, 8, 3), [1.0, 0.0, 0.0])
    assert colours(flat) == pytest.approx((np.hypot(80.09, 67.20), 0), abs=0.1)
    halves = np.zeros((8, 8, 3))
    halves[:4] = 1.0
    assert colours(halves) == pytest.approx((0, 50), abs=0.1)


def test_pictures_are_compared_over_white_and_in_one_size():
    clear = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    assert pixels(clear).shape == (2, 4, 3) and (pixels(clear) == 1).all() and pixels(clear, (8, 6)).shape == (6, 8, 3)
