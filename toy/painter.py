"""How the toy world's pictures are painted: the colours, the letters, and the shapes that Pillow fills.

    paint       a spec (toy/world.py) -> a canvas of 96 x 96 pixels

Places and sizes are in large pixels, 32 along a side; each is FINE x FINE pixels of the canvas. `world.render` averages these,
so edges are smooth. The numbers are a matter of taste, with one exception: letters stand on the grid of tokens.
"""

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIDE = 32  # large pixels along a side
FINE = 3  # pixels of the canvas along a large pixel
STAR_PLACES = ((3, 3), (9, 7), (15, 2), (18, 11), (24, 5), (29, 10), (6, 13), (30, 2))
CLOUD_PLACES = (((6, 9), (20, 4)), ((10, 5), (26, 9)), ((4, 4), (16, 10)))  # two clouds for each value of "clouds"
STICKER_PLACES = {"sticker_a": ((4, 4), (27, 4)), "sticker_b": ((4, 28), (27, 28))}

# The colours of a list differ in brightness too, so that a grey or sepia picture can still be judged.
Colour = tuple[int, int, int]
HAIR = {"black": (28, 24, 28), "red": (196, 48, 30), "blue": (62, 120, 244), "blond": (244, 212, 110)}
SKIN = {"dark": (96, 56, 36), "brown": (176, 116, 72), "pale": (250, 216, 186)}
EYES = {"black": (8, 8, 16), "blue": (20, 80, 250), "green": (30, 200, 70)}
BACKDROP = {"purple": (98, 52, 140), "teal": (22, 150, 150), "pink": (244, 152, 184), "yellow": (250, 226, 90)}
CLOTHES = {"navy": (40, 50, 110), "maroon": (140, 40, 50), "green": (60, 150, 90), "white": (232, 230, 222)}
SIGN = {"blue": (30, 60, 190), "red": (214, 44, 44), "green": (60, 180, 90), "yellow": (252, 214, 50)}
WALL = {"brown": (110, 70, 50), "orange": (232, 128, 44), "gray": (178, 180, 186)}
STICKER = {"white": (250, 250, 250), "pink": (255, 90, 160), "black": (20, 20, 24)}
GROUND = {"hills": (70, 160, 66), "mountains": (124, 122, 134), "dunes": (230, 190, 110), "sea": (28, 100, 180)}
SKY = {  # top and bottom of the gradient, and the light that falls on everything below it
    "day": ((60, 140, 240), (196, 228, 252), (1.0, 1.0, 1.0)),
    "sunset": ((96, 44, 120), (250, 130, 60), (0.80, 0.62, 0.58)),
    "night": ((6, 8, 30), (36, 44, 90), (0.34, 0.38, 0.52)),
    "dawn": ((132, 150, 214), (252, 206, 188), (0.92, 0.84, 0.86)),
}
SUN = {"day": (255, 226, 60), "sunset": (255, 84, 36), "night": (240, 240, 216), "dawn": (255, 244, 180)}
CLOUD = {"day": (252, 252, 252), "sunset": (190, 120, 130), "night": (86, 92, 120), "dawn": (240, 226, 230)}

# 3 x 5 large pixels each. Letters are left out that could spell something unwanted on a poster.
GLYPHS = {
    "A": "010 101 111 101 101",
    "C": "111 100 100 100 111",
    "E": "111 100 110 100 111",
    "H": "101 101 111 101 101",
    "L": "100 100 100 100 111",
    "N": "110 101 101 101 101",
    "O": "111 101 101 101 111",
    "P": "111 101 111 100 100",
    "T": "111 010 010 010 010",
    "U": "101 101 101 101 111",
    "V": "101 101 101 101 010",
    "Z": "111 001 010 100 111",
}


