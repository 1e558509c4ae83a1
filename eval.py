"""T2I-Bench and Editing-Bench: how a model is scored, and the command that does it.

The paper compares models on two benches (sections 3 and 5, appendix A): T2I-Bench has three categories of prompts,
Editing-Bench six families of edits. A bench scores a model in four steps:

    draw       one picture for each case; its noise follows from the case, so all models start from the same noise
    judge      one score for each picture: half compliance, half fidelity
    mean       over the cases of a category; the AVERAGE is the mean of the categories' means
    interval   1.96 sqrt(sum_c var_c / n_c) / C, half the width of the average's 95% interval; C categories of n_c cases

There are two judges, and each has cases of its own:

    the toy world   toy/judge.py measures, exactly. Scores from 0 to 1. Cases from toy/world.py, drawn by toy/draw.py
    your own        a vision-language model is asked, by rubrics. Scores from 1 to 5. Cases from JSON lines: judges/

A ROW is the result for one model. In JSON:

    name, guidance, seconds_per_image, machine
    nfe                          network evaluations for one picture: the steps, and twice as many with guidance
    t2i, edit                    {"portrait": mean, ..., "average": mean of the means}
    t2i_interval, edit_interval  the +- of the average
    edit_shift, edit_scale, edit_colour, t2i_colour, variety        measures that need no judge: scores/measures.py
    of the toy world             t2i_compliance, t2i_fidelity, ... like t2i; t2i_diversity; cases, in a category
    of your own cases            scale, 5; bench, a hash of the cases; judges, scores and intervals of each judge
    checksum                     of all the rest; --table rejects a row that was changed

Commands: eval.py --help. Means and intervals: scores/statistics.py. The paper's experiments: experiments/.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from program import edges
from program.eval_options import EvalOptions, parse

if __name__ == "__main__":  # here already: --help and a mistyped flag do not wait for torch
    edges.run("eval", parse)  # imports the rest, and calls run(options)

import torch
from PIL import Image
from tqdm import tqdm

from checkpoint.files import KEPT, read_json, write_json
from checkpoint.layout import fingerprint, read_index, teachers_in
from data.pictures import save
from data.prompts import Prompt
from judges import rubrics
from judges.cases import check_folder, describe, file_measures, notes_in, open_chats, read_cases, several_name
from sample import Pipeline
from scores.measures import colour_measures, edit_measures, mean_distance, measures_table, pixels
from scores.rows import check_place, machine, markdown, read_row, without_cases, write_row
from scores.statistics import averages, interval_over_cases
from toy import judge, world
from toy.draw import Sampler, default_sampler, draw_cases, open_checkpoint, reconstruct, teacher_samplers
from toy.figures import contact_sheet

CATEGORIES = dict(world.BENCHES)  # of each bench, "t2i" and "edit"
CASES = {"t2i": 192, "edit": 96}  # in a category
COMPARED = {"t2i": 48, "edit": 24}  # the same for `compare`, which ends a run of minutes
VARIETY = (2, 8)  # prompts in a category, and pictures of each, from which diversity is measured
SHOWN = {"t2i": 4, "edit": 2}  # cases of a category in the contact sheet
MEASURES = ("edit_shift", "edit_scale", "edit_colour", "t2i_colour", "variety")  # keys of scores/measures.py
# Families whose edits leave things where they are. The others draw a new scene, which has no unchanged parts.
IN_PLACE = ("enhance", "object", "style")

# ---- what a score is -------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[judge.Verdict], float]] = {
    "score": lambda verdict: verdict.score,  # half compliance, half fidelity
    "compliance": lambda verdict: float(verdict.compliance),
    "attributes": lambda verdict: sum(verdict.right.values()) / max(1, len(verdict.right)),
    "fidelity": lambda verdict: verdict.fidelity,
}
CaseScores = dict[str, dict[str, list[float]]]  # one of PARTS -> category -> a number for each case


def evaluate(
    pipeline: Pipeline,
    sampler: Sampler,
    benches: list[str],
    cases: dict[str, int] = CASES,
    each: bool = False,
    only: tuple[str, ...] = (),
) -> tuple[dict, dict[str, list[Image.Image]]]:
    """Score one model on benches of the toy world: its row, and its pictures by bench and category.

    cases: in a category of each bench. each: the row also has the numbers of every single case, as "t2i_each". All models
    draw the same cases, so the difference of two models can be taken case by case. only: these categories; (): all.
    """
    row = {"name": sampler.name, "nfe": sampler.nfe, "guidance": sampler.guidance}
    row |= {"seconds_per_image": 0.0, "machine": machine(pipeline.device)}
    row |= {"cases": {bench: cases[bench] for bench in benches}}
    shown, seconds, count = {}, 0.0, 0
    with tqdm(total=sum(len(only or CATEGORIES[bench]) for bench in benches), desc=sampler.name, leave=False) as bar:
        for bench in benches:
            verdicts = {}
            for category in only or CATEGORIES[bench]:
                benched = world.bench(bench, category, cases[bench])
                pictures, spent = draw_cases(pipeline, sampler, benched, list(range(len(benched))))
                verdicts[category] = judge.judge(pictures, benched, partial(reconstruct, pipeline))
                shown[f"{bench} {category}"] = pictures
                seconds, count = seconds + spent, count + len(benched)
                bar.update()
            scores = parts_of(verdicts)
            row |= summary(bench, scores)
            if each:
                row[f"{bench}_each"] = scores
            row[f"{bench}_diversity"] = diversity(pipeline, sampler, bench, only)
    row |= toy_measures(row, shown)
    row["seconds_per_image"] = seconds / count
    return row, shown


def parts_of(verdicts: dict[str, list[judge.Verdict]]) -> CaseScores:
    """The parts of every verdict. verdicts: by category."""
    return {part: {c: [read(verdict) for verdict in verdicts[c]] for c in verdicts} for part, read in PARTS.items()}


def summary(bench: str, scores: CaseScores) -> dict:
    """A bench's part of a row: the means of score, compliance, attributes and fidelity, and the score's interval."""
    means = {bench if part == "score" else f"{bench}_{part}": averages(scores[part]) for part in scores}
    return means | {f"{bench}_interval": interval_over_cases(scores["score"])}


def diversity(pipeline: Pipeline, sampler: Sampler, bench: str, only: tuple[str, ...] = ()) -> dict:
    """How different several pictures of ONE prompt are. A student that always draws the same picture loses both numbers.

    distance   between two of them, root mean square over large pixels, 0 to 1; by category, and their average
    modes      how many of them differ in what the prompt leaves open, 1 to `of`; the same
    """
    prompts, samples = VARIETY
    distances, modes = {}, {}
    for category in only or CATEGORIES[bench]:
        prompted = [case for case in world.bench(bench, category, 4 * prompts) if case.free][:prompts]
        cases = [case for case in prompted for _ in range(samples)]
        pictures, _ = draw_cases(pipeline, sampler, cases, [10**6 + i for i in range(len(cases))])
        small = [world.shrink(picture) for picture in pictures]
        fitted = [judge.fit_free(picture, case) for picture, case in zip(small, cases)]
        starts = range(0, len(cases), samples)  # of each prompt's pictures
        distances[category] = [mean_distance(small[i : i + samples]) for i in starts]
        modes[category] = [len(set(fitted[i : i + samples])) for i in starts]
    return {"distance": averages(distances), "modes": averages(modes), "of": samples}


def toy_measures(row: dict, shown: dict[str, list[Image.Image]]) -> dict:
    """The measures that need no judge, of a row's pictures."""
    edits, drawings, left_out = [], [], 0
    for title, pictures in shown.items():
        bench, category = title.split()
        if bench == "t2i":
            drawings += pictures
        elif category in IN_PLACE:
            edits += zip(world.bench(bench, category, len(pictures)), pictures)
        else:
            left_out += len(pictures)
    measured = {}
    if edits:
        measured |= edit_measures(((pixels(case.images[-1]), pixels(picture)) for case, picture in edits), left_out)
    if drawings:
        measured |= colour_measures(map(pixels, drawings))
    variety = {}
    for bench, key in (("t2i", "distance"), ("edit", "edit_distance")):
        if f"{bench}_diversity" in row:
            variety[key] = row[f"{bench}_diversity"]["distance"]["average"]
    return measured | {"variety": variety}


