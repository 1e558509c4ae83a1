"""T2I-Bench and Editing-Bench: how a model is scored, and the command that does it.

The paper compares models on two benches (sections 3 and 5, appendix A): T2I-Bench has three categories of prompts,
Editing-Bench six families of edits. A model is scored in four steps:

    draw       one picture for each case; its noise follows from the case, so all models start from the same noise
    judge      one score for each picture: half compliance, half fidelity
    mean       over the cases of a category; the AVERAGE is the mean of the categories' means
    interval   1.96 sqrt(sum_c var_c / n_c) / C, half the width of the average's 95% interval; C categories of n_c cases

There are two judges, and each has cases of its own:

    the toy world   toy/judge.py measures, exactly. Scores from 0 to 1. Cases from toy/world.py, drawn by toy/draw.py
    your own        a vision-language model is asked, by rubrics. Scores from 1 to 5. Cases from JSON lines. Room: judges/

A ROW is the result for one model. In JSON:

    name, guidance, seconds_per_image, machine
    nfe                          network evaluations for one picture: the steps, and twice as many with guidance
    t2i, edit                    {"portrait": mean, ..., "average": mean of the means}
    t2i_interval, edit_interval  the +- of the average
    edit_shift, edit_scale, edit_colour, t2i_colour, variety        measures that need no judge: scores/measures.py
    of the toy world             t2i_compliance, t2i_fidelity, t2i_extras, ... like t2i; t2i_diversity; cases, in a category
    of your own cases            scale, 5; bench, a hash of the cases; judges, scores and intervals of each judge
    checksum                     of all the rest; --table rejects a row that was changed

Commands: eval.py --help. Means and intervals: scores/statistics.py. The paper's experiments: experiments/.
"""

import json
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from program import edges
from program.eval_options import EvalOptions, parse

if __name__ == "__main__":  # here already: --help and a mistyped flag do not wait for torch
    edges.run("eval", parse)  # imports the rest, and calls run(options)

from tqdm import tqdm

from checkpoint.files import read_json, write_json
from checkpoint.layout import fingerprint, teachers_in
from judges import rubrics
from judges.cases import check_folder, describe, file_measures, read_cases, several_name
from judges.chat import open_chats
from judges.drawing import draw_missing
from sample import Pipeline
from scores.colours import colours, pixels
from scores.measures import (
    EDIT_NUMBERS,
    colour_measures,
    mean_distance,
    measure_edit,
    measures_table,
    summary_of_edits,
)
from scores.rows import check_place, machine, read_row, without_cases, write_row
from scores.statistics import averages, interval_over_cases
from toy import judge, world
from toy.draw import Pictures, Sampler, default_sampler, draw_cases, open_checkpoint, reconstruct, teacher_samplers
from toy.figures import contact_sheet, table

BENCHES = dict(world.BENCHES)  # the categories of T2I-Bench ("t2i") and Editing-Bench ("edit")
CASES = {"t2i": 192, "edit": 96}  # in a category
COMPARED = {"t2i": 48, "edit": 24}  # the same for `compare`, which ends a run of minutes
SHOWN = {"t2i": 4, "edit": 2}  # the same for the contact sheet
VARIETY = (2, 8)  # prompts in a category, and pictures of each, from which diversity is measured
# A row's keys that it has over all its cases only: of scores/measures.py, and the share of pictures with an extra.
MEASURES = ("edit_shift", "edit_scale", "edit_colour", "t2i_colour", "variety", "t2i_extras", "edit_extras")
# Families whose edits leave things where they are. The others draw a new scene, which has no unchanged parts.
IN_PLACE = ("enhance", "object", "style")

# ---- what a score is -------------------------------------------------------------------------------------------------

PARTS = ("score", "compliance", "attributes", "fidelity")
CaseScores = dict[str, dict[str, list[float]]]  # one of PARTS -> category -> a number for each case


def parts_of_score(verdict: judge.Verdict) -> dict[str, float]:
    """What the judge says of one picture, from 0 to 1 each."""
    return {
        "score": verdict.score,  # half compliance, half fidelity
        "compliance": float(verdict.compliance),  # whether all is right
        "attributes": sum(verdict.right.values()) / max(1, len(verdict.right)),  # the share that is right
        "fidelity": verdict.fidelity,  # how clean the picture is
    }


def case_scores(verdicts: dict[str, list[judge.Verdict]]) -> CaseScores:
    """verdicts: of one task, by category."""
    scores: CaseScores = {part: {} for part in PARTS}
    for category, of_category in verdicts.items():
        of_cases = [parts_of_score(verdict) for verdict in of_category]
        for part in PARTS:
            scores[part][category] = [of_case[part] for of_case in of_cases]
    return scores


