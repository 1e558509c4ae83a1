"""What a spec says can be seen in its picture, in the place where it should be."""

from itertools import combinations

import numpy as np
import pytest
from test_world import specs

from toy import world
from toy.world import ATTRIBUTES, CATEGORIES


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_attribute_shows(category):
    """Each value against each other, somewhere a large pixel differs by at least 0.05."""
    for spec in specs(category, 12):
        for name, values in ATTRIBUTES[category].items():
            settled = [world.settle(spec | {name: value}) for value in values]
            drawn = {str(s): world.render(s) for s in settled}
            for a, b in combinations(drawn.values(), 2):
                assert np.abs(a - b).max() > 0.05, (name, spec)


def test_letters_lie_on_the_token_grid():
    """Another letter changes one column of tokens, two high: 4 x 8 large pixels."""
    for spec in specs("text", 20):
        for i in range(3):
            others = [world.render(spec | {f"letter{i}": letter}) for letter in world.LETTERS]
            ys, xs = np.nonzero(np.ptp(np.stack(others), axis=0).max(axis=2))
            assert set(xs // 4) == {(spec["column"] + 4 * i) // 4}
            assert set(ys // 4) <= {spec["row"] // 4, spec["row"] // 4 + 1}
