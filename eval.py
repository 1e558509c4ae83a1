"""T2I-Bench and Editing-Bench: how a model is scored, and the command that does it.

The paper compares models on two benches (sections 3 and 5, appendix A): T2I-Bench has three categories of prompts,
Editing-Bench six families of edits. A bench scores a model in four steps:

    draw       one picture for each case; its noise follows from the case, so all models start from the same noise
    judge      one score for each picture: half compliance and half fidelity; for edits of files, a verdict by rubric
    mean       over the cases of a category; the AVERAGE is the mean of the categories' means
    interval   1.96 sqrt(sum_c var_c / n_c) / C, half the width of the average's 95% interval; C categories of n_c cases

There are two judges, and each has cases of its own:

    the toy world   toy/judge.py measures, exactly. Scores from 0 to 1, cases from toy/world.py. The steps: toy/score.py
    files           a vision-language model is asked. Scores from 1 to 5, cases from JSON lines. Rubrics and questions:
                    judges/rubrics.py; pictures: judges/cases.py

A ROW is the result for one model. In JSON:

    name, guidance, seconds_per_image
    nfe                          network evaluations for one picture: the steps, and twice as many with guidance
    t2i, edit                    {"portrait": mean, ..., "average": mean of the means}
    t2i_interval, edit_interval  the +- of the average
    of the toy world             t2i_compliance, t2i_fidelity, ... like t2i; t2i_diversity; cases, in a category
    of files                     scale, 5; bench, a hash of the cases; judges, scores and intervals of each judge
    checksum                     of all the rest: a row that was changed is no measurement, and --table refuses it

Rows become tables with --table. The paper's three experiments, from training to verdict: experiments/tables.py. Commands:
eval.py --help.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from program import edges
from program.eval_options import Args, parse

if __name__ == "__main__":  # here already: --help and a mistyped flag do not wait for torch
    edges.run("eval", parse)  # imports the rest, and calls run(args)

from experiments import tables as experiments
from judges import rubrics
from judges.cases import check_folder, describe, draw_cases, open_chats, read_cases
from judges.writing import write_prompts
from scores.rows import check_place, read_row, write_row
from toy import score as bench
from toy.figures import contact_sheet


def score_toy(args: Args) -> None:
    """Score a model on the toy world's benches. Prints the table; writes the row, and the table with a contact sheet."""
    pipeline = bench.open_checkpoint(args.checkpoint)
    guidance = pipeline.guidance if args.guidance is None else args.guidance
    sampler = bench.default_sampler(args.checkpoint.resolve().name, pipeline, args.steps, guidance)
    made = {"name": sampler.name, "nfe": sampler.nfe, "guidance": sampler.guidance}
    files = places(args, made, ["table.md", "sheet.png"])
    benches = ["t2i", "edit"] if args.bench == "all" else [args.bench]
    row, pictures = bench.evaluate(pipeline, sampler, benches, {b: args.cases or bench.CASES[b] for b in benches})
    for file in files:
        write_row(file, row)
    print(bench.table([row]))
    if args.out:
        (args.out / "table.md").write_text(bench.table([row]) + "\n")
        contact_sheet({sampler.name: pictures}, bench.SHOWN, args.out / "sheet.png")


def score_files(args: Args) -> None:
    """Score a model on your own cases. All that can be wrong is looked at before the first question, which costs money.

    SystemExit(1) at the end if something could not be scored. The same command then asks for that, and for nothing else.
    """
    cases = read_cases(args.prompts)  # {name of its picture: case}
    if args.list:
        return print("\n".join(json.dumps({"picture": name, "prompt": case.prompt}) for name, case in cases.items()))
    judges = open_chats(args.judge, args) if args.judge else []
    name = args.name or args.out.resolve().name
    files = places(args, {"name": name})
    folder = args.pictures or args.out / "pictures"
    check_folder(folder, cases, whole=args.pictures is not None)
    if not args.pictures:
        draw_cases(cases, folder, args)
    row = {"name": name, **describe(cases, folder), "judges": {}}
    if not judges:
        return print(f"{len(cases)} pictures in {folder}")

    for judge in judges:
        answers, unscored = rubrics.judge(judge, cases, folder, args.out / "answers", args.parallel)
        row["judges"][judge.model or "judge"] = rubrics.summary(cases, answers, unscored)
    first = next(iter(row["judges"].values()))  # its numbers are the row's
    row |= {key: value for key, value in first.items() if key not in ("scored", "unscored")}
    for file in files:
        write_row(file, row)
    print(rubrics.table([row]))
    for judge, scores in row["judges"].items():
        for picture, reason in scores["unscored"].items():
            print(f"not scored by {judge}: {picture}, {cases[picture].prompt!r}: {reason}", file=sys.stderr)
    if any(scores["unscored"] for scores in row["judges"].values()):
        sys.exit(1)


def places(args: Args, made: dict, beside: Iterable[str] = ()) -> list[Path]:
    """Where the row of a model, drawn as `made` says, may be written.

    These are --json and OUT/row.json. beside: names of further files in OUT. A row that was made with other settings is
    replaced only with --overwrite.
    """
    wanted = [(args.json, ()), (args.out and args.out / "row.json", beside)]
    for place, others in wanted:
        if place:
            check_place(place, made, args.overwrite, others)
    return [place for place, _ in wanted if place]


def print_table(files: list[Path]) -> None:
    """Print rows that were written before as one table."""
    rows = [read_row(path) for path in files]
    judged = ["judges" in row for row in rows]
    if any(judged) != all(judged):
        file = files[judged.index(False)]
        raise ValueError(f"{file}: is of the toy world, and cannot share a table with rows of files")
    print((rubrics if judged[0] else bench).table(rows))


def run(args: Args) -> None:
    if args.table:
        print_table(args.table)
    elif args.prompts:
        score_files(args)
    elif args.experiment:
        experiments.run(args)
    elif args.write_prompts:
        (chat,) = open_chats([args.endpoint], args)
        count = write_prompts(chat, args.category, args.write_prompts, args.out, args.parallel)
        print(f"{args.out}: {count} prompts")
    else:
        score_toy(args)


def main(argv: list[str] | None = None) -> None:
    """The command line, for a caller in Python."""
    run(parse(argv))
