"""The judge of the toy world: it scores a picture by drawing what the picture should have been.

No network is involved. For a picture and the case that its prompt was made from:

1. fit     The prompt leaves much open: find the free entries with which a right answer comes nearest to the picture.
2. read    Change the attribute that brings the drawing nearest, and repeat until none does. An attribute whose value is
           wrong at the end is wrong in the picture.
3. count   See whether the picture shows more than its nearest drawing: a second sign, a fourth letter, a third cloud.
4. score   Half compliance, half fidelity, as the paper's judges weigh two things (appendix A).
           compliance  1 if EVERYTHING that was asked for or had to be kept is right, every letter included, and nothing
                       is there that nobody asked for; else 0
           fidelity    how near the picture is to the nearest drawing, place by place: 1 for that drawing through the
                       autoencoder and back, 0 for that drawing blurred or noised until a person calls it bad

An edit must keep the rest of its source. So only the entries that it leaves free are fitted. Other clothes that nobody asked
for are far from the drawing and cost fidelity. A house, a cloud or a sign that moved is found, and is wrong. A face that
moved, or long hair in place of short hair, covers backdrop that should be seen, and counts as an extra. Where half of a
picture is filled in, only answers that agree with the visible half are right. A damaged source that was not repaired is wrong.

Extras are looked for on the background alone: sky and land, backdrop, or wall. A third eye inside a face is not found. Hills
between two right places, and bricks in two right places at once, are unclean: they cost fidelity, and are no extras.

BAD_BLUR, BAD_NOISE and EXTRA were set on pictures of the world itself. Right pictures stay below EXTRA, at 0.034 or less, after
blur up to 0.8 large pixels, noise up to 0.05, or the autoencoder. Of planted extras whose colour differs from the background
by 0.12 (root mean square over the channels), 95% are found, half transparent ones included.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from checkpoint.files import digest
from toy import painter, world
from toy.world import Case

BAD_BLUR = 1.2  # radius in large pixels
BAD_NOISE = 0.10  # standard deviation per large pixel, of a full range of 1
EXTRA = 0.04  # of a full range of 1: how far the colour of a patch may stand out from the background
# Entries that are fitted together, because one alone cannot be told without the others.
TOGETHER = {
    "landscape": (
        "time",
        "sun",
        "weather clouds",
        "ground horizon phase",
        "thing side step",
        "horizon step",
        "phase step",
    ),
    "portrait": ("x size", "hair length", "skin", "hat", "eyes", "mouth", "backdrop pattern", "clothes"),
    "text": ("column row sign", "letter0", "letter1", "letter2", "wall", "bricks", "sticker_a", "sticker_b"),
}
# The open entries that decide how the background itself looks. What may be seen with any of their values is no extra.
BEHIND = {"landscape": ("horizon", "phase"), "portrait": ("pattern",), "text": ("bricks",)}
# The entries that another value of an attribute leaves open: a house that should not be there may stand anywhere.
OPENS = {
    "weather": ("clouds",),
    "thing": ("side", "step"),
    "side": ("step",),
    "ground": ("horizon", "phase"),
    "sign": ("column", "row"),
}

# (B, 128, 128, 3) pictures in [0, 1] -> the same, through the autoencoder and back.
Reconstruct = Callable[[np.ndarray], np.ndarray]


@dataclass
class Verdict:  # what the judge says of one picture
    right: dict[str, bool]  # of every attribute that was asked for or had to be kept, and "nothing extra"
    fitted: dict  # the nearest spec: the attributes as read, the free entries as fitted
    fidelity: float  # 0 to 1

    @property
    def compliance(self) -> bool:
        return all(self.right.values())

    @property
    def score(self) -> float:
        return 0.5 * self.compliance + 0.5 * self.fidelity


def judge(pictures: list[Image.Image], cases: list[Case], reconstruct: Reconstruct) -> list[Verdict]:
    """Score pictures, of any size and mode, against their cases."""
    reads = [read(world.shrink(picture), case) for picture, case in zip(pictures, cases, strict=True)]
    drawn = np.stack([_large(world.render(spec)) for spec, _ in reads])  # (B, 128, 128, 3)
    again = reconstruct(drawn)
    verdicts = []
    for i, (spec, right) in enumerate(reads):
        seen = world.shrink(pictures[i], drawn.shape[1])  # (128, 128, 3)
        right["nothing extra"] = extra(_small(seen), spec, again[i]) <= EXTRA
        verdicts.append(Verdict(right, spec, fidelity(seen, drawn[i], again[i])))
    return verdicts


def version() -> str:
    """A hash of the judge and of its world, so that no table mixes two judges. Comments and docstrings do not count."""
    sources = b"".join(Path(file).read_bytes() for file in (__file__, world.__file__, painter.__file__))
    return digest(re.sub(rb'\s*(""".*?"""|#[^\n]*)', b"", sources, flags=re.DOTALL))[:16]


def read(picture: np.ndarray, case: Case) -> tuple[dict, dict[str, bool]]:
    """(32, 32, 3) -> the nearest spec, and which attributes are right."""
    if case.visible is not None:
        return read_half(picture, case)
    allowed = right_values(case)
    spec = descend(picture, case, allowed)
    right = {name: spec[name] in values for name, values in allowed.items()}
    if "side" in right and spec["thing"] == "nothing":  # what is not there is on no side
        right["side"] = False
    for name, opened in OPENS.items():  # what had to be kept, and now stands elsewhere
        places = world.OPEN[spec["category"]].keys() & set(opened) - case.free.keys()
        if right.get(name) and any(spec[place] != case.target[place] for place in places):
            right[name] = False
    if case.noise is not None:
        right["noise removed"] = _nearer_than_source(picture, spec, case)
    return spec, right


def read_half(picture: np.ndarray, case: Case) -> tuple[dict, dict[str, bool]]:
    """The same where half of a picture was to be filled in. Any picture that agrees with the visible half is right.

    So everything is free, and fitted. An attribute is right if the nearest agreeing picture has the same value.
    """
    seen = fit(picture, case.target, case.free)
    agreeing = seen if _agrees(seen, case) else fit(picture, case.target, case.free, partial(_agrees, case=case))
    right = {name: seen[name] == agreeing[name] for name in world.ATTRIBUTES[seen["category"]]}
    return agreeing, right | {"half filled": _nearer_than_source(picture, agreeing, case)}


def right_values(case: Case) -> dict[str, tuple]:
    """Everything that was asked for or had to be kept -> the values that are right. That is each attribute for which some
    value is wrong, and each open entry that had to change, as in "other clothes"."""
    lists = world.attributes(case.target)
    lists |= {name: values for name, values in world.OPEN[case.target["category"]].items() if name in case.free}
    allowed = {name: case.free.get(name, (case.target[name],)) for name in lists}
    return {name: some for name, some in allowed.items() if len(some) < len(lists[name])}


def descend(picture: np.ndarray, case: Case, allowed: Iterable[str]) -> dict:
    """Steepest descent from the nearest right answer: make the one change of an allowed entry that brings the drawing nearest,
    fit the free entries again, and repeat until no change helps.

    One change at a time, the greatest first, because one wrong attribute makes others look wrong: on a sign of another
    colour the letters have other ink.
    """
    spec = fit(picture, case.target, case.free)
    for _ in allowed:
        changes = [change for name in allowed for change in _changes(spec, name)]
        best = min([spec, *changes], key=lambda change: _distance(picture, change))
        if best == spec:  # first in the list, so it also wins a tie
            break
        spec = fit(picture, best, case.free)
    return spec


def _changes(spec: dict, name: str) -> list[dict]:
    """The spec with each other value of `name`, combined with all values of what such a change leaves open."""
    lists = world.ATTRIBUTES[spec["category"]] | world.OPEN[spec["category"]]
    choices = _combinations({name: lists[name]} | {opened: lists[opened] for opened in OPENS.get(name, ())})
    return [world.settle(spec | choice) for choice in choices if choice[name] != spec[name]]


def fit(picture: np.ndarray, spec: dict, free: dict[str, tuple], agrees: Callable[[dict], bool] | None = None) -> dict:
    """The spec with the values of the free entries that bring its drawing nearest to the picture (32, 32, 3).

    Coordinate descent from the spec's own values, until a sweep changes nothing. All combinations of a group's entries are
    tried, except those that `agrees` rejects.
    """
    groups = [{name: free[name] for name in group.split() if name in free} for group in TOGETHER[spec["category"]]]
    for _ in range(4):
        before = spec
        for group in filter(None, groups):
            candidates = [world.settle(spec | choice) for choice in _combinations(group)]
            candidates = [spec, *(filter(agrees, candidates) if agrees else candidates)]
            spec = min(candidates, key=lambda candidate: _distance(picture, candidate))
        if spec == before:
            break
    return spec


def _combinations(lists: dict[str, tuple]) -> list[dict]:
    return [dict(zip(lists, choice)) for choice in product(*lists.values())]


def fit_free(picture: np.ndarray, case: Case) -> tuple:
    """(32, 32, 3) -> the fitted free entries, which say which of the many right answers this is."""
    agrees = None if case.visible is None else partial(_agrees, case=case)
    spec = fit(picture, case.target, case.free, agrees)
    return tuple(spec[name] for name in case.free)


def _agrees(spec: dict, case: Case) -> bool:
    """Whether the drawing shows what is visible of the source."""
    drawn, source = _drawing(tuple(spec.items())), _drawing(tuple(case.source.items()))
    return bool((drawn == source)[case.visible].all())


def _nearer_than_source(picture: np.ndarray, spec: dict, case: Case) -> bool:
    """Whether the picture is nearer to this drawing than to the damaged source: else nothing was repaired."""
    return _distance(picture, spec) < float(np.square(picture - world.shrink(case.images[0])).sum())


def fidelity(picture: np.ndarray, drawn: np.ndarray, again: np.ndarray) -> float:
    """1 for `again`, 0 for `drawn` with a bad blur or bad noise. All (128, 128, 3) in [0, 1].

    No place counts more than the worst place of those bad pictures, so a doubled cloud does not weigh as much as a picture
    that is bad everywhere.
    """
    small = drawn[:: world.ENLARGE, :: world.ENLARGE]
    noise = np.random.default_rng(0).normal(0, BAD_NOISE, small.shape)
    blurred, noisy = world.blur(small, BAD_BLUR), np.clip(small + noise, 0, 1)
    bad = [local_errors(_large(made), drawn) for made in (blurred, noisy)]
    worst = np.max(bad)

    def error(made: np.ndarray) -> float:
        return _rms(local_errors(made, drawn).clip(max=worst))

    zero, one = min(map(_rms, bad)), error(again)
    if zero <= one:  # an autoencoder as bad as that draws nothing well
        return 0.0
    return float(np.clip((zero - error(picture)) / (zero - one), 0, 1))


def extra(picture: np.ndarray, spec: dict, again: np.ndarray) -> float:
    """How much the picture shows on the background that the drawing of the spec does not: the largest mean of colours that
    stand out, over all patches of 3 x 3 large pixels; root mean square over red, green, blue.

    A colour stands out by how far it lies outside the range of the colours around it: in the drawing, in that drawing through
    the autoencoder, and in backgrounds with other bricks, patterns or hills. So blur does not count, nor do bricks between
    two right places. Noise cancels in the mean of a patch. picture: (32, 32, 3), again: (128, 128, 3), both in [0, 1].
    """
    lists = {name: world.OPEN[spec["category"]][name] for name in BEHIND[spec["category"]]}
    drawn, behind = world.render(spec), world.background(spec)
    likes = [drawn, _small(again), *(world.background(spec | choice) for choice in _combinations(lists))]
    around = np.stack([_patches(np.pad(like, ((1, 1), (1, 1), (0, 0)), "edge")) for like in likes])
    low, high = around.min(axis=(0, 4, 5)), around.max(axis=(0, 4, 5))  # (32, 32, 3) each
    beyond = (picture - picture.clip(low, high)) * (drawn == behind).all(axis=2, keepdims=True)
    return float(np.sqrt(np.square(_patches(beyond).mean(axis=(3, 4))).mean(axis=2)).max())


def _patches(small: np.ndarray) -> np.ndarray:
    """(h, w, 3) -> (h - 2, w - 2, 3, 3, 3), the last two within a patch."""
    return np.lib.stride_tricks.sliding_window_view(small, (3, 3), axis=(0, 1))


def _small(large: np.ndarray) -> np.ndarray:
    """(128, 128, 3) -> (32, 32, 3), the means of large pixels."""
    return large.reshape(world.SIDE, world.ENLARGE, world.SIDE, world.ENLARGE, 3).mean(axis=(1, 3))


def local_errors(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The error in each of the 8 x 8 latent positions: a fourth-power mean over its pixels.

    Blur errs much at a few pixels, the edges; noise errs a little at all of them. With squares alone, obvious blur would
    count as much as hardly visible noise.
    """
    error = np.square(np.square(a - b).mean(axis=2))  # (128, 128)
    return error.reshape(8, 16, 8, 16).mean(axis=(1, 3)) ** 0.25


def _rms(errors: np.ndarray) -> float:
    return float(np.sqrt(np.square(errors).mean()))


def _distance(picture: np.ndarray, spec: dict) -> float:
    return float(np.square(picture - _drawing(tuple(spec.items())) / np.float32(255)).sum())


@lru_cache(maxsize=2**14)  # 50 MB: reading one picture tries many drawings again
def _drawing(spec: tuple) -> np.ndarray:
    """The drawing of a spec's items, (32, 32, 3) in 0 to 255."""
    return (world.render(dict(spec)) * 255).round().astype(np.uint8)


def _large(small: np.ndarray) -> np.ndarray:
    """(32, 32, 3) -> (128, 128, 3), in the 256 steps of a picture."""
    return ((small * 255).round() / 255).repeat(world.ENLARGE, axis=0).repeat(world.ENLARGE, axis=1)
