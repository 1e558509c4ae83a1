"""The first few inputs of each surface of tools/fuzz.py, which tries thousands."""

import pytest

from tools import fuzz

FEW = 12


@pytest.fixture(scope="module")
def things(tmp_path_factory) -> dict:
    return fuzz.write_originals(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("surface", fuzz.COUNTS)
def test_nonsense_is_one_clear_error(surface, things, tmp_path):
    words, faults = fuzz.try_inputs(surface, 0, FEW, things, tmp_path)
    assert not faults, "\n".join(faults)
    assert words["refused"] or surface in fuzz.PROPERTIES  # it does meet nonsense
