"""Forks on the plane, `python -m plane --forks`: each patch of forks/ against the unchanged code.

A row is one fork, or the unchanged code, under one recipe with a number of seeds. It is trained by a process of its own, in
a copy of the sources to which the patch was applied. Both have the same seeds and draws, so their differences are paired. A
row is a file in OUT/rows: a killed run loses one row at most. The tables in OUT/README.md are made anew after each row.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from checkpoint.files import digest, read_json, write_json
from plane.method import CATEGORIES, SIGMAS, Setting, evaluate, train
from plane.rows import EDITS_BASE, ROWS, as_lines, average, cell, from_lines
from scores.pages import fill, open_page
from scores.rows import markdown
from scores.statistics import mean_over_seeds

ROOT = Path(__file__).parents[1]
PATCHES = ROOT / "forks"
UNCHANGED = "unchanged"
# The forks that have something to change on the plane, the ones of most interest first.
ORDER = ("pooled", "below", "told", "through", "gan", "projected", "chords", "decoupled", "interval", "sid", "huber")
NEEDS = {"decoupled": {"guidance": 2.0}}  # the setting of a fork, and of the unchanged code beside it
RECIPES = {"base": EDITS_BASE, "step": "5:5"}  # the base teacher alone, and step-wise teachers; both at 5:5
TITLES = {"base": "The base teacher alone, 5:5", "step": "Step-wise teachers, 5:5"}


@dataclass(frozen=True)
class Row:
    """What is trained: a fork's name, or UNCHANGED; the key of a recipe; the values that differ from Setting's defaults."""

    fork: str
    recipe: str
    values: tuple[tuple[str, float], ...]  # of Setting, seeds and updates among them

    @property
    def file(self) -> str:
        values = dict(self.values)
        own = "".join(f"-{name}-{value:g}" for name, value in self.values if name not in ("seeds", "seed", "updates"))
        return f"{self.fork}-{self.recipe}{own}-{values['seeds']}.json"

    @property
    def other(self) -> "Row":
        """The row of the unchanged code that it is compared with."""
        return Row(UNCHANGED, self.recipe, self.values)


def patch(fork: str) -> Path:
    return PATCHES / f"{fork}.patch"


def changed_lines(fork: str) -> list[str]:
    """The lines that a patch removes or adds. Its head, before the first diff, does not count."""
    text = patch(fork).read_text()
    lines = text[text.index("diff --git") :].splitlines()
    return [line for line in lines if line[:1] in ("+", "-") and line[:3] not in ("+++", "---")]


def copy_sources(folder: Path, fork: str) -> None:
    """The Python files of this checkout, with the fork's patch applied. CalledProcessError if it does not apply."""
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "-co", "--exclude-standard", "*.py"], cwd=ROOT, text=True
    )
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # and not removed since it was committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    if fork != UNCHANGED:
        alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}  # no repository above the copy counts
        subprocess.run(["git", "apply", str(patch(fork))], cwd=folder, env=alone, check=True)


