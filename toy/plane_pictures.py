"""Pictures of the plane: what DMD does, in six panels and as an animation; and differences along a knob, as curves.

A panel is a square window on the plane. Everything is drawn three times too large and then reduced, for smooth edges.
"""

import math
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dmd import dmd_gradient
from flow import Velocity, add_noise, euler
from toy.plane import SIGMAS, Mixture, Model

FINE = 3  # so many times larger
SIDE, HEAD = 400, 56  # a panel's pixels, and its title's
BLUE, RED, GREEN, GREY, BLACK = "#1f5fb4", "#d0312d", "#1f8a4c", "#8c8c8c", "#202020"
COLOURS = (BLUE, RED, GREEN, "#e08214", "#8856a7", "#7f5539", "#111111")


class Panel:
    """A window on the plane, from -edge to edge, at a place (column, row) of a picture."""

    def __init__(self, picture: Image.Image, column: int, row: int, title: str, note: str, edge: float = 2.7):
        self.picture, self.pen, self.edge = picture, ImageDraw.Draw(picture, "RGBA"), edge
        self.left, self.top = column * SIDE * FINE, row * (SIDE + HEAD) * FINE
        self.write((8, 6), title, BLACK, 18)
        self.write((8, 30), note, GREY, 14)

    def write(self, place: tuple[float, float], words: str, colour: str, size: int = 14) -> None:
        """place: pixels from the panel's upper left corner."""
        xy = (self.left + place[0] * FINE, self.top + place[1] * FINE)
        self.pen.text(xy, words, colour, ImageFont.load_default(size * FINE))

    def shade(self, truth: Mixture) -> None:
        """The density of what is right."""
        line = torch.linspace(-self.edge, self.edge, 100)
        places = torch.cartesian_prod(-line, line).flip(1)  # from the upper left, row by row
        density = (-torch.cdist(places, truth.modes + truth.centre).square() / (2 * truth.sd**2)).exp().sum(1)
        colours = 255 - density.clamp(max=1)[:, None] * torch.tensor([70.0, 45.0, 5.0])
        tile = Image.fromarray(colours.byte().reshape(100, 100, 3).numpy())
        tile = tile.resize((SIDE * FINE, SIDE * FINE), Image.BICUBIC)
        self.picture.paste(tile, (self.left, self.top + HEAD * FINE))

    def pixels(self, points: Tensor) -> list[tuple[float, float]]:
        x, y = ((points / self.edge + 1) / 2 * SIDE * FINE).unbind(-1)  # y runs upwards
        return [(self.left + a, self.top + (HEAD + SIDE) * FINE - b) for a, b in zip(x.tolist(), y.tolist())]

    def dots(self, points: Tensor, colour: str, radius: float) -> None:
        r = radius * FINE
        for x, y in self.pixels(points):
            self.pen.ellipse([x - r, y - r, x + r, y + r], fill=colour)

    def line(self, points: Tensor, colour: str, width: float = 1.5) -> None:
        self.pen.line(self.pixels(points), fill=colour, width=round(width * FINE), joint="curve")

    def area(self, points: Tensor, colour: str) -> None:
        self.pen.polygon(self.pixels(points), fill=colour)

    def label(self, place: tuple[float, float], words: str, colour: str, anchor: str = "lm") -> None:
        """Words at a place of the plane; anchor is Pillow's."""
        self.pen.text(self.pixels(torch.tensor([place]))[0], words, colour, ImageFont.load_default(13 * FINE), anchor)

    def arrow(self, start: Tensor, end: Tensor, colour: str) -> None:
        along = (end - start) / (end - start).norm().clamp(min=1e-6) * 0.04 * self.edge
        across = torch.stack([-along[1], along[0]]) / 2
        self.line(torch.stack([start, end - along / 2]), colour)
        self.area(torch.stack([end, end - along + across, end - along - across]), colour)


