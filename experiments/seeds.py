"""One job of train.py over several seeds, scored on the larger bench, and its differences from the teacher.

    python -m experiments seeds                                          the main job
    python -m experiments seeds --name euler -- --sampler euler          the same with other options of train.py
    python -m experiments seeds --name fast --minus euler -- ...         and its differences from students made before

Each student is a complete run of train.py, with the comparison at its end. It stands in RUNS/NAME/seedN beside its row,
which has the scores of every case. Finished students and rows are reused, so a killed command resumes.
"""

from functools import partial
from pathlib import Path

import numpy as np

import eval as evaluation
import flow
import train
from checkpoint.files import read_json, write_json
from experiments.kept import check_settings, hold, kept_row, row_name
from experiments.measures import measured_edits, measures_of, number, table_of
from experiments.options import TITLES, SeedsOptions, cases_by_task
from program.options import flag
from sample import Pipeline
from scores.rows import (
    check_place,
    difference_of_scores,
    markdown,
    scores_of_cases,
    with_interval,
    without_cases,
)
from scores.statistics import seeds_half
from toy import judge
from toy.draw import Sampler, default_sampler, open_checkpoint, teacher_samplers
from training.options import TrainOptions

PARTS = ("score", "compliance", "fidelity")
VARIETY = ("modes", "distance")  # eval.diversity
HEAD = [heading for title in TITLES.values() for heading in (title, *PARTS[1:], *VARIETY)]  # of the tables


def run(options: SeedsOptions, words: list[str]) -> dict:
    """Train and score the students of all seeds. words: further options of train.py.

    Writes rows and differences as JSON, and the tables as Markdown beside it. ValueError for options of train.py that the
    seeds cannot share, and for a folder whose students were made with other options.
    """
    cases = cases_by_task(options.cases)
    job = student_options(words)
    teacher = open_checkpoint(job.checkpoint)
    folder = options.runs / options.name
    file = options.json or folder / f"seeds-{'-'.join(map(str, options.seeds))}.json"
    result = {"name": options.name, "train.py": " ".join(words), "cases": cases, "seeds": list(options.seeds)}
    check_place(file, result, options.overwrite, [file.with_suffix(".md").name])
    minus = {}
    if options.minus:  # read first: a missing row is reported before hours of training
        minus[options.minus] = [earlier_row(options.runs / options.minus, seed, cases) for seed in options.seeds]
    with hold(folder):
        settings = {"weights": evaluation.fingerprint_with_teachers(job.checkpoint), "options": words}
        settings = check_settings(folder, settings, job.device or str(teacher.device))
        words = [*words, "--dtype", job.dtype or settings["dtype"]]
        rows = [student_row(folder, words, seed, cases) for seed in options.seeds]
        others = teacher_rows(folder, teacher, job.student_steps, cases) | minus
    models = others | {row["name"]: [row] for row in rows} | {"students": rows}
    differences = {name: differences_from(rows, other) for name, other in others.items()}
    measures = measures_of(rows, others)
    tables = [scores_table(models), categories_table(models), differences_table(differences)]
    tables += [table_of(measures, "models"), table_of(measures, "students minus")]
    text = "\n\n".join([f"# {options.name}", about(result), *tables, measured_edits(rows)])
    result |= {
        "judge": judge.version(),
        "minus": options.minus,
        "rows": [without_cases(row) for row in rows],
        "differences": differences,
        "measures": measures,
    }
    write_json(file, result)
    file.with_suffix(".md").write_text(text + "\n")
    print(f"{text}\nwritten to {file} and {file.with_suffix('.md')}")
    return result


def student_options(words: list[str]) -> TrainOptions:
    """The options of train.py that all students share. ValueError for those that `run` sets itself, and for those that
    make no student of the toy world."""
    job, usual = train.parse(words), train.parse([])
    for name in ("objective", "prompts", "out", "seed", "resume", "redraw", "plan"):
        if getattr(job, name) != getattr(usual, name):
            raise ValueError(f'{flag(name)}: behind "--" are the options of a distillation that all seeds share')
    return job


def row_file(folder: Path, seed: int, cases: dict[str, int]) -> Path:
    return folder / f"seed{seed}" / row_name("row", cases)


