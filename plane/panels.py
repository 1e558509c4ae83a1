"""Pictures of the plane: samples, arrows, and the shade of what is right."""

from statistics import mean

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from plane.method import CATEGORIES, Mixture
from scores.charts import curves

FINE = 3  # a panel is drawn this many times too large and then reduced, for smooth edges
SIDE, HEAD = 400, 56  # pixels of a panel, and of the title above it
BLUE, RED, GREEN, GREY, BLACK = "#1f5fb4", "#d0312d", "#1f8a4c", "#8c8c8c", "#202020"


class Panel:
    """A window on the plane, from -edge to edge. Points are (..., 2).

    The shade is the density of truth, whose centre is (1, 2) or 0.
    """

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
    """One frame of the animation: what students draw after `step` updates. source: of the edit, (1, 2)."""
    notes = {
        "portrait": "shade: where right samples are",
        "text": "many narrow modes",
        "object": "black: the source; three answers are right",
    }
    panels = [Panel(f"{category}: {step} updates", notes[category], truths[category], 3.0) for category in notes]
    for category, panel in zip(notes, panels):
        panel.dots(samples[category], BLUE + "c0", 3)
    panels[-1].dots(source, BLACK, 6)
    return tiled([panel.image.reduce(5) for panel in panels])


def six_panels(
    truth: Mixture,
    ways: dict[str, Tensor],
    early: int,
    corrections: tuple[list[Tensor], Tensor, Tensor],
    history: dict[str, dict],
) -> Image.Image:
    """Portraits: three models above, the DMD gradient and the course of training below.

    ways: model -> the stops of its samples, (steps + 1, N, 2).
    corrections: after `early` updates. Of one sample x, x_t, x0_real, x0_fake, (2,) each; of all g and x_theta, (N, 2).
    history: model -> updates -> category -> measures.
    """
    notes = (
        "from noise (grey) to a sample (red); blue: other samples",
        "too few: many samples end between the shaded modes",
        "after training: the nearer to panel 1, the better",
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

    note = f"the mean of -g after {early} updates; the longest are cut"
    panel = Panel("5. How all samples are corrected", note, truth, 2.4)
    moves = -0.2 * g * (3 / g.norm(dim=1, keepdim=True)).clamp(max=1)  # none longer than 0.6
    for start, end in zip(x_theta[::2], (x_theta + moves)[::2]):
        panel.dots(start[None], BLACK, 2)
        panel.arrow(start, end, GREEN)
    panels.append(panel)

    lines = {}
    for key, meaning in (("precision", "samples in a mode"), ("coverage", "modes that are drawn")):
        for model, by_updates in history.items():
            line = lines[f"{key} ({meaning}): {model.lower()}"] = []
            for updates, scored in by_updates.items():
                line.append((updates, [mean(scored[category][key] for category in CATEGORIES["t2i"])]))
    title = "6. As training goes on (landscape, portrait and text)"
    last = curves({title: lines}, "updates of the student", SIDE, 326)
    return tiled([*(panel.image.reduce(FINE) for panel in panels), last]).quantize(256, Image.Quantize.MAXCOVERAGE)


def stacked(charts: list[dict], along: str) -> Image.Image:
    """Rows of `curves`, one below the other. The panels of a row have the same scale."""
    images = []
    for panels in charts:
        lines = [line for by_name in panels.values() for line in by_name.values()]
        values = [y for line in lines for _, interval in line for y in interval]
        images.append(curves(panels, along, SIDE, 300, log=True, reach=values))
    canvas = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    for i, image in enumerate(images):
        canvas.paste(image, (0, sum(above.height for above in images[:i])))
    return canvas


def tiled(images: list[Image.Image]) -> Image.Image:
    """Three in a row, each as large as the first."""
    width, height = images[0].size
    canvas = Image.new("RGB", (3 * width, len(images) // 3 * height), "white")
    for i, image in enumerate(images):
        canvas.paste(image, (i % 3 * width, i // 3 * height))
    return canvas
