"""Students that train six times as long as those of the tables, and are scored on the way: `python -m experiments long`.

After 100 updates a student has hardly left the base network, so its recipe hardly shows. Here every row trains 600: base,
specialised and step-wise teachers, each with both choices of `--renoise-times`, and three mixtures.

A row of one seed is one file in OUT/rows, which is written after every look. Finished rows are reused, on any machine. A
killed command resumes its row from the last checkpoint. Several commands may work at the same time: each takes rows that
no other is working on. Seed 0 of all rows comes first, so unfinished work is a whole table with fewer seeds.
"""

from dataclasses import replace
from pathlib import Path

from checkpoint.files import read_json, write_json
from experiments.kept import changed_keys, hold
from experiments.options import TITLES, LongOptions, cases_by_task
from experiments.students import STUDENT, Students, stages
from scores.charts import Lines, chart
from scores.pages import fill, open_page
from scores.rows import markdown, with_interval
from scores.statistics import mean_over_seeds
from toy import judge
from training.options import TrainOptions

# Row -> recipe, and --renoise-times: up to which level the student's pictures are noised.
ROWS = {
    "base alone": ("base-5-5", "pooled"),
    "base alone, below": ("base-5-5", "below"),
    "specialised alone": ("specialised-5-5", "pooled"),
    "specialised alone, below": ("specialised-5-5", "below"),
    "step-wise": ("flash", "pooled"),
    "step-wise, below": ("flash", "below"),
    "step-wise, 10:0": ("step-wise", "pooled"),
    "step-wise, 0:10": ("mix-0-10", "pooled"),
}
DIFFERENCES = (
    ("base alone, below", "base alone"),
    ("specialised alone, below", "specialised alone"),
    ("step-wise, below", "step-wise"),
    ("specialised alone", "base alone"),
    ("step-wise", "base alone"),
    ("step-wise, below", "base alone, below"),
    ("step-wise", "step-wise, 10:0"),
    ("step-wise", "step-wise, 0:10"),
)
PARTS = ("score", "compliance", "extras", "fidelity", "modes", "distance")
LOOKS = 6  # times at which a student is scored

Look = dict[str, dict[str, dict[str, float]]]  # task -> part -> category, or "average" -> number
Row = dict[int, Look]  # updates -> the scores of one seed


def run(options: LongOptions) -> None:
    """Train and score the rows that are missing. Writes tables and curves after each."""
    cases = cases_by_task(options.cases)
    open_page(options.out / "README.md")
    students = Students(options.runs, options.checkpoint, options.steps, nfe=4, tasks=TITLES)
    made_with = {name: value for name, value in students.settings.items() if name != "dtype"}
    made_with |= {"judge": judge.version(), "cases": cases, "steps": options.steps}
    for seed in range(options.seeds):
        for name in ROWS:  # rows of other settings are rejected before the training
            read_row(options.out, name, seed, made_with)
    for seed in range(options.seeds):
        for name in ROWS:
            try:
                lock = hold(options.runs / "locks" / row_file(options.out, name, seed).stem)
            except ValueError:  # another command is at this row
                continue
            with lock:
                make_row(students, options.out, name, seed, made_with)
            report(options, made_with)
    print(f"{(options.out / 'README.md').read_text()}\nwritten to {options.out}")


def row_file(out: Path, name: str, seed: int) -> Path:
    recipe, times = ROWS[name]
    return out / "rows" / f"{recipe}-{times}-seed{seed}.json"


def read_row(out: Path, name: str, seed: int, made_with: dict) -> Row:
    """The looks in a row's file; none without a file. ValueError if they were made with other settings."""
    file = row_file(out, name, seed)
    if not file.exists():
        return {}
    row = read_json(file)
    changed = changed_keys(row["made_with"], made_with)
    if changed:
        raise ValueError(f"{file}: made with other {changed}; remove it, or name another --out")
    return {int(updates): look for updates, look in row["looks"].items()}


