"""Measures of pictures, on motions and colours that are known. The pictures are made of smooth noise, or of the toy world."""

import numpy as np
import pytest
from PIL import Image

from scores import measures
from scores.measures import colour_drift, colours, edit_measures, lab, mean_distance, motion, pixels
from toy import figures, world

SIDE = 128


def texture(seed: int) -> np.ndarray:
    """(512, 512) of smooth noise around 0.5, to be sampled at a third of its size."""
    rng, frequency = np.random.default_rng(seed), np.fft.fftfreq(512)
    falls = np.exp(-((np.hypot.outer(frequency, frequency) / 0.08) ** 2)) / (
        np.hypot.outer(frequency, frequency) + 0.004
    )
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(512, 512))) * falls).real
    return 0.5 + 0.15 * noise / noise.std()


def shown(seed: int, scale: float = 1.0, down: float = 0.0, right: float = 0.0) -> np.ndarray:
    """(SIDE, SIDE, 3): the middle of a texture, enlarged about its centre and moved. Sampled from three times as many points,
    so sub-pixel motions are exact to a few hundredths."""
    place = np.arange(SIDE) - (SIDE - 1) / 2
    y = np.repeat((255.5 + 3 * (place - down) / scale)[:, None], SIDE, axis=1)
    x = np.repeat((255.5 + 3 * (place - right) / scale)[None], SIDE, axis=0)
    return np.stack([measures.bilinear(texture(seed), y, x).clip(0, 1)] * 3, axis=2)


KNOWN = [(1, 0, 0), (1, 0.25, -0.75), (1, 2.5, 5), (1, -14, 11), (1, 20, 0), (1.02, 0, 0), (0.97, 1.5, 0), (1.15, 6, 4)]


@pytest.mark.parametrize(("scale", "down", "right"), KNOWN)
def test_known_motions_are_found(scale, down, right):
    """Sub-pixel, also where they are too large for single windows to follow."""
    for seed in range(2):
        found = motion(shown(seed), shown(seed, scale, down, right))
        assert found.shift == pytest.approx([down, right], abs=0.05) and found.scale == pytest.approx(scale, abs=0.001)
        assert len(found.windows) > 40


@pytest.mark.parametrize(("scale", "down", "right"), [motion for motion in KNOWN if motion[1:] != (-14, 11)])
def test_an_edit_that_changes_half_of_the_picture_does_not_hide_the_other_half(scale, down, right):
    edited = shown(0, scale, down, right)
    edited[:, SIDE // 2 :] = shown(7)[:, SIDE // 2 :]
    found = motion(shown(0), edited)
    assert found.shift == pytest.approx([down, right], abs=0.2) and found.scale == pytest.approx(scale, abs=0.005)
    assert 15 < len(found.windows) < 35
    assert (found.windows[:, 1] >= SIDE // 2).sum() <= 1  # one may agree by chance


def test_what_has_no_unchanged_parts_is_counted_and_left_out():
    edits = [(shown(seed), shown(seed + 20)) for seed in range(3)] + [(shown(0), shown(0, 1.0, 3.0, -4.0))]
    assert [motion(*edit) is None for edit in edits] == [True, True, True, False]
    row = edit_measures(edits, left_out=2)
    assert (row["edit_shift"]["measured"], row["edit_shift"]["of"]) == (1, 6)
    assert row["edit_shift"]["median_px"] == pytest.approx(5, abs=0.05)
    assert row["edit_shift"]["median_xy"] == pytest.approx([-4, 3], abs=0.05)  # to the right, down
    none = edit_measures(edits[:3])
    assert (
        none["edit_shift"]["measured"] == 0
        and none["edit_shift"]["median_px"] is none["edit_colour"]["median_lab"] is None
    )
    assert motion(np.full((64, 64, 3), 0.5), np.full((64, 64, 3), 0.5)) is None  # nothing to follow


def test_share_of_cases_that_moved_by_more_than_a_latent_pixel():
    edits = [(shown(seed), shown(seed, 1.0, 0.0, right)) for seed, right in enumerate((0.0, 3.0, 15.0, 20.0))]
    assert edit_measures(edits)["edit_shift"]["over_16px"] == 0.25


def test_the_toys_own_answers_stand_where_their_sources_stand():
    """Repairs, another hat, another time of day: the world itself moves nothing."""
    for family in ("enhance", "object", "style"):
        cases = world.bench("edit", family, 4)
        for case in cases:
            if found := motion(pixels(case.images[0]), pixels(figures.answer(case))):
                assert np.abs(found.shift).max() < 0.1 and abs(found.scale - 1) < 0.002


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


def test_saturation_contrast_and_variety():
    flat = np.full((8, 8, 3), [1.0, 0.0, 0.0])
    assert colours(flat) == pytest.approx((np.hypot(80.09, 67.20), 0), abs=0.1)
    halves = np.zeros((8, 8, 3))
    halves[:4] = 1.0
    assert colours(halves) == pytest.approx((0, 50), abs=0.1)
    assert mean_distance([flat, flat]) == 0 and mean_distance([np.zeros((2, 2)), np.ones((2, 2))]) == 1
    row = measures.colour_measures([halves, flat], reference=[flat, flat])["t2i_colour"]
    assert row["contrast"] == pytest.approx(25, abs=0.1) and row["contrast_above_reference"] == pytest.approx(
        25, abs=0.1
    )


def test_pictures_are_compared_over_white_and_in_one_size():
    clear = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    assert pixels(clear).shape == (2, 4, 3) and (pixels(clear) == 1).all() and pixels(clear, (8, 6)).shape == (6, 8, 3)