def blank(columns: int, rows: int, more: int = 0) -> Image.Image:
    """An empty picture of so many panels, and `more` pixels below them."""
    return Image.new("RGB", (columns * SIDE * FINE, (rows * (SIDE + HEAD) + more) * FINE), "white")


def reduced(picture: Image.Image, scale: float = 1.0) -> Image.Image:
    return picture.resize([round(side / FINE * scale) for side in picture.size], Image.LANCZOS)


def save(picture: Image.Image, place: Path) -> None:
    """As a PNG of 256 colours, a third as large."""
    reduced(picture).quantize(256, Image.Quantize.MAXCOVERAGE).save(place, optimize=True)


# ---- the six panels ------------------------------------------------------------------------------------------------


def paths(
    picture: Image.Image, column: int, title: str, note: str, v: Velocity, noise: Tensor, sigmas: list, truth
) -> None:
    """Panels 1 to 3: where samples end (blue), and the way there of some, from noise (grey) to picture (red)."""
    panel = Panel(picture, column, 0, title, note)
    panel.shade(truth)
    stops = [noise]
    for pair in pairwise(sigmas):
        stops.append(euler(v, stops[-1], pair))
    panel.dots(stops[-1][:300], BLUE + "a0", 2)
    for way in torch.stack(stops, dim=1)[:14]:  # (stops, 2) each
        panel.line(way, BLACK)
        panel.dots(way[1:-1], BLACK, 1 if len(way) > 5 else 3)
        panel.dots(way[:1], GREY, 4)
        panel.dots(way[-1:], RED, 4)


def one_gradient(picture: Image.Image, real: Velocity, fake: Velocity, x_theta: Tensor, truth: Mixture) -> None:
    """Panel 4: the DMD gradient of one sample; x_theta (N, 2)."""
    panel = Panel(
        picture, 0, 1, "4. One sample's gradient", "noise what the student drew; ask both what it was", edge=1.5
    )
    panel.shade(truth)
    x = x_theta[(x_theta[:300] - torch.tensor([0.3, 0.9])).norm(dim=1).argmin()]  # one between two modes
    xi, t = torch.tensor([0.9, -0.1]), torch.full((len(x_theta),), 0.5)
    _, x0_real, x0_fake = (one[0] for one in dmd_gradient(real, fake, x.expand_as(x_theta), xi.expand_as(x_theta), t))
    x_t, better = add_noise(x[None], xi[None], t[:1])[0], x + x0_real - x0_fake
    panel.line(torch.stack([x, x_t]), GREY)
    panel.arrow(x_t, x0_real, BLUE)
    panel.arrow(x_t, x0_fake, RED)
    panel.line(torch.stack([x0_fake, x0_real]), GREEN)
    panel.arrow(x, better, GREEN)
    legend = (
        (x, BLACK, "x_theta: drawn by the student"),
        (x_t, GREY, "x_t: the same, with noise"),
        (x0_real, BLUE, "x0_real: the teacher's answer"),
        (x0_fake, RED, "x0_fake: the fake score's answer"),
        (better, GREEN, "-g: x_theta moves as from red to blue"),
    )
    for i, (place, colour, words) in enumerate(legend):
        panel.dots(place[None], colour, 5)
        panel.write((16, 350 + 20 * i), words, colour)


def field(picture: Image.Image, real: Velocity, fake: Velocity, x_theta: Tensor, truth: Mixture) -> None:
    """Panel 5: -g at many samples, each averaged over 60 noises."""
    panel = Panel(picture, 1, 1, "5. The field -g", "its mean over noises: samples are carried to the modes")
    panel.shade(truth)
    rng, mean = torch.Generator().manual_seed(0), torch.zeros_like(x_theta)
    for _ in range(60):
        xi, t = torch.randn(x_theta.shape, generator=rng), 0.02 + 0.96 * torch.rand(len(x_theta), generator=rng)
        mean += dmd_gradient(real, fake, x_theta, xi, t).g / 60
    for x, g in zip(x_theta[:150], mean):
        panel.dots(x[None], BLACK, 2)
        panel.arrow(x, x - 0.25 * g, GREEN)


