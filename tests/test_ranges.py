"""One rule for the numbers of configs and of options."""

import math
from dataclasses import dataclass

import pytest

from checkpoint.files import build_config
from program.options import Options, option
from program.ranges import Ranged, inside, within


@dataclass
class Config(Ranged):
    wide_enough: tuple[int, ...] = within((4, 7), "[1, 8)")
    part: float | None = within(0.5, "(0, 1]")
    plain: int = 0
    real: float = 0.0


@dataclass
class Flags(Options):
    wide_enough: int = option(4, "", "[1, 8)")
    kind: str = option("dmd", "", "dmd | flow")


def test_an_interval_has_the_ends_that_it_says():
    assert [inside(x, "[1, 8)") for x in (0.9, 1, 8)] == [False, True, False]
    assert [inside(x, "(0, inf)") for x in (0, 1e300, math.inf, math.nan)] == [False, True, False, False]


def test_configs_and_options_refuse_a_number_in_the_same_words():
    with pytest.raises(ValueError, match=r"^wide_enough 8: a number in \[1, 8\) is expected$"):
        Config(wide_enough=(4, 8))
    with pytest.raises(ValueError, match=r"^--wide-enough 8: a number in \[1, 8\) is expected$"):
        Flags(wide_enough=8)
    with pytest.raises(ValueError, match="^--kind rl: expected is dmd or flow$"):
        Flags(kind="rl")


@pytest.mark.parametrize("field, value", [("part", 0), ("part", math.nan), ("plain", -1), ("plain", 2**31)])
def test_a_config_file_names_the_place_of_a_wrong_number(field, value):
    content = {"wide_enough": [4], "part": None, "plain": 1, "real": 0.5}
    assert build_config(Config, content, "file: ") == Config((4,), None, 1, 0.5)
    with pytest.raises(ValueError, match=f"^file: {field} .*: a number in"):
        build_config(Config, content | {field: value}, "file: ")
    with pytest.raises(ValueError, match="^file: real inf: a number in"):
        build_config(Config, content | {"real": math.inf}, "file: ")
