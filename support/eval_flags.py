"""The command line of eval.py: its flags, what each is for, and the ranges of its numbers. Torch is not imported here."""

import argparse
from pathlib import Path

from support.program import check_range

EXAMPLES = """
Score a model with T2I-Bench and Editing-Bench, or make one of the paper's tables in the toy world.

  python eval.py --checkpoint toy/checkpoint --json teacher.json --out results/teacher       the toy world's benches
  python eval.py --checkpoint DIR --prompts bench --out results/mine --judge http://localhost:8000/v1      your cases
  python eval.py --table results/mine/row.json results/other/row.json                        rows as one table
  python eval.py --experiment composition                                                    a table of the paper
  python eval.py --write-prompts 20000 --category portrait --endpoint http://localhost:8000/v1 --out portrait.jsonl
"""
TOY = Path(__file__).parent.parent / "toy" / "checkpoint"
# What the command does, by the flag that asks for it. Without any of these flags: the toy world's benches.
MODES = {"prompts": "--prompts", "table": "--table", "write_prompts": "--write-prompts", "experiment": "--experiment"}
TOY_BENCH = "the toy world's benches"


def word(text: str) -> str:
    """A flag's text, which is not empty and can be written to a file."""
    if not text.strip() or "\0" in text or len(text) > 4096:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is empty, has a zero byte, or is longer than 4,096 letters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no valid Unicode") from None
    return text


def file(text: str) -> Path:
    return Path(word(text))


class Parser(argparse.ArgumentParser):
    """Errors are ValueErrors of one line; argparse would print the usage too."""

    def error(self, message: str) -> None:
        raise ValueError(message if len(message) < 500 else f"{message[:200]}...")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, and `mode`, one of MODES or "toy". ValueError names the flag that is wrong or that does not fit."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="eval.py", usage="eval.py [flags]", description=EXAMPLES, formatter_class=layout, allow_abbrev=False
    )
    rules = {}  # flag's name -> the modes it is for, and a number's range

    def add(flag: str, modes: str, text: str, within: str | None = None, **settings) -> None:
        action = group.add_argument(flag, help=text, **settings)
        rules[action.dest] = (modes.split(), within)

    group = parser.add_argument_group("what to do (without one of these: the toy world's benches)")
    add("--prompts", "prompts", "draw and judge your own cases: JSON lines, or folders of them", type=file, nargs="+")
    add("--table", "table", "print rows that were written before as one table", type=file, nargs="+", metavar="FILE")
    add("--experiment", "experiment", "train and score a table", choices=["composition", "teachers", "mixture"])
    add("--write-prompts", "write_prompts", "until --out FILE.jsonl has N", "[1, 1e7]", type=int, metavar="N")

    group = parser.add_argument_group("a model")
    scores = "toy prompts experiment"
    add(
        "--checkpoint", scores, "folder in the published layout [toy/checkpoint]", type=file, default=TOY, metavar="DIR"
    )
    steps = "default: the checkpoint's own sigmas, else 40; with --experiment the students' updates, 80"
    add("--steps", scores, steps, "[1, 100000]", type=int, metavar="N")
    add("--guidance", "toy prompts", "1 is off; default: the checkpoint's own", "[1, 1e6]", type=float, metavar="W")
    out = "folder for table and pictures; default: with --experiment results/NAME, else none"
    add("--out", scores + " write_prompts", out, type=file, metavar="DIR")
    add("--json", "toy prompts", "file for the row; default: row.json in --out", type=file, metavar="FILE")
    add("--overwrite", scores, "replace results of other settings", action="store_true")

    group = parser.add_argument_group("the toy world's benches")
    add("--bench", "toy", "t2i, edit or all [all]", choices=["t2i", "edit", "all"], default="all")
    add("--cases", "toy", "in each category [64 of t2i, 48 of edit]", "[2, 100000]", type=int, metavar="N")

    group = parser.add_argument_group("your own cases (--prompts)")
    add("--list", "prompts", "print each case with its picture's name and do nothing else", action="store_true")
    add("--pictures", "prompts", "judge these, which something else drew", type=file, metavar="DIR")
    add("--seed", "prompts", "of the pictures' noise [0]", "[0, 9e18]", type=int, default=0, metavar="N")
    add("--offload", "prompts", "the networks take turns on the GPU: half the memory, slower", action="store_true")
    add("--name", "prompts", "the model's name in tables; default: that of --out", type=word)
    add("--judge", "prompts", "chat endpoints, such as http://localhost:8000/v1", type=word, nargs="+", metavar="URL")
    add("--judge-model", "prompts write_prompts", "names of the models there", type=word, nargs="+", metavar="NAME")
    keys = "environment variables with the endpoints' keys [JUDGE_API_KEY]"
    add("--judge-key", "prompts write_prompts", keys, type=word, nargs="+", metavar="VARIABLE")
    asked = "prompts write_prompts"
    add("--parallel", asked, "questions under way at once [8]", "[1, 1000]", type=int, default=8, metavar="N")
    add("--timeout", asked, "seconds for an answer [180]", "(0, 86400]", type=float, default=180.0, metavar="S")

    group = parser.add_argument_group("prompts for training (--write-prompts)")
    add("--category", "write_prompts", "landscape, portrait, text, or other words that say what to describe", type=word)
    add("--endpoint", "write_prompts", "the chat endpoint that writes", type=word, metavar="URL")

    group = parser.add_argument_group("the paper's tables (--experiment)")
    add("--seeds", "experiment", "students a row [3]", "[1, 100]", type=int, default=3, metavar="N")
    add("--nfe", "experiment", "the students' number of steps [4]", "[1, 1000]", type=int, default=4, metavar="N")
    runs = "where students and scores are kept [runs/experiments]"
    add("--runs", "experiment", runs, type=file, default=Path("runs/experiments"), metavar="DIR")

    args = parser.parse_args(argv)
    asked_for = [mode for mode in MODES if vars(args)[mode] is not None]
    if len(asked_for) > 1:
        raise ValueError(f"{MODES[asked_for[0]]} and {MODES[asked_for[1]]}: one of them at a time")
    args.mode = asked_for[0] if asked_for else "toy"
    for name, (modes, within) in rules.items():
        flag, value = "--" + name.replace("_", "-"), vars(args)[name]
        if value == parser.get_default(name):
            continue
        if args.mode not in modes:
            use = " and ".join(MODES.get(mode, TOY_BENCH) for mode in modes)
            raise ValueError(f"{flag} is for {use}; this command is {MODES.get(args.mode, 'one of ' + TOY_BENCH)}")
        if within:
            check_range(flag, value, within)
    check_combinations(args)
    return args


def check_combinations(args: argparse.Namespace) -> None:
    """ValueError where a flag is missing that another one needs."""
    if args.mode == "write_prompts" and not (args.category and args.endpoint and args.out):
        raise ValueError("--write-prompts needs --category, --endpoint URL and --out FILE.jsonl")
    if args.mode == "prompts" and not (args.list or args.out):
        raise ValueError("--prompts needs --out DIR, for pictures and answers")
    if args.mode == "prompts" and not args.judge and (args.judge_model or args.judge_key):
        raise ValueError("--judge-model and --judge-key need --judge URL")
    if args.experiment and args.steps == 1:
        raise ValueError("--steps 1: an experiment looks at half of its steps, so at least 2 are needed")
