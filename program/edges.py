"""The edges of a program: start, end, notices, and JSON that comes in. Torch is not imported here."""

import json
import os
import signal
import sys
from collections.abc import Callable


def start(name: str, parse: Callable[[], object]) -> None:
    """Set how the program `name` ends, then parse the command line once; `main` parses it again. Called before torch is
    imported, so that --help and a mistyped flag take no seconds.

    Ctrl-C, also during the imports that follow, is one line and status 130. ValueError and OSError are one line and
    status 2, FloatingPointError is one line and status 1. Other exceptions are faults of the program and keep their
    traceback. Of the processes of torchrun the first one prints the line.
    """

    def say(text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            # torch.distributed swaps sys.stderr for a buffer here
            print(f"{name}: {text}", file=sys.__stderr__, flush=True)

    def end(kind: type[BaseException], error: BaseException, trace) -> None:
        statuses = {KeyboardInterrupt: 130, ValueError: 2, OSError: 2, FloatingPointError: 1}
        status = next((statuses[k] for k in statuses if issubclass(kind, k)), None)
        if status is None:
            return sys.__excepthook__(kind, error, trace)
        say(stopped if status == 130 else " ".join(str(error).split()))
        sys.exit(status)

    def leave(number, frame) -> None:
        say(stopped)
        os._exit(130)

    stopped, sys.excepthook = "stopped by Ctrl-C", end
    # Until main begins there is nothing to tidy up. An exception could be swallowed by a library that is being imported.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="backslashreplace")  # a terminal may not have the letters of every prompt
    parse()


def begin() -> None:
    """Called when the imports are done: from now on Ctrl-C is KeyboardInterrupt, and what is being written is tidied up."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
    """A JSON value. ValueError also for a key that is given twice, and for nesting too deep to be read."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} is given twice")
        return content

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None
