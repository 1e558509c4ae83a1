"""The main job as a speedrun: `python -m experiments record` makes a row of results/records.md.

    python -m experiments record --name below --changed "--renoise-times below" -- --renoise-times below

It trains and scores three students, as `python -m experiments seeds` does, adds up their passes (training/passes.py), and
adds a row to results/records.json and to the page beside it. The row names the commit, so commit first what was changed.
"""

import json
import subprocess
from pathlib import Path

from checkpoint.files import read_json, write_json
from experiments import seeds
from experiments.options import TITLES, RecordOptions
from scores import pages
from scores.rows import markdown, with_interval
from scores.statistics import mean_over_seeds

BUDGET = 50_000  # passes of one student: the main job has 49,110 to 49,452 with seeds 0, 1 and 2
FEWEST = 3  # seeds of a row


def run(options: RecordOptions, words: list[str]) -> dict:
    """Train, score, and add the row. words: further options of train.py.

    ValueError before the training if the row could not be added: too few seeds, changes that are not committed, a name that
    is taken, or a page without its marks.
    """
    if len(options.seeds) < FEWEST:
        raise ValueError(f"--seeds: a row needs {FEWEST} or more, so that its interval says something")
    rows = read_rows(options.records)
    page = options.records.with_suffix(".md")
    if any(row["name"] == options.name for row in rows) and not options.overwrite:
        raise ValueError(
            f"{options.records} has a row {options.name} already; choose another --name, or --overwrite it"
        )
    made_by = commit()
    pages.open_page(page)
    result = seeds.run(options, words)
    folder, updates = options.runs / options.name, seeds.student_options(words).steps
    passes = [passes_of(folder / f"seed{seed}" / "metrics.jsonl") for seed in options.seeds]
    row = make_row(result, options.changed, made_by, updates, passes)
    rows = [other for other in rows if other["name"] != row["name"]] + [row]
    write_json(options.records, {"budget": BUDGET, "rows": rows})
    pages.fill(page, tables(rows))
    print(f"{tables(rows)}\n\nwritten to {options.records} and {page}")
    return row


def read_rows(file: Path) -> list[dict]:
    return read_json(file)["rows"] if file.exists() else []


def commit() -> str:
    """The commit of these sources. ValueError if files differ from it."""
    folder = Path(__file__).parent
    try:
        changed = subprocess.check_output(["git", "status", "--porcelain", "-uno"], cwd=folder, text=True)
        name = subprocess.check_output(["git", "rev-parse", "--short=7", "HEAD"], cwd=folder, text=True).strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"a row names its commit, and git does not know one here ({error})") from None
    if changed:
        raise ValueError(f"a row names its commit; commit your changes first:\n{changed.rstrip()}")
    return name


def passes_of(metrics: Path) -> int:
    """The passes of a whole run, from its log."""
    return sum(json.loads(line)["passes"] for line in metrics.read_text().splitlines())


def make_row(result: dict, changed: str, commit: str, updates: int, passes: list[int]) -> dict:
    """result: as `seeds.run` returns it. The score is the mean of T2I and editing; its half-width is over seeds alone."""
    scores = {task: [row[task]["average"] for row in result["rows"]] for task in TITLES}
    mean, half = mean_over_seeds([sum(pair) / 2 for pair in zip(*scores.values(), strict=True)])
    minus = {}
    for name in ("teacher", result["minus"]):
        if name:
            of_tasks = result["differences"][name]
            minus[f"minus {name}"] = {task: of_tasks[task]["score"] for task in TITLES}
    return {
        "name": result["name"],
        "changed": changed,
        "commit": commit,
        "train.py": result["train.py"],
        "seeds": result["seeds"],
        "updates": updates,
        "passes": round(sum(passes) / len(passes)),
        "score": {"mean": mean, "half": half},
        **{task: sum(numbers) / len(numbers) for task, numbers in scores.items()},
        **minus,
    }


def reaches_teacher(row: dict) -> bool:
    """Whether its mean of T2I and editing is not below that of the teacher in 80 evaluations."""
    return sum(difference["mean"] for difference in row["minus teacher"].values()) >= 0


def tables(rows: list[dict]) -> str:
    """Markdown: the rows within the budget, the best first; the others; and those that reach the teacher."""
    best_first = sorted(rows, key=lambda row: -row["score"]["mean"])
    within = [row for row in best_first if row["passes"] <= BUDGET]
    beyond = [row for row in best_first if row["passes"] > BUDGET]
    fewest = sorted(filter(reaches_teacher, rows), key=lambda row: row["updates"])
    parts = [f"**Within {BUDGET:,} passes**", table(within)]
    if beyond:
        parts += ["**Beyond them**", table(beyond)]
    parts += ["**Fewest updates to the score of the teacher's 80 evaluations**"]
    parts += [table(fewest) if fewest else "No row has reached it."]
    return "\n\n".join(parts)


def table(rows: list[dict]) -> str:
    lines = [["score", "T2I", "editing", "minus teacher: T2I", "editing", "passes", "updates", "changed", "commit"]]
    for row in rows:
        line = [f"**{row['score']['mean']:.3f}** ± {row['score']['half']:.3f}"]
        line += [f"{row[task]:.3f}" for task in TITLES]
        # Rows that are older than this command may have no half-width there.
        line += [with_interval(**row["minus teacher"][task], sign="+") for task in TITLES]
        job = f"{row['changed']} (`{row['train.py']}`)" if row["train.py"] else row["changed"]
        lines.append([*line, f"{row['passes']:,}", f"{row['updates']}", job, row["commit"]])
    return markdown(lines)
