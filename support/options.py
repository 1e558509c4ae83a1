"""Options: a dataclass field is a flag. Its default, its range and its help text stand beside each other."""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import MISSING, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import get_args

import torch

from model import MMDiTConfig
from support import plan
from support.checkpoint import read_index
from support.ranks import ranks


def option(default, text: str, within: str | None = None):
    """A field of train.Args. within: the interval of a number, as in "[0, 1)" or "(0, inf)"."""
    return field(default=default, metadata={"help": text, "within": within})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_range(name: str, value: float, within: str) -> None:
    """ValueError, with the flag's name, unless the value is in the interval. NaN is in none."""
    low, high = (float(end) for end in within[1:-1].split(","))
    above = value >= low if within[0] == "[" else value > low
    below = value <= high if within[-1] == "]" else value < high
    if not (above and below and math.isfinite(value)):
        raise ValueError(f"{flag(name)} {value}: a number in {within} is expected")


def parse(argv: list[str] | None, kind: type, defaults: Callable[[str, int, int], dict], about: str):
    """The command line as a `kind`, a dataclass of options.

    defaults(objective, parameters, lora_rank) gives the values that differ from the dataclass's own. They are known only
    after a first look at the flags that decide them.
    """
    own = {f.name: f.default for f in fields(kind)}
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--objective", choices=["dmd", "flow"], default=own["objective"])
    first.add_argument("--checkpoint", type=Path, default=own["checkpoint"])
    first.add_argument("--lora-rank", type=int, default=own["lora_rank"])
    given = first.parse_known_args(argv)[0]
    config = given.checkpoint / "transformer" / "config.json"
    parameters = plan.parameters(MMDiTConfig.from_json(config)) if config.is_file() else 0  # missing: `settle` says so
    own |= defaults(given.objective, parameters, given.lora_rank)

    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=layout, allow_abbrev=False)
    for f in fields(kind):
        default, text = own[f.name], f.metadata["help"] + (f" [{own[f.name]}]" if own[f.name] else "")
        if f.type is bool:
            parser.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, default=default, help=text)
        else:
            one = next((t for t in get_args(f.type) if t is not NoneType), f.type)  # X | None, tuple[X, ...] -> X
            nargs = "+" if isinstance(f.default, tuple) else None
            parser.add_argument(flag(f.name), type=one, default=default, nargs=nargs, help=text)
    return kind(**vars(parser.parse_args(argv)))


def settle(args):
    """Check the options, and fill in what depends on the checkpoint and the machine. ValueError names the flag."""
    for f in fields(args):
        value, within = getattr(args, f.name), f.metadata.get("within", MISSING)
        if within and value is not None:
            check_range(f.name, value, within)
    index = read_index(args.checkpoint)
    if args.dtype not in (None, "bfloat16", "float32"):
        raise ValueError(f"--dtype {args.dtype}: bfloat16 or float32 is expected")
    if uneven := [size for size in args.sizes if size % ranks()]:
        parts = f"--batch {args.batch} in --micro-batch {args.micro_batch} makes parts of {uneven[0]}"
        raise ValueError(f"{parts} samples, not to be shared equally by {ranks()} processes; take multiples of these")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    guidance = float(index["guidance"] if args.guidance is None else args.guidance)
    resolution, dtype = args.resolution or index["resolution"], args.dtype or faster_dtype(device)
    return replace(args, out=args.home, guidance=guidance, resolution=resolution, device=device, dtype=dtype)


def faster_dtype(device: str) -> str:
    """bfloat16 on a GPU. On a CPU the one that multiplies faster: some have no bf16 units and emulate them."""

    def seconds(dtype: torch.dtype) -> float:
        a, b, spent = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 768, dtype=dtype), []
        for _ in range(20):
            start = time.perf_counter()
            _ = a @ b
            spent.append(time.perf_counter() - start)
        return min(spent)  # the least disturbed one

    return "bfloat16" if device != "cpu" or seconds(torch.bfloat16) < seconds(torch.float32) else "float32"
