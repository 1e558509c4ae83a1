"""What a row says of its pictures without a judge: what edits did to the parts they should not touch, colours, variety.

    edit_measures     motion and colours of the unchanged parts: scores/motion.py
    colour_measures   saturation and contrast of T2I pictures: scores/colours.py
    mean_distance     how far several pictures of one prompt lie apart
    measures_table    the measures of several rows in Markdown

The keys, and what they mean: docs/benches.md.
"""

from collections.abc import Iterable
from itertools import combinations

import numpy as np

from scores.colours import colours
from scores.motion import colour_drift, motion
from scores.rows import markdown, with_interval
from scores.statistics import mean_over_cases, median_interval

EDIT_NUMBERS = ("shift", "right", "down", "scale", "drift", "chroma")  # of one edit, see measure_edit


def mean_distance(pictures: list[np.ndarray]) -> float:
    """The root mean square between two pictures, 0 to 1, averaged over all pairs."""
    return float(np.mean([np.sqrt(np.square(a - b).mean()) for a, b in combinations(pictures, 2)]))


def measure_edit(source: np.ndarray, edited: np.ndarray) -> dict[str, float] | None:
    """The numbers of one edit: shift, right and down in pixels, scale and chroma in percent, drift in CIELAB.

    None if it has no unchanged parts. Both pictures have one size.
    """
    moved = motion(source, edited)
    if moved is None:
        return None
    down, right = (float(pixels) for pixels in moved.shift)
    drift, chroma = colour_drift(source, edited, moved)
    scale = 100 * (moved.scale - 1)
    shift = float(np.hypot(down, right))
    return {"shift": shift, "right": right, "down": down, "scale": scale, "drift": drift, "chroma": chroma}


def edit_measures(edits: Iterable[tuple[np.ndarray, np.ndarray]], left_out: int = 0) -> dict:
    """A row's keys for edits, each (source, edited picture) of one size. left_out: see summary_of_edits."""
    return summary_of_edits([measure_edit(source, edited) for source, edited in edits], left_out)


def summary_of_edits(edits: list[dict[str, float] | None], left_out: int = 0) -> dict:
    """A row's keys, from what measure_edit gives for each edit.

    Medians over the cases with unchanged parts, and the ends of their 95% intervals; None if there is no such case.
    left_out: further cases, known to have no such parts.
    """
    measured = [edit for edit in edits if edit is not None]
    numbers = {name: [edit[name] for edit in measured] for name in EDIT_NUMBERS}
    shifts = numbers["shift"]
    return {
        "edit_shift": {
            "median_px": median(shifts),
            "interval_px": median_interval(shifts),
            "median_xy": [median(numbers["right"]), median(numbers["down"])],
            "over_16px": float(np.mean(np.array(shifts) > 16)) if shifts else None,
            "measured": len(measured),
            "of": left_out + len(edits),
        },
        "edit_scale": {
            "median_percent": median(numbers["scale"]),
            "interval_percent": median_interval(numbers["scale"]),
        },
        "edit_colour": {
            "median_lab": median(numbers["drift"]),
            "interval_lab": median_interval(numbers["drift"]),
            "chroma_percent": median(numbers["chroma"]),
            "interval_chroma": median_interval(numbers["chroma"]),
        },
    }


def median(numbers: list[float]) -> float | None:
    return float(np.median(numbers)) if numbers else None


def colour_measures(pictures: Iterable[np.ndarray], reference: Iterable[np.ndarray] = ()) -> dict:
    """A row's key for T2I pictures: mean saturation and contrast, and half the width of their 95% intervals.

    reference: another model's pictures of the same cases. Then also by how much both are higher than that model's.
    """
    own = np.array([colours(picture) for picture in pictures]).reshape(-1, 2)  # (N, 2)
    other = np.array([colours(picture) for picture in reference]).reshape(-1, 2)
    row = {}
    for column, name in enumerate(("saturation", "contrast")):
        row[name], row[f"{name}_half"] = mean_over_cases(own[:, column])
        if len(other):
            difference, half = mean_over_cases(own[:, column] - other[:, column])
            row[f"{name}_above_reference"], row[f"{name}_above_reference_half"] = difference, half
    return {"t2i_colour": row}


LINES = (  # of the table: title, key in the row, name of the value, digits
    ("edits: shift, pixels", "edit_shift", "median_px", 2),
    ("edits: share above 16 pixels", "edit_shift", "over_16px", 3),
    ("edits: scale, %", "edit_scale", "median_percent", 2),
    ("edits: colour drift, CIELAB", "edit_colour", "median_lab", 1),
    ("edits: change of chroma, %", "edit_colour", "chroma_percent", 1),
    ("T2I: saturation, CIELAB", "t2i_colour", "saturation", 1),
    ("T2I: contrast, CIELAB", "t2i_colour", "contrast", 1),
    ("... saturation above the reference", "t2i_colour", "saturation_above_reference", 1),
    ("... contrast above the reference", "t2i_colour", "contrast_above_reference", 1),
    ("T2I: distance of pictures of one prompt", "variety", "distance", 3),
    ("edits: distance of pictures of one case", "variety", "edit_distance", 3),
)
MEDIAN_INTERVALS = {  # a mean's interval is NAME_half
    "median_px": "interval_px",
    "median_percent": "interval_percent",
    "median_lab": "interval_lab",
    "chroma_percent": "interval_chroma",
}


def measures_table(rows: list[dict]) -> str:
    """Markdown, a model in a column. Lines without any number are left out."""
    lines = [["", *(row["name"] for row in rows)]]
    for title, key, name, digits in LINES:
        interval = MEDIAN_INTERVALS.get(name, f"{name}_half")
        measures = [row.get(key, {}) for row in rows]
        cells = [cell(values.get(name), values.get(interval), digits) for values in measures]
        if any(text != "-" for text in cells):
            lines.append([title, *cells])
    shifts = [row.get("edit_shift") for row in rows]
    counts = [f"{shift['measured']} of {shift['of']}" if shift else "-" for shift in shifts]
    lines.append(["edits with unchanged parts", *counts])
    return markdown(lines)


def cell(value: float | None, interval: list[float] | float | None, digits: int) -> str:
    """A number with its interval, which is given by its two ends, by half its width, or not at all."""
    if not isinstance(interval, list):
        return with_interval(value, interval, digits=digits)
    low, high = interval
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
