"""Pictures of results: the contact sheet shows every model on the same cases, curves show scores during training or along
a knob, and panels show samples and arrows on the plane (toy/plane_method.py)."""

import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from toy import world
from toy.plane_method import Mixture
from toy.world import Case

TILE = world.SIDE * world.ENLARGE + 4  # a picture and the space after it
HEADING = 92  # above the rows: the categories, and every case's prompt
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf")


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


# ---- the plane -----------------------------------------------------------------------------------------------------

FINE = 3  # a panel is drawn so many times too large, and then reduced: this makes edges smooth
SIDE, HEAD = 400, 56  # pixels of a panel, and of the title above it
BLUE, RED, GREEN, GREY, BLACK = "#1f5fb4", "#d0312d", "#1f8a4c", "#8c8c8c", "#202020"


class Panel:
    """A window on the plane, `edge` to each side of the origin. The shade is the density of truth, whose centre is (1, 2)
    or 0. Points are (..., 2)."""

    def __init__(self, title: str, note: str, truth: Mixture, edge: float):
        self.image, self.edge = Image.new("RGB", (SIDE * FINE, (SIDE + HEAD) * FINE), "white"), edge
        self.pen = ImageDraw.Draw(self.image, "RGBA")
        self.write((8, 6), title, BLACK, 18)
        self.write((8, 30), note, GREY, 14)
        line = torch.linspace(-edge, edge, 100)
        places = torch.cartesian_prod(-line, line).flip(1)  # from the upper left, row by row
        density = (-torch.cdist(places, truth.modes + truth.centre).square() / (2 * truth.sd**2)).exp().sum(1)
        colours = 255 - density.clamp(max=1)[:, None] * torch.tensor([70.0, 45.0, 5.0])
        tile = Image.fromarray(colours.byte().reshape(100, 100, 3).numpy())
        self.image.paste(tile.resize((SIDE * FINE, SIDE * FINE)), (0, HEAD * FINE))

    def write(self, place: tuple[float, float], words: str, colour: str, size: int) -> None:
        """place: pixels from the upper left corner."""
        self.pen.text((place[0] * FINE, place[1] * FINE), words, colour, ImageFont.load_default(size * FINE))

    def pixels(self, points: Tensor) -> list[tuple[float, float]]:
        x, y = ((points / self.edge + 1) / 2 * SIDE * FINE).unbind(-1)  # y runs upwards
        return [(a, (HEAD + SIDE) * FINE - b) for a, b in zip(x.tolist(), y.tolist())]

    def dots(self, points: Tensor, colour: str, radius: float) -> None:
        r = radius * FINE
        for x, y in self.pixels(points):
            self.pen.ellipse([x - r, y - r, x + r, y + r], fill=colour)

    def line(self, points: Tensor, colour: str) -> None:
        self.pen.line(self.pixels(points), fill=colour, width=round(1.5 * FINE), joint="curve")

    def arrow(self, start: Tensor, end: Tensor, colour: str) -> None:
        along = (end - start) / (end - start).norm().clamp(min=1e-6) * 0.04 * self.edge
        across = torch.stack([-along[1], along[0]]) / 2
        self.line(torch.stack([start, end - along / 2]), colour)
        self.pen.polygon(self.pixels(torch.stack([end, end - along + across, end - along - across])), fill=colour)


def frame(step: int, samples: dict[str, Tensor], truths: dict[str, Mixture], source: Tensor) -> Image.Image:
    """Of the animation: what students draw after so many updates, by category; the source of the edit is (1, 2)."""
    notes = {
        "portrait": "shade: where right samples are",
        "text": "many narrow modes",
        "object": "black: the source; three answers are right",
    }
    panels = [Panel(f"{category}: {step} updates", notes[category], truths[category], 2.7) for category in notes]
    for category, panel in zip(notes, panels):
        panel.dots(samples[category], BLUE + "c0", 3)
    panels[-1].dots(source, BLACK, 6)
    return tiled([panel.image.reduce(5) for panel in panels])


def six_panels(
    truth: Mixture, ways: dict[str, Tensor], early: int, corrections: tuple[list[Tensor], Tensor, Tensor], found: dict
) -> Image.Image:
    """Portraits. Above, three models: `ways` are the stops of their samples, (steps + 1, N, 2). Below, the DMD gradient after
    `early` updates: of one sample, x, x_t, x0_real, x0_fake, (2,) each, and of all, g and x_theta, (N, 2); and what was
    measured, {model: {updates: {category: measures}}}."""
    notes = (
        "from noise (grey) to a sample (red); blue: other samples",
        "too few: many samples end between the shaded modes",
        "after training more of them end in a mode",
    )
    panels = []
    for i, (model, note) in enumerate(zip(ways, notes), 1):
        panels.append(Panel(f"{i}. {model}", note, truth, 2.4))
        panels[-1].dots(ways[model][-1], BLUE + "a0", 2)
        for way in ways[model].unbind(1)[:14]:  # (steps + 1, 2) each
            panels[-1].line(way, BLACK)
            panels[-1].dots(way[1:-1], BLACK, 1 if len(way) > 5 else 3)
            panels[-1].dots(way[:1], GREY, 4)
            panels[-1].dots(way[-1:], RED, 4)

    (x, x_t, x0_real, x0_fake), g, x_theta = corrections
    note = "put noise on it; both networks guess what it was"
    panel = Panel("4. How one sample is corrected", note, truth, 1.5)
    better = x + x0_real - x0_fake
    panel.line(torch.stack([x, x_t]), GREY)
    panel.arrow(x_t, x0_real, BLUE)
    panel.arrow(x_t, x0_fake, RED)
    panel.line(torch.stack([x0_fake, x0_real]), GREEN)
    panel.arrow(x, better, GREEN)
    legend = (
        (x, BLACK, "x_theta: drawn by the student"),
        (x_t, GREY, "x_t: the same, with noise"),
        (x0_real, BLUE, "x0_real: the teacher's guess from x_t"),
        (x0_fake, RED, "x0_fake: the fake score's guess from x_t"),
        (better, GREEN, "-g: from red to blue; x_theta moves that way"),
    )
    for i, (place, colour, words) in enumerate(legend):
        panel.dots(place[None], colour, 5)
        panel.write((16, 350 + 20 * i), words, colour, 14)
    panels.append(panel)

    note = f"the mean of -g after {early} updates: out to the modes"
    panel = Panel("5. How all samples are corrected", note, truth, 2.4)
    for start, end in zip(x_theta[::2], (x_theta - 0.2 * g)[::2]):
        panel.dots(start[None], BLACK, 2)
        panel.arrow(start, end, GREEN)
    panels.append(panel)

    lines = {}
    for key, meaning in (("precision", "samples in a mode"), ("coverage", "modes that are drawn")):
        for model, at in found.items():
            means = [[scored[category][key] for category in world.CATEGORIES] for scored in at.values()]
            lines[f"{key} ({meaning}): {model.lower()}"] = [(s, [sum(m) / len(m)]) for s, m in zip(at, means)]
    title = "6. As training goes on (landscape, portrait and text)"
    last = curves({title: lines}, "updates of the student", SIDE, 326)
    return tiled([*(panel.image.reduce(FINE) for panel in panels), last]).quantize(256, Image.Quantize.MAXCOVERAGE)


def tiled(images: list[Image.Image]) -> Image.Image:
    """Three in a row, each as large as the first."""
    width, height = images[0].size
    canvas = Image.new("RGB", (3 * width, len(images) // 3 * height), "white")
    for i, image in enumerate(images):
        canvas.paste(image, (i % 3 * width, i // 3 * height))
    return canvas