def progress(
    picture: Image.Image, curves: dict[str, dict[int, float]], teachers: dict[str, tuple[float, float]]
) -> None:
    """Panel 6: measures of the student after so many updates; thin, the teacher's with 40 and with 4 steps."""
    panel = Panel(picture, 2, 1, "6. As training goes on", "means over landscape, portrait and text", edge=1.15)
    last = max(max(curve) for curve in curves.values())

    def at(step: int, height: float) -> tuple[float, float]:
        return 2 * math.log1p(step) / math.log1p(last) - 1, 2 * height - 1

    for height in (0.0, 0.5, 1.0):
        panel.label((-1.03, 2 * height - 1), f"{height:g}", GREY, "rm")
    for step in sorted({0, min(10, last), min(100, last), last}):
        panel.label((at(step, 0)[0], -1.06), f"{step} updates" if step == 0 else f"{step}", GREY, "ma")
    for (name, curve), colour in zip(curves.items(), (BLUE, GREEN)):
        for steps, height in zip((40, 4), teachers[name]):
            panel.line(torch.tensor([at(0, height), at(last, height)]), colour + "80", 0.8)
            panel.label((-0.98, 2 * height - 1.05), f"{name}, teacher, {steps} steps", colour)
        panel.line(torch.tensor([at(*point) for point in curve.items()]), colour, 3)
    panel.label((0.98, -0.9), "thick: the student", BLACK, "rm")


def moving(model: Model, step: int, noise: Tensor, source: Tensor, truth: dict[str, Mixture]) -> Image.Image:
    """A frame of the animation: what the student draws after so many updates."""
    frame, notes = blank(3, 1), ("shade: what is right", "many narrow modes", "black: the source; three right answers")
    for column, (task, category) in enumerate((("t2i", "portrait"), ("t2i", "text"), ("edit", "object"))):
        panel = Panel(frame, column, 0, f"{category}: {step} updates", notes[column])
        panel.shade(truth[category])
        panel.dots(euler(model(task, category, source), noise, SIGMAS)[:300], BLUE + "c0", 3)
        if task == "edit":
            panel.dots(source[:1], BLACK, 6)
    return reduced(frame, 0.6)


# ---- differences along a knob --------------------------------------------------------------------------------------


def chart(panels: dict[str, dict[str, list[tuple[float, float, float]]]], knob: str, place: Path) -> None:
    """{title: {label: [(the knob's value, mean, half-width)]}}: curves with their intervals; above the line is better."""
    labels = list(next(iter(panels.values())))
    picture = blank(2, 1, 30 + 22 * len(labels))
    for column, (title, lines) in enumerate(panels.items()):
        panel = Panel(picture, column, 0, title, f"along {knob}", edge=1.25)
        top = max(abs(mean) + half for points in lines.values() for _, mean, half in points if math.isfinite(half)) or 1
        panel.line(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), BLACK, 1)
        for height in (-top, 0.0, top):
            panel.label((-1.02, height / top), f"{height:+.2f}", GREY, "rm")
        for points, colour in zip(lines.values(), COLOURS):
            x = torch.linspace(-0.9, 0.9, len(points))
            values, means, halves = torch.tensor(points).T
            upper, lower = torch.stack([x, (means + halves) / top], 1), torch.stack([x, (means - halves) / top], 1)
            panel.area(torch.cat([upper, lower.flip(0)]), colour + "28")
            panel.line(torch.stack([x, means / top], 1), colour, 2)
            panel.dots(torch.stack([x, means / top], 1), colour, 4)
            for place_x, value in zip(x.tolist(), values.tolist()):
                panel.label((place_x, -1.1), f"{value:g}", GREY, "ma")
    legend = Panel(picture, 0, 0, "", "")
    for i, (label, colour) in enumerate(zip(labels, COLOURS)):
        legend.write((24, SIDE + HEAD + 8 + 22 * i), label, colour, 15)
    save(picture, place)