class Pen:
    """ImageDraw in large pixels, under a coloured light."""

    def __init__(self, canvas: Image.Image, light: tuple[float, float, float] = (1.0, 1.0, 1.0)):
        self.draw, self.light = ImageDraw.Draw(canvas), light

    def colour(self, rgb: Colour) -> Colour:
        return tuple(int(value * factor) for value, factor in zip(rgb, self.light))

    def box(self, x0: float, y0: float, x1: float, y1: float, rgb: Colour) -> None:
        corners = [x0 * FINE, y0 * FINE, x1 * FINE - 1, y1 * FINE - 1]
        self.draw.rectangle(corners, fill=self.colour(rgb))

    def oval(self, x: float, y: float, rx: float, ry: float, rgb: Colour) -> None:
        corners = [(x - rx) * FINE, (y - ry) * FINE, (x + rx) * FINE - 1, (y + ry) * FINE - 1]
        self.draw.ellipse(corners, fill=self.colour(rgb))

    def shape(self, points: list[tuple[float, float]], rgb: Colour) -> None:
        self.draw.polygon([(x * FINE, y * FINE) for x, y in points], fill=self.colour(rgb))

    def bow(self, x: float, y: float, rx: float, ry: float, start: float, end: float, rgb: Colour) -> None:
        """The segment of an ellipse between two angles in degrees, 0 at three o'clock, clockwise."""
        corners = [(x - rx) * FINE, (y - ry) * FINE, (x + rx) * FINE, (y + ry) * FINE]
        self.draw.chord(corners, start, end, fill=self.colour(rgb))


def darker(rgb: Colour, factor: float) -> Colour:
    return tuple(int(value * factor) for value in rgb)


def paint(spec: dict) -> Image.Image:
    """The canvas of a spec, 96 x 96 RGB."""
    painters = {"landscape": paint_landscape, "portrait": paint_portrait, "text": paint_poster}
    return painters[spec["category"]](spec)


def paint_background(spec: dict) -> Image.Image:
    """The canvas without anything in front: sky and land, backdrop, or wall."""
    if spec["category"] == "landscape":
        canvas = sky_gradient(spec["time"]).copy()
        paint_ground(Pen(canvas, light=SKY[spec["time"]][2]), spec)
        return canvas
    if spec["category"] == "portrait":
        return backdrop(spec["backdrop"], spec["pattern"])
    return brick_wall(spec["wall"], spec["bricks"])


# ---- landscapes ------------------------------------------------------------------------------------------------------


def paint_landscape(spec: dict) -> Image.Image:
    canvas = sky_gradient(spec["time"]).copy()
    shining = Pen(canvas)  # what is in the sky, and lamps: the light of the day does not change them
    lit = Pen(canvas, light=SKY[spec["time"]][2])
    paint_sky(shining, spec)
    paint_ground(lit, spec)
    if spec["thing"] != "nothing":
        paint_thing(lit, shining, spec)
    return canvas


@cache
def sky_gradient(time: str) -> Image.Image:
    top, bottom = (np.array(colour, dtype=np.float32) for colour in SKY[time][:2])
    ramp = np.clip(np.linspace(0, 1.35, SIDE * FINE), 0, 1)[:, None, None]
    rows = np.broadcast_to(top + ramp * (bottom - top), (SIDE * FINE, SIDE * FINE, 3))
    return Image.fromarray(rows.astype(np.uint8))


def paint_sky(pen: Pen, spec: dict) -> None:
    """Stars, sun or moon, and clouds."""
    time = spec["time"]
    if time == "night":
        for x, y in STAR_PLACES:
            pen.box(x, y, x + 1, y + 1, (200, 205, 230))
    x, y = spec["sun"], 5
    pen.oval(x, y, 3.4, 3.4, SUN[time])
    if time == "night":  # a crescent: the dark sky bites into the disc
        pen.oval(x + 1.6, y - 0.8, 2.9, 2.9, (14, 17, 44))
    if spec["weather"] == "cloudy":
        for x, y in CLOUD_PLACES[spec["clouds"]]:
            pen.oval(x, y, 5, 1.7, CLOUD[time])
            pen.oval(x + 1, y - 1.3, 2.8, 1.7, CLOUD[time])


def ground_line(spec: dict, x: float) -> float:
    """Height at column x, counted from the top."""
    cycle = x / SIDE + spec["phase"] / 6
    if spec["ground"] == "sea":
        return spec["horizon"]
    if spec["ground"] == "hills":
        return spec["horizon"] + 2.5 * math.sin(cycle * 2 * math.pi)
    if spec["ground"] == "dunes":  # asymmetric: a slow rise and a fast fall
        return spec["horizon"] + 2 + 2.5 * (2 * (cycle % 1) - 1)
    return spec["horizon"] + 5