def shares_with_extras(verdicts: dict[str, list[judge.Verdict]]) -> dict[str, list[float]]:
    """category -> 1 for each picture that shows something nobody asked for, else 0."""
    extras = {}
    for category, of_category in verdicts.items():
        extras[category] = [float(not verdict.right["nothing extra"]) for verdict in of_category]
    return extras


def summary(task: str, scores: CaseScores) -> dict:
    """What a row says of a task: the means of score, compliance, attributes and fidelity, and the score's interval."""
    return {
        task: averages(scores["score"]),
        f"{task}_compliance": averages(scores["compliance"]),
        f"{task}_attributes": averages(scores["attributes"]),
        f"{task}_fidelity": averages(scores["fidelity"]),
        f"{task}_interval": interval_over_cases(scores["score"]),
    }


# ---- the toy world's benches -----------------------------------------------------------------------------------------


def evaluate(
    pipeline: Pipeline, sampler: Sampler, counts: dict[str, int], only: tuple[str, ...] = ()
) -> tuple[dict, Pictures]:
    """Score one model on the benches of the toy world: its row, and its pictures.

    counts: cases in a category, for each task to be scored. only: these categories; (): all. The row also has the numbers
    of every single case, as "t2i_each". All models draw the same cases, so two models can be compared case by case.
    """
    row = {"name": sampler.name, "nfe": sampler.nfe, "guidance": sampler.guidance}
    row |= {"seconds_per_image": 0.0, "machine": machine(pipeline.device), "cases": dict(counts)}
    pictures, seconds = {}, 0.0
    for task, count in counts.items():
        verdicts = {}
        for category in tqdm(only or BENCHES[task], desc=f"{sampler.name}: {task}", leave=False):
            cases = world.bench_cases(task, category, count)
            drawn, spent = draw_cases(pipeline, sampler, cases, list(range(count)))
            verdicts[category] = judge.judge(drawn, cases, partial(reconstruct, pipeline))
            pictures[task, category] = drawn
            seconds += spent
        scores = case_scores(verdicts)
        row |= summary(task, scores)
        row[f"{task}_each"] = scores
        row[f"{task}_extras"] = averages(shares_with_extras(verdicts))
        row[f"{task}_diversity"] = diversity(pipeline, sampler, task, only or BENCHES[task])
    measures, of_cases = toy_measures(row, pictures)
    row |= measures
    for task in counts:
        row[f"{task}_each"] |= of_cases[task]
    row["seconds_per_image"] = seconds / sum(map(len, pictures.values()))
    return row, pictures


def diversity(pipeline: Pipeline, sampler: Sampler, task: str, categories: tuple[str, ...]) -> dict:
    """How different several pictures of ONE prompt are. A student that always draws the same picture loses both numbers.

    distance   between two of them, root mean square over large pixels, 0 to 1; by category, and their average
    modes      how many of them differ in what the prompt leaves open, 1 to `of`; the same
    """
    prompts, samples = VARIETY
    distances, modes = {}, {}
    for category in categories:
        open_cases = [case for case in world.bench_cases(task, category, 4 * prompts) if case.free]
        cases = [case for case in open_cases[:prompts] for _ in range(samples)]
        seeds = [10**6 + i for i in range(len(cases))]
        pictures, _ = draw_cases(pipeline, sampler, cases, seeds)
        small = [world.shrink(picture) for picture in pictures]
        fitted = [judge.fit_free(picture, case) for picture, case in zip(small, cases)]
        starts = range(0, len(cases), samples)  # of each prompt's pictures
        distances[category] = [mean_distance(small[i : i + samples]) for i in starts]
        modes[category] = [len(set(fitted[i : i + samples])) for i in starts]
    return {"distance": averages(distances), "modes": averages(modes), "of": samples}


def toy_measures(row: dict, pictures: Pictures) -> tuple[dict, dict[str, CaseScores]]:
    """The measures that need no judge, of a row's pictures; and by task those of every single case, None where an edit has
    no unchanged parts."""
    edits, drawings, left_out = {}, {}, 0
    for (task, category), drawn in pictures.items():
        if task == "t2i":
            drawings[category] = [pixels(picture) for picture in drawn]
        elif category in IN_PLACE:
            sources = [case.images[-1] for case in world.bench_cases(task, category, len(drawn))]
            pairs = zip(sources, drawn, strict=True)
            edits[category] = [measure_edit(pixels(source), pixels(edited)) for source, edited in pairs]
        else:
            left_out += len(drawn)
    measures = {}
    if edits:
        measures |= summary_of_edits([edit for of_category in edits.values() for edit in of_category], left_out)
    if drawings:
        measures |= colour_measures(drawing for of_category in drawings.values() for drawing in of_category)
    measures["variety"] = {}
    for task, name in (("t2i", "distance"), ("edit", "edit_distance")):
        if f"{task}_diversity" in row:
            measures["variety"][name] = row[f"{task}_diversity"]["distance"]["average"]
    of_cases = {"t2i": {}, "edit": {}}
    for place, name in enumerate(("saturation", "contrast")):
        of_cases["t2i"][name] = {c: [colours(drawing)[place] for drawing in drawings[c]] for c in drawings}
    for name in EDIT_NUMBERS:
        of_cases["edit"][name] = {c: [edit[name] if edit else None for edit in edits[c]] for c in edits}
    return measures, of_cases


