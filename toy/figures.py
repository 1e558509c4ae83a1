"""Pictures of results: the contact sheet shows every model on the same cases, the curve shows scores during training."""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from toy import world
from toy.world import Case

TILE = world.SIDE * world.ENLARGE + 4  # a picture and the space after it
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b")


def contact_sheet(models: dict[str, dict[str, list[Image.Image]]], each: int, path: Path) -> None:
    """The same cases under every model, one model in a row. Above, 2 x `each` cases of the three T2I categories; below, `each`
    cases of the six families of edits, under their sources. The last row is the truth.

    models: {name: {"t2i portrait": pictures, "edit scene": pictures, ...}}, pictures in the order of the bench
    """
    blocks = []  # for each bench: {category: cases}, {name of the row: {category: pictures}}
    for bench, count in (("t2i", 2 * each), ("edit", each)):
        first = {key.split()[1]: shown for key, shown in next(iter(models.values())).items() if key.startswith(bench)}
        cases = {category: world.bench(bench, category, min(count, len(shown))) for category, shown in first.items()}
        rows = {name: {c: shown[f"{bench} {c}"][: len(cases[c])] for c in cases} for name, shown in models.items()}
        rows["one right answer"] = {c: [answer(case) for case in some] for c, some in cases.items()}
        if bench == "edit":
            rows = {"source": {c: [case.images[0] for case in some] for c, some in cases.items()}} | rows
        if cases:
            blocks.append((cases, rows))

    tile, gap, font, small = TILE, 12, ImageFont.load_default(16), ImageFont.load_default(11)
    heads = [66 if "source" in rows else 28 for _, rows in blocks]  # an edit's instruction stands above it
    left = 24 + int(max(font.getlength(name) for _, rows in blocks for name in rows))
    height = sum(head + len(rows) * tile for head, (_, rows) in zip(heads, blocks))
    canvas = Image.new("RGB", (left + 6 * (each * tile + gap), height), "white")
    pen, top = ImageDraw.Draw(canvas), 0
    for head, (cases, rows) in zip(heads, blocks):
        for i, (name, categories) in enumerate(rows.items()):
            x, y = left, top + head + i * tile
            pen.text((8, y + tile // 2), name, fill="black", font=font, anchor="lm")
            for category, pictures in categories.items():
                for j, (case, picture) in enumerate(zip(cases[category], pictures)):
                    canvas.paste(picture, (x + j * tile, y), picture)
                    if i == 0 and case.edit:
                        words = textwrap.fill(case.prompt, 20)
                        pen.multiline_text(
                            (x + j * tile, y - 3), words, fill="black", font=small, anchor="ld", spacing=1
                        )
                if i == 0:
                    pen.text((x, top + 20 if case.edit else y - 4), category, fill="black", font=font, anchor="ls")
                x += len(pictures) * tile + gap
        top += head + len(rows) * tile
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def answer(case: Case) -> Image.Image:
    """The picture that the case was made from. For a T2I case it is one of many right ones."""
    return world.enlarge(world.render(case.target, case.edit and case.edit.style))


def chart(panels: dict[str, dict[str, list[tuple[float, list[float]]]]], path: Path) -> None:
    """Panels side by side: {title: {name of the line: [(step, one value for each seed)]}}. A line runs through the means; its
    shadow reaches from the lowest to the highest seed."""
    width, height, left, top, foot = 520, 340, 52, 34, 40
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
        x0, x1, y0, y1 = panel * width + left, (panel + 1) * width - 14, top, height - foot

        def place(x: float, y: float) -> tuple[float, float]:
            return x0 + (x1 - x0) * x / last, y1 - (y1 - y0) * (y - low) / (high - low)  # noqa: B023

        pen.text((x0, 8), title, fill="black", font=font)
        for i in range(5):
            y = low + (high - low) * i / 4
            pen.line([(x0, place(0, y)[1]), (x1, place(0, y)[1])], fill="#dddddd")
            pen.text((x0 - 6, place(0, y)[1]), f"{y:.3f}", fill="black", font=font, anchor="rm")
        for x in sorted(set(steps)):
            pen.text((place(x, low)[0], y1 + 6), f"{x:g}", fill="black", font=font, anchor="ma")
        pen.text(((x0 + x1) / 2, height - 18), "updates of the student", fill="black", font=font, anchor="ma")
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
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