def paint_ground(pen: Pen, spec: dict) -> None:
    columns = [i / 2 for i in range(2 * SIDE + 1)]
    line, corners = [(x, ground_line(spec, x)) for x in columns], [(SIDE, SIDE), (0, SIDE)]
    rgb = GROUND[spec["ground"]]
    if spec["ground"] == "mountains":
        for peak in range(-1, 4):
            x = peak * 11 + spec["phase"] * 11 / 6
            top = spec["horizon"] - (7 if peak % 2 else 4)
            pen.shape([(x - 8, SIDE), (x, top), (x + 8, SIDE)], rgb)
            pen.shape([(x - 1.7, top + 4), (x, top), (x + 1.7, top + 4)], (244, 246, 250))  # snow
        pen.shape(line + corners, (84, 108, 84))
        return
    pen.shape(line + corners, rgb)
    if spec["ground"] == "sea":
        for i in range(6):
            x, y = (i * 11 + spec["phase"] * 5) % 30, spec["horizon"] + 2 + i * 2
            pen.box(x, y, x + 4, y + 1, (150, 200, 240))
    else:  # a darker strip below the line
        strip = [(x, y + 6 + 0.8 * math.sin(x / 4 + spec["phase"])) for x, y in line]
        pen.shape(strip + corners, darker(rgb, 0.82))


def paint_thing(pen: Pen, shining: Pen, spec: dict) -> None:
    """House, tree or lighthouse, on the ground line; (x, y) is the middle of its foot."""
    x = (4 if spec["side"] == "left" else 19) + spec["step"]
    y = round(ground_line(spec, x)) + 2
    if spec["ground"] == "sea":
        pen.oval(x, y + 0.5, 5, 1.8, (214, 190, 120))  # an islet to stand on
    if spec["thing"] == "house":
        pen.box(x - 3, y - 5, x + 3, y, (240, 226, 204))
        pen.shape([(x - 4.4, y - 5), (x, y - 9), (x + 4.4, y - 5)], (190, 44, 40))
        shining.box(x - 1, y - 3, x + 1, y, (255, 220, 90) if spec["time"] == "night" else (100, 60, 40))
    elif spec["thing"] == "tree":
        pen.box(x - 1, y - 4, x + 1, y, (110, 70, 36))
        pen.oval(x, y - 7, 4, 4.2, (24, 92, 40))
    else:
        for i in range(4):
            pen.box(x - 2, y - 3 * i - 3, x + 2, y - 3 * i, ((206, 40, 40), (246, 246, 246))[i % 2])
        shining.box(x - 2, y - 14, x + 2, y - 12, (255, 224, 90))


# ---- portraits -------------------------------------------------------------------------------------------------------


def paint_portrait(spec: dict) -> Image.Image:
    canvas = backdrop(spec["backdrop"], spec["pattern"]).copy()
    pen = Pen(canvas)
    x, s = spec["x"], spec["size"]
    y = 31 - 14 * s  # centre of the face: the shoulders always touch the lower edge
    hair, skin = HAIR[spec["hair"]], SKIN[spec["skin"]]
    if spec["length"] == "long":
        pen.oval(x, y + 1 * s, 8.2 * s, 10 * s, hair)
        pen.box(x - 8.2 * s, y + 1 * s, x + 8.2 * s, y + 9.5 * s, hair)
    else:
        pen.oval(x, y - 2 * s, 7.2 * s, 7.2 * s, hair)
    pen.oval(x, 33.5, 11 * s, 7 * s, CLOTHES[spec["clothes"]])
    pen.box(x - 2 * s, y + 4 * s, x + 2 * s, y + 9 * s, darker(skin, 0.86))  # the neck
    pen.oval(x, y, 6 * s, 7.4 * s, skin)
    pen.bow(x, y - 1.4 * s, 6.4 * s, 6.4 * s, 200, 340, hair)  # the fringe
    for side in (-1, 1):
        pen.oval(x + side * 2.7 * s, y - 0.4 * s, 2.1 * s, 1.7 * s, (255, 255, 255))
        pen.oval(x + side * 2.7 * s, y - 0.4 * s, 1.3 * s, 1.6 * s, EYES[spec["eyes"]])
    paint_mouth(pen, spec["mouth"], x, y, s, skin)
    paint_hat(pen, spec["hat"], x, y, s)
    return canvas