def score_toy(options: EvalOptions) -> None:
    """Score a model on the toy world's benches. Prints the table; writes the row, and the table with a contact sheet."""
    pipeline = open_checkpoint(options.checkpoint)
    guidance = pipeline.guidance if options.guidance is None else options.guidance
    sampler = default_sampler(options.checkpoint.resolve().name, pipeline, options.steps, guidance)
    made = {"name": sampler.name, "nfe": sampler.nfe, "guidance": sampler.guidance}
    files = places(options, made, ["table.md", "sheet.png"])
    benches = ["t2i", "edit"] if options.bench == "all" else [options.bench]
    cases = {bench: options.cases or CASES[bench] for bench in benches}
    row, pictures = evaluate(pipeline, sampler, benches, cases)
    for file in files:
        write_row(file, row)
    print(table([row]))
    if options.out:
        (options.out / "table.md").write_text(table([row]) + "\n")
        contact_sheet({sampler.name: pictures}, SHOWN, options.out / "sheet.png")


def table(rows: list[dict]) -> str:
    """Rows of the toy world in Markdown, one model in a column. What a row does not have is "-" there."""

    def cells(key: str, name: str = "average") -> list[str]:
        return [f"{row[key][name]:.3f}" if name in row.get(key, ()) else "-" for row in rows]

    lines = [["", *(row["name"] for row in rows)], ["network evaluations", *(str(row["nfe"]) for row in rows)]]
    for bench, title in (("t2i", "T2I"), ("edit", "edit")):
        if not any(bench in row for row in rows):
            continue
        lines += [[f"{title} {category}", *cells(bench, category)] for category in CATEGORIES[bench]]
        widths = [f" ± {row[f'{bench}_interval']:.3f}" if bench in row else "" for row in rows]
        bold = [f"**{mean}**{width}" if width else mean for mean, width in zip(cells(bench), widths)]
        lines.append([f"**{title} average**", *bold])
        lines += [[f"{title} {half}", *cells(f"{bench}_{half}")] for half in ("compliance", "fidelity")]
        several = [row.get(f"{bench}_diversity") for row in rows]
        modes = [f"{of_row['modes']['average']:.1f} of {of_row['of']}" if of_row else "-" for of_row in several]
        distances = [f"{of_row['distance']['average']:.3f}" if of_row else "-" for of_row in several]
        lines += [[f"{title} modes", *modes], [f"{title} distance", *distances]]
    lines.append(["seconds per image", *(f"{row['seconds_per_image']:.4f}" for row in rows)])
    lines.append(["measured on", *(row.get("machine", "-") for row in rows)])
    measured = any("variety" in row for row in rows)
    return f"{markdown(lines)}\n\n{measures_table(rows)}" if measured else markdown(lines)


