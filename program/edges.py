"""The edges of a program: start, end, notices, and JSON that comes in. Torch is not imported here."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn

from program import waiting

STOPPED = "stopped by Ctrl-C"
STATUSES = {KeyboardInterrupt: 130, ValueError: 2, OSError: 2, FloatingPointError: 1}


def run(module: str, parse: Callable[[], object]) -> NoReturn:
    """Run a program: parse the command line, import `module`, and call its run(options).

    A script calls this with its own name, before its other imports. So --help and a mistyped flag do not wait for torch,
    and Ctrl-C prints one line even during the import.
    """
    name = f"{module}.py"
    with ends(name):
        with leaves_at_once(name):
            options = parse()
            waiting.spin_briefly()
            work = import_module(module).run
            waiting.make_room()
        work(options)
    sys.exit()


@contextmanager
def ends(name: str) -> Iterator[None]:
    """Within, errors end the program `name` with one line and a status: 130 for Ctrl-C, 2 for ValueError and OSError, 1
    for FloatingPointError. Other exceptions are faults of the program and keep their traceback."""
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="backslashreplace")  # a terminal may lack the letters of a prompt
    try:
        yield
    except tuple(STATUSES) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        say(name, STOPPED if interrupted else " ".join(str(error).split()))
        sys.exit(next(status for kind, status in STATUSES.items() if isinstance(error, kind)))


@contextmanager
def leaves_at_once(name: str) -> Iterator[None]:
    """Within, Ctrl-C ends the program at once. An exception could be swallowed by a library that is being imported.
    Nothing may be open that needs closing."""

    def leave(number, frame) -> None:
        say(name, STOPPED)
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a shell's background job ignores Ctrl-C
        signal.signal(signal.SIGINT, leave)
    yield
    signal.signal(signal.SIGINT, before)


def say(name: str, text: str) -> None:
    """Print a line on stderr. Under torchrun only the first process does."""
    if os.environ.get("RANK", "0") == "0":
        # To the real one: torch.distributed replaces sys.stderr by a buffer.
        print(f"{name}: {text}", file=sys.__stderr__, flush=True)


_said: set[str] = set()


def notice(kind: str, text: str) -> None:
    """Print a line on stderr, but only the first of its kind."""
    if kind not in _said:
        _said.add(kind)
        print(text, file=sys.stderr)


def short(value: object) -> str:
    """A value for an error message: its repr, cut after 60 letters."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


def parse_json(text: str | bytes) -> object:
    """A JSON value. A key that is given twice, and nesting that is too deep, are a ValueError, too."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"key {short(next(k for k in keys if keys.count(k) > 1))} is given twice")
        return content

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None
