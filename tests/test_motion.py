"""Motions and changes of colour that are known are found. The pictures are made of smooth noise, or of the toy world."""

import numpy as np
import pytest

from scores.colours import lab, pixels
from scores.motion import bilinear, colour_drift, motion
from toy import world

SIDE = 128


def texture(seed: int) -> np.ndarray:
    """(512, 512) of smooth noise around 0.5, to be sampled at a third of its size."""
    rng, frequency = np.random.default_rng(seed), np.fft.fftfreq(512)
    radius = np.hypot.outer(frequency, frequency)
    falls = np.exp(-((radius / 0.08) ** 2)) / (radius + 0.004)
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(512, 512))) * falls).real
    return 0.5 + 0.15 * noise / noise.std()


def shown(seed: int, scale: float = 1.0, down: float = 0.0, right: float = 0.0) -> np.ndarray:
    """(SIDE, SIDE, 3): the middle of a texture, enlarged about its centre and moved. Sampled from three times as many points,
    so sub-pixel motions are exact to a few hundredths."""
    place = np.arange(SIDE) - (SIDE - 1) / 2
    y = np.repeat((255.5 + 3 * (place - down) / scale)[:, None], SIDE, axis=1)
    x = np.repeat((255.5 + 3 * (place - right) / scale)[None], SIDE, axis=0)
    return np.stack([bilinear(texture(seed), y, x).clip(0, 1)] * 3, axis=2)


KNOWN = [(1, 0, 0), (1, 0.25, -0.75), (1, 2.5, 5), (1, -14, 11), (1, 20, 0), (1.02, 0, 0), (0.97, 1.5, 0), (1.15, 6, 4)]


@pytest.mark.parametrize(("scale", "down", "right"), KNOWN)
def test_known_motions_are_found(scale, down, right):
    """Sub-pixel, also where they are too large for single windows to follow."""
    for seed in range(2):
        result = motion(shown(seed), shown(seed, scale, down, right))
        assert result.shift == pytest.approx([down, right], abs=0.05)
        assert result.scale == pytest.approx(scale, abs=0.001)
        assert len(result.windows) > 40


@pytest.mark.parametrize(("scale", "down", "right"), [motion for motion in KNOWN if motion[1:] != (-14, 11)])
def test_an_edit_that_changes_half_of_the_picture_does_not_hide_the_other_half(scale, down, right):
    edited = shown(0, scale, down, right)
    edited[:, SIDE // 2 :] = shown(7)[:, SIDE // 2 :]
    result = motion(shown(0), edited)
    assert result.shift == pytest.approx([down, right], abs=0.2) and result.scale == pytest.approx(scale, abs=0.005)
    assert 15 < len(result.windows) < 35
    assert (result.windows[:, 1] >= SIDE // 2).sum() <= 1  # one may agree by chance


def test_the_toys_own_answers_stand_where_their_sources_stand():
    """Repairs, another hat, another time of day: the world itself moves nothing."""
    for family in ("enhance", "object", "style"):
        for case in world.bench_cases("edit", family, 4):
            result = motion(pixels(case.images[0]), pixels(case.answer()))
            if result is not None:
                assert np.abs(result.shift).max() < 0.1 and abs(result.scale - 1) < 0.002


def test_colour_drift_of_a_known_tint():
    """The edited half is left out, and a shift does not look like a change of colour."""
    grey = 0.3 + 0.4 * shown(0)
    source, edited = grey * [1.0, 0.8, 0.6], 0.3 + 0.4 * shown(0, 1.0, 1.5, 2.0)
    edited = edited * [1.0, 0.8, 0.6]
    distance, chroma = colour_drift(source, edited, motion(source, edited))
    assert distance < 0.3 and abs(chroma) < 1
    tinted = edited * [1.0, 0.95, 0.85]
    tinted[:, SIDE // 2 :] = [0.0, 1.0, 0.0] * shown(9)[:, SIDE // 2 :]
    distance, chroma = colour_drift(source, tinted, motion(source, tinted))
    left = [lab(picture[:, : SIDE // 2]).mean((0, 1)) for picture in (source, tinted)]
    assert distance == pytest.approx(np.linalg.norm(left[1] - left[0]), rel=0.1) and distance > 3
    before, after = (np.hypot(*colour[1:]) for colour in left)
    assert chroma == pytest.approx(100 * (after / before - 1), rel=0.15) and chroma > 10