# ---- a student beside its teacher ------------------------------------------------------------------------------------


def compare(student: Path, teacher: Path, out: Path, cases: dict[str, int] = COMPARED) -> list[dict]:
    """What a distillation was for: the teacher at 80 NFE, the same teacher in the student's few steps by both samplers,
    and the student. Writes out/comparison.json, .md and .png, and prints the table.

    Of the toy's own teacher only the pictures of the contact sheet are drawn: what it scores was measured when it was made.
    """
    base, pupil = open_checkpoint(teacher), open_checkpoint(student)
    own = default_sampler("student", pupil, None, 1.0)
    own.name = f"student, {own.nfe} steps"
    models = [*((base, sampler) for sampler in teacher_samplers(base, own.sigmas)), (pupil, own)]
    rows, sheet, known = [], {}, recorded(teacher, cases)
    for pipeline, sampler in models:
        sheet[sampler.name], seconds = first_pictures(pipeline, sampler)
        row = known.get(sampler.name) or evaluate(pipeline, sampler, ["t2i", "edit"], cases)[0]
        # All seconds are measured here, side by side: those of the log are of another time, or another machine.
        rows.append(without_cases(row) | {"seconds_per_image": seconds, "machine": machine(pipeline.device)})
    write_json(out / "comparison.json", rows)
    (out / "comparison.md").write_text(table(rows) + "\n")
    contact_sheet(sheet, SHOWN, out / "comparison.png")
    print(table(rows))
    print(f"pictures side by side: {out / 'comparison.png'}")
    return rows


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


def recorded(teacher: Path, cases: dict[str, int]) -> dict[str, dict]:
    """The rows of a checkpoint's own teacher in its log, by name, over the first of their cases: those of this bench. They
    have the numbers of every single case. None where the log has fewer cases."""
    log, rows = build_log(teacher), {}
    for row in log["score base"]["rows"] if log else []:
        if any(count > row["cases"][bench] for bench, count in cases.items()):
            continue
        row = row | {"cases": cases}
        for bench, count in cases.items():
            logged = row[f"{bench}_each"]
            scores = {part: {c: logged[part][c][:count] for c in logged[part]} for part in logged}
            row |= summary(bench, scores) | {f"{bench}_each": scores}
        rows[row["name"]] = {
            key: value for key, value in row.items() if key not in MEASURES
        }  # they are of all its cases
    return rows