def score_toy(options: EvalOptions) -> None:
    """Score a model on the toy world's benches. Prints the table; writes the row, and the table with a contact sheet."""
    pipeline = open_checkpoint(options.checkpoint)
    guidance = pipeline.guidance if options.guidance is None else options.guidance
    sampler = default_sampler(options.checkpoint.resolve().name, pipeline, options.steps, guidance)
    settings = {"name": sampler.name, "nfe": sampler.nfe, "guidance": sampler.guidance}
    files = row_files(options, settings, beside=["table.md", "sheet.png"])
    tasks = ["t2i", "edit"] if options.bench == "all" else [options.bench]
    row, pictures = evaluate(pipeline, sampler, {task: options.cases or CASES[task] for task in tasks})
    row = without_cases(row)
    for file in files:
        write_row(file, row)
    print(table([row]))
    if options.out:
        (options.out / "table.md").write_text(table([row]) + "\n")
        contact_sheet({sampler.name: pictures}, SHOWN, options.out / "sheet.png")


# ---- a student beside its teacher ------------------------------------------------------------------------------------


def compare(student: Path, teacher: Path, out: Path, counts: dict[str, int] = COMPARED) -> list[dict]:
    """What a distillation was for: the teacher at 80 NFE, the same teacher in the student's few steps by both samplers,
    and the student. Writes out/comparison.json, .md and .png, and prints the table.

    Of the toy's own teacher only the pictures of the contact sheet are drawn: it was scored when it was made.
    """
    teacher_pipeline, student_pipeline = open_checkpoint(teacher), open_checkpoint(student)
    few_steps = default_sampler("student", student_pipeline, None, 1.0)
    few_steps.name = f"student, {few_steps.nfe} steps"
    models = [(teacher_pipeline, sampler) for sampler in teacher_samplers(teacher_pipeline, few_steps.sigmas)]
    models.append((student_pipeline, few_steps))
    rows, pictures, known = [], {}, recorded(teacher, counts)
    for pipeline, sampler in models:
        pictures[sampler.name], seconds = first_pictures(pipeline, sampler, BENCHES)
        row = known.get(sampler.name) or evaluate(pipeline, sampler, counts)[0]
        # All seconds are measured here, side by side: those of the log are of another time, or another machine.
        rows.append(without_cases(row) | {"seconds_per_image": seconds, "machine": machine(pipeline.device)})
    write_json(out / "comparison.json", rows)
    (out / "comparison.md").write_text(table(rows) + "\n")
    contact_sheet(pictures, SHOWN, out / "comparison.png")
    print(table(rows))
    print(f"pictures side by side: {out / 'comparison.png'}")
    return rows


def first_pictures(pipeline: Pipeline, sampler: Sampler, tasks: Iterable[str]) -> tuple[Pictures, float]:
    """The pictures that the contact sheet shows, and the seconds that each took."""
    pictures, seconds = {}, 0.0
    for task in tasks:
        for category in BENCHES[task]:
            cases = world.bench_cases(task, category, SHOWN[task])
            pictures[task, category], spent = draw_cases(pipeline, sampler, cases, list(range(len(cases))))
            seconds += spent
    return pictures, seconds / sum(map(len, pictures.values()))


def build_log(checkpoint: Path) -> dict:
    """What `python -m toy.build` measured of this checkpoint. Empty where it did not make it, where another version of the
    judge scored it, or where weights were changed since."""
    file = checkpoint / "build.json"
    log = read_json(file) if file.is_file() else {}
    if log.get("judge") != judge.version():
        return {}
    return log if log.get("fingerprint") == fingerprint_with_teachers(checkpoint) else {}


def fingerprint_with_teachers(checkpoint: Path) -> str:
    return fingerprint(checkpoint, *teachers_in(checkpoint).values())


