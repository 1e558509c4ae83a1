"""A small panel for each claim: its difference along the training, coloured by the verdict."""

import math
import textwrap

from PIL import Image, ImageDraw, ImageFont

from plane.panels import BLACK, BLUE, GREEN, GREY, RED
from scores.charts import ticks

COLOURS = {"agree": GREEN, "disagree": RED, "no effect": BLUE, "cannot tell": GREY}
CORNERS = {"pooled": 0, "below": 4, "told": 3}  # of the mark of a fake score; 0: round
WIDTH, HEIGHT = 400, 230  # pixels of a panel
LEFT, RIGHT, TOP, FOOT = 52, 12, 48, 24  # of it, around the curves
Points = list[tuple[int, float, float, str]]  # updates, difference, half-width of its interval, verdict


class Pen:
    """Draws in pixels of the final image, on one twice as large: reducing it makes edges smooth."""

    def __init__(self, width: int, height: int):
        self.image = Image.new("RGB", (2 * width, 2 * height), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, words: str, size: int, anchor: str = "la") -> None:
        self.draw.text((2 * x, 2 * y), words, BLACK, ImageFont.load_default(2 * size), anchor)

    def line(self, points: list[tuple[float, float]], colour: str, width: float = 1) -> None:
        self.draw.line([(2 * x, 2 * y) for x, y in points], fill=colour, width=round(2 * width))

    def mark(self, x: float, y: float, corners: int, colour: str) -> None:
        if corners:
            self.draw.regular_polygon((2 * x, 2 * y, 12), corners, fill=colour)
        else:
            self.draw.ellipse([2 * x - 9, 2 * y - 9, 2 * x + 9, 2 * y + 9], fill=colour)


def small_panels(claims: dict[str, dict[str, Points]]) -> Image.Image:
    """Three in a row: {claim: {fake score: points}}. Above 0 the claim holds."""
    rows = math.ceil(len(claims) / 3)
    pen = Pen(3 * WIDTH, rows * HEIGHT + 60)
    for i, (claim, by_fake) in enumerate(claims.items()):
        panel(pen, i % 3 * WIDTH, i // 3 * HEIGHT, claim, by_fake)
    y = rows * HEIGHT + 16
    for i, (verdict, colour) in enumerate(COLOURS.items()):
        pen.mark(20 + 130 * i, y, 0, colour)
        pen.text(32 + 130 * i, y, verdict, 13, "lm")
    for i, (fake, corners) in enumerate(CORNERS.items()):
        pen.mark(620 + 170 * i, y, corners, BLACK)
        pen.text(632 + 170 * i, y, f"fake score: {fake}", 13, "lm")
    pen.text(12, y + 24, "Difference over updates of the student, 95% interval; above 0 the claim holds.", 13, "lm")
    return pen.image.reduce(2)


def panel(pen: Pen, x0: float, y0: float, claim: str, by_fake: dict[str, Points]) -> None:
    """One claim; its upper left corner is (x0, y0). At each look the fake scores stand beside each other."""
    for i, words in enumerate(textwrap.wrap(claim, 58)[:2]):
        pen.text(x0 + 8, y0 + 8 + 16 * i, words, 13)
    every = [point for points in by_fake.values() for point in points]
    ends = [0.0, *(d + sign * half for _, d, half, _ in every for sign in (-1, 1))]
    levels = ticks(min(ends), max(ends), 5)
    bottom = y0 + HEIGHT - FOOT
    scale = (HEIGHT - TOP - FOOT) / (levels[-1] - levels[0])  # pixels

    def height(difference: float) -> float:
        return bottom - (difference - levels[0]) * scale

    for level in levels:
        is_zero = abs(level) < 1e-9
        y = height(level)
        pen.line([(x0 + LEFT, y), (x0 + WIDTH - RIGHT, y)], BLACK if is_zero else "#e0e0e0")
        pen.text(x0 + LEFT - 6, y, "0" if is_zero else f"{level:+.2g}", 11, "rm")
    looks = sorted({updates for updates, *_ in every})
    places = {look: x0 + LEFT + 30 + i * (WIDTH - LEFT - 60) / max(1, len(looks) - 1) for i, look in enumerate(looks)}
    for look, x in places.items():
        pen.text(x, bottom + 5, f"{look:,}", 11, "ma")
    for i, (fake, corners) in enumerate(CORNERS.items()):
        points = by_fake.get(fake, [])
        xs = [places[look] + 9 * (i - 1) for look, *_ in points]
        pen.line([(x, height(difference)) for x, (_, difference, _, _) in zip(xs, points)], "#c8c8c8")
        for x, (_, difference, half, verdict) in zip(xs, points):
            pen.line([(x, height(difference - half)), (x, height(difference + half))], COLOURS[verdict], 1.5)
            pen.mark(x, height(difference), corners, COLOURS[verdict])
