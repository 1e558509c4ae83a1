"""Rows, the results of one model each: in files, and as Markdown tables."""

import json
import platform
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from checkpoint.files import digest, may_write, read_json, write_json
from scores.statistics import difference_of_models


def scores_of_cases(rows: list[dict], task: str, part: str, category: str = "average") -> np.ndarray:
    """(seeds, categories, cases): one part of a score, such as "fidelity", of every case, from the rows of a model's seeds.

    The rows hold the numbers of single cases under TASK_each; NaN stands for none. category: one alone, or "average" for
    all of them.
    """
    of_rows = [row[f"{task}_each"][part] for row in rows]
    chosen = list(of_rows[0]) if category == "average" else [category]
    return np.array([[scores[name] for name in chosen] for scores in of_rows], dtype=float)


def difference_of_scores(
    rows: list[dict], others: list[dict], task: str, part: str, category: str = "average"
) -> tuple[float, float]:
    """Two models, each with the rows of its seeds: the mean of rows - others, and half the width of its 95% interval."""
    own, other = (scores_of_cases(model, task, part, category) for model in (rows, others))
    return difference_of_models(own, other)


def machine(device: torch.device) -> str:
    """The model name of the GPU or of the processor: seconds say nothing without it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):  # Linux alone has this file
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def without_cases(row: dict) -> dict:
    """The row without the numbers of single cases."""
    return {key: value for key, value in row.items() if not key.endswith("_each")}


def write_row(path: Path, row: dict) -> None:
    """Write a row with a checksum of its numbers and words."""
    write_json(path, row | {"checksum": checksum(row)})


def read_row(path: Path) -> dict:
    """A row that `write_row` wrote; ValueError for any other file, and for a row that was changed afterwards."""
    row = read_json(path)
    if row.pop("checksum", None) != checksum(row):
        raise ValueError(f"{path}: not a row as eval.py wrote it, or changed since; score the model again")
    return row


def checksum(row: dict) -> str:
    return digest(json.dumps(row, sort_keys=True))[:16]


def check_place(path: Path, settings: dict, overwrite: bool, beside: Iterable[str] = ()) -> None:
    """Before the work begins: whether results may be written to the JSON file `path` and to the files `beside` it.

    Results with the same settings are replaced, others only with `overwrite`. ValueError or OSError says what is in the way.
    """
    with suppress(OSError, ValueError):  # no JSON: not ours
        before = read_json(path)
        overwrite = overwrite or all(before.get(key) == value for key, value in settings.items())
    for file in (path, *(path.parent / name for name in beside)):
        may_write(file, overwrite=overwrite)


def with_interval(mean: float | None, half: float | None = None, sign: str = "", digits: int = 3) -> str:
    """A mean with half the width of its interval: "0.559 ± 0.012". sign: "+" also marks what is above 0.

    half None: the mean alone. mean None: "-".
    """
    if mean is None:
        return "-"
    interval = "" if half is None else f" ± {half:.{digits}f}"
    return f"{mean:{sign}.{digits}f}{interval}"


def markdown(lines: list[list[str]]) -> str:
    """A table whose first line is its head; aligned, so that it reads in a terminal too."""
    lines = [[" ".join(cell.replace("|", "/").split()) for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    rows = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)
