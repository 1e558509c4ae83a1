"""Students in a table, and sweeps along a knob of the setting: `python -m plane --experiment NAME`.

What was expected of each, and what was found: results/plane/findings.md.
"""

import time
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from experiments.claims import E1, E3, E4, E5, HALFWAY, START, TEACHER, Above
from plane.claims import FAKES
from plane.method import CATEGORIES, Setting
from plane.rows import (
    AVERAGE,
    BASE,
    EDITS_BASE,
    LAMBDAS,
    SHOWN,
    SPECIAL,
    STEPS,
    average,
    cell,
    difference,
    ends,
    heading,
    label,
    scores,
    values_cell,
    write,
)
from scores import charts

# Students in a table: the row, and what differs from the setting. The first one is what the others are compared with.
CHOICES = {
    "default: below and told": {},
    **FAKES,
    "below and told, beta1 0.9": {"beta1": 0.9},
    "1 fake update": {"fake_updates": 1},
    "5 fake updates": {"fake_updates": 5},
    "lr 5e-4": {"lr": 5e-4},
    "lr 2e-3": {"lr": 2e-3},
    "lr 2e-3, fake 1e-2": {"lr": 2e-3, "fake_lr": 1e-2},
    "fake lr 2e-3": {"fake_lr": 2e-3},
    "fake lr 1e-2": {"fake_lr": 1e-2},
    "batch 32": {"batch": 32},
    "shift 1.5": {"shift": 1.5},
    "shift 3": {"shift": 3.0},
    "width 128": {"width": 128},
    "three times the updates": {"updates": 6000},
}
GUIDANCE = {
    f"{who}, w {w}{where}": (row, {"guidance": w} | changes)
    for w in (1, 2, 4)
    for who, row, where, changes in (
        ("teacher", TEACHER, "", {}),
        ("student", EDITS_BASE, "", {}),
        ("student", EDITS_BASE, ", guided above sigma_k", {"guided_above": True}),
    )
    if w > 1 or not changes
}
TABLES = {
    "choices": {name: (EDITS_BASE, changes) for name, changes in CHOICES.items()},
    "guidance": GUIDANCE,
    "lambdas": {row: (row, {}) for row in (BASE, STEPS, SPECIAL, AVERAGE, *LAMBDAS)},
}

RISES = [Above(BASE, START), Above(SPECIAL, START)]
FALLS = [Above(BASE + HALFWAY, BASE), Above(SPECIAL + HALFWAY, SPECIAL)]
ROUTING = [Above(STEPS, SPECIAL, "text"), Above(STEPS, AVERAGE, "text")]
EDITING = [Above("5:5", "10:0", task="edit"), Above("5:5", "10:0")]
TEXT = [Above(E1, E3, "text"), Above(E1, E3), Above(E4, E5, "text"), Above(E1, START, "text")]
DISTILLED = [Above(TEACHER, EDITS_BASE), Above(TEACHER, EDITS_BASE, task="edit")]
OPEN = [Above(TEACHER, START, task="edit"), *EDITING, Above("10:0", "9:1", task="edit")]
SWEEPS = {  # a knob of Setting: its values, and the differences to look at
    "blur": ((1.0, 2.0, 3.0, 4.0), TEXT),
    "sharp": ((0.25, 0.5, 1.0), ROUTING),
    "displaced": ((0.0, 0.5, 1.0, 2.0), ROUTING),
    "open": ((0.0, 0.5, 1.0, 1.5), OPEN),
    "oracle": ((0, 1), RISES + FALLS),
    "renoise": ((0, 1), [Above(TEACHER, START), Above(TEACHER, START, task="edit"), *RISES, *DISTILLED]),
}


def table(name: str, setting: Setting, out: Path) -> None:
    """Students of several settings side by side, with seed 1: no claim sees the draws that chose a setting."""
    setting, lines, result = replace(setting, seed=1), [], {}
    for students, (row, changes) in tqdm(TABLES[name].items(), name):
        started = time.process_time()
        scored = scores(replace(setting, **changes), row)
        seconds = time.process_time() - started
        if not lines:
            first = scored
        result[students], cells = {"seconds": seconds}, []
        for task, categories in CATEGORIES.items():
            result[students][task] = {m: average(scored, categories, m).mean().item() for m in SHOWN}
            gain = cell(difference(scored, first, Above(row, "", task=task))) if lines else ""
            cells += [values_cell(result[students][task]), gain]
        lines.append([students, f"{seconds:.0f}", *cells])
    head = ["students", "seconds", "T2I", "above the first", "edits", "above the first"]
    title = f"# {name}\n\n{heading(setting)} Precision / coverage / energy distance; differences in precision."
    write(out / name, title, [head, *lines], result)


def sweep(knob: str, setting: Setting, out: Path) -> None:
    """Differences of rows along a knob, as a table and as curves. Above 0 row is better. The shade is the interval."""
    values, parts = SWEEPS[knob]
    lines, curves, result = [["row - other", "measure", *(f"{v:g}" for v in values)]], {}, {}
    for part in tqdm(parts, knob):
        for by in ("precision", "distance"):
            settings = [replace(setting, **{knob: value}) for value in values]
            gains = [difference(scores(s, part.row), scores(s, part.other), part, by) for s in settings]
            lines.append([label(part), by, *map(cell, gains)])
            result[f"{label(part)}, {by}"] = [(value, *pair) for value, pair in zip(values, gains)]
            line = [(value, ends(pair)) for value, pair in zip(values, gains)]
            curves.setdefault(f"Difference in {by}, above 0 is better", {})[label(part)] = line
    charts.chart(curves, out / f"{knob}.png", along=knob)
    write(out / knob, f"# {knob}\n\n{heading(setting)}", lines, result)
