"""Options: a dataclass field is a flag, with its default, its help text and its range.

Nothing here imports torch, which takes seconds. So --help answers at once.
"""

import argparse
import os
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import get_args

from program.edges import short
from program.ranges import Ranged

TOY = Path(__file__).parents[1] / "toy" / "checkpoint"


def option(default, text: str, within: str | None = None, use: str | None = None):
    """A field of `Options`.

    text    its help
    within  an interval, such as "[0, 1)" or "(0, inf)", or all possible words: "dmd | flow"
    use     what the flag is for, where a program does several things; see `check_use`
    """
    return field(default=default, metadata={"help": text, "within": within, "use": use})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def text(given: str) -> str:
    """The text of a flag. It may name a file, so it must be a name that a system can write."""
    try:
        os.fsencode(given)
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{short(given)} holds half a letter (a lone surrogate)") from None
    if "\0" in given:
        raise argparse.ArgumentTypeError(f"{short(given)} holds a null character")
    return given


def path(given: str) -> Path:
    """A file or folder. The empty text, which a shell makes of an unset variable, would be the current folder."""
    if not given.strip():
        raise argparse.ArgumentTypeError(f"{given!r} is empty")
    return Path(text(given))


READERS = {str: text, Path: path, int: int, float: float}


@dataclass
class Options(Ranged):
    """The options of a program. A value outside of its range is a ValueError that names the flag."""

    @staticmethod
    def called(name: str) -> str:
        return flag(name)


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag as a ValueError, without printing the usage of all flags."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message.removeprefix('argument ')}; --help lists the options")


def check_use(options: Options, asked: str, uses: dict[str, str]) -> None:
    """ValueError for a flag that is given, but has no effect in what was asked for.

    uses: what the program can do, each with its name in a message. A flag's `use` lists its keys, with spaces.
    """
    for entry in fields(options):
        use = entry.metadata["use"]
        if use and asked not in use.split() and getattr(options, entry.name) != entry.default:
            names = " and ".join(uses[key] for key in use.split())
            raise ValueError(f"{flag(entry.name)} is for {names}, not for {uses[asked]}")


def parse(argv: list[str] | None, kind: type[Options], about: str, defaults=lambda options: {}):
    """The command line as a `kind`. ValueError names the flag.

    about               a docstring; --help shows its first paragraph, and those with commands
    defaults(options)   given the options that were set: further defaults, which replace the dataclass's own
    """
    title, *paragraphs = about.split("\n\n")
    parser = Parser(
        description=title,
        epilog="\n\n".join(text for text in paragraphs if "python " in text or text.startswith("Exit status")),
        usage="%(prog)s [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,  # it shows the defaults of such a run, so it comes after the other flags are read
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("-h", "--help", action="store_true")
    for entry in fields(kind):
        add_flag(parser, entry)
    given = vars(parser.parse_args(argv))
    wants_help = given.pop("help", False)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    options = kind(**given)
    options = replace(options, **{**defaults(options), **given})
    if wants_help:
        parser.set_defaults(**vars(options))
        parser.print_help()
        raise SystemExit(0)
    return options


def add_flag(parser: argparse.ArgumentParser, entry: Field) -> None:
    """The flag of one field."""
    about = entry.metadata["help"] + (" [%(default)s]" if entry.default else "")
    if entry.type is bool:
        parser.add_argument(flag(entry.name), action=argparse.BooleanOptionalAction, help=about)
        return
    inner = [kind for kind in get_args(entry.type) if kind is not NoneType]  # of X | None and tuple[X, ...]: X
    reader = READERS[inner[0] if inner else entry.type]
    within = entry.metadata["within"] or ""
    shown = within.replace(" ", "") if "|" in within else reader.__name__.upper()
    # A list may be given at once or one by one: --teacher a=A b=B, or --teacher a=A --teacher b=B.
    several = {"nargs": "+", "action": "extend"} if isinstance(entry.default, tuple) else {}
    parser.add_argument(flag(entry.name), type=reader, help=about, metavar=shown, **several)