def student_row(folder: Path, words: list[str], seed: int, cases: dict[str, int]) -> dict:
    """The row of one student. Without a row it is scored, and before that trained, if it is not there yet."""
    file = row_file(folder, seed, cases)
    out = file.parent

    def score() -> dict:
        if not (out / "student").exists():
            resume = ["--resume"] if (out / "args.json").exists() else []
            train.main([*words, "--seed", str(seed), "--out", str(out), *resume])
        pipeline = open_checkpoint(out / "student")
        sampler = default_sampler(f"{folder.name}, seed {seed}", pipeline, None, 1.0)
        return evaluation.evaluate(pipeline, sampler, cases)[0]

    return kept_row(file, score)


def earlier_row(folder: Path, seed: int, cases: dict[str, int]) -> dict:
    """The row of a student that an earlier command made."""
    file = row_file(folder, seed, cases)
    if not file.exists():
        raise ValueError(f"{file}: missing; make it first, with --name {folder.name}, this seed and these cases")
    return read_json(file)


def teacher_rows(folder: Path, teacher: Pipeline, steps: int, cases: dict[str, int]) -> dict[str, list[dict]]:
    """The teacher, at 80 evaluations and in the students' few steps: from the checkpoint's log, or measured here.

    One row each, in a list as the rows of a student's seeds are.
    """

    def score(sampler: Sampler) -> dict:
        return evaluation.evaluate(teacher, sampler, cases)[0]

    logged = evaluation.recorded(Path(teacher.directory), cases)
    rows = {}
    for sampler in teacher_samplers(teacher, flow.student_sigmas(steps)):
        row = logged.get(sampler.name)
        if row is None or "shift" not in row["edit_each"]:  # older logs have no measures
            row = kept_row(folder / row_name(sampler.name, cases), partial(score, sampler))
        rows[sampler.name] = [row]
    return rows


# ---- tables ----------------------------------------------------------------------------------------------------------


def differences_from(rows: list[dict], others: list[dict]) -> dict[str, dict[str, dict[str, float | None]]]:
    """task -> part -> the mean difference of the students from other models, and half the width of its 95% interval."""
    differences = {}
    for task in TITLES:
        differences[task] = {}
        for part in PARTS:
            differences[task][part] = number(*difference_of_scores(rows, others, task, part))
        for name in VARIETY:
            own, other = (variety_of_seeds(model, task, name) for model in (rows, others))
            half = seeds_half(own, other) if len(own) > 1 else None  # one seed says nothing about others
            differences[task][name] = number(float(own.mean() - other.mean()), half)
    return differences


def variety_of_seeds(rows: list[dict], task: str, name: str) -> np.ndarray:
    """(seeds,): the average over categories."""
    return np.array([row[f"{task}_diversity"][name]["average"] for row in rows])


def about(result: dict) -> str:
    job = f"`train.py {result['train.py']}`".replace(" `", "`")
    counts = " and ".join(f"{count} cases a category at {TITLES[task]}" for task, count in result["cases"].items())
    chance = "seeds and cases" if len(result["seeds"]) > 1 else "cases alone"
    seeds = ", ".join(map(str, result["seeds"]))
    return f"{job}, seeds {seeds}; {counts}. ± is a 95% interval over {chance}; of modes and distance over seeds alone."


def scores_table(models: dict[str, list[dict]]) -> str:
    """Markdown: a line for each model, averaged over its seeds."""
    lines = [["", *HEAD]]
    for name, rows in models.items():
        line = [name]
        for task in TITLES:
            line += [f"{scores_of_cases(rows, task, part).mean():.3f}" for part in PARTS]
            line += [f"{variety_of_seeds(rows, task, measure).mean():.3f}" for measure in VARIETY]
        lines.append(line)
    return markdown(lines)


def categories_table(models: dict[str, list[dict]]) -> str:
    """Markdown: the score in every category."""
    places = [(task, category) for task in TITLES for category in evaluation.BENCHES[task]]
    lines = [["score", *(category for _, category in places)]]
    for name, rows in models.items():
        means = [scores_of_cases(rows, task, "score", category).mean() for task, category in places]
        lines.append([name, *(f"{mean:.3f}" for mean in means)])
    return markdown(lines)


def differences_table(differences: dict[str, dict]) -> str:
    """Markdown: a line for each of the other models."""
    lines = [["students minus", *HEAD]]
    for name, by_task in differences.items():
        line = [name]
        for task in TITLES:
            line += [with_interval(**by_task[task][part], sign="+") for part in (*PARTS, *VARIETY)]
        lines.append(line)
    return markdown(lines)
