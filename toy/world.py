"""A world small enough for a laptop: pictures, captions and edits with known ground truth.

A picture is painted from a SPEC, a flat dictionary of values out of the short lists below. It has two kinds of entries:

- ATTRIBUTES are named in the caption ("A smiling person, blue hair ..."). A model must get them right.
- OPEN entries are not (where the face is, which hill, which stickers). A model must choose ONE value. So the distribution
  has many modes, and the average of two looks wrong. A few Euler steps draw such averages; distillation has to repair
  them. Open values come from lists, too, so that the judge (judge.py) can recover them exactly.

Three categories, as in the paper (section 3): landscape, portrait, text (a poster). Six families of edits, as in its
Editing-Bench (section 5): scene, enhance, object, text, identity, style. An edit asks for something, keeps something of its
source, and leaves the rest open, as real edits do. Everything else about this world is ours.

A picture has 32 x 32 large pixels, painted smoothly (painter.py), each enlarged to 4 x 4 pixels: 128 x 128 RGBA. The VAE's
factor of 16 makes 64 tokens of it, each 4 x 4 large pixels. A letter is one token wide and two high, on the grid of tokens,
because a small network does not learn to write off the grid.

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
from PIL import Image, ImageFilter

from checkpoint import files
from data.pictures import open_picture
from program import edges
from recipe import TASKS, Prompt, Recipe
from toy import painter

SIDE = painter.SIDE  # large pixels along a side
ENLARGE = 4  # pixels of the picture along a large pixel
NOISE = 0.22  # standard deviation of the noise that an edit removes, of a full range of 1

CATEGORIES = ("landscape", "portrait", "text")
FAMILIES = ("scene", "enhance", "object", "text", "identity", "style")
BENCHES = {"t2i": CATEGORIES, "edit": FAMILIES}
LETTERS = tuple(painter.GLYPHS)  # twelve; three make a word: 12^3 = 1,728 words

ATTRIBUTES: dict[str, dict[str, tuple]] = {
    "landscape": {
        "time": tuple(painter.SKY),
        "ground": tuple(painter.GROUND),
        "thing": ("nothing", "house", "tree", "lighthouse"),
        "side": ("left", "right"),
        "weather": ("clear", "cloudy"),
    },
    "portrait": {
        "hair": tuple(painter.HAIR),
        "skin": tuple(painter.SKIN),
        "hat": ("nothing", "cap", "crown", "top hat"),
        "eyes": tuple(painter.EYES),
        "mouth": ("smiling", "frowning", "serious"),
        "backdrop": tuple(painter.BACKDROP),
    },
    "text": {
        "letter0": LETTERS,
        "letter1": LETTERS,
        "letter2": LETTERS,
        "sign": tuple(painter.SIGN),
        "wall": tuple(painter.WALL),
    },
}

NO_STICKER = ("none", 0)
STICKERS = (NO_STICKER, *((colour, place) for place in (0, 1) for colour in painter.STICKER))
OPEN: dict[str, dict[str, tuple]] = {
    "landscape": {
        "horizon": (16, 20),
        "phase": (0, 2, 4),  # of the land's wave, in sixths
        "sun": (5, 16, 27),
        "clouds": (0, 1, 2),
        "step": (0, 7),  # of the thing, to the right
    },
    "portrait": {
        "x": (16, 11, 21),
        "size": (1.1, 1.3),
        "length": ("short", "long"),  # of the hair
        "clothes": tuple(painter.CLOTHES),
        "pattern": ("plain", "columns", "rows", "slanted", "dots"),
    },
    "text": {
        "column": (4, 8, 12, 16),
        "row": (0, 8, 16, 24),
        "bricks": (0, 1, 2, 3),
        "sticker_a": STICKERS,
        "sticker_b": STICKERS,
    },
}


# ---- specs and captions ----------------------------------------------------------------------------------------------


def draw_spec(category: str, rng: random.Random, narrow: bool = False) -> dict:
    """A spec with every entry drawn uniformly, settled.

    narrow: open entries come from the first half of their lists, so that a specialised teacher's pictures have fewer modes
    than the base teacher's.
    """
    lists = ATTRIBUTES[category] | (narrowed(OPEN[category]) if narrow else OPEN[category])
    return settle({"category": category} | {name: rng.choice(values) for name, values in lists.items()})


def narrowed(lists: dict[str, tuple]) -> dict[str, tuple]:
    return {name: values[: (len(values) + 1) // 2] for name, values in lists.items()}


def settle(spec: dict) -> dict:
    """The spec with a fixed value in every entry that cannot be seen, so that equal pictures have equal specs."""
    spec = dict(spec)
    if spec["category"] == "landscape":
        if spec["thing"] == "nothing":
            spec |= {"side": "left", "step": 0}
        if spec["weather"] == "clear":
            spec["clouds"] = 0
    if spec["category"] == "text":
        left, top = spec["column"] - 2, spec["row"]  # of the sign; it hides what lies wholly behind it
        for name, places in painter.STICKER_PLACES.items():
            x, y = places[spec[name][1]]
            inside_x = left <= x - 2.4 and x + 2.4 <= left + 15
            inside_y = top <= y - 2.4 and y + 2.4 <= top + 7
            if inside_x and inside_y:
                spec[name] = NO_STICKER
    return spec


def attributes(spec: dict) -> dict[str, tuple]:
    """The attributes that this spec's caption names, each with the list of its values."""
    lists = dict(ATTRIBUTES[spec["category"]])
    if spec.get("thing") == "nothing":
        del lists["side"]
    return lists


