"""One rule for the numbers of configs and of options."""

import math

from program.ranges import inside


def test_an_interval_has_the_ends_that_it_says():
    assert [inside(x, "[1, 8)") for x in (0.9, 1, 8)] == [False, True, False]
    assert [inside(x, "(0, inf)") for x in (0, 1e300, math.inf, math.nan)] == [False, True, False, False]
