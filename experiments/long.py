"""Students that train six times as long as those of the tables, and are scored on the way: `python -m experiments long`.

After 100 updates a student has hardly left the base network, so its recipe hardly shows. Here every row trains 600: base,
specialised and step-wise teachers, each with both choices of `--renoise-times`, and three mixtures.

A row of one seed is one file in OUT/rows, which is written after every look. Finished rows are reused, on any machine. A
killed command resumes its row from the last checkpoint. Several commands may work at the same time: each takes rows that
no other is at. Seed 0 of all rows comes first, so a part of the work is a whole table with fewer seeds.
"""

from dataclasses import replace
from pathlib import Path

from checkpoint.files import read_json, write_json
from experiments.kept import hold
from experiments.options import LongOptions
from experiments.students import STUDENT, Students, stages
from scores.charts import chart
from scores.pages import fill, open_page
from scores.rows import markdown
from scores.statistics import mean_over_seeds
from toy import judge
from training.options import TrainOptions

TITLES = {"t2i": "T2I", "edit": "editing"}
# Row: recipe, and noise levels of the student's pictures.
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
    """Train and score the rows that are not there yet. Writes tables and curves after each."""
    if len(options.cases) != len(TITLES):
        raise ValueError("--cases: two numbers are expected, in a category of T2I and in a family of edits")
    open_page(options.out / "README.md")
    students, cases = Students(options.runs, options.checkpoint, options.steps, nfe=4), dict(zip(TITLES, options.cases))
    made_with = {name: value for name, value in students.settings.items() if name != "dtype"}
    made_with |= {"judge": judge.version(), "cases": cases, "steps": options.steps}
    for seed in range(options.seeds):
        for name in ROWS:  # what was made with other settings is said before the training
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
    """The looks of a row that are there. ValueError if they were made with other settings."""
    file = row_file(out, name, seed)
    if not file.exists():
        return {}
    row = read_json(file)
    if changed := [key for key in made_with if row["made_with"].get(key) != made_with[key]]:
        raise ValueError(f"{file}: made with other {', '.join(changed)}; remove it, or name another --out")
    return {int(updates): look for updates, look in row["looks"].items()}


def make_row(students: Students, out: Path, name: str, seed: int, made_with: dict) -> None:
    """Train one student and score it at every look. Looks that are there are not made again."""
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
        row = students.student_row(student, updates, tuple(TITLES), task, cases[task])
        look[task] = {"score": row[task]}
        for part in ("compliance", "extras", "fidelity"):
            look[task][part] = row[f"{task}_{part}"]
        for part in ("modes", "distance"):
            look[task][part] = row[f"{task}_diversity"][part]
    return look


# ---- tables and curves -----------------------------------------------------------------------------------------------


def report(options: LongOptions, made_with: dict) -> None:
    """README.md, t2i.png and edit.png in OUT, of the rows that are there."""
    rows = {name: [read_row(options.out, name, seed, made_with) for seed in range(options.seeds)] for name in ROWS}
    looks = stages(options.steps, LOOKS)
    tables = []
    for task, title in TITLES.items():
        tables += [
            f"**{title}**",
            markdown(end_table(rows, task, looks[-1])),
            markdown(score_table(rows, task, looks)),
        ]
        chart(curves(rows, task, looks), options.out / f"{task}.png")
    tables += ["**Differences of scores**", markdown(differences_table(rows, looks))]
    fill(options.out / "README.md", "\n\n".join(tables))


def values(rows: list[Row], task: str, part: str, updates: int) -> dict[int, float]:
    """seed -> the average over categories, of the seeds that are there."""
    return {seed: row[updates][task][part]["average"] for seed, row in enumerate(rows) if updates in row}


def cell(numbers: list[float], sign: str = "") -> str:
    """Mean and interval over seeds."""
    if not numbers:
        return "not run"
    mean, half = mean_over_seeds(numbers)
    return f"{mean:{sign}.3f}" + (f" ± {half:.3f}" if len(numbers) > 1 else "")


def end_table(rows: dict[str, list[Row]], task: str, updates: int) -> list[list[str]]:
    """All parts after all updates."""
    lines = [[f"after {updates} updates", "seeds", *PARTS]]
    for name in rows:
        numbers = [[*values(rows[name], task, part, updates).values()] for part in PARTS]
        lines.append([name, str(len(numbers[0])), *map(cell, numbers)])
    return lines


def score_table(rows: dict[str, list[Row]], task: str, looks: list[int]) -> list[list[str]]:
    """The score at every look."""
    lines = [["score after updates", *(str(updates) for updates in looks)]]
    for name in rows:
        by_look = [values(rows[name], task, "score", updates) for updates in looks]
        lines.append([name, *(cell([*of_seeds.values()]) for of_seeds in by_look)])
    return lines


def differences_table(rows: dict[str, list[Row]], looks: list[int]) -> list[list[str]]:
    """Of two rows at the first and the last look, over the seeds that both have."""
    ends = (looks[0], looks[-1])
    lines = [["", *(f"{title}, {updates} updates" for title in TITLES.values() for updates in ends)]]
    for name, other in DIFFERENCES:
        cells = []
        for task in TITLES:
            for updates in ends:
                a, b = (values(rows[row], task, "score", updates) for row in (name, other))
                cells.append(cell([a[seed] - b[seed] for seed in a.keys() & b.keys()], sign="+"))
        lines.append([f"{name}, minus {other}", *cells])
    return lines


def curves(rows: dict[str, list[Row]], task: str, looks: list[int]) -> dict[str, dict[str, list]]:
    """For scores.charts: part -> row -> [(updates, a value for each seed)]."""
    panels = {}
    for part in PARTS:
        lines = {}
        for name in rows:
            by_look = [(updates, [*values(rows[name], task, part, updates).values()]) for updates in looks]
            lines[name] = [(updates, numbers) for updates, numbers in by_look if numbers]
        lines = {name: line for name, line in lines.items() if line}
        if lines:
            panels[f"{TITLES[task]}: {part}"] = lines
    return panels