def first_pictures(pipeline: Pipeline, sampler: Sampler) -> tuple[dict[str, list[Image.Image]], float]:
    """The pictures that the contact sheet shows, by bench and category, and the seconds that each took."""
    shown, seconds = {}, 0.0
    for bench, categories in CATEGORIES.items():
        for category in categories:
            cases = world.bench(bench, category, SHOWN[bench])
            shown[f"{bench} {category}"], spent = draw_cases(pipeline, sampler, cases, list(range(len(cases))))
            seconds += spent
    return shown, seconds / sum(map(len, shown.values()))


# ---- your own cases --------------------------------------------------------------------------------------------------


def score_files(options: EvalOptions) -> None:
    """Score a model on your own cases. All that can be wrong is looked at before the first question, which costs money.
    Without a judge the row has the measures that need none.

    SystemExit(1) at the end if something could not be scored. The same command then asks for that, and for nothing else.
    """
    cases = read_cases(options.prompts)  # {name of its picture: case}
    if options.list:
        return print("\n".join(json.dumps({"picture": name, "prompt": case.prompt}) for name, case in cases.items()))
    chats = open_chats(options.judge, options.judge_model, options.judge_key, options.timeout) if options.judge else []
    name = options.name or options.out.resolve().name
    files = places(options, {"name": name})
    folder = options.pictures or options.out / "pictures"
    several = {picture: [several_name(picture, n) for n in range(options.variety)] for picture in cases}
    check_folder(folder, cases, several, whole=options.pictures is not None)
    if options.reference:
        check_folder(
            options.reference, cases, {name: [name] for name, case in cases.items() if case.task == "t2i"}, True
        )
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


def draw_missing(cases: dict[str, Prompt], several: dict[str, list[str]], folder: Path, options: EvalOptions) -> None:
    """Draw the cases that have no picture in the folder yet. A case's noise is the same for every model.

    several: the names of a case's pictures; all but the first have further noises.

    Every picture has in it what made it. ValueError for pictures of other weights or settings: a bench is of one model.
    """
    index = read_index(options.checkpoint)
    guidance = index["guidance"] if options.guidance is None else options.guidance
    steps = options.steps or len(index["sample_sigmas"] or [0] * 40)
    made = {"steps": steps, "guidance": guidance, "seed": options.seed}
    made["weights"] = fingerprint(options.checkpoint, kept=options.out / KEPT)
    wanted = {name: (picture, n) for picture, names in several.items() for n, name in enumerate(names)}
    missing = [name for name in wanted if not (folder / name).exists()]
    for name in wanted.keys() - set(missing):
        if {key: notes_in(folder / name).get(key) for key in made} != made:
            raise ValueError(f"{folder / name}: drawn by other weights or settings; name another --out for these")
    if not missing:
        return
    dtype, device = (torch.bfloat16, "cuda") if torch.cuda.is_available() else (torch.float32, "cpu")
    pipeline = Pipeline.from_pretrained(options.checkpoint, dtype, device, options.offload, keep_encoder=True)
    pipeline.progress = False
    for name in tqdm(missing, desc="draw", unit="picture"):
        picture_name, n = wanted[name]
        began, case, own = time.perf_counter(), cases[picture_name], int(picture_name[-20:-4], 16) % 2**31
        settings = {"steps": steps, "guidance": guidance, "seed": options.seed + own + n}
        picture = pipeline(case.prompt, list(case.images), **settings)
        spent = {"seconds": round(time.perf_counter() - began, 3), "machine": machine(pipeline.device)}
        save(picture, folder / name, made | {"prompt": case.prompt} | spent)


# ---- the command -----------------------------------------------------------------------------------------------------


def places(options: EvalOptions, made: dict, beside: list[str] | None = None) -> list[Path]:
    """Where the row of a model, drawn as `made` says, may be written: --json and OUT/row.json.

    beside: names of further files in OUT. A row that was made with other settings is replaced only with --overwrite.
    """
    files = []
    if options.json:
        check_place(options.json, made, options.overwrite)
        files.append(options.json)
    if options.out:
        check_place(options.out / "row.json", made, options.overwrite, beside or [])
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


def files_table(rows: list[dict]) -> str:
    """Rows of your own cases in Markdown: what judges said, where one was asked, and the measures that need none."""
    if len({row["bench"] for row in rows}) > 1:
        raise ValueError("rows of different cases cannot share a table: " + ", ".join(row["name"] for row in rows))
    judged = [row for row in rows if row["judges"]]
    return "\n\n".join([*([rubrics.table(judged)] if judged else []), measures_table(rows)])


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
