"""The edges of a program: a fast start, an end in one line, notices, and the ranges of numbers. Torch is not imported here.

A program calls `start` before it imports torch, so that --help and a mistyped flag take no seconds:

    from support import program, sample_flags

    if __name__ == "__main__":
        program.start("sample.py", sample_flags.parse)

    import torch
"""

import math
import sys
from collections.abc import Callable


def start(name: str, parse: Callable[[], object]) -> None:
    """Set how the program `name` ends, then parse the command line once; `main` parses it again.

    Ctrl-C, also during the imports that follow, is one line and status 130. ValueError and OSError are one line and
    status 2. Other exceptions are faults of the program and keep their traceback.
    """

    def end(kind: type[BaseException], error: BaseException, trace) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print(f"{name}: stopped by Ctrl-C", file=sys.stderr)
            sys.exit(130)
        if issubclass(kind, (ValueError, OSError)):
            print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = end
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="backslashreplace")  # a terminal may not have the letters of every prompt
    parse()


_said: set[str] = set()


def notice(kind: str, text: str) -> None:
    """Print a line on stderr, but only the first of its kind."""
    if kind not in _said:
        _said.add(kind)
        print(text, file=sys.stderr)


def inside(value: float, within: str) -> bool:
    """Whether a finite number lies in an interval such as "[0, 1)" or "(0, inf)"."""
    low, high = (float(end) for end in within[1:-1].split(","))
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        finite = False
    above = value >= low if within[0] == "[" else value > low
    below = value <= high if within[-1] == "]" else value < high
    return finite and above and below


def check_range(name: str, value: float, within: str) -> None:
    """ValueError with the name of the flag or key, unless the value is in the interval."""
    if not inside(value, within):
        raise ValueError(f"{name} {short(value)}: a number in {within} is expected")


def short(value: object) -> str:
    """A value for an error message: its repr, cut after 60 letters."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}..."
