"""What a row says of its pictures without a judge."""

import numpy as np
import pytest
from test_motion import shown

from scores.measures import colour_measures, edit_measures, mean_distance
from scores.motion import motion


def test_what_has_no_unchanged_parts_is_counted_and_left_out():
    edits = [(shown(seed), shown(seed + 20)) for seed in range(3)] + [(shown(0), shown(0, 1.0, 3.0, -4.0))]
    assert [motion(*edit) is None for edit in edits] == [True, True, True, False]
    row = edit_measures(edits, left_out=2)
    assert (row["edit_shift"]["measured"], row["edit_shift"]["of"]) == (1, 6)
    assert row["edit_shift"]["median_px"] == pytest.approx(5, abs=0.05)
    assert row["edit_shift"]["median_xy"] == pytest.approx([-4, 3], abs=0.05)  # to the right, down
    none = edit_measures(edits[:3])
    assert none["edit_shift"]["measured"] == 0
    assert none["edit_shift"]["median_px"] is none["edit_colour"]["median_lab"] is None
    assert motion(np.full((64, 64, 3), 0.5), np.full((64, 64, 3), 0.5)) is None  # nothing to follow


def test_share_of_cases_that_moved_by_more_than_a_latent_pixel():
    edits = [(shown(seed), shown(seed, 1.0, 0.0, right)) for seed, right in enumerate((0.0, 3.0, 15.0, 20.0))]
    assert edit_measures(edits)["edit_shift"]["over_16px"] == 0.25


def test_variety_is_the_distance_of_pictures_and_a_reference_gives_differences():
    red, grey = np.full((8, 8, 3), [1.0, 0.0, 0.0]), np.zeros((8, 8, 3))
    grey[:4] = 1.0  # half black, half white: contrast 50
    assert mean_distance([red, red]) == 0 and mean_distance([np.zeros((2, 2)), np.ones((2, 2))]) == 1
    row = colour_measures([grey, red], reference=[red, red])["t2i_colour"]
    assert row["contrast"] == pytest.approx(25, abs=0.1)
    assert row["contrast_above_reference"] == pytest.approx(25, abs=0.1)
