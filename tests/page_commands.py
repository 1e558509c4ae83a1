"""The commands on the pages."""

import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commands(program: str, text: str) -> list[list[str]]:
    """The arguments of every command in the text that runs `python PROGRAM`, in order. Commands stand four spaces in."""
    lines = [line for line in text.splitlines() if line.startswith("    ") and f"python {program}" in line]
    words = [shlex.split(line.split("&&")[-1]) for line in lines]
    return [line[line.index(program.split()[-1]) + 1 :] for line in words]


def pages(*names: str) -> str:
    """The text of pages, given as paths or patterns, one after the other."""
    return "\n".join(page.read_text() for name in names for page in sorted(ROOT.glob(name)))
