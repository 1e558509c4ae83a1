"""The paper's three tables in the toy world: train the students, score them, and say which claims hold.

The students of a row differ only in the seed. All rows of all tables have the same optimisation, STUDENT, and the same
prompts. No number here was chosen by looking at a table. Intervals decide each claim (experiments/claims.py): agree,
disagree, or cannot tell. Finished students and scores are reused, so a killed command resumes.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

import eval as evaluation
from checkpoint.files import read_json, write_json
from experiments.claims import EXPERIMENTS, HALFWAY, LONGER, SPECIALISTS, START, TEACHER, Above, Experiment
from experiments.kept import hold
from experiments.options import TableOptions
from experiments.students import STUDENT, Students, stages
from scores.charts import chart
from scores.rows import check_place, difference_of_scores, markdown, scores_of_cases, with_interval
from scores.statistics import agreement, difference_of_models
from toy import judge
from toy.draw import Pictures
from toy.figures import contact_sheet

TIMES = 5  # LONGER rows have so many times the updates
STAGES = 4  # a student is scored after each quarter of its steps
PLANE = Path(__file__).parents[1] / "results" / "plane" / "claims.json"  # which claims hold there: plane/claims.py

Rows = dict[tuple[str, str], list[dict]]  # (row, task) -> what `evaluate` gives, for each seed
Curves = dict[str, dict[str, list[tuple[int, list[float]]]]]  # panel -> row -> [(steps, a score for each seed)]


def length(row: str, steps: int) -> int:
    """The steps of a row's students."""
    return TIMES * steps if row.endswith(LONGER) else steps


# ---- the scores of one table -----------------------------------------------------------------------------------------


