"""Score a model with T2I-Bench and Editing-Bench: in the toy world, or on your own cases.

examples:
  python eval.py --checkpoint toy/checkpoint --json teacher.json --out results/teacher       the toy world's benches
  python eval.py --checkpoint DIR --prompts bench --out results/mine --judge http://localhost:8000/v1      your cases
  python eval.py --table results/mine/row.json results/other/row.json                        rows as one table
"""

from dataclasses import dataclass, fields
from pathlib import Path

from program import options
from program.options import TOY, Options, flag, option

# What a flag is for, as its `use` says it. The second and the third are flags themselves.
USES = {"toy": "the toy world's benches", "prompts": "--prompts", "table": "--table"}


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

    list: bool = option(
        False, "with --prompts: print each case with its picture's name and do nothing else", use="prompts"
    )
    pictures: Path | None = option(
        None, "with --prompts: a folder: judge these, which something else drew", use="prompts"
    )
    variety: int = option(
        1, "with --prompts: pictures of each case, NAME.png, NAME-1.png, ...", "[1, 1000]", use="prompts"
    )
    reference: Path | None = option(
        None, "with --prompts: a folder of another model's pictures, to compare colours with", use="prompts"
    )
    seed: int = option(0, "with --prompts: of the pictures' noise", "[0, 9e18]", use="prompts")
    offload: bool = option(
        False, "with --prompts: the networks take turns on the GPU: half the memory, slower", use="prompts"
    )
    name: str | None = option(None, "with --prompts: the model's name in tables; default: that of --out", use="prompts")
    judge: tuple[str, ...] = option(
        (), "with --prompts: chat endpoints, such as http://localhost:8000/v1", use="prompts"
    )
    judge_model: tuple[str, ...] = option((), "with --judge: names of the models there", use="prompts")
    judge_key: tuple[str, ...] = option(
        (), "with --judge: environment variables with the endpoints' keys; default: JUDGE_API_KEY", use="prompts"
    )
    parallel: int = option(8, "with --judge: questions under way at once", "[1, 1000]", use="prompts")
    timeout: float = option(
        180.0, "with --judge: seconds in which an endpoint may send nothing", "(0, 86400]", use="prompts"
    )


def check(args: EvalOptions) -> None:
    """ValueError names the flag that is wrong, that is missing, or that is not for what was asked."""
    if args.prompts and args.table:
        raise ValueError("--prompts and --table: give one of them")
    asked = "prompts" if args.prompts else "table" if args.table else "toy"
    for f in fields(args):
        value, use = getattr(args, f.name), f.metadata["use"]
        if value != f.default and use and asked not in use.split():
            uses = " and ".join(USES[name] for name in use.split())
            raise ValueError(f"{flag(f.name)} is for {uses}, not for {USES[asked]}")
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str | Path) and not (str(text).strip() and str(text).isprintable()):
                raise ValueError(f"{flag(f.name)}: {str(text)[:60]!r} is empty, or has letters that cannot be shown")
    if args.prompts and not (args.list or args.out):
        raise ValueError("--prompts needs --out DIR, for pictures and answers")
    if args.prompts and not args.judge and (args.judge_model or args.judge_key):
        raise ValueError("--judge-model and --judge-key need --judge URL")


def parse(argv: list[str] | None = None) -> EvalOptions:
    args = options.parse(argv, EvalOptions, __doc__)
    check(args)
    return args
