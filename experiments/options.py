"""The paper's experiments in the toy world: its three tables, and one job over several seeds.

  python -m experiments composition        which prompts              section 3, table 1
  python -m experiments teachers           which teacher, when        section 4, table 2; section 6.1
  python -m experiments mixture            how many edits             section 5, tables 3 and 4
  python -m experiments long               six times as long: teachers, noise levels, edits
  python -m experiments seeds -- --steps 400        the main job, or one with other options of train.py, seed by seed
  python -m experiments record --name NAME --changed "WHAT" -- --lr 0.001        the same, as a row of results/records.md

`python -m experiments NAME --help` lists the options of one.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.claims import EXPERIMENTS
from program import options
from program.options import TOY, Options, option

TITLES = {"t2i": "T2I", "edit": "editing"}  # of the tasks, in tables


def cases_by_task(cases: tuple[int, ...]) -> dict[str, int]:
    """--cases by task. ValueError unless there are two numbers."""
    if len(cases) != len(TITLES):
        raise ValueError("--cases: two numbers are expected, in a category of T2I and in a family of edits")
    return dict(zip(TITLES, cases))


@dataclass
class TableOptions(Options):
    """The options of a table."""

    checkpoint: Path = option(TOY, "folder in the published layout: the teachers")
    seeds: int = option(5, "students a row", "[1, 100]")
    steps: int = option(100, "updates of a student; rows that are called longer have five times as many", "[2, 100000]")
    nfe: int = option(4, "the students' number of steps", "[1, 1000]")
    out: Path | None = option(None, "folder for the table; default: results/NAME")
    overwrite: bool = option(False, "replace a table of other settings")
    runs: Path = option(Path("runs/experiments"), "folder of students and scores, which are kept")


@dataclass
class SeedsOptions(Options):
    """The options of `seeds`. Those of train.py follow after "--"."""

    seeds: tuple[int, ...] = option((0, 1, 2), "seeds of the students", "[0, 9e18]")
    name: str = option("main", "of these students, and of their folder in --runs")
    minus: str | None = option(None, "NAME of students that were made before: give differences from them, too")
    cases: tuple[int, ...] = option(
        (192, 96), "held-out cases in a category of T2I, and in a family of edits", "[2, 1e5]"
    )
    json: Path | None = option(
        None, "file for the rows; a .md beside it has the tables; default: RUNS/NAME/seeds-SEEDS.json"
    )
    overwrite: bool = option(False, "replace rows of other settings")
    runs: Path = option(Path("runs/seeds"), "folder of students and scores, which are kept")


@dataclass
class RecordOptions(SeedsOptions):
    """The options of `record`. Those of train.py follow after "--"."""

    changed: str = option("", "what was changed, in a few words")
    records: Path = option(Path("results/records.json"), "file of all rows; a .md beside it has the tables")


@dataclass
class LongOptions(Options):
    """The options of `long`."""

    checkpoint: Path = option(TOY, "folder in the published layout: the teachers")
    seeds: int = option(5, "students a row", "[1, 100]")
    steps: int = option(600, "updates of a student, which is scored six times on the way", "[2, 100000]")
    cases: tuple[int, ...] = option(
        (96, 48), "held-out cases in a category of T2I, and in a family of edits", "[2, 1e5]"
    )
    out: Path = option(Path("results/long"), "folder of rows, tables and curves")
    runs: Path = option(Path("runs/long"), "folder of students and scores, which are kept")


JOBS = {"seeds": SeedsOptions, "record": RecordOptions}  # one job of train.py over several seeds
KINDS = dict.fromkeys(EXPERIMENTS, TableOptions) | {"long": LongOptions} | JOBS


def parse(argv: list[str] | None = None) -> tuple[str, Options, list[str]]:
    """The command line: what is to be made, its options, and what stands after "--". ValueError says what is wrong."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        raise SystemExit(0)
    if name not in KINDS:
        *names, last = KINDS
        raise ValueError(f"{name[:60]!r}: expected is {', '.join(names)} or {last}")
    own, rest = words, []
    if name in JOBS and "--" in words:
        own, rest = words[: words.index("--")], words[words.index("--") + 1 :]
    return name, options.parse(own, KINDS[name], __doc__), rest
