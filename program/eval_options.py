"""Score a model with T2I-Bench and Editing-Bench: in the toy world, or on your own cases.

examples:
  python eval.py --checkpoint toy/checkpoint --json teacher.json --out results/teacher       the toy world's benches
  python eval.py --checkpoint DIR --prompts bench --out results/mine --judge http://localhost:8000/v1      your cases
  python eval.py --table results/mine/row.json results/other/row.json                        rows as one table
"""

from dataclasses import dataclass, fields
from pathlib import Path

from program import options
from program.options import TOY, Options, check_use, flag, option

USES = {"toy": "the toy world's benches", "prompts": "--prompts", "table": "--table"}  # what the program does


def for_prompts(default, text: str, within: str | None = None):
    return option(default, f"with --prompts: {text}", within, use="prompts")


def for_judge(default, text: str, within: str | None = None):
    return option(default, f"with --judge: {text}", within, use="prompts")


@dataclass
class EvalOptions(Options):
    """The options of eval.py."""

    # What to do. Without one of these: the toy world's benches.
    prompts: tuple[Path, ...] = option((), "draw and judge your own cases: JSON lines, or folders of them")
    table: tuple[Path, ...] = option((), "print rows that were written before as one table")

    checkpoint: Path = option(TOY, "folder in the published layout", use="toy prompts")
    steps: int | None = option(None, "default: the checkpoint's own sigmas, else 40", "[1, 100000]", use="toy prompts")
    guidance: float | None = option(None, "1 is off; default: the checkpoint's own", "[1, 1e6]", use="toy prompts")
    out: Path | None = option(None, "folder for rows, tables and pictures; default: none", use="toy prompts")
    json: Path | None = option(None, "file for the row; default: row.json in --out", use="toy prompts")
    overwrite: bool = option(False, "replace results of other settings", use="toy prompts")

    bench: str = option("all", "which of the toy world's", "t2i | edit | all", use="toy")
    cases: int | None = option(None, "in each category; default: 192 of t2i, 96 of edit", "[2, 100000]", use="toy")

    # With --prompts.
    list: bool = for_prompts(False, "print each case with its picture's name and do nothing else")
    pictures: Path | None = for_prompts(None, "a folder: judge these pictures, which something else drew")
    variety: int = for_prompts(1, "pictures of each case, NAME.png, NAME-1.png, ...", "[1, 1000]")
    reference: Path | None = for_prompts(None, "a folder of another model's pictures, to compare colours with")
    seed: int = for_prompts(0, "of the pictures' noise", "[0, 9e18]")
    offload: bool = for_prompts(False, "the networks take turns on the GPU: half the memory, slower")
    name: str | None = for_prompts(None, "the model's name in tables; default: that of --out")
    judge: tuple[str, ...] = for_prompts((), "chat endpoints, such as http://localhost:8000/v1")
    judge_model: tuple[str, ...] = for_judge((), "names of the models there")
    judge_key: tuple[str, ...] = for_judge((), "environment variables with the endpoints' keys; default: JUDGE_API_KEY")
    parallel: int = for_judge(8, "questions under way at once", "[1, 1000]")
    timeout: float = for_judge(180.0, "seconds in which an endpoint may send nothing", "(0, 86400]")


def check(args: EvalOptions) -> None:
    """ValueError names the flag that is wrong, that is missing, or that has no effect in what was asked for."""
    if args.prompts and args.table:
        raise ValueError("--prompts and --table: give one of them")
    asked = "prompts" if args.prompts else "table" if args.table else "toy"
    check_use(args, asked, USES)
    for entry in fields(args):
        value = getattr(args, entry.name)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str | Path) and not (str(text).strip() and str(text).isprintable()):
                shown = f"{flag(entry.name)}: {str(text)[:60]!r}"
                raise ValueError(f"{shown} is empty, or has letters that cannot be shown")
    if args.prompts and not (args.list or args.out):
        raise ValueError("--prompts needs --out DIR, for pictures and answers")
    if args.prompts and not args.judge and (args.judge_model or args.judge_key):
        raise ValueError("--judge-model and --judge-key need --judge URL")


def parse(argv: list[str] | None = None) -> EvalOptions:
    args = options.parse(argv, EvalOptions, __doc__)
    check(args)
    return args
