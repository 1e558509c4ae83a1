"""Options: a dataclass field is a flag. Its default, its help text and its range stand beside each other.

Nothing here imports torch, which takes seconds: --help answers at once.
"""

import argparse
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import get_args

from program.ranges import Ranged

TOY = Path(__file__).parents[1] / "toy" / "checkpoint"


def option(default, text: str, within: str | None = None, use: str | None = None):
    """A field of `Options`. within: an interval, as in "[0, 1)" or "(0, inf)", or the words there are: "dmd | flow".
    use: what the flag is for, where a program does several things."""
    return field(default=default, metadata={"help": text, "within": within, "use": use})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def file(text: str) -> Path:
    """A flag's file or folder. The empty text, which a shell makes of an unset variable, would be the folder at hand."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is empty")
    return Path(text)


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
        text = f.metadata["help"] + (" [%(default)s]" if f.default else "")
        if f.type is bool:
            parser.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, help=text)
        else:
            one = next((t for t in get_args(f.type) if t is not NoneType), f.type)  # X | None, tuple[X, ...] -> X
            one = file if one is Path else one
            nargs, within = "+" if isinstance(f.default, tuple) else None, f.metadata["within"] or ""
            shown = within.replace(" ", "") if "|" in within else "PATH" if one is file else one.__name__.upper()
            parser.add_argument(flag(f.name), type=one, nargs=nargs, help=text, metavar=shown)
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