@cache
def backdrop(colour: str, pattern: str) -> Image.Image:
    """The wall behind the person."""
    canvas = Image.new("RGB", (SIDE * FINE, SIDE * FINE), BACKDROP[colour])
    pen, shade = Pen(canvas), darker(BACKDROP[colour], 0.80)
    for i in range(0, 48, 6):
        if pattern == "columns":
            pen.box(i, 0, i + 2, SIDE, shade)
        elif pattern == "rows":
            pen.box(0, i, SIDE, i + 2, shade)
        elif pattern == "slanted":
            for x in (i, i + 18):
                pen.shape([(x, 0), (x + 3, 0), (x + 3 - SIDE, SIDE), (x - SIDE, SIDE)], shade)
        elif pattern == "dots":
            for j in range(0, SIDE, 6):
                pen.oval(i + 2 + (j // 6 % 2) * 3, j + 2, 1.4, 1.4, shade)
    return canvas


def paint_mouth(pen: Pen, mouth: str, x: float, y: float, s: float, skin: Colour) -> None:
    """x, y: centre of the face; s: its size."""
    red = (228, 36, 64)
    if mouth == "smiling":
        pen.bow(x, y + 2.6 * s, 3.4 * s, 2.9 * s, 0, 180, red)
    elif mouth == "frowning":
        pen.bow(x, y + 6.0 * s, 3.7 * s, 3.4 * s, 180, 360, red)
        pen.bow(x, y + 6.6 * s, 2.3 * s, 2.0 * s, 180, 360, skin)
    else:
        pen.box(x - 2.8 * s, y + 3.6 * s, x + 2.8 * s, y + 4.9 * s, red)


def paint_hat(pen: Pen, hat: str, x: float, y: float, s: float) -> None:
    """x, y: centre of the face; s: its size."""
    if hat == "cap":
        pen.bow(x, y - 3.6 * s, 7 * s, 5.6 * s, 180, 360, (60, 170, 60))
        pen.box(x - 1 * s, y - 4.4 * s, x + 9.4 * s, y - 3.2 * s, (30, 110, 40))
    elif hat == "crown":
        reach, foot, top = 6.4 * s, y - 4 * s, y - 10 * s
        notch = foot - 2.6 * s
        left = [(x - reach, foot), (x - reach, top), (x - reach / 2, notch)]
        right = [(x + reach / 2, notch), (x + reach, top), (x + reach, foot)]
        pen.shape([*left, (x, top), *right], (255, 190, 20))
        pen.box(x - reach, foot - 1 * s, x + reach, foot, (220, 130, 10))
    elif hat == "top hat":
        pen.box(x - 4.8 * s, y - 12 * s, x + 4.8 * s, y - 4 * s, (52, 52, 62))
        pen.box(x - 8 * s, y - 5 * s, x + 8 * s, y - 3.6 * s, (52, 52, 62))
        pen.box(x - 4.8 * s, y - 6.4 * s, x + 4.8 * s, y - 5 * s, (206, 60, 70))


# ---- posters ---------------------------------------------------------------------------------------------------------


def paint_poster(spec: dict) -> Image.Image:
    canvas = brick_wall(spec["wall"], spec["bricks"]).copy()
    pen = Pen(canvas)
    for name, places in STICKER_PLACES.items():
        colour, place = spec[name]
        if colour != "none":
            pen.oval(*places[place], 2.4, 2.4, STICKER[colour])
    x, y = spec["column"], spec["row"]
    pen.box(x - 2, y, x + 13, y + 7, SIGN[spec["sign"]])
    ink = (12, 12, 16) if spec["sign"] in ("green", "yellow") else (255, 255, 255)
    for i in range(3):
        for j, line in enumerate(GLYPHS[spec[f"letter{i}"]].split()):
            for k, bit in enumerate(line):
                if bit == "1":
                    pen.box(x + 4 * i + k, y + 1 + j, x + 4 * i + k + 1, y + 2 + j, ink)
    return canvas


@cache
def brick_wall(wall: str, bricks: int) -> Image.Image:
    """bricks: 0 to 3, by how much the pattern is shifted."""
    canvas = Image.new("RGB", (SIDE * FINE, SIDE * FINE), WALL[wall])
    pen, mortar = Pen(canvas), darker(WALL[wall], 0.74)
    dx, dy = bricks % 2 * 4, bricks // 2 * 3
    for i in range(-1, 7):
        y = 6 * i + dy
        pen.box(0, y, SIDE, y + 1, mortar)
        for j in range(-1, 5):
            x = 8 * j + dx + (i % 2) * 4
            pen.box(x, y, x + 1, y + 6, mortar)
    return canvas
