"""Options: a dataclass field is a flag. Its default, its help text and its range stand beside each other.

Nothing here imports torch, which takes seconds: --help answers at once.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from types import NoneType
from typing import get_args

from support.program import check_range


def option(default, text: str, within: str | None = None):
    """A field of train.Args. within: an interval, as in "[0, 1)" or "(0, inf)", or the words there are: "dmd | flow"."""
    return field(default=default, metadata={"help": text, "within": within})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check(name: str, value: float | str, within: str) -> None:
    """ValueError, with the flag's name, unless the value is one of the words or in the interval."""
    if "|" not in within:
        check_range(flag(name), value, within)
    elif value not in within.split(" | "):
        raise ValueError(f"{flag(name)} {str(value)[:60]}: expected is {within.replace('|', 'or')}")


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag as ValueError, without the usage of all flags before it."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; --help lists the options")


def divisible(batch: int, micro_batch: int, processes: int) -> dict[str, int]:
    """Both rounded up, so that each process has an equal part of every micro-batch."""
    micro_batch = math.ceil(micro_batch / processes) * processes
    return {"batch": math.ceil(batch / micro_batch) * micro_batch, "micro_batch": micro_batch}


def parse(argv: list[str] | None, kind: type, defaults: Callable[[str, int, int], dict], about: str):
    """The command line as a `kind`, a dataclass of options. ValueError names the flag.

    defaults(objective, parameters, lora_rank) gives the values that differ from the dataclass's own. They are known only
    after a first look at the flags that decide them. about: a docstring; --help shows its first paragraph, and
    the one with commands.
    """
    argv = sys.argv[1:] if argv is None else argv
    if wrong := [word for word in argv if word.endswith("=--")]:  # argparse takes it for an empty list
        raise ValueError(f"{wrong[0]}: a value is expected")
    own = {f.name: f.default for f in fields(kind)}
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--objective", default=own["objective"])
    first.add_argument("--checkpoint", type=Path, default=own["checkpoint"])
    first.add_argument("--lora-rank", type=int, default=own["lora_rank"])
    first.add_argument("--gpus", type=int)
    given = first.parse_known_args(argv)[0]
    processes = given.gpus or int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets it
    processes = processes if 1 <= processes <= 1e6 else 1  # a wrong --gpus is reported later
    own |= defaults(given.objective, count(given.checkpoint, own["checkpoint"]), given.lora_rank)
    own |= divisible(own["batch"], own["micro_batch"], processes)

    title, *paragraphs = about.split("\n\n")
    examples = "\n\n".join(part for part in paragraphs if "python " in part or part.startswith("Exit status"))
    usage, layout = "%(prog)s [options]", argparse.RawDescriptionHelpFormatter
    parser = Parser(description=title, epilog=examples, usage=usage, formatter_class=layout, allow_abbrev=False)
    for f in fields(kind):
        default, text = own[f.name], f.metadata["help"] + (f" [{own[f.name]}]" if own[f.name] else "")
        if f.type is bool:
            parser.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, default=default, help=text)
        else:
            one = next((t for t in get_args(f.type) if t is not NoneType), f.type)  # X | None, tuple[X, ...] -> X
            nargs = "+" if isinstance(f.default, tuple) else None
            parser.add_argument(
                flag(f.name), type=one, default=default, nargs=nargs, help=text, metavar=one.__name__.upper()
            )
    values = vars(parser.parse_args(argv))
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def count(checkpoint: Path, small: Path) -> int:
    """The number of a checkpoint's parameters; 0 for `small`, and where there is no config: who opens it says so."""
    config = checkpoint / "transformer" / "config.json"
    if checkpoint == small or not config.is_file():
        return 0
    from model import MMDiTConfig
    from support import plan

    return plan.parameters(MMDiTConfig.from_json(config))
