"""Charts: scores during training, or along a knob."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf")
Lines = dict[str, list[tuple[float, list[float]]]]  # name of a line -> [(x, values at x)]


def chart(panels: dict[str, Lines], path: Path, along: str = "updates of the student") -> None:
    """Write the picture of `curves`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    curves(panels, along).save(path)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round numbers, evenly spaced: the first is at most `low`, the last at least `high`.

    Their distance is 1, 2 or 5 times a power of ten. So the axis of a share, whose values end at 1, ends at 1.
    """
    if high <= low:
        high = low + 0.01
    rough = (high - low) / (most - 1)
    for mantissa in (1, 2, 5, 10, 20, 50):
        distance = mantissa * 10 ** math.floor(math.log10(rough))
        first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
        if last - first < most:
            break
    return [i * distance for i in range(first, last + 1)]


def curves(
    panels: dict[str, Lines],
    along: str,
    width: int = 520,
    height: int = 340,
    log: bool = False,
    reach: Sequence[float] = (),
) -> Image.Image:
    """Panels side by side, by title, above a legend.

    A line runs through the means; its shadow reaches from the lowest to the highest value at each x. These are all seeds, or
    the ends of an interval. along: what x is; log: x has a logarithmic scale, and is above 0; reach: values that every
    panel has room for; width, height: of a panel, in pixels.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colours = dict(zip(names, COLOURS * (1 + len(names) // len(COLOURS))))
    canvas = Image.new("RGB", (len(panels) * width, height + 20 * len(names) + 10), "white")
    pen, font = ImageDraw.Draw(canvas, "RGBA"), ImageFont.load_default(13)
    for panel, (title, lines) in enumerate(panels.items()):
        x0, x1 = panel * width + 52, (panel + 1) * width - 26
        y0, y1 = 34, height - 40
        pen.text((x0, 8), title, fill="black", font=font)
        pen.text(((x0 + x1) / 2, height - 18), along, fill="black", font=font, anchor="ma")
        draw_lines(pen, (x0, y0, x1, y1), lines, colours, log, reach)
    for i, name in enumerate(names):
        y = height + 20 * i + 8
        pen.line([(52, y), (76, y)], fill=colours[name], width=3)
        pen.text((84, y), name, fill="black", font=font, anchor="lm")
    return canvas


def draw_lines(
    pen: ImageDraw.ImageDraw,
    frame: tuple[float, float, float, float],
    lines: Lines,
    colours: dict[str, str],
    log: bool,
    reach: Sequence[float],
) -> None:
    """Axes and lines inside a frame (left, top, right, bottom), in pixels; the axes' numbers stand outside."""
    x0, y0, x1, y1 = frame
    font = ImageFont.load_default(13)
    steps = sorted({x for line in lines.values() for x, _ in line})
    values = [y for line in lines.values() for _, at_x in line for y in at_x]
    levels = ticks(min([*values, *reach]), max([*values, *reach]))

    def place(x: float, y: float) -> tuple[float, float]:
        if not log:
            along_x = x / (steps[-1] or 1)
        elif len(steps) > 1:
            along_x = math.log(x / steps[0]) / math.log(steps[-1] / steps[0])
        else:
            along_x = 0.5
        along_y = (y - levels[0]) / (levels[-1] - levels[0])
        return x0 + (x1 - x0) * along_x, y1 - (y1 - y0) * along_y

    for level in levels:
        y = place(steps[0], level)[1]
        pen.line([(x0, y), (x1, y)], fill="black" if abs(level) < 1e-9 else "#dddddd")
        pen.text((x0 - 6, y), f"{level:.4g}", fill="black", font=font, anchor="rm")
    for x in steps:
        pen.text((place(x, levels[0])[0], y1 + 6), f"{x:g}", fill="black", font=font, anchor="ma")
    for name, line in lines.items():
        upper = [place(x, max(at_x)) for x, at_x in line]
        lower = [place(x, min(at_x)) for x, at_x in line]
        pen.polygon(upper + lower[::-1], fill=colours[name] + "22")
        means = [place(x, sum(at_x) / len(at_x)) for x, at_x in line]
        pen.line(means, fill=colours[name], width=2)
        for x, y in means:
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colours[name])
