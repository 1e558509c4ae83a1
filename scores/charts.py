"""Charts: scores during training, or along a knob."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf")


def chart(panels: dict[str, dict], path: Path, along: str = "updates of the student") -> None:
    """Writes the picture of `curves`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    curves(panels, along).save(path)


def curves(
    panels: dict[str, dict[str, list[tuple[float, list[float]]]]], along: str, width: int = 520, height: int = 340
) -> Image.Image:
    """Panels side by side: {title: {name of the line: [(x, values at x)]}}. A line runs through the means; its shadow reaches
    from the lowest to the highest value: of all seeds, or the ends of an interval. along: what x is."""
    left, top, foot = 52, 34, 40
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colours = dict(zip(names, COLOURS * (1 + len(names) // len(COLOURS))))
    canvas = Image.new("RGB", (len(panels) * width, height + 20 * len(names) + 10), "white")
    pen, font = ImageDraw.Draw(canvas, "RGBA"), ImageFont.load_default(13)
    for panel, (title, lines) in enumerate(panels.items()):
        points = [(x, y) for line in lines.values() for x, some in line for y in some]
        steps, values = zip(*points)
        low, high, last = min(values), max(values), max(steps) or 1
        margin = max(0.01, 0.08 * (high - low))
        low, high = low - margin, high + margin
        x0, x1, y0, y1 = panel * width + left, (panel + 1) * width - 18, top, height - foot

        def place(x: float, y: float) -> tuple[float, float]:
            return x0 + (x1 - x0) * x / last, y1 - (y1 - y0) * (y - low) / (high - low)  # noqa: B023

        pen.text((x0, 8), title, fill="black", font=font)
        for i in range(5):
            y = low + (high - low) * i / 4
            pen.line([(x0, place(0, y)[1]), (x1, place(0, y)[1])], fill="#dddddd")
            pen.text((x0 - 6, place(0, y)[1]), f"{y:.3f}", fill="black", font=font, anchor="rm")
        if low < 0 < high:
            pen.line([place(0, 0), place(last, 0)], fill="black")
        for x in sorted(set(steps)):
            pen.text((place(x, low)[0], y1 + 6), f"{x:g}", fill="black", font=font, anchor="ma")
        pen.text(((x0 + x1) / 2, height - 18), along, fill="black", font=font, anchor="ma")
        for name, line in lines.items():
            upper, lower = ([place(x, bound(some)) for x, some in line] for bound in (max, min))
            pen.polygon(upper + lower[::-1], fill=colours[name] + "22")
            means = [place(x, sum(some) / len(some)) for x, some in line]
            pen.line(means, fill=colours[name], width=2)
            for x, y in means:
                pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colours[name])
    for i, name in enumerate(names):
        y = height + 20 * i + 8
        pen.line([(left, y), (left + 24, y)], fill=colours[name], width=3)
        pen.text((left + 32, y), name, fill="black", font=font, anchor="lm")
    return canvas