def recorded(teacher: Path, counts: dict[str, int]) -> dict[str, dict]:
    """The rows of a checkpoint's own teacher in its log, by name, as they are over the first cases of each category. Empty
    where the log has fewer cases."""
    log, rows = build_log(teacher), {}
    for row in log["score base"]["rows"] if log else []:
        if all(count <= row["cases"][task] for task, count in counts.items()):
            rows[row["name"]] = of_first_cases(row, counts)
    return rows


def of_first_cases(row: dict, counts: dict[str, int]) -> dict:
    """A row over its first cases. The MEASURES are left out: a row has them only over all its cases."""
    shorter = {key: value for key, value in row.items() if key not in MEASURES} | {"cases": counts}
    for task, count in counts.items():
        scores = {
            part: {category: numbers[:count] for category, numbers in by_category.items()}
            for part, by_category in row[f"{task}_each"].items()
        }
        shorter |= summary(task, scores) | {f"{task}_each": scores}
    return shorter


# ---- your own cases --------------------------------------------------------------------------------------------------


def score_files(options: EvalOptions) -> None:
    """Score a model on your own cases. Everything is checked before the first question, which costs money. Without a judge
    the row has the measures that need none.

    SystemExit(1) at the end if something could not be scored. The same command then asks for that, and for nothing else.
    """
    cases = read_cases(options.prompts)  # {name of its picture: case}
    if options.list:
        for name, case in cases.items():
            print(json.dumps({"picture": name, "prompt": case.prompt}))
        return
    chats = open_chats(options.judge, options.judge_model, options.judge_key, options.timeout) if options.judge else []
    name = options.name or options.out.resolve().name
    files = row_files(options, {"name": name})
    folder = options.pictures or options.out / "pictures"
    several = {picture: [several_name(picture, n) for n in range(options.variety)] for picture in cases}
    check_folder(folder, cases, several, whole=options.pictures is not None)
    if options.reference:
        drawings = {picture: [picture] for picture, case in cases.items() if case.task == "t2i"}
        check_folder(options.reference, cases, drawings, whole=True)
    if not options.pictures:
        draw_missing(cases, several, folder, options)
    row = {"name": name, **describe(cases, folder), "judges": {}}
    row |= file_measures(cases, several, folder, options.reference)
    for chat in chats:
        answers, unscored = rubrics.judge(chat, cases, folder, options.out / "answers", options.parallel)
        row["judges"][chat.model or "judge"] = rubrics.summary(cases, answers, unscored)
    first = next(iter(row["judges"].values()), {})  # its numbers are the row's
    row |= {key: value for key, value in first.items() if key not in ("scored", "unscored")}
    for file in files:
        write_row(file, row)
    print(files_table([row]))
    for model, scores in row["judges"].items():
        for picture, reason in scores["unscored"].items():
            print(f"not scored by {model}: {picture}, {cases[picture].prompt!r}: {reason}", file=sys.stderr)
    if any(scores["unscored"] for scores in row["judges"].values()):
        sys.exit(1)


def files_table(rows: list[dict]) -> str:
    """Rows of your own cases in Markdown: what judges said, where one was asked, and the measures that need none."""
    if len({row["bench"] for row in rows}) > 1:
        raise ValueError("rows of different cases cannot share a table: " + ", ".join(row["name"] for row in rows))
    tables = [measures_table(rows)]
    judged = [row for row in rows if row["judges"]]
    if judged:
        tables.insert(0, rubrics.table(judged))
    return "\n\n".join(tables)


# ---- the command -----------------------------------------------------------------------------------------------------


def row_files(options: EvalOptions, settings: dict, beside: list[str] | None = None) -> list[Path]:
    """The files that a model's row is written to: --json and OUT/row.json. beside: names of further files in OUT.

    ValueError or OSError where they cannot be written. A row with other settings is replaced only with --overwrite.
    """
    files = []
    if options.json:
        check_place(options.json, settings, options.overwrite)
        files.append(options.json)
    if options.out:
        check_place(options.out / "row.json", settings, options.overwrite, beside or [])
        files.append(options.out / "row.json")
    return files


def print_table(files: list[Path]) -> None:
    """Print rows that were written before as one table."""
    rows = [read_row(path) for path in files]
    judged = ["judges" in row for row in rows]
    if any(judged) != all(judged):
        file = files[judged.index(False)]
        raise ValueError(f"{file}: is of the toy world, and cannot share a table with rows of your own cases")
    print(files_table(rows) if judged[0] else table(rows))


def run(options: EvalOptions) -> None:
    if options.table:
        print_table(options.table)
    elif options.prompts:
        score_files(options)
    else:
        score_toy(options)


def main(argv: list[str] | None = None) -> None:
    """The command line, for a caller in Python."""
    run(parse(argv))
