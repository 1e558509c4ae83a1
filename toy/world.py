"""A world small enough for a laptop: pictures, captions and edits with known ground truth.

A picture is drawn from a SPEC, a flat dictionary of values out of the short lists below. It has two kinds of entries:

- ATTRIBUTES are named in the caption ("A smiling person, blue hair ..."); a model must get them right.
- OPEN entries are not (where the face is, which hill, which stickers); a model must choose ONE. They make the distribution
  multi-modal: the average of two choices looks wrong. A few Euler steps draw such averages, and distillation has to repair
  them. They come from lists too, so that the judge (judge.py) can find them again exactly.

Three categories, as in the paper (section 3): landscape, portrait, text (a poster). Six families of edits, as in its
Editing-Bench (section 5): scene, enhance, object, text, identity, style. An edit asks for something, keeps something of its
source, and leaves the rest open, as real edits do. Everything else about this world is ours.

Pictures are drawn at 96 x 96 with Pillow and averaged down to 32 x 32 "large pixels", so that edges are smooth. These are
enlarged four times, to 128 x 128 RGBA. The VAE's factor of 16 makes 64 tokens of that, each 4 x 4 large pixels. A letter
is one token wide and two high, on the grid of tokens: a small network does not learn to write off the grid.

`python -m toy.world FILE.png` draws a sheet of it.
"""

import argparse
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from checkpoint import files
from data.pictures import open_picture
from program import edges
from recipe import TASKS, Prompt, Recipe

SIDE = 32  # large pixels along a side
ENLARGE = 4  # pixels of the picture per large pixel
NOISE = 0.22  # standard deviation of the noise that an edit removes, of a full range of 1
FINE = 3  # drawing is done at this many times SIDE, then averaged: anti-aliasing

CATEGORIES = ("landscape", "portrait", "text")
FAMILIES = ("scene", "enhance", "object", "text", "identity", "style")
BENCHES = {"t2i": CATEGORIES, "edit": FAMILIES}

