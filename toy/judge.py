"""The judge of the toy world: it scores a picture by drawing what the picture should have been.

No network has a say. For a picture and the spec that its prompt was made from:

1. fit     The caption leaves much open: find the OPEN entries with which the truth comes nearest to the picture.
2. read    Change the attribute that brings the drawing nearest, until none does. What was changed is wrong.
3. score   Half compliance, half fidelity, as the paper's judges weigh two things (appendix A).
           compliance  1 if EVERY attribute, and so every letter, is right, else 0
           fidelity    how near the picture is to the nearest drawing, place by place: 1 at what the autoencoder makes of
                       that drawing, 0 at that drawing blurred or noised until a person calls it bad

An edit must leave the rest alone. So its open entries are those of the SOURCE, and only those that the instruction opens
are fitted: a face that moved is far from the drawing and costs fidelity. `kept` is the fidelity to the TRUE target where the
edit should have changed nothing; it is reported beside the score.

BAD_BLUR and BAD_NOISE were set by looking at pictures of the world itself, before any model was scored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image

from toy import world
from toy.world import Case, Edit

BAD_BLUR = 1.2  # radius in large pixels
BAD_NOISE = 0.10  # standard deviation per large pixel, of a full range of 1
MIN_KEPT = 1 / 16  # of the picture; a sunset leaves only a lamp or two as they were, too little to judge by
# What another value of an attribute leaves open: a house that should not be there may stand anywhere.
OPENS = {
    "weather": ("clouds",),
    "thing": ("side", "step"),
    "side": ("step",),
    "ground": ("horizon", "phase", "steep"),
    "sign": ("column", "row"),
}

# (B, 128, 128, 3) pictures in [0, 1] -> the same, through the autoencoder and back.
Reconstruct = Callable[[np.ndarray], np.ndarray]


@dataclass
class Verdict:
    right: dict[str, bool]  # by attribute; for a style edit with "style"
    fitted: dict  # the nearest spec: the attributes as read, the open entries as fitted
    fidelity: float  # 0 to 1
    kept: float | None  # 0 to 1: fidelity where an edit should change nothing; None where that is (next to) nowhere

    @property
    def compliance(self) -> bool:
        return all(self.right.values())

    @property
    def score(self) -> float:
        return 0.5 * self.compliance + 0.5 * self.fidelity


def judge(pictures: list[Image.Image], cases: list[Case], reconstruct: Reconstruct) -> list[Verdict]:
    """Scores pictures (any size, any mode) against their cases."""
    reads = [read(world.shrink(picture), case) for picture, case in zip(pictures, cases)]
    drawn = [_large(world.render(spec, style)) for spec, _, style in reads]  # (128, 128, 3) each
    # What an edit should have kept is compared with the truth. The nearest drawing may have a hat that nobody asked for.
    edits = [i for i, case in enumerate(cases) if case.edit]
    truths = {i: cases[i].target | {name: reads[i][0][name] for name in cases[i].edit.free} for i in edits}
    kept = {i: _large(world.render(truths[i], reads[i][2])) for i in edits}
    again = reconstruct(np.stack(drawn + list(kept.values())))  # (B + edits, 128, 128, 3)
    kept_again = dict(zip(edits, again[len(cases) :]))
    verdicts = []
    for i, (spec, right, _) in enumerate(reads):
        picture = world.shrink(pictures[i], drawn[i].shape[0])
        whole, rest = fidelity(picture, drawn[i], again[i]), None
        if cases[i].edit:
            where = _untouched(cases[i].edit, truths[i])
            if where.mean() > MIN_KEPT:
                rest = fidelity(picture, kept[i], kept_again[i], where)
        verdicts.append(Verdict(right, spec, whole, rest))
    return verdicts


def read(picture: np.ndarray, case: Case) -> tuple[dict, dict[str, bool], str | None]:
    """(32, 32, 3) -> the nearest spec, which attributes are right, and the nearest style.

    Steepest descent from the truth: make the one change of an attribute that brings the drawing nearest, fit the open
    entries again, and repeat until no change helps. One change at a time, the greatest first, because one wrong attribute
    makes others look wrong: on a sign of another colour the letters have other ink.
    """
    style = case.edit.style if case.edit else None
    groups = _groups(case)
    spec = fit(picture, _blank(case.target, groups), groups, style)
    names = world.attributes(case.target)
    restyled = (None, *world.STYLES) if style else (style,)
    for _ in names:
        changes = [(c, style) for name in names for c in _others(spec, name)] + [(spec, s) for s in restyled]
        best = min([(spec, style), *changes], key=lambda change: _distance(picture, world.render(*change)))
        if best == (spec, style):  # first in the list, so it also wins a tie
            break
        spec, style = fit(picture, best[0], groups, best[1]), best[1]
    right = {name: spec[name] == case.target[name] for name in names}
    if "side" in names and spec["thing"] == "nothing":  # what is not there is on no side
        right["side"] = False
    if case.edit and case.edit.style:
        right["style"] = style == case.edit.style
    return spec, right, style


def fit_open(picture: np.ndarray, case: Case) -> tuple:
    """(32, 32, 3) of a T2I case -> its fitted open entries, which say which of the many right pictures this is."""
    groups = _groups(case)
    spec = fit(picture, _blank(case.target, groups), groups, None)
    return tuple(spec[name] for name in world.OPEN[spec["category"]])


def fit(picture: np.ndarray, spec: dict, groups: tuple[tuple[str, ...], ...], style: str | None) -> dict:
    """The spec with those entries in `groups` that bring the drawing nearest: coordinate descent from the spec's own, until
    a sweep changes nothing. The entries of one group are tried in all combinations."""
    lists = world.OPEN[spec["category"]]
    for _ in range(4):
        before = spec
        for group in groups:
            candidates = [
                world.settle(spec | dict(zip(group, choice))) for choice in product(*(lists[name] for name in group))
            ]
            candidates = [c for i, c in enumerate(candidates) if c not in candidates[:i]]
            if len(candidates) > 1:
                spec = min(candidates, key=lambda candidate: _distance(picture, world.render(candidate, style)))
        if spec == before:
            break
    return spec


def _groups(case: Case) -> tuple[tuple[str, ...], ...]:
    """The open entries to fit: all of a T2I case, of an edit those that its instruction opens."""
    groups = world.TOGETHER[case.target["category"]]
    if case.edit:
        groups = tuple(tuple(name for name in group if name in case.edit.free) for group in groups)
    return tuple(group for group in dict.fromkeys(groups) if group)


def _blank(spec: dict, groups: tuple[tuple[str, ...], ...]) -> dict:
    """The spec with first values in the entries to fit: the judge must find them in the picture."""
    lists = world.OPEN[spec["category"]]
    return world.settle(spec | {name: lists[name][0] for group in groups for name in group})


def _others(spec: dict, name: str) -> list[dict]:
    """The specs with another value of attribute `name`, and with all that such a change leaves open."""
    lists = world.ATTRIBUTES[spec["category"]] | world.OPEN[spec["category"]]
    opened = OPENS.get(name, ())
    values = [value for value in lists[name] if value != spec[name]]
    return [
        world.settle(spec | {name: value} | dict(zip(opened, choice)))
        for value in values
        for choice in product(*(lists[o] for o in opened))
    ]


def fidelity(picture: np.ndarray, drawn: np.ndarray, again: np.ndarray, where: np.ndarray | None = None) -> float:
    """1 at `again`, 0 at a bad blur or noise of `drawn`. All (128, 128, 3) in [0, 1]; `where` is a (128, 128) mask.

    No place counts for more than the worst place of those bad pictures: a doubled cloud should not weigh as much as a
    picture that is bad everywhere.
    """
    small = drawn[:: world.ENLARGE, :: world.ENLARGE]
    noise = np.random.default_rng(0).normal(0, BAD_NOISE, small.shape)
    blurred, noisy = world.blur(small, BAD_BLUR), np.clip(small + noise, 0, 1)
    bad = [local_errors(_large(made), drawn, where) for made in (blurred, noisy)]
    worst = np.max(bad)

    def error(made: np.ndarray) -> float:
        return _rms(local_errors(made, drawn, where).clip(max=worst))

    zero, one = min(map(_rms, bad)), error(again)
    if zero <= one:  # an autoencoder as bad as that draws nothing well
        return 0.0
    return float(np.clip((zero - error(picture)) / (zero - one), 0, 1))


def local_errors(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
    """The error in each of the 8 x 8 latent positions (of those in `where`): a fourth-power mean over its pixels.

    Blur errs much at few pixels, the edges; noise errs little at all of them. With squares alone, plain blur would count as
    hardly visible noise.
    """
    error = np.square(np.square(a - b).mean(axis=2))
    weight = np.ones_like(error) if where is None else where.astype(np.float32)
    error, weight = (x.reshape(8, 16, 8, 16).sum(axis=(1, 3)) for x in (error * weight, weight))
    seen = weight > 0
    return (error[seen] / weight[seen]) ** 0.25 if seen.any() else np.zeros(1)


def _rms(errors: np.ndarray) -> float:
    return float(np.sqrt(np.square(errors).mean()))


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.square(a - b).sum())


def _large(small: np.ndarray) -> np.ndarray:
    """(32, 32, 3) -> (128, 128, 3), in the 256 steps of a picture."""
    return ((small * 255).round() / 255).repeat(world.ENLARGE, axis=0).repeat(world.ENLARGE, axis=1)


def _untouched(edit: Edit, truth: dict) -> np.ndarray:
    """(128, 128) bool: where source and true target agree, before any degradation or style."""
    same = np.abs(world.render(edit.source) - world.render(truth)).max(axis=2) < 1 / 255
    return same.repeat(world.ENLARGE, axis=0).repeat(world.ENLARGE, axis=1)