def train_row(recipe: str, values: dict) -> dict:
    """Trains the students of a row, with the sources as they are here. Scores and seconds after a fifth of the updates, and
    after all: {"looks": updates -> category -> measure -> values of all seeds, in a line, "seconds": updates -> seconds}."""
    setting, looks, seconds, started = Setting(**values), {}, {}, time.process_time()
    for look, students, _ in train(setting, ROWS[RECIPES[recipe]], {setting.updates // 5, setting.updates}):
        trained = time.process_time()
        seconds[str(look)] = trained - started
        looks[str(look)] = as_lines(evaluate(setting, students, SIGMAS))
        started += time.process_time() - trained  # measuring does not count
    return {"looks": looks, "seconds": seconds}


def make_row(row: Row, file: Path) -> None:
    """Trains the row in a changed copy and writes its file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_sources(folder, row.fork)
        words = [
            sys.executable,
            "-m",
            "plane.forks",
            row.recipe,
            json.dumps(dict(row.values)),
            str(folder / "row.json"),
        ]
        subprocess.run(words, cwd=folder, check=True)
        made = read_json(folder / "row.json")
    write_json(file, {"setting": dict(row.values), "patch": fingerprint(row.fork)} | made)


def fingerprint(fork: str) -> str:
    """Of what a patch changes; "" for the unchanged code."""
    return "" if fork == UNCHANGED else digest("\n".join(changed_lines(fork)))[:16]


def read_row(row: Row, file: Path) -> dict:
    """A row's file. ValueError if it was made with other settings or another patch."""
    made = read_json(file)
    if made["setting"] != dict(row.values) or made["patch"] != fingerprint(row.fork):
        raise ValueError(f"{file}: made with other settings or another patch; remove it, or name another --out")
    return made


def rows_to_make(seeds: int, updates: int) -> list[Row]:
    """Every fork beside the unchanged code. Seed 1: no claim sees the draws that a setting was chosen with."""
    rows = {}  # in order, each once
    for fork in ORDER:
        for recipe in RECIPES:
            values = {"seeds": seeds, "seed": 1, "updates": updates} | NEEDS.get(fork, {})
            row = Row(fork, recipe, tuple(values.items()))
            rows |= {row.other: None, row: None}
    return [*rows]


def forks(names: list[str], seeds: int, updates: int, out: Path) -> None:
    """Trains the rows of these forks, and of the unchanged code beside them, that are not there yet. After each it writes the
    tables of all rows of so many seeds and updates that are there. ValueError for a name that is not in ORDER."""
    if unknown := [name for name in names if name not in ORDER]:
        raise ValueError(
            f"--forks {unknown[0]}: expected are {', '.join(ORDER)}; a new one is named in plane/forks.py, ORDER"
        )
    open_page(out / "README.md")
    (out / "rows").mkdir(exist_ok=True)
    rows, made = rows_to_make(seeds, updates), {}
    for row in rows:
        file = out / "rows" / row.file
        if file.exists():
            made[row] = read_row(row, file)
    wanted = [row for row in rows if row.fork in names]
    wanted = {row.other: None for row in wanted} | dict.fromkeys(wanted)  # what they are compared with comes first
    for row in tqdm([row for row in wanted if row not in made], "forks"):
        file = out / "rows" / row.file
        make_row(row, file)
        made[row] = read_row(row, file)
        write_tables(rows, made, out / "README.md")
    write_tables(rows, made, out / "README.md")
    print(f"{(out / 'README.md').read_text()}\nwritten to {out / 'README.md'}")


# ---- tables ----------------------------------------------------------------------------------------------------------


def gains(row: dict, other: dict, look: str) -> str:
    """Of precision at T2I and editing, then of the distance: row minus other, with paired intervals."""
    cells = []
    for measure in ("precision", "distance"):
        pairs = []
        for categories in CATEGORIES.values():
            a, b = (average(from_lines(made["looks"][look]), categories, measure) for made in (row, other))
            pairs.append(cell(mean_over_seeds((a - b).tolist())))
        cells.append(" / ".join(pairs))
    return "; ".join(cells)


def values(row: dict, look: str) -> str:
    cells = []
    for measure in ("precision", "distance"):
        scored = from_lines(row["looks"][look])
        means = [average(scored, categories, measure).mean().item() for categories in CATEGORIES.values()]
        cells.append(" / ".join(f"{mean:.3f}" for mean in means))
    return "; ".join(cells)


def table(recipe: str, rows: list[Row], made: dict[Row, dict]) -> list[list[str]]:
    """A line for each fork that was trained under the recipe, with its difference from the unchanged code."""
    looks = [f"{round(dict(rows[0].values)['updates'] / part)}" for part in (5, 1)]
    lines = [["fork", "seeds", "time", *(f"after {int(look):,} updates" for look in looks)]]
    for row in [row for row in rows if row.recipe == recipe and row in made]:
        own, seeds = made[row], f"{dict(row.values)['seeds']}"
        needs = "".join(f", {name} {value:g}" for name, value in row.values[3:])
        if row.fork == UNCHANGED:
            lines.append([f"*unchanged{needs}*", seeds, "1", *(values(own, look) for look in looks)])
        else:
            other = made[row.other]
            time_ratio = own["seconds"][looks[1]] / other["seconds"][looks[1]]
            cells = [gains(own, other, look) for look in looks]
            lines.append([f"{row.fork}{needs}", seeds, f"{time_ratio:.2f}", *cells])
    return lines


def ideas() -> list[list[str]]:
    """A line for each patch: its idea and its source, as its head has them, and its world."""
    lines = [["fork", "idea", "source", "world", "lines"]]
    for fork in ORDER:
        idea, head = patch(fork).read_text().split("\n\n", 1)
        source, world = (re.search(rf"^{key}: (.*)$", head, re.M).group(1) for key in ("Source", "World"))
        cells = [idea.split(": ", 1)[1], source.rstrip("."), re.split("[.,;]", world)[0], f"{len(changed_lines(fork))}"]
        lines.append([f"[{fork}]({fork}.patch)", *cells])
    return lines


def write_tables(rows: list[Row], made: dict[Row, dict], page: Path) -> None:
    tables = [f"**{TITLES[recipe]}**\n\n{markdown(table(recipe, rows, made))}" for recipe in RECIPES]
    fill(page, "\n\n".join([markdown(ideas()), *tables]))


if __name__ == "__main__":  # a row's own process, in the changed copy
    recipe, values_of_setting, file = sys.argv[1:]
    write_json(Path(file), train_row(recipe, json.loads(values_of_setting)))
