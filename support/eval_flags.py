"""The command line of eval.py: its flags, what each is for, and the ranges of its numbers. Torch is not imported here."""

import argparse
from pathlib import Path

from support.options import TOY
from support.program import check_range

EXAMPLES = """
Score a model with T2I-Bench and Editing-Bench, or make one of the paper's tables in the toy world.

  python eval.py --checkpoint toy/checkpoint --json teacher.json --out results/teacher       the toy world's benches
  python eval.py --checkpoint DIR --prompts bench --out results/mine --judge http://localhost:8000/v1      your cases
  python eval.py --table results/mine/row.json results/other/row.json                        rows as one table
  python eval.py --experiment composition                                                    a table of the paper
  python eval.py --write-prompts 20000 --category portrait --endpoint http://localhost:8000/v1 --out portrait.jsonl
"""


def word(text: str) -> str:
    """A flag's text: not empty, and what can stand in a file and be shown."""
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is empty, or has letters that cannot be shown")
    return text


def file(text: str) -> Path:
    return Path(word(text))


class Parser(argparse.ArgumentParser):
    """Errors are ValueErrors of one line; argparse would print the usage too."""

    def error(self, message: str) -> None:
        raise ValueError(message if len(message) < 500 else f"{message[:200]}...")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. ValueError names the flag that is wrong, that is missing, or that is not for what was asked."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser("eval.py", "eval.py [flags]", EXAMPLES, formatter_class=layout, allow_abbrev=False)
    group = parser.add_argument_group("what to do (without one of these: the toy world's benches)")
    group = group.add_mutually_exclusive_group()
    rules = {}  # flag's name -> what it is for, and a number's range

    def add(flag: str, use: str, text: str, within: str | None = None, **settings) -> None:
        rules[group.add_argument(flag, help=text, **settings).dest] = use.split(), within

    many, number = {"type": file, "nargs": "+"}, {"type": int, "metavar": "N"}
    add("--prompts", "prompts", "draw and judge your own cases: JSON lines, or folders of them", **many)
    add("--table", "table", "print rows that were written before as one table", metavar="FILE", **many)
    add("--experiment", "experiment", "train and score a table", choices=["composition", "teachers", "mixture"])
    add("--write-prompts", "write_prompts", "until --out FILE.jsonl has N", "[1, 1e7]", **number)
    modes = list(rules)

    group = parser.add_argument_group("a model")
    scores = "toy prompts experiment"
    add(
        "--checkpoint", scores, "folder in the published layout [toy/checkpoint]", type=file, default=TOY, metavar="DIR"
    )
    steps = "default: the checkpoint's own sigmas, else 40; with --experiment the students' updates, 80"
    add("--steps", scores, steps, "[1, 100000]", **number)
    add("--guidance", "toy prompts", "1 is off; default: the checkpoint's own", "[1, 1e6]", type=float, metavar="W")
    out = "folder for table and pictures; default: with --experiment results/NAME, else none"
    add("--out", scores + " write_prompts", out, type=file, metavar="DIR")
    add("--json", "toy prompts", "file for the row; default: row.json in --out", type=file, metavar="FILE")
    add("--overwrite", scores, "replace results of other settings", action="store_true")

    group = parser.add_argument_group("the toy world's benches")
    add("--bench", "toy", "t2i, edit or all [all]", choices=["t2i", "edit", "all"], default="all")
    add("--cases", "toy", "in each category [64 of t2i, 48 of edit]", "[2, 100000]", **number)

    group = parser.add_argument_group("your own cases (--prompts)")
    asked = "prompts write_prompts"
    add("--list", "prompts", "print each case with its picture's name and do nothing else", action="store_true")
    add("--pictures", "prompts", "judge these, which something else drew", type=file, metavar="DIR")
    add("--seed", "prompts", "of the pictures' noise [0]", "[0, 9e18]", default=0, **number)
    add("--offload", "prompts", "the networks take turns on the GPU: half the memory, slower", action="store_true")
    add("--name", "prompts", "the model's name in tables; default: that of --out", type=word)
    add("--judge", "prompts", "chat endpoints, such as http://localhost:8000/v1", type=word, nargs="+", metavar="URL")
    add("--judge-model", asked, "names of the models there", type=word, nargs="+", metavar="NAME")
    keys = "environment variables with the endpoints' keys [JUDGE_API_KEY]"
    add("--judge-key", asked, keys, type=word, nargs="+", metavar="VARIABLE")
    add("--parallel", asked, "questions under way at once [8]", "[1, 1000]", default=8, **number)
    silent = "seconds in which an endpoint may send nothing [180]"
    add("--timeout", asked, silent, "(0, 86400]", type=float, default=180.0, metavar="S")

    group = parser.add_argument_group("prompts for training (--write-prompts)")
    add("--category", "write_prompts", "landscape, portrait, text, or other words that say what to describe", type=word)
    add("--endpoint", "write_prompts", "the chat endpoint that writes", type=word, metavar="URL")

    group = parser.add_argument_group("the paper's tables (--experiment)")
    add("--seeds", "experiment", "students a row [3]", "[1, 100]", default=3, **number)
    add("--nfe", "experiment", "the students' number of steps [4]", "[1, 1000]", default=4, **number)
    runs = "where students and scores are kept [runs/experiments]"
    add("--runs", "experiment", runs, type=file, default=Path("runs/experiments"), metavar="DIR")

    args = parser.parse_args(argv)
    mode = next((name for name in modes if vars(args)[name] is not None), "toy")
    words = {name: f"--{name.replace('_', '-')}" for name in rules} | {"toy": "the toy world's benches"}
    for name, (use, within) in rules.items():
        value = vars(args)[name]
        if value != parser.get_default(name) and mode not in use:
            raise ValueError(f"{words[name]} is for {' and '.join(words[m] for m in use)}, not for {words[mode]}")
        if within and value is not None:
            check_range(words[name], value, within)
    if mode == "write_prompts" and not (args.category and args.endpoint and args.out):
        raise ValueError("--write-prompts needs --category, --endpoint URL and --out FILE.jsonl")
    if mode == "prompts" and not (args.list or args.out):
        raise ValueError("--prompts needs --out DIR, for pictures and answers")
    if mode == "prompts" and not args.judge and (args.judge_model or args.judge_key):
        raise ValueError("--judge-model and --judge-key need --judge URL")
    if args.experiment and args.steps == 1:
        raise ValueError("--steps 1: an experiment looks at half of its steps, so at least 2 are needed")
    return args