def measure(students: Students, experiment: Experiment, seeds: int) -> tuple[Rows, Curves]:
    """Train and score all students of a table, and score the teachers."""
    rows, curves = {}, defaultdict(dict)
    tasks = tuple(experiment.paper)
    for label, sampler in students.teachers.items():
        for task in tasks:
            rows[label, task] = [students.teacher_row(sampler, task, evaluation.CASES[task])]
    claimed = {row for parts in experiment.claims.values() for part in parts for row in (part.row, part.other)}
    for label, recipe in experiment.rows.items():
        steps = stages(length(label, students.steps), STAGES)
        half, end = steps[(len(steps) - 1) // 2], steps[-1]
        # These steps are scored on all cases; the others are for the curve, which has few.
        whole = {end, half} if label + HALFWAY in claimed else {end}
        by_step = defaultdict(list)  # (step, task) -> rows of all seeds
        for seed in range(seeds):
            student = replace(STUDENT, recipe=recipe, seed=seed)
            for step in steps:
                for task in tasks:
                    cases = evaluation.CASES[task] if step in whole else few_cases(task)
                    by_step[step, task].append(students.student_row(student, step, task, cases))
        for task in tasks:
            rows[label, task] = by_step[end, task]
            rows[label + HALFWAY, task] = by_step[half, task]
            line = [(0, on_curve(rows[START, task], task))]
            line += [(step, on_curve(by_step[step, task], task)) for step in steps]
            panel = task + LONGER if label.endswith(LONGER) else task
            curves[panel][label] = line
            mean = np.mean([row[task]["average"] for row in rows[label, task]])
            print(f"{label}: {task} {mean:.3f}", flush=True)
    return rows, curves


def few_cases(task: str) -> int:
    """Cases in a category for a point of a curve."""
    return min(evaluation.COMPARED[task], evaluation.CASES[task])


def on_curve(rows: list[dict], task: str) -> list[float]:
    """The score of each seed on the first few cases: all points of a curve have the same ones."""
    return [float(scores_of_cases([row], task, "score")[..., : few_cases(task)].mean()) for row in rows]


def weigh(parts: list[Above], rows: Rows, seeds: int) -> tuple[str, list[str]]:
    """Whether a claim holds: "agree", "disagree" or "cannot tell"; and the differences that decide it."""
    differences, evidence = [], []
    for part in parts:
        row, other = rows[part.row, part.task], rows[part.other, part.task]
        mean, half = difference_of_scores(row, other, part.task, part.measure, part.category)
        differences.append((mean, half if seeds > 1 else math.inf))  # one seed says nothing about others
        score = [part.task]
        if part.category != "average":
            score.append(part.category)
        if part.measure != "score":
            score.append(part.measure)
        evidence.append(f"{part.row} - {part.other}, {' '.join(score)}: {with_interval(mean, half, '+')}")
    return agreement(differences), evidence


def averaged(task: str, rows: list[dict]) -> dict:
    """The rows of one student's seeds as one row: means, the interval over seeds and cases, and each seed's average."""

    def mean(numbers: Iterable[float]) -> float:
        return float(np.mean(list(numbers)))

    _, half = difference_of_models(scores_of_cases(rows, task, "score"), np.zeros((1, 1, 1)))
    whole = {"nfe": rows[0]["nfe"], "seeds": len(rows), f"{task}_interval": half}
    whole[f"{task}_by_seed"] = [row[task]["average"] for row in rows]
    for key in (task, f"{task}_compliance", f"{task}_attributes", f"{task}_fidelity"):
        whole[key] = {category: mean(row[key][category] for row in rows) for category in rows[0][key]}
    whole[f"{task}_diversity"] = {
        key: mean(row[f"{task}_diversity"][key]["average"] for row in rows) for key in ("modes", "distance")
    }
    whole["seconds_per_image"] = mean(row["seconds_per_image"] for row in rows)
    whole["machine"] = ", ".join(sorted({row["machine"] for row in rows}))
    return whole


# ---- the command -----------------------------------------------------------------------------------------------------


def run(name: str, options: TableOptions) -> dict:
    """One table, from the prompts to the claims. Writes table.md, table.json, sheet.png and curve.png to --out."""
    out = options.out or Path("results") / (name if options.nfe == 4 else f"{name}-{options.nfe}nfe")
    result = {"experiment": name, "steps": options.steps, "seeds": options.seeds}
    result |= {"student_nfe": options.nfe, "cases": evaluation.CASES}
    check_place(out / "table.json", result, options.overwrite, ["table.md", "sheet.png", "curve.png"])
    experiment = EXPERIMENTS[name]
    with hold(options.runs):
        students = Students(options.runs, options.checkpoint, options.steps, options.nfe, experiment.paper)
        rows, curves = measure(students, experiment, options.seeds)
        sheet = pictures(students, experiment)
    result["made_with"] = students.settings | {"judge": judge.version()}
    means = {}  # task -> row -> its mean over seeds
    result["rows"] = {label: {} for label in (TEACHER, SPECIALISTS, START, *experiment.rows)}
    for task in experiment.paper:
        means[task] = {label: averaged(task, rows[label, task]) for label in result["rows"]}
        for label, row in means[task].items():
            result["rows"][label] |= row
    result["claims"] = []
    for claim, parts in experiment.claims.items():
        word, evidence = weigh(parts, rows, options.seeds)
        result["claims"].append({"claim": claim, "verdict": word, "evidence": evidence})

    blocks = [about(options, means)]
    blocks += [table(task, means[task], experiment.paper[task]) for task in experiment.paper]
    blocks.append(claims_table(result["claims"]))
    log = evaluation.build_log(options.checkpoint)
    if log:
        blocks.append(premises_table(log["premises"]["premises"]))
    if options.seeds == 1:
        blocks.append("One seed says nothing about others: nothing can be told from it.")
    text = "\n\n".join(blocks)
    write_json(out / "table.json", result | {"curve": curves})
    (out / "table.md").write_text(f"# {name}\n\n{text}\n")
    contact_sheet(sheet, evaluation.SHOWN, out / "sheet.png")
    chart(curves, out / "curve.png")
    print(f"{text}\nwritten to {out}")
    return result


def pictures(students: Students, experiment: Experiment) -> dict[str, Pictures]:
    """Of the first cases: by the base teacher, by the undistilled network, and by the first seed of every row."""
    drawn, tasks = {}, tuple(experiment.paper)
    for label in (TEACHER, START):
        drawn[label], _ = evaluation.first_pictures(students.opened(None), students.teachers[label], tasks)
    for label, recipe in experiment.rows.items():
        student = replace(STUDENT, recipe=recipe, seed=0)
        weights = students.weights(student, length(label, students.steps))
        drawn[label], _ = evaluation.first_pictures(students.opened(weights), students.few_steps(label), tasks)
    return drawn


def about(options: TableOptions, means: dict[str, dict[str, dict]]) -> str:
    """What the numbers of the tables are. means: task -> row -> its mean over seeds."""
    chance = "seeds and cases" if options.seeds > 1 else "cases alone"
    counts = ", ".join(f"{task} {evaluation.CASES[task]}" for task in means)
    machines = ", ".join(sorted({row["machine"] for of_task in means.values() for row in of_task.values()}))
    return (
        f"{options.seeds} seeds a row, {options.steps} updates of {STUDENT.batch} samples ({TIMES} times as many in a row "
        f"that is called longer), students of {options.nfe} NFE. Cases in a category: {counts}. ± is a 95% interval over "
        f"{chance}; s/image is without the encoding of prompts and sources, on {machines}."
    )


def table(task: str, rows: dict[str, dict], paper: dict[str, str]) -> str:
    """Markdown, a line for each of the averaged rows."""
    categories = evaluation.BENCHES[task]
    head = [task, "NFE", "seeds", *categories, "average", "compliance", "fidelity", "modes", "distance", "s/image"]
    lines = [[*head, "paper: Gemini / GPT"]]
    for name, row in rows.items():
        line = [name, str(row["nfe"]), str(row["seeds"])]
        line += [f"{row[task][category]:.3f}" for category in categories]
        line.append(f"**{row[task]['average']:.3f}** ± {row[f'{task}_interval']:.3f}")
        line += [f"{row[f'{task}_{part}']['average']:.3f}" for part in ("compliance", "fidelity")]
        line += [f"{row[f'{task}_diversity'][key]:.2f}" for key in ("modes", "distance")]
        lines.append([*line, f"{row['seconds_per_image']:.3f}", paper.get(name, "")])
    return markdown(lines)


def claims_table(claims: list[dict]) -> str:
    """Markdown: each claim, what was found here and on the plane, and the differences."""
    plane = read_json(PLANE)["claims"]
    lines = [["the paper", "here", "on the plane, late", "here: differences"]]
    for claim in claims:
        on_plane = plane[claim["claim"]].get("late", "not run")
        lines.append([claim["claim"], f"**{claim['verdict']}**", on_plane, "; ".join(claim["evidence"])])
    return markdown(lines)


def premises_table(premises: list[dict]) -> str:
    lines = [["what the paper takes for granted", "these teachers", "holds"]]
    lines += [[row["premise"], row["measured"], "yes" if row["holds"] else "no"] for row in premises]
    return markdown(lines)
