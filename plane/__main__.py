"""The plane's commands: one picture of the whole method in two dimensions, and the paper's claims there.

    python -m plane                            trains students: a table, a picture, an animation (show.py)
    python -m plane --recipe flash             the same under other teachers; --help has more choices (docs/evening.md)
    python -m plane --experiment claims        the paper's claims along one training, under three fake scores (claims.py)
    python -m plane --experiment dimension     re-noising against Euler's method in 2 to 512 dimensions (dimension.py)
    python -m plane --experiment NAME          choices, guidance, lambdas, or a sweep along a knob (tables.py)
    python -m plane --forks                    each patch of forks/ against the unchanged code (forks.py)

The method itself is plane/method.py.
"""

import argparse
from pathlib import Path

from checkpoint.files import may_write
from plane.claims import claims
from plane.dimension import dimension
from plane.forks import ORDER, forks
from plane.method import Setting
from plane.rows import OURS
from plane.show import show
from plane.tables import SWEEPS, TABLES, sweep, table
from program.ranges import check_range
from recipe import RECIPES

UPDATES = {"claims": 10_000, "choices": 2000, "guidance": 2000, "dimension": 1000} | dict.fromkeys(
    [*SWEEPS, "lambdas"], 1000
)
PICTURED = RECIPES | {recipe.name: recipe for recipe in OURS.values()}  # what the picture's students may learn


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="plane", description="DMD in two dimensions.")
    parser.add_argument("--experiment", choices=list(UPDATES), metavar="NAME", help=f"one of {', '.join(UPDATES)}")
    parser.add_argument(
        "--forks", nargs="*", metavar="NAME", help="compare these patches of forks/, or all, with the unchanged code"
    )
    parser.add_argument("--seeds", type=int, default=32, help="students of a row (default: %(default)s)")
    parser.add_argument(
        "--updates", type=int, help="of each student (default: 6000; forks: 5000; claims: 10000; others: 1000 or 2000)"
    )
    parser.add_argument("--out", type=Path, help="folder to write to (default: runs/plane; with --forks: forks)")
    picture = parser.add_argument_group("students of the picture", "tables have their own")
    picture.add_argument(
        "--recipe", choices=list(PICTURED), metavar="NAME", help=f"one of {', '.join(PICTURED)} (default: base-5-5)"
    )
    picture.add_argument("--fake-updates", type=int, help="of the fake score, before each of the student (default: 2)")
    picture.add_argument("--guidance", type=float, help="w of the teachers; 1, the default, is off")
    yes_or_no = argparse.BooleanOptionalAction
    picture.add_argument("--below", action=yes_or_no, help="noise step k again up to sigma_k only (default: --below)")
    picture.add_argument("--told", action=yes_or_no, help="tell the fake score the step k (default: --told)")
    args = parser.parse_args(argv)
    compares = args.forks is not None
    if compares and args.experiment:
        parser.error("--forks and --experiment are two commands; give one")
    given = {"fake_updates": args.fake_updates, "guidance": args.guidance, "below": args.below, "told": args.told}
    choices = {field: value for field, value in given.items() if value is not None}
    if (args.experiment or compares) and (choices or args.recipe):
        parser.error("tables have students of their own: leave out --recipe and the other options of the picture")
    if compares:
        return compare_forks(parser, args)
    args.out = args.out or Path("runs/plane")
    name = args.experiment or "dmd"
    updates = UPDATES.get(name, 6000) if args.updates is None else args.updates
    setting = Setting(seeds=args.seeds, updates=updates, **choices)
    try:
        check_range("--fake-updates", setting.fake_updates, "[0, 1000]")
        check_range("--guidance", setting.guidance, "[0, 100]")
        check_range("--seeds", setting.seeds, "[2, 1000]" if name == "claims" else "[1, 1000]")
        check_range("--updates", setting.updates, "[1, 1000000]")
        may_write(args.out / f"{name}.json", overwrite=True)
        if name == "claims":
            claims(setting, args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if name in TABLES:
        table(name, setting, args.out)
    elif name in SWEEPS:
        sweep(name, setting, args.out)
    elif name == "dimension":
        dimension(setting, args.out)
    elif name == "dmd":
        show(setting, PICTURED[args.recipe or "base-5-5"], args.out)


def compare_forks(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    out, updates = args.out or Path("forks"), 5000 if args.updates is None else args.updates
    try:
        check_range("--seeds", args.seeds, "[2, 1000]")
        check_range("--updates", updates, "[5, 1000000]")
        may_write(out / "README.md", overwrite=True)
        forks(args.forks or [*ORDER], args.seeds, updates, out)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
