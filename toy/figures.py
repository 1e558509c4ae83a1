"""The contact sheet: every model on the same cases."""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from toy import world
from toy.world import Case

TILE = world.SIDE * world.ENLARGE + 4  # a picture and the space after it
HEADING = 92  # above the rows: the categories, and every case's prompt


def contact_sheet(models: dict[str, dict[str, list[Image.Image]]], each: dict[str, int], path: Path) -> None:
    """The same cases under every model, one model in a row. Above, each["t2i"] cases of the three categories, with their
    prompts; below, each["edit"] cases of the six families of edits, under their sources. The last row is the truth.

    models: {name: {"t2i portrait": pictures, "edit scene": pictures, ...}}, pictures in the order of the bench
    """
    blocks = []  # for each bench: {category: cases}, {name of the row: {category: pictures}}
    for bench, count in each.items():
        counts = {key: min(len(shown[key]) for shown in models.values()) for key in next(iter(models.values()))}
        counts = {key.split()[1]: min(count, least) for key, least in counts.items() if key.startswith(bench)}
        cases = {category: world.bench(bench, category, n) for category, n in counts.items()}
        rows = {name: {c: shown[f"{bench} {c}"][: len(cases[c])] for c in cases} for name, shown in models.items()}
        rows["one right answer"] = {c: [answer(case) for case in some] for c, some in cases.items()}
        if bench == "edit":
            rows = {"source": {c: [case.images[0] for case in some] for c, some in cases.items()}} | rows
        if cases:
            blocks.append((cases, rows))

    gap, font, small = 12, ImageFont.load_default(16), ImageFont.load_default(11)
    left = 24 + int(max(font.getlength(name) for _, rows in blocks for name in rows))
    height = sum(HEADING + len(rows) * TILE for _, rows in blocks)
    width = max(sum(len(some) * TILE + gap for some in cases.values()) for cases, _ in blocks)
    canvas = Image.new("RGB", (left + width, height), "white")
    pen, top = ImageDraw.Draw(canvas), 0
    for cases, rows in blocks:
        x = left
        for category, some in cases.items():
            pen.text((x, top + 20), category, fill="black", font=font, anchor="ls")
            for j, case in enumerate(some):
                words = textwrap.fill(case.prompt, 20)
                pen.multiline_text((x + j * TILE, top + HEADING - 3), words, "black", small, "ld", spacing=1)
                for i, pictures in enumerate(rows.values()):
                    picture = pictures[category][j]
                    canvas.paste(picture, (x + j * TILE, top + HEADING + i * TILE), picture)
            x += len(some) * TILE + gap
        for i, name in enumerate(rows):
            pen.text((8, top + HEADING + i * TILE + TILE // 2), name, fill="black", font=font, anchor="lm")
        top += HEADING + len(rows) * TILE
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def answer(case: Case) -> Image.Image:
    """The picture that the case was made from. For a T2I case it is one of many right ones."""
    return world.enlarge(world.render(case.target))