def caption(spec: dict) -> str:
    """The caption in plain English. It names every attribute that can be seen, and no open entry."""
    if spec["category"] == "landscape":
        thing = "" if spec["thing"] == "nothing" else f", {spec['thing']} on the {spec['side']}"
        return f"A landscape of {spec['ground']}, {spec['weather']} {spec['time']} sky{thing}."
    if spec["category"] == "portrait":
        hat = "no hat" if spec["hat"] == "nothing" else spec["hat"]
        face = f"{spec['hair']} hair, {spec['skin']} skin, {spec['eyes']} eyes"
        return f"A {spec['mouth']} person, {face}, {hat}, {spec['backdrop']} background."
    word = spec["letter0"] + spec["letter1"] + spec["letter2"]
    return f'A poster with the word "{word}" on a {spec["sign"]} sign, {spec["wall"]} wall.'


def held_out(spec: dict) -> bool:
    """Whether this combination of attributes is for the benches alone; one in eight is. Training never shows it.

    For a poster the word alone decides, so training shows no word of the bench on any sign.
    """
    category = spec["category"]
    names = ("letter0", "letter1", "letter2") if category == "text" else ATTRIBUTES[category]
    key = ",".join([category, *(str(spec[name]) for name in names)])
    return int(files.digest(key)[:2], 16) % 8 == 0


# ---- pictures --------------------------------------------------------------------------------------------------------


def render(spec: dict) -> np.ndarray:
    """spec -> (32, 32, 3) float32 in [0, 1], in large pixels."""
    return large_pixels(painter.paint(spec))


def background(spec: dict) -> np.ndarray:
    """The same without anything in front: sky and land, backdrop, or wall."""
    return large_pixels(painter.paint_background(spec))


def large_pixels(canvas: Image.Image) -> np.ndarray:
    return np.asarray(canvas.reduce(painter.FINE), dtype=np.float32) / 255


def enlarge(small: np.ndarray) -> Image.Image:
    """(32, 32, 3) in [0, 1] -> the 128 x 128 opaque RGBA picture."""
    return to_image(small).resize((SIDE * ENLARGE, SIDE * ENLARGE), Image.NEAREST).convert("RGBA")


def shrink(image: Image.Image, side: int = SIDE) -> np.ndarray:
    """Any picture -> (side, side, 3) float32 in [0, 1]: the mean colour of each large pixel, over white."""
    image = open_picture(image)
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(flat.resize((side, side), Image.BOX), dtype=np.float32) / 255


def to_image(small: np.ndarray) -> Image.Image:
    return Image.fromarray((small * 255).round().astype(np.uint8))