# Without letters that could spell something unwanted on a poster. Three make a word: 12^3 = 1,728 words.
LETTERS = "ACEHLNOPTUVZ"
GLYPHS = {  # 3 x 5 large pixels
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

# The colours of a list differ in brightness too, so that a grey or sepia picture can still be judged.
HAIR = {"black": (28, 24, 28), "red": (196, 48, 30), "blue": (62, 120, 244), "blond": (244, 212, 110)}
SKIN = {"dark": (96, 56, 36), "brown": (176, 116, 72), "pale": (250, 216, 186)}
EYES = {"black": (8, 8, 16), "blue": (20, 80, 250), "green": (30, 200, 70)}
BACKDROP = {"purple": (98, 52, 140), "teal": (22, 150, 150), "pink": (244, 152, 184), "yellow": (250, 226, 90)}
CLOTHES = {"navy": (40, 50, 110), "maroon": (140, 40, 50), "green": (60, 150, 90), "white": (232, 230, 222)}
SIGN = {"blue": (30, 60, 190), "red": (214, 44, 44), "green": (60, 180, 90), "yellow": (252, 214, 50)}
WALL = {"brown": (110, 70, 50), "orange": (232, 128, 44), "gray": (178, 180, 186)}
STICKER = {"white": (250, 250, 250), "pink": (255, 90, 160), "black": (20, 20, 24)}
STICKER_PLACES = {"sticker_a": ((4, 4), (27, 4)), "sticker_b": ((4, 28), (27, 28))}
SKY = {  # top and bottom of the gradient, and the light that falls on everything below it
    "day": ((60, 140, 240), (196, 228, 252), (1.0, 1.0, 1.0)),
    "sunset": ((96, 44, 120), (250, 130, 60), (0.80, 0.62, 0.58)),
    "night": ((6, 8, 30), (36, 44, 90), (0.34, 0.38, 0.52)),
    "dawn": ((132, 150, 214), (252, 206, 188), (0.92, 0.84, 0.86)),
}
SUN = {"day": (255, 226, 60), "sunset": (255, 84, 36), "night": (240, 240, 216), "dawn": (255, 244, 180)}
CLOUD = {"day": (252, 252, 252), "sunset": (190, 120, 130), "night": (86, 92, 120), "dawn": (240, 226, 230)}
GROUND = {"hills": (70, 160, 66), "mountains": (124, 122, 134), "dunes": (230, 190, 110), "sea": (28, 100, 180)}

ATTRIBUTES: dict[str, dict[str, tuple]] = {
    "landscape": {
        "time": tuple(SKY),
        "ground": tuple(GROUND),
        "thing": ("nothing", "house", "tree", "lighthouse"),
        "side": ("left", "right"),
        "weather": ("clear", "cloudy"),
    },
    "portrait": {
        "hair": tuple(HAIR),
        "skin": tuple(SKIN),
        "hat": ("nothing", "cap", "crown", "top hat"),
        "eyes": tuple(EYES),
        "mouth": ("smiling", "frowning", "serious"),
        "backdrop": tuple(BACKDROP),
    },
    "text": {
        "letter0": tuple(LETTERS),
        "letter1": tuple(LETTERS),
        "letter2": tuple(LETTERS),
        "sign": tuple(SIGN),
        "wall": tuple(WALL),
    },
}

OPEN: dict[str, dict[str, tuple]] = {
    "landscape": {
        "horizon": (16, 20),
        "phase": (0, 2, 4),
        "sun": (5, 16, 27),
        "clouds": (0, 1, 2),
        "step": (0, 7),
    },
    "portrait": {
        "x": (16, 11, 21),
        "size": (1.1, 1.3),
        "length": ("short", "long"),
        "clothes": tuple(CLOTHES),
        "pattern": ("plain", "columns", "rows", "slanted", "dots"),
    },
    "text": {
        "column": (4, 8, 12, 16),
        "row": (0, 8, 16, 24),
        "bricks": (0, 1, 2, 3),
        "sticker_a": (("none", 0),) + tuple((c, p) for p in (0, 1) for c in STICKER),
        "sticker_b": (("none", 0),) + tuple((c, p) for p in (0, 1) for c in STICKER),
    },
}


# ----------------------------------------------------------------------------- specs and captions


def draw_spec(category: str, rng: random.Random, narrow: bool = False) -> dict:
    """A spec with every entry drawn uniformly, settled. narrow: open entries come from the first half of their lists. So a
    specialised teacher's pictures have fewer modes than the base teacher's."""
    lists = ATTRIBUTES[category] | (narrowed(OPEN[category]) if narrow else OPEN[category])
    return settle({"category": category} | {name: rng.choice(values) for name, values in lists.items()})


def narrowed(lists: dict[str, tuple]) -> dict[str, tuple]:
    return {name: values[: (len(values) + 1) // 2] for name, values in lists.items()}


def settle(spec: dict) -> dict:
    """The spec with one fixed value for every entry that cannot be seen, so that equal pictures have equal specs."""
    spec = dict(spec)
    if spec["category"] == "landscape":
        if spec["thing"] == "nothing":
            spec |= {"side": "left", "step": 0}
        if spec["weather"] == "clear":
            spec["clouds"] = 0
    if spec["category"] == "text":
        x, y = spec["column"] - 2, spec["row"]  # the sign's corner; it hides what lies wholly behind it
        for name, places in STICKER_PLACES.items():
            at_x, at_y = places[spec[name][1]]
            if x <= at_x - 2.4 and at_x + 2.4 <= x + 15 and y <= at_y - 2.4 and at_y + 2.4 <= y + 7:
                spec[name] = ("none", 0)
    return spec


def attributes(spec: dict) -> dict[str, tuple]:
    """The attributes that this spec's caption names, each with the list of its values."""
    lists = dict(ATTRIBUTES[spec["category"]])
    if spec.get("thing") == "nothing":
        del lists["side"]
    return lists


def caption(spec: dict) -> str:
    """The caption in plain English. It names every attribute and nothing that is open."""
    if spec["category"] == "landscape":
        thing = "" if spec["thing"] == "nothing" else f", {spec['thing']} on the {spec['side']}"
        return f"A landscape of {spec['ground']}, {spec['weather']} {spec['time']} sky{thing}."
    if spec["category"] == "portrait":
        hat = "no hat" if spec["hat"] == "nothing" else spec["hat"]
        face = f"{spec['hair']} hair, {spec['skin']} skin, {spec['eyes']} eyes"
        return f"A {spec['mouth']} person, {face}, {hat}, {spec['backdrop']} background."
    return f'A poster with the word "{word(spec)}" on a {spec["sign"]} sign, {spec["wall"]} wall.'


def word(spec: dict) -> str:
    return spec["letter0"] + spec["letter1"] + spec["letter2"]


def held_out(spec: dict) -> bool:
    """Whether this combination of attributes is kept for the benches: one in eight is. Training never shows it.

    For a poster the word alone decides, so that no benched word has been seen on any sign.
    """
    names = ("letter0", "letter1", "letter2") if spec["category"] == "text" else tuple(ATTRIBUTES[spec["category"]])
    key = ",".join([spec["category"], *(str(spec[name]) for name in names)])
    return int(files.digest(key)[:2], 16) % 8 == 0


# ----------------------------------------------------------------------------- drawing


def render(spec: dict) -> np.ndarray:
    """spec -> (32, 32, 3) float32 in [0, 1], in large pixels."""
    painter = {"landscape": _landscape, "portrait": _portrait, "text": _poster}[spec["category"]]
    return _large_pixels(painter(spec))


def background(spec: dict) -> np.ndarray:
    """The same with nothing in front: sky and land, backdrop, or wall."""
    if spec["category"] == "landscape":
        return _large_pixels(_land(_sky(spec["time"]).copy(), spec))
    if spec["category"] == "portrait":
        return _large_pixels(_backdrop(spec["backdrop"], spec["pattern"]))
    return _large_pixels(_wall(spec["wall"], spec["bricks"]))


def _large_pixels(canvas: Image.Image) -> np.ndarray:
    return np.asarray(canvas.reduce(FINE), dtype=np.float32) / 255


def add_noise(small: np.ndarray, seed: int) -> np.ndarray:
    """Strong noise, in blocks of 2 x 2 large pixels."""
    noise = np.random.default_rng(seed).normal(0, NOISE, (SIDE // 2, SIDE // 2, 3))
    return np.clip(small + noise.repeat(2, axis=0).repeat(2, axis=1), 0, 1).astype(np.float32)


def draw_half(rng: random.Random) -> np.ndarray:
    """One of the four halves of a picture, (32, 32) bool."""
    inside = np.zeros((SIDE, SIDE), dtype=bool)
    half = slice(*rng.choice(((0, SIDE // 2), (SIDE // 2, SIDE))))
    inside[(half, slice(None)) if rng.random() < 0.5 else (slice(None), half)] = True
    return inside


def hide(small: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """The picture, grey where it is not visible."""
    return np.where(visible[..., None], small, np.float32(0.5))


def blur(small: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur, radius in large pixels."""
    image = Image.fromarray((small * 255).round().astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255


def enlarge(small: np.ndarray) -> Image.Image:
    """(32, 32, 3) in [0, 1] -> the 128 x 128 opaque RGBA picture."""
    image = Image.fromarray((small * 255).round().astype(np.uint8))
    return image.resize((SIDE * ENLARGE, SIDE * ENLARGE), Image.NEAREST).convert("RGBA")


def shrink(image: Image.Image, side: int = SIDE) -> np.ndarray:
    """Any picture -> (side, side, 3) float32 in [0, 1]: the mean colour of each large pixel, over white."""
    image = open_picture(image)
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(flat.resize((side, side), Image.BOX), dtype=np.float32) / 255


class Pen:
    """ImageDraw in large-pixel coordinates, under a coloured light."""

    def __init__(self, canvas: Image.Image, light: tuple = (1.0, 1.0, 1.0)):
        self.draw, self.light = ImageDraw.Draw(canvas), light

    def colour(self, rgb: tuple) -> tuple:
        return tuple(int(c * factor) for c, factor in zip(rgb, self.light))

    def box(self, x0, y0, x1, y1, rgb):
        self.draw.rectangle([x0 * FINE, y0 * FINE, x1 * FINE - 1, y1 * FINE - 1], fill=self.colour(rgb))

    def oval(self, x, y, rx, ry, rgb):
        self.draw.ellipse(
            [(x - rx) * FINE, (y - ry) * FINE, (x + rx) * FINE - 1, (y + ry) * FINE - 1], fill=self.colour(rgb)
        )

    def shape(self, points, rgb):
        self.draw.polygon([(x * FINE, y * FINE) for x, y in points], fill=self.colour(rgb))

    def bow(self, x, y, rx, ry, start, end, rgb):
        """The segment of an ellipse between two angles in degrees, 0 at three o'clock, clockwise."""
        box = [(x - rx) * FINE, (y - ry) * FINE, (x + rx) * FINE, (y + ry) * FINE]
        self.draw.chord(box, start, end, fill=self.colour(rgb))


@cache
def _sky(time: str) -> Image.Image:
    top, bottom, _ = (np.array(c, dtype=np.float32) for c in SKY[time])
    ramp = np.clip(np.linspace(0, 1.35, SIDE * FINE), 0, 1)[:, None, None]
    rows = np.broadcast_to(top + ramp * (bottom - top), (SIDE * FINE, SIDE * FINE, 3))
    return Image.fromarray(rows.astype(np.uint8))


def _landscape(spec: dict) -> Image.Image:
    canvas, time = _sky(spec["time"]).copy(), spec["time"]
    sky, pen = Pen(canvas), Pen(canvas, SKY[time][2])
    if time == "night":
        for x, y in ((3, 3), (9, 7), (15, 2), (18, 11), (24, 5), (29, 10), (6, 13), (30, 2)):
            sky.box(x, y, x + 1, y + 1, (200, 205, 230))
    x, y = spec["sun"], 5
    sky.oval(x, y, 3.4, 3.4, SUN[time])
    if time == "night":  # a crescent: the dark sky bites into the disc
        sky.oval(x + 1.6, y - 0.8, 2.9, 2.9, (14, 17, 44))
    if spec["weather"] == "cloudy":
        for x, y in (((6, 9), (20, 4)), ((10, 5), (26, 9)), ((4, 4), (16, 10)))[spec["clouds"]]:
            sky.oval(x, y, 5, 1.7, CLOUD[time])
            sky.oval(x + 1, y - 1.3, 2.8, 1.7, CLOUD[time])
    _land(canvas, spec)
    if spec["thing"] != "nothing":
        x = (4 if spec["side"] == "left" else 19) + spec["step"]
        y = round(_surface(spec, x)) + 2
        if spec["ground"] == "sea":
            pen.oval(x, y + 0.5, 5, 1.8, (214, 190, 120))  # an islet to stand on
        if spec["thing"] == "house":
            pen.box(x - 3, y - 5, x + 3, y, (240, 226, 204))
            pen.shape([(x - 4.4, y - 5), (x, y - 9), (x + 4.4, y - 5)], (190, 44, 40))
            sky.box(x - 1, y - 3, x + 1, y, (255, 220, 90) if time == "night" else (100, 60, 40))
        elif spec["thing"] == "tree":
            pen.box(x - 1, y - 4, x + 1, y, (110, 70, 36))
            pen.oval(x, y - 7, 4, 4.2, (24, 92, 40))
        else:
            for i in range(4):
                pen.box(x - 2, y - 3 * i - 3, x + 2, y - 3 * i, ((206, 40, 40), (246, 246, 246))[i % 2])
            sky.box(x - 2, y - 14, x + 2, y - 12, (255, 224, 90))
    return canvas


def _surface(spec: dict, x: float) -> float:
    """Height of the ground line at column x."""
    if spec["ground"] == "sea":
        return spec["horizon"]
    wave = math.sin((x / SIDE + spec["phase"] / 6) * 2 * math.pi)
    if spec["ground"] == "hills":
        return spec["horizon"] + 2.5 * wave
    if spec["ground"] == "dunes":  # asymmetric: a slow rise and a fast fall
        return spec["horizon"] + 2 + 2.5 * (2 * ((x / SIDE + spec["phase"] / 6) % 1) - 1)
    return spec["horizon"] + 5


def _land(canvas: Image.Image, spec: dict) -> Image.Image:
    """The canvas, with the land on it."""
    pen = Pen(canvas, SKY[spec["time"]][2])
    xs = [i / 2 for i in range(2 * SIDE + 1)]
    land = [(x, _surface(spec, x)) for x in xs] + [(SIDE, SIDE), (0, SIDE)]
    rgb = GROUND[spec["ground"]]
    if spec["ground"] == "mountains":
        for peak in range(-1, 4):
            x = peak * 11 + spec["phase"] * 11 / 6
            top = spec["horizon"] - (7 if peak % 2 else 4)
            pen.shape([(x - 8, SIDE), (x, top), (x + 8, SIDE)], rgb)
            pen.shape([(x - 1.7, top + 4), (x, top), (x + 1.7, top + 4)], (244, 246, 250))
        pen.shape(land, (84, 108, 84))
    elif spec["ground"] == "sea":
        pen.shape(land, rgb)
        for i in range(6):
            x, y = (i * 11 + spec["phase"] * 5) % 30, spec["horizon"] + 2 + i * 2
            pen.box(x, y, x + 4, y + 1, (150, 200, 240))
    else:
        pen.shape(land, rgb)
        lower = [(x, y + 6 + 0.8 * math.sin(x / 4 + spec["phase"])) for x, y in land[:-2]] + land[-2:]
        pen.shape(lower, tuple(int(c * 0.82) for c in rgb))
    return canvas


@cache
def _backdrop(backdrop: str, pattern: str) -> Image.Image:
    rgb = BACKDROP[backdrop]
    canvas = Image.new("RGB", (SIDE * FINE, SIDE * FINE), rgb)
    pen, shade = Pen(canvas), tuple(int(c * 0.80) for c in rgb)
    for i in range(0, 48, 6):
        if pattern == "columns":
            pen.box(i, 0, i + 2, SIDE, shade)
        elif pattern == "rows":
            pen.box(0, i, SIDE, i + 2, shade)
        elif pattern == "slanted":
            pen.shape([(i, 0), (i + 3, 0), (i - SIDE + 3, SIDE), (i - SIDE, SIDE)], shade)
            pen.shape([(i + 18, 0), (i + 21, 0), (i + 21 - SIDE, SIDE), (i + 18 - SIDE, SIDE)], shade)
        elif pattern == "dots":
            for j in range(0, SIDE, 6):
                pen.oval(i + 2 + (j // 6 % 2) * 3, j + 2, 1.4, 1.4, shade)
    return canvas


def _portrait(spec: dict) -> Image.Image:
    canvas = _backdrop(spec["backdrop"], spec["pattern"]).copy()
    pen = Pen(canvas)
    x, s = spec["x"], spec["size"]
    y = 31 - 14 * s  # centre of the face: the shoulders always touch the lower edge
    hair, skin = HAIR[spec["hair"]], SKIN[spec["skin"]]
    dim = tuple(int(c * 0.86) for c in skin)
    if spec["length"] == "long":
        pen.oval(x, y + 1 * s, 8.2 * s, 10 * s, hair)
        pen.box(x - 8.2 * s, y + 1 * s, x + 8.2 * s, y + 9.5 * s, hair)
    else:
        pen.oval(x, y - 2 * s, 7.2 * s, 7.2 * s, hair)
    pen.oval(x, 33.5, 11 * s, 7 * s, CLOTHES[spec["clothes"]])
    pen.box(x - 2 * s, y + 4 * s, x + 2 * s, y + 9 * s, dim)
    pen.oval(x, y, 6 * s, 7.4 * s, skin)
    pen.bow(x, y - 1.4 * s, 6.4 * s, 6.4 * s, 200, 340, hair)  # the fringe
    for side in (-1, 1):
        pen.oval(x + side * 2.7 * s, y - 0.4 * s, 2.1 * s, 1.7 * s, (255, 255, 255))
        pen.oval(x + side * 2.7 * s, y - 0.4 * s, 1.3 * s, 1.6 * s, EYES[spec["eyes"]])
    red = (228, 36, 64)
    if spec["mouth"] == "smiling":
        pen.bow(x, y + 2.6 * s, 3.4 * s, 2.9 * s, 0, 180, red)
    elif spec["mouth"] == "frowning":
        pen.bow(x, y + 6.0 * s, 3.7 * s, 3.4 * s, 180, 360, red)
        pen.bow(x, y + 6.6 * s, 2.3 * s, 2.0 * s, 180, 360, skin)
    else:
        pen.box(x - 2.8 * s, y + 3.6 * s, x + 2.8 * s, y + 4.9 * s, red)
    if spec["hat"] == "cap":
        pen.bow(x, y - 3.6 * s, 7 * s, 5.6 * s, 180, 360, (60, 170, 60))
        pen.box(x - 1 * s, y - 4.4 * s, x + 9.4 * s, y - 3.2 * s, (30, 110, 40))
    elif spec["hat"] == "crown":
        w, b, t = 6.4 * s, y - 4 * s, y - 10 * s
        left, right = (
            [(x - w, b), (x - w, t), (x - w / 2, b - 2.6 * s)],
            [(x + w / 2, b - 2.6 * s), (x + w, t), (x + w, b)],
        )
        pen.shape([*left, (x, t), *right], (255, 190, 20))
        pen.box(x - w, b - 1 * s, x + w, b, (220, 130, 10))
    elif spec["hat"] == "top hat":
        pen.box(x - 4.8 * s, y - 12 * s, x + 4.8 * s, y - 4 * s, (52, 52, 62))
        pen.box(x - 8 * s, y - 5 * s, x + 8 * s, y - 3.6 * s, (52, 52, 62))
        pen.box(x - 4.8 * s, y - 6.4 * s, x + 4.8 * s, y - 5 * s, (206, 60, 70))
    return canvas


@cache
def _wall(wall: str, bricks: int) -> Image.Image:
    rgb = WALL[wall]
    canvas = Image.new("RGB", (SIDE * FINE, SIDE * FINE), rgb)
    pen, mortar = Pen(canvas), tuple(int(c * 0.74) for c in rgb)
    dx, dy = bricks % 2 * 4, bricks // 2 * 3
    for i in range(-1, 7):
        y = 6 * i + dy
        pen.box(0, y, SIDE, y + 1, mortar)
        for j in range(-1, 5):
            x = 8 * j + dx + (i % 2) * 4
            pen.box(x, y, x + 1, y + 6, mortar)
    return canvas


def _poster(spec: dict) -> Image.Image:
    canvas = _wall(spec["wall"], spec["bricks"]).copy()
    pen = Pen(canvas)
    for name, places in STICKER_PLACES.items():
        tint, place = spec[name]
        if tint != "none":
            pen.oval(*places[place], 2.4, 2.4, STICKER[tint])
    x, y, sign = spec["column"], spec["row"], SIGN[spec["sign"]]
    pen.box(x - 2, y, x + 13, y + 7, sign)
    ink = (12, 12, 16) if spec["sign"] in ("green", "yellow") else (255, 255, 255)
    for i, letter in enumerate(word(spec)):
        for j, line in enumerate(GLYPHS[letter].split()):
            for k, bit in enumerate(line):
                if bit == "1":
                    pen.box(x + 4 * i + k, y + 1 + j, x + 4 * i + k + 1, y + 2 + j, ink)
    return canvas


# ----------------------------------------------------------------------------- edits


@dataclass
class Case:
    """A prompt, and the truth, which the judge alone knows.

    target is one right answer. free says which of its entries may have other values, and which; all other entries were asked
    for, or had to be kept. visible is the part of the source that must be kept as it is, place by place; None: no such part.
    """

    task: str
    category: str
    prompt: str
    target: dict
    free: dict[str, tuple]
    source: dict | None = None
    visible: np.ndarray | None = None  # (32, 32) bool
    noise: int | None = None  # the seed of the noise on the source

    @cached_property
    def images(self) -> list[Image.Image]:
        """The source as the prompt shows it; [] for text to image. Drawn when first asked for: most cases are held out."""
        if self.source is None:
            return []
        small = render(self.source)
        if self.noise is not None:
            small = add_noise(small, self.noise)
        return [enlarge(small if self.visible is None else hide(small, self.visible))]


def draw_case(task: str, category: str, seed: int, index: int, benched: bool, narrow: bool = False) -> Case:
    """Case number `index` of a stream. Target and source of a benched case are held out (see held_out), those of a training
    case never are. narrow: see draw_spec."""
    rng = random.Random(f"{task} {category} {seed} {index} {benched}")
    while True:
        if task == "t2i":
            spec = draw_spec(category, rng, narrow)
            case = Case(task, category, caption(spec), spec, OPEN[category])
        else:
            case = draw_edit(category, rng, narrow)
        if all(held_out(spec) == benched for spec in (case.target, case.source or case.target)):
            return case


def draw_edit(family: str, rng: random.Random, narrow: bool = False) -> Case:
    """A source and an instruction of this family, drawn uniformly.

    Nearly every instruction leaves something open, or its source does. There the answer is one of many, and the edit is as
    hard for few steps as a picture from words alone. Noise leaves nothing open, but hides much.
    """
    fitting = {
        "scene": ("landscape",),
        "text": ("text",),
        "identity": ("portrait",),
        "object": ("landscape", "portrait"),
    }
    category = rng.choice(fitting.get(family, CATEGORIES))
    source, everything = draw_spec(category, rng), ATTRIBUTES[category] | OPEN[category]
    if family == "scene" or (family, category) == ("object", "landscape"):  # these are about a thing in a landscape
        source = settle(source | {"thing": rng.choice(everything["thing"][1:]), "side": rng.choice(everything["side"])})

    def others(name: str) -> tuple:
        """The values that the source does not have."""
        return tuple(value for value in everything[name] if value != source[name])

    def edit(instruction: str, asked: dict, open_names: str = "", new: dict[str, tuple] | None = None) -> Case:
        """asked: entries that the instruction names. open_names: entries that it leaves wholly open. new: entries of which
        it says only that they change, with the values that they may have."""
        free = {name: everything[name] for name in open_names.split()} | (new or {})
        drawn = dict(free)
        if narrow:
            half = narrowed(OPEN[category])
            drawn |= {name: tuple(v for v in free[name] if v in half[name]) for name in free if name in half}
        target = settle(source | asked | {name: rng.choice(values) for name, values in drawn.items()})
        return Case("edit", family, instruction, target, free, source)

    if family == "enhance":
        if rng.random() < 0.5:
            return Case("edit", family, "Remove the noise.", source, {}, source, noise=rng.getrandbits(64))
        return Case("edit", family, "Fill in the missing half.", source, everything, source, visible=draw_half(rng))
    if family == "scene":
        asked = {"time": rng.choice(others("time")), "ground": rng.choice(everything["ground"])}
        place = {"sea": "by the sea"}.get(asked["ground"], f"in the {asked['ground']}")
        instruction = f"This {source['thing']} at {asked['time']}, {place}."
        return edit(instruction, asked, "side weather horizon phase sun clouds step")
    if family == "identity":
        backdrop = rng.choice(others("backdrop"))
        return edit(
            f"This person again, {backdrop} background.", {"backdrop": backdrop}, "hat mouth x size clothes pattern"
        )
    if family == "text":
        sign = rng.choice(others("sign"))
        return edit(
            f"A new poster with this word, {sign} sign.", {"sign": sign}, "wall column row bricks sticker_a sticker_b"
        )
    if family == "object":
        if category == "landscape":
            things = tuple(thing for thing in others("thing") if thing != "nothing")
            return edit(f"Replace the {source['thing']}.", {}, new={"thing": things})
        if rng.random() < 0.5:
            hats = tuple(hat for hat in others("hat") if hat != "nothing")
            return edit("Give this person another hat.", {}, new={"hat": hats})
        return edit("Give this person another hairdo.", {}, "length", {"hair": others("hair")})
    instruction, open_names, new = {  # style: other colours, the same forms
        "landscape": ("This place at another time of the day.", "sun", ("time",)),
        "portrait": ("Other clothes, another background.", "pattern", ("clothes", "backdrop")),
        "text": ("Paint the sign and the wall in other colors.", "", ("sign", "wall")),
    }[category]
    return edit(instruction, {}, open_names, {name: others(name) for name in new})


# ----------------------------------------------------------------------------- data for training and for the benches


def training_prompts(
    task: str, category: str, count: int, seed: int, targets: bool = True, narrow: bool = False
) -> list[Prompt]:
    """`count` prompts of one category (or family of edits) that no bench has; `targets`: with the pictures to learn."""
    cases = [draw_case(task, category, seed, index, benched=False, narrow=narrow) for index in range(count)]
    return [
        Prompt(task, category, case.prompt, case.images, enlarge(render(case.target)) if targets else None)
        for case in cases
    ]


def prompts(counts: dict[str, int], seed: int, targets: bool, narrow: bool = False) -> Iterator[Prompt]:
    """counts[task] training prompts of every category (or family of edits) of the tasks in `counts`."""
    for task, count in counts.items():
        for category in BENCHES[task]:
            yield from training_prompts(task, category, count, seed, targets, narrow)


def prompts_for(recipe: Recipe, count: int, seed: int, targets: bool) -> list[Prompt]:
    """`count` training prompts of each task that the recipe has, in equal parts from each of its categories."""
    found = []
    for task, parts, composition in zip(TASKS, recipe.ratio, (recipe.t2i, recipe.edit), strict=True):
        categories = tuple(composition) or BENCHES[task]
        for category in categories if parts else ():
            found += training_prompts(task, category, math.ceil(count / len(categories)), seed, targets)
    return found


def digest(some: Iterable[Prompt]) -> str:
    """Of prompts: it changes with words and pictures, and so with the world, but not with its comments."""
    contents = b""
    for prompt in some:
        pictures = [*prompt.images, *filter(None, [prompt.target])]
        contents += prompt.prompt.encode() + b"".join(picture.tobytes() for picture in pictures)
    return files.digest(contents)[:16]


def bench(task: str, category: str, count: int) -> list[Case]:
    """The fixed cases of T2I-Bench (task "t2i") or Editing-Bench (task "edit") in one category or family."""
    return [_benched(task, category, index) for index in range(count)]


@cache
def _benched(task: str, category: str, index: int) -> Case:
    return draw_case(task, category, 2026, index, benched=True)


def sheet() -> Image.Image:
    """What the world looks like: a category in three rows, the last of them of one caption; a family of edits in a row."""
    rows = []
    for category in CATEGORIES:
        rng = random.Random(0)
        rows += [[enlarge(render(draw_spec(category, rng))) for _ in range(12)] for _ in range(2)]
        spec = draw_spec(category, rng)
        said = {name: spec[name] for name in ATTRIBUTES[category]}
        rows.append([enlarge(render(settle(draw_spec(category, rng) | said))) for _ in range(12)])
    for family in FAMILIES:
        cases = [draw_case("edit", family, 0, index, benched=False) for index in range(6)]
        rows.append([p for c in cases for p in (c.images[0], enlarge(render(c.target)))])
    side = SIDE * ENLARGE + 6
    canvas = Image.new("RGB", (12 * side, side * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            canvas.paste(picture, (x * side + 3, y * side + 3))
    return canvas


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m toy.world", description="Draws a sheet of the toy world.")
    parser.add_argument("path", type=Path, nargs="?", default=Path("world.png"), metavar="FILE.png")
    path = parser.parse_args(argv).path
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: the sheet is written as .png")
    sheet().save(path)


if __name__ == "__main__":
    with edges.ends("toy.world"):
        main()
