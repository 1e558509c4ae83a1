"""T2I-Bench and Editing-Bench, and the paper's three experiments: the command.

The paper scores four-step students with two benches (section 3 and 5; appendix A): three categories of prompts, six
families of edits, and a judge who weighs compliance and quality equally. There are two of that kind here:

    the toy world's    toy/bench.py: an exact judge, fixed held-out cases
    of files           judges/bench.py: cases from JSON lines, a vision-language model as the judge

    python eval.py --checkpoint toy/checkpoint --guidance 2 --json teacher.json --out results/teacher
    python eval.py --checkpoint DIR --prompts bench/ --out results/turbo --judge http://localhost:8000/v1 --judge-model NAME
    python eval.py --table results/turbo/row.json results/mine/row.json
    python eval.py --experiment composition                      one of the paper's tables, from training to verdict
    python eval.py --write-prompts 20000 --category portrait --endpoint http://localhost:8000/v1 --out portrait.jsonl
"""

import argparse
import math
import os
import sys
from pathlib import Path

from judges import chat
from judges import rubrics as language_judge
from judges.bench import open_chat, score_files
from support.files import read_json, write_json
from toy import bench, experiments
from toy.figures import contact_sheet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path(__file__).parent / "toy" / "checkpoint", help="published layout")
    add("--json", type=Path, metavar="FILE", help="write the row there")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="write table and contact sheet there; with --prompts pictures and row.json",
    )
    add("--steps", type=int, help="default: the checkpoint's own sigmas, else 40. --experiment: a student's updates")
    add("--guidance", type=float, help="default: the checkpoint's own")
    add("--bench", choices=["t2i", "edit", "all"], default="all", help="of the toy world")
    add("--cases", type=int, help=f"of the toy world, per category (default: {bench.CASES})")
    add = parser.add_argument_group("benches of files").add_argument
    add("--prompts", type=Path, nargs="+", metavar="PATH", help="JSON lines as train.py reads them, or folders of them")
    add("--pictures", type=Path, metavar="DIR", help="judge these, which something else drew; their names: --list")
    add("--list", action="store_true", help="print each case with its picture's name and do nothing else")
    add("--seed", type=int, default=0, help="of the pictures' noise")
    add("--offload", action="store_true", help="the networks take turns on the GPU: half the memory, slower")
    add("--name", help="the model's name in the table; default: that of --out")
    add("--judge", nargs="+", metavar="URL", help="chat endpoints, such as http://localhost:8000/v1")
    add("--judge-model", nargs="+", metavar="NAME", help="the judges, side by side (or the one that writes)")
    add(
        "--judge-key",
        nargs="+",
        metavar="VARIABLE",
        default=["JUDGE_API_KEY"],
        help="environment variables with the keys",
    )
    add("--parallel", type=int, default=8, help="questions under way at once")
    add("--timeout", type=float, default=180.0, help="seconds for an answer")
    add("--table", type=Path, nargs="+", metavar="FILE", help="rows that --json or --prompts wrote, as one table")
    add = parser.add_argument_group("writing prompts").add_argument
    add("--write-prompts", type=int, metavar="N", help="until --out FILE.jsonl has N different ones")
    add("--category", help="landscape, portrait, text, or any other words that say what to describe")
    add("--endpoint", metavar="URL", help="the chat endpoint that writes")
    add = parser.add_argument_group("the paper's experiments, in the toy world").add_argument
    add("--experiment", choices=["composition", "teachers", "mixture"])
    add("--seeds", type=int, default=3, help="students a row")
    add("--nfe", type=int, default=4, help="the students' number of steps")
    add("--runs", type=Path, default=Path("runs/experiments"), metavar="DIR", help="where students and scores are kept")
    args = parser.parse_args(argv)

    modes = ("experiment", "prompts", "table", "write_prompts")
    chosen = [mode for mode in modes if vars(args)[mode] is not None]
    if len(chosen) > 1:
        raise ValueError(f"--{chosen[0].replace('_', '-')} and --{chosen[1].replace('_', '-')}: one of them at a time")
    for needed, mode in (
        ("judge", "prompts"),
        ("pictures", "prompts"),
        ("list", "prompts"),
        ("category", "write_prompts"),
    ):
        if vars(args)[needed] and vars(args)[mode] is None:
            raise ValueError(f"--{needed} goes with --{mode.replace('_', '-')}")
    for number in ("parallel", "timeout", "seeds", "nfe"):
        if vars(args)[number] <= 0:
            raise ValueError(f"--{number} {vars(args)[number]}: a number above 0 is expected")
    if args.guidance is not None and not 1 <= args.guidance < math.inf:
        raise ValueError(f"--guidance {args.guidance}: a number from 1 (off) on is expected")

    if args.write_prompts is not None:
        if not (args.category and args.endpoint and args.out):
            raise ValueError("--write-prompts needs --category, --endpoint URL and --out FILE.jsonl")
        count = chat.write_prompts(open_chat(args), args.category, args.write_prompts, args.out, args.parallel)
        print(f"{args.out}: {count} prompts")
    elif args.table:
        rows = [read_json(path) for path in args.table]
        judged = ["judges" in row for row in rows]
        if any(judged) != all(judged):
            raise ValueError("rows of the toy world and of files cannot share a table")
        print(language_judge.table(rows) if all(judged) else bench.table(rows))
    elif args.experiment:
        suffix = "" if args.nfe == 4 else f"-{args.nfe}nfe"
        out = args.out or Path("results") / f"{args.experiment}{suffix}"
        steps = experiments.STUDENT.steps if args.steps is None else args.steps
        experiments.run(args.experiment, args.checkpoint, out, args.runs, args.seeds, steps, args.nfe)
    elif args.prompts:
        score_files(args)
    else:
        score_toy(args)


def score_toy(args: argparse.Namespace) -> None:
    # Everything that can be wrong is looked at now: the scores take minutes, and should not be lost at the end.
    if args.cases is not None and args.cases < 2:
        raise ValueError(f"--cases {args.cases}: at least 2 are needed, for an interval")
    for folder in filter(None, (args.json and args.json.parent, args.out)):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder}: no folder that can be written to")
    if args.json and args.json.is_dir():
        raise ValueError(f"--json {args.json}: is a folder; name a file")
    pipeline = bench.open_checkpoint(args.checkpoint)
    sampler = bench.default_sampler(pipeline, args.steps, pipeline.guidance if args.guidance is None else args.guidance)
    sampler.name = args.checkpoint.resolve().name
    benches = ["t2i", "edit"] if args.bench == "all" else [args.bench]
    row, shown = bench.evaluate(pipeline, sampler, benches, {b: args.cases or bench.CASES[b] for b in benches})
    if args.json:
        write_json(args.json, row)
    print(bench.table([row]))
    if args.out:
        (args.out / "table.md").write_text(bench.table([row]) + "\n")
        contact_sheet({sampler.name: shown}, 2, args.out / "sheet.png")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"eval.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
