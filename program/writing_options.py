"""Let a language model write prompts to train on.

python -m judges.writing --category portrait --count 20000 --endpoint http://localhost:8000/v1 --out portrait.jsonl
"""

from dataclasses import dataclass
from pathlib import Path

from program import options
from program.options import Options, option


@dataclass
class WritingOptions(Options):
    """The options of judges/writing.py."""

    category: str = option("", "landscape, portrait, text, or other words for what to describe")
    count: int = option(20000, "write until --out has so many prompts", "[1, 1e7]")
    endpoint: str = option("", "of the chat model that writes, such as http://localhost:8000/v1")
    model: str | None = option(None, "its name there; default: the server's only one")
    key: str | None = option(None, "environment variable with the endpoint's key; default: JUDGE_API_KEY")
    out: Path | None = option(None, "file of JSON lines; what is in it already counts")
    parallel: int = option(8, "questions under way at once", "[1, 1000]")
    timeout: float = option(180.0, "seconds in which the endpoint may send nothing", "(0, 86400]")


def parse(argv: list[str] | None = None) -> WritingOptions:
    """The command line. ValueError names what is missing."""
    given = options.parse(argv, WritingOptions, __doc__)
    if not (given.category.strip() and given.endpoint and given.out):
        raise ValueError("--category, --endpoint URL and --out FILE.jsonl are needed")
    if not given.category.isprintable():
        raise ValueError(f"--category: {given.category[:60]!r} has letters that cannot be shown")
    return given
