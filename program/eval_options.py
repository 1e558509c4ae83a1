"""Score a model with T2I-Bench and Editing-Bench, or make one of the paper's tables in the toy world.

examples:
  python eval.py --checkpoint toy/checkpoint --json teacher.json --out results/teacher       the toy world's benches
  python eval.py --checkpoint DIR --prompts bench --out results/mine --judge http://localhost:8000/v1      your cases
  python eval.py --table results/mine/row.json results/other/row.json                        rows as one table
  python eval.py --experiment composition                                                    a table of the paper
  python eval.py --write-prompts 20000 --category portrait --endpoint http://localhost:8000/v1 --out portrait.jsonl
"""

from dataclasses import dataclass, fields
from pathlib import Path

from program import options
from program.options import TOY, Options, flag, option

# What the command does, as the `use` of a flag says it: "toy" is the toy world's benches, the others are flags.
MODES = ("prompts", "table", "experiment", "write_prompts")
SCORES, MODEL, ASKED = "toy prompts experiment", "toy prompts", "prompts write_prompts"


@dataclass
class Args(Options):
    """The options of eval.py."""

    # What to do. Without one of these: the toy world's benches.
    prompts: tuple[Path, ...] = option((), "draw and judge your own cases: JSON lines, or folders of them")
    table: tuple[Path, ...] = option((), "print rows that were written before as one table")
    experiment: str | None = option(None, "train and score a table", "composition | teachers | mixture")
    write_prompts: int | None = option(
        None, "write prompts for training until --out FILE.jsonl has so many", "[1, 1e7]"
    )

    checkpoint: Path = option(TOY, "folder in the published layout", use=SCORES)
    steps: int | None = option(None, "default: the checkpoint's own sigmas, else 40; with --experiment the students' "
                               "updates, 100", "[1, 100000]", SCORES)  # fmt: skip
    guidance: float | None = option(None, "1 is off; default: the checkpoint's own", "[1, 1e6]", MODEL)
    out: Path | None = option(None, "folder for table and pictures; default: with --experiment results/NAME, else none",
                              use=SCORES + " write_prompts")  # fmt: skip
    json: Path | None = option(None, "file for the row; default: row.json in --out", use=MODEL)
    overwrite: bool = option(False, "replace results of other settings", use=SCORES)

    bench: str = option("all", "which of the toy world's", "t2i | edit | all", "toy")
    cases: int | None = option(None, "in each category; default: 192 of t2i, 96 of edit", "[2, 100000]", "toy")

    list: bool = option(
        False, "with --prompts: print each case with its picture's name and do nothing else", use="prompts"
    )
    pictures: Path | None = option(
        None, "with --prompts: a folder: judge these, which something else drew", use="prompts"
    )
    seed: int = option(0, "with --prompts: of the pictures' noise", "[0, 9e18]", "prompts")
    offload: bool = option(
        False, "with --prompts: the networks take turns on the GPU: half the memory, slower", use="prompts"
    )
    name: str | None = option(None, "with --prompts: the model's name in tables; default: that of --out", use="prompts")
    judge: tuple[str, ...] = option(
        (), "with --prompts: chat endpoints, such as http://localhost:8000/v1", use="prompts"
    )
    judge_model: tuple[str, ...] = option((), "names of the models there", use=ASKED)
    judge_key: tuple[str, ...] = option((), "environment variables with the endpoints' keys; default: JUDGE_API_KEY",
                                        use=ASKED)  # fmt: skip
    parallel: int = option(8, "questions under way at once", "[1, 1000]", ASKED)
    timeout: float = option(180.0, "seconds in which an endpoint may send nothing", "(0, 86400]", ASKED)

    category: str | None = option(
        None,
        "with --write-prompts: landscape, portrait, text, or other words for what to describe",
        use="write_prompts",
    )
    endpoint: str | None = option(None, "with --write-prompts: the chat endpoint that writes", use="write_prompts")

    seeds: int = option(5, "with --experiment: students a row", "[1, 100]", "experiment")
    nfe: int = option(4, "with --experiment: the students' number of steps", "[1, 1000]", "experiment")
    runs: Path = option(
        Path("runs/experiments"), "with --experiment: where students and scores are kept", use="experiment"
    )


def check(args: Args) -> None:
    """ValueError names the flag that is wrong, that is missing, or that is not for what was asked."""
    given = [name for name in MODES if getattr(args, name)]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(map(flag, given))}: give one of them")
    mode, what = given[0] if given else "toy", {"toy": "the toy world's benches"} | {m: flag(m) for m in MODES}
    for f in fields(args):
        value, use = getattr(args, f.name), (f.metadata["use"] or " ".join(MODES)).split()
        if value != f.default and mode not in use:
            raise ValueError(f"{flag(f.name)} is for {' and '.join(what[m] for m in use)}, not for {what[mode]}")
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str | Path) and not (str(text).strip() and str(text).isprintable()):
                raise ValueError(f"{flag(f.name)}: {str(text)[:60]!r} is empty, or has letters that cannot be shown")
    if mode == "write_prompts" and not (args.category and args.endpoint and args.out):
        raise ValueError("--write-prompts needs --category, --endpoint URL and --out FILE.jsonl")
    if mode == "prompts" and not (args.list or args.out):
        raise ValueError("--prompts needs --out DIR, for pictures and answers")
    if mode == "prompts" and not args.judge and (args.judge_model or args.judge_key):
        raise ValueError("--judge-model and --judge-key need --judge URL")
    if mode == "experiment" and args.steps == 1:
        raise ValueError("--steps 1: an experiment looks at half of its steps, so at least 2 are needed")


def parse(argv: list[str] | None = None) -> Args:
    args = options.parse(argv, Args, __doc__)
    check(args)
    return args