def add_noise(small: np.ndarray, seed: int) -> np.ndarray:
    """Strong noise, in blocks of 2 x 2 large pixels."""
    noise = np.random.default_rng(seed).normal(0, NOISE, (SIDE // 2, SIDE // 2, 3))
    return np.clip(small + noise.repeat(2, axis=0).repeat(2, axis=1), 0, 1).astype(np.float32)


def draw_half(rng: random.Random) -> np.ndarray:
    """A random half of a picture, upper, lower, left or right: (32, 32) bool."""
    half = slice(*rng.choice(((0, SIDE // 2), (SIDE // 2, SIDE))))
    inside = np.zeros((SIDE, SIDE), dtype=bool)
    if rng.random() < 0.5:
        inside[half, :] = True
    else:
        inside[:, half] = True
    return inside


def hide(small: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """The picture, grey where it is not visible."""
    return np.where(visible[..., None], small, np.float32(0.5))


def blur(small: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur, radius in large pixels."""
    return np.asarray(to_image(small).filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255


# ---- cases: what is asked of a model, and the truth ------------------------------------------------------------------


@dataclass
class Case:
    """A prompt, and the truth, which only the judge knows.

    target: the spec of one right answer. free: the entries that may have other values, each with these values. All other
    entries were asked for, or must be kept.
    """

    task: str
    category: str
    prompt: str
    target: dict
    free: dict[str, tuple]
    source: dict | None = None
    visible: np.ndarray | None = None  # (32, 32) bool: the part to be kept as it is; None: there is no such part
    noise: int | None = None  # the seed of the noise on the source

    @cached_property
    def images(self) -> list[Image.Image]:
        """The source as the prompt shows it; [] for text to image. It is painted when first asked for, because `draw_case`
        drops many cases."""
        if self.source is None:
            return []
        small = render(self.source)
        if self.noise is not None:
            small = add_noise(small, self.noise)
        if self.visible is not None:
            small = hide(small, self.visible)
        return [enlarge(small)]

    def answer(self) -> Image.Image:
        """The picture of `target`. For a T2I case it is one of many right ones."""
        return enlarge(render(self.target))


def bench_cases(task: str, category: str, count: int) -> list[Case]:
    """The first `count` cases of T2I-Bench (task "t2i") or Editing-Bench (task "edit") in one category or family."""
    return [bench_case(task, category, index) for index in range(count)]


@cache  # and with it the case's pictures
def bench_case(task: str, category: str, index: int) -> Case:
    return draw_case(task, category, 2026, index, benched=True)


def draw_case(task: str, category: str, seed: int, index: int, benched: bool, narrow: bool = False) -> Case:
    """Case number `index` of a stream.

    benched: whether it is for a bench. Then target and source are held out; a training case's never are (see held_out).
    narrow: see draw_spec.
    """
    rng = random.Random(f"{task} {category} {seed} {index} {benched}")
    while True:
        if task == "t2i":
            spec = draw_spec(category, rng, narrow)
            case = Case(task, category, caption(spec), spec, OPEN[category])
        else:
            case = draw_edit(category, rng, narrow)
        specs = [case.target] if case.source is None else [case.target, case.source]
        if all(held_out(spec) == benched for spec in specs):
            return case


SOURCES = {  # categories of the sources of an edit; those of other families may be of any category
    "scene": ("landscape",),
    "text": ("text",),
    "identity": ("portrait",),
    "object": ("landscape", "portrait"),
}


def draw_edit(family: str, rng: random.Random, narrow: bool = False) -> Case:
    """A source and an instruction of this family, drawn uniformly. narrow: see draw_spec.

    Nearly every instruction leaves something open, or its source does. There the answer is one of many, and the edit is as
    hard for few steps as a picture from words alone. Noise leaves nothing open, but hides much.
    """
    category = rng.choice(SOURCES.get(family, CATEGORIES))
    source, lists = draw_spec(category, rng), ATTRIBUTES[category] | OPEN[category]
    if family == "scene" or (family == "object" and category == "landscape"):  # these are about a thing in a landscape
        thing, side = rng.choice(lists["thing"][1:]), rng.choice(lists["side"])
        source = settle(source | {"thing": thing, "side": side})

    def others(name: str, leaving_out: str = "") -> tuple:
        """The values that the source does not have."""
        return tuple(value for value in lists[name] if value not in (source[name], leaving_out))

    def edit(instruction: str, asked: dict, open_names: str = "", new: dict[str, tuple] | None = None) -> Case:
        """asked: entries that the instruction names. open_names: entries that it leaves open. new: entries of which it says
        only that they change, with the values that they may have."""
        free = {name: lists[name] for name in open_names.split()} | (new or {})
        choices = dict(free)
        if narrow:
            for name, values in narrowed(OPEN[category]).items():
                if name in free:
                    choices[name] = tuple(value for value in free[name] if value in values)
        drawn = {name: rng.choice(values) for name, values in choices.items()}
        return Case("edit", family, instruction, settle(source | asked | drawn), free, source)

    if family == "enhance":
        if rng.random() < 0.5:
            noise = rng.getrandbits(64)
            return Case("edit", family, "Remove the noise.", source, {}, source, noise=noise)
        visible = draw_half(rng)
        return Case("edit", family, "Fill in the missing half.", source, lists, source, visible=visible)
    if family == "scene":
        asked = {"time": rng.choice(others("time")), "ground": rng.choice(lists["ground"])}
        place = "by the sea" if asked["ground"] == "sea" else f"in the {asked['ground']}"
        instruction = f"This {source['thing']} at {asked['time']}, {place}."
        return edit(instruction, asked, "side weather horizon phase sun clouds step")
    if family == "identity":
        asked = {"backdrop": rng.choice(others("backdrop"))}
        instruction = f"This person again, {asked['backdrop']} background."
        return edit(instruction, asked, "hat mouth x size clothes pattern")
    if family == "text":
        asked = {"sign": rng.choice(others("sign"))}
        instruction = f"A new poster with this word, {asked['sign']} sign."
        return edit(instruction, asked, "wall column row bricks sticker_a sticker_b")
    if family == "object":
        if category == "landscape":
            return edit(f"Replace the {source['thing']}.", {}, new={"thing": others("thing", "nothing")})
        if rng.random() < 0.5:
            return edit("Give this person another hat.", {}, new={"hat": others("hat", "nothing")})
        return edit("Give this person another hairdo.", {}, "length", {"hair": others("hair")})
    instruction, open_names, changed = {  # style: other colours, the same forms
        "landscape": ("This place at another time of the day.", "sun", ("time",)),
        "portrait": ("Other clothes, another background.", "pattern", ("clothes", "backdrop")),
        "text": ("Paint the sign and the wall in other colors.", "", ("sign", "wall")),
    }[category]
    return edit(instruction, {}, open_names, {name: others(name) for name in changed})


# ---- prompts to train on ---------------------------------------------------------------------------------------------


def training_prompts(
    task: str, category: str, count: int, seed: int, targets: bool = True, narrow: bool = False
) -> list[Prompt]:
    """`count` prompts of one category (or family of edits) that are in no bench; targets: with the pictures to learn."""
    prompts = []
    for index in range(count):
        case = draw_case(task, category, seed, index, benched=False, narrow=narrow)
        target = case.answer() if targets else None
        prompts.append(Prompt(task, category, case.prompt, case.images, target))
    return prompts


def prompts(counts: dict[str, int], seed: int, targets: bool) -> Iterator[Prompt]:
    """counts[task] training prompts of every category (or family of edits) of the tasks in `counts`."""
    for task, count in counts.items():
        for category in BENCHES[task]:
            yield from training_prompts(task, category, count, seed, targets)


def prompts_for(recipe: Recipe, count: int, seed: int, targets: bool) -> list[Prompt]:
    """`count` training prompts of each task that the recipe uses, in equal parts from each of its categories."""
    prompts = []
    for task, share, composition in zip(TASKS, recipe.ratio, (recipe.t2i, recipe.edit), strict=True):
        categories = tuple(composition) or BENCHES[task]
        if share:
            for category in categories:
                prompts += training_prompts(task, category, math.ceil(count / len(categories)), seed, targets)
    return prompts


def digest(prompts: Iterable[Prompt]) -> str:
    """A hash of words and pictures. So it changes with the world, but not with its comments."""
    contents = b""
    for prompt in prompts:
        pictures = [*prompt.images, *filter(None, [prompt.target])]
        contents += prompt.prompt.encode() + b"".join(picture.tobytes() for picture in pictures)
    return files.digest(contents)[:16]


# ---- the sheet -------------------------------------------------------------------------------------------------------


def sheet() -> Image.Image:
    """What the world looks like: three rows for each category, the last with one caption for all its pictures; then a row for
    each family of edits, every source beside its answer."""
    rows = []
    for category in CATEGORIES:
        rng = random.Random(0)
        specs = [draw_spec(category, rng) for _ in range(25)]
        named = {name: specs[-1][name] for name in ATTRIBUTES[category]}
        of_one_caption = [settle(draw_spec(category, rng) | named) for _ in range(12)]
        rows += [specs[:12], specs[12:24], of_one_caption]
    rows = [[enlarge(render(spec)) for spec in row] for row in rows]
    for family in FAMILIES:
        cases = [draw_case("edit", family, 0, index, benched=False) for index in range(6)]
        rows.append([picture for case in cases for picture in (case.images[0], case.answer())])
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
