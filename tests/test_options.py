"""The command line: what is given twice, and what no system can write."""

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import train
from program import options
from training import presets
from training.options import TrainOptions


@dataclass
class Flags(options.Options):
    teacher: tuple[str, ...] = options.option((), "teachers")
    sigmas: tuple[float, ...] = options.option((), "numbers", "(0, 1]")
    out: Path | None = options.option(None, "a folder")


def parse(*words: str) -> Flags:
    return options.parse(list(words), Flags, "A program.")


def test_a_list_that_is_given_twice_adds_up():
    expected = Flags(teacher=("text=A", "edit=B", "x=C"), sigmas=(1.0, 0.5))
    assert parse(*"--teacher text=A edit=B --sigmas 1 --teacher x=C --sigmas 0.5".split()) == expected
    assert parse(*"--teacher text=A --teacher edit=B x=C --sigmas 1 0.5".split()) == expected
    assert parse().teacher == () and parse("--teacher", "a=A").teacher == ("a=A",)  # nothing stays from before


def test_a_name_in_another_encoding_is_taken_as_it_is():
    """What a shell hands over of bytes that are no UTF-8."""
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert parse("--out", name).out == Path(name)


@pytest.mark.parametrize("objective", ["dmd", "flow"])
def test_help_has_every_flag(objective, capsys):
    """argparse formats a help text only when it is asked for: a lone percent sign fails there, and only there."""
    with pytest.raises(SystemExit) as end:
        train.parse(["--objective", objective, "--help"])
    text = capsys.readouterr().out
    assert f"updates of the student [{TrainOptions.steps if objective == 'dmd' else presets.FLOW['steps']}]" in text
    assert end.value.code == 0 and all(f"--{f.name.replace('_', '-')}" in text for f in fields(TrainOptions))