def make_row(students: Students, out: Path, name: str, seed: int, made_with: dict) -> None:
    """Train one student and score it at every look that its row's file does not have."""
    recipe, times = ROWS[name]
    student = replace(STUDENT, recipe=recipe, renoise_times=times, seed=seed)
    row = read_row(out, name, seed, made_with)
    for updates in stages(students.steps, LOOKS):
        if updates not in row:
            row[updates] = make_look(students, student, updates, made_with["cases"])
            write_json(row_file(out, name, seed), {"made_with": made_with, "looks": row})


def make_look(students: Students, student: TrainOptions, updates: int, cases: dict[str, int]) -> Look:
    look = {}
    for task in TITLES:
        row = students.student_row(student, updates, task, cases[task])
        look[task] = {"score": row[task]}
        for part in ("compliance", "extras", "fidelity"):
            look[task][part] = row[f"{task}_{part}"]
        for part in ("modes", "distance"):
            look[task][part] = row[f"{task}_diversity"][part]
    return look


# ---- tables and curves -----------------------------------------------------------------------------------------------


def report(options: LongOptions, made_with: dict) -> None:
    """Write README.md, t2i.png and edit.png in OUT, from the rows made so far."""
    rows = {name: [read_row(options.out, name, seed, made_with) for seed in range(options.seeds)] for name in ROWS}
    looks = stages(options.steps, LOOKS)
    tables = []
    for task, title in TITLES.items():
        tables += [f"**{title}**", end_table(rows, task, looks[-1]), score_table(rows, task, looks)]
        chart(panels(rows, task, looks), options.out / f"{task}.png")
    tables += ["**Differences of scores**", differences_table(rows, looks)]
    fill(options.out / "README.md", "\n\n".join(tables))


def values(rows: list[Row], task: str, part: str, updates: int) -> dict[int, float]:
    """seed -> the average over categories, for the seeds that have this look."""
    return {seed: row[updates][task][part]["average"] for seed, row in enumerate(rows) if updates in row}


def cell(numbers: list[float], sign: str = "") -> str:
    """Mean and interval over seeds."""
    if not numbers:
        return "not run"
    mean, half = mean_over_seeds(numbers)
    return with_interval(mean, half if len(numbers) > 1 else None, sign)


def end_table(rows: dict[str, list[Row]], task: str, updates: int) -> str:
    """Markdown: all parts after all updates."""
    lines = [[f"after {updates} updates", "seeds", *PARTS]]
    for name, of_seeds in rows.items():
        by_part = [list(values(of_seeds, task, part, updates).values()) for part in PARTS]
        lines.append([name, str(len(by_part[0])), *map(cell, by_part)])
    return markdown(lines)


def score_table(rows: dict[str, list[Row]], task: str, looks: list[int]) -> str:
    """Markdown: the score at every look."""
    lines = [["score after updates", *(str(updates) for updates in looks)]]
    for name, of_seeds in rows.items():
        by_look = [list(values(of_seeds, task, "score", updates).values()) for updates in looks]
        lines.append([name, *map(cell, by_look)])
    return markdown(lines)


def differences_table(rows: dict[str, list[Row]], looks: list[int]) -> str:
    """Markdown: two rows at the first and the last look, over the seeds that both have."""
    places = [(task, updates) for task in TITLES for updates in (looks[0], looks[-1])]
    lines = [["", *(f"{TITLES[task]}, {updates} updates" for task, updates in places)]]
    for name, other in DIFFERENCES:
        line = [f"{name}, minus {other}"]
        for task, updates in places:
            scores = values(rows[name], task, "score", updates)
            others = values(rows[other], task, "score", updates)
            line.append(cell([scores[seed] - others[seed] for seed in scores.keys() & others.keys()], sign="+"))
        lines.append(line)
    return markdown(lines)


def panels(rows: dict[str, list[Row]], task: str, looks: list[int]) -> dict[str, Lines]:
    """The panels of a chart, one for each part; without lines that have no point, and without empty panels."""
    charted = {}
    for part in PARTS:
        lines = {}
        for name, of_seeds in rows.items():
            points = [(updates, list(values(of_seeds, task, part, updates).values())) for updates in looks]
            points = [(updates, numbers) for updates, numbers in points if numbers]
            if points:
                lines[name] = points
        if lines:
            charted[f"{TITLES[task]}: {part}"] = lines
    return charted
