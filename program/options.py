"""Options: a dataclass field is a flag. Its default, its help text and its range stand beside each other.

Nothing here imports torch, which takes seconds: --help answers at once.
"""

import argparse
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import get_args

from program.edges import short
from program.ranges import Ranged

TOY = Path(__file__).parents[1] / "toy" / "checkpoint"


def option(default, text: str, within: str | None = None, use: str | None = None):
    """A field of `Options`. within: an interval, as in "[0, 1)" or "(0, inf)", or the words there are: "dmd | flow".
    use: what the flag is for, where a program does several things."""
    return field(default=default, metadata={"help": text, "within": within, "use": use})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def text(given: str) -> str:
    """A flag's text. It may name a file, so it must be one that a system can write."""
    try:
        os.fsencode(given)
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{short(given)} holds half a letter (a lone surrogate)") from None
    if "\0" in given:
        raise argparse.ArgumentTypeError(f"{short(given)} holds a null character")
    return given


def path(given: str) -> Path:
    """A flag's file or folder. The empty text, which a shell makes of an unset variable, would be the folder at hand."""
    if not given.strip():
        raise argparse.ArgumentTypeError(f"{given!r} is empty")
    return Path(text(given))


READERS = {str: text, Path: path, int: int, float: float}


@dataclass
class Options(Ranged):
    """A program's options. ValueError, with the flag's name, for a value outside of its range."""

    @staticmethod
    def called(name: str) -> str:
        return flag(name)


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag as ValueError, without the usage of all flags before it."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message.removeprefix('argument ')}; --help lists the options")


def parse(argv: list[str] | None, kind: type[Options], about: str, defaults=lambda args: {}):
    """The command line as a `kind`. ValueError names the flag.

    about: a docstring; --help shows its first paragraph, and those with commands. defaults(args): the values that
    differ from the dataclass's own, known once the given flags are.
    """
    title, *paragraphs = about.split("\n\n")
    parser = Parser(
        description=title,
        epilog="\n\n".join(part for part in paragraphs if "python " in part or part.startswith("Exit status")),
        usage="%(prog)s [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,  # it shows the defaults of such a run, so it comes after the other flags are read
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("-h", "--help", action="store_true")
    for f in fields(kind):
        about_it = f.metadata["help"] + (" [%(default)s]" if f.default else "")
        if f.type is bool:
            parser.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, help=about_it)
            continue
        reader = READERS[next((t for t in get_args(f.type) if t is not NoneType), f.type)]  # X | None, tuple[X, ...]: X
        words = f.metadata["within"] if "|" in (f.metadata["within"] or "") else None
        shown = words.replace(" ", "") if words else reader.__name__.upper()
        # A list may be given at once or one by one: --teacher a=A b=B, or --teacher a=A --teacher b=B.
        several = {"nargs": "+", "action": "extend"} if isinstance(f.default, tuple) else {}
        parser.add_argument(flag(f.name), type=reader, help=about_it, metavar=shown, **several)
    given = vars(parser.parse_args(argv))
    wants_help = given.pop("help", False)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    args = kind(**given)
    args = replace(args, **defaults(args) | given)
    if wants_help:
        parser.set_defaults(**vars(args))
        parser.print_help()
        raise SystemExit(0)
    return args
