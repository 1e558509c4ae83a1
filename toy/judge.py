"""The judge of the toy world: it scores a picture by drawing what the picture should have been.

No network has a say. For a picture and the spec that its prompt was made from:

1. fit     the caption leaves much open, so find the OPEN entries with which the truth comes nearest to the picture;
2. read    for every attribute, draw each of its values (all else held) and take the nearest: right, or wrong;
3. score   half compliance, half fidelity, as the paper's judges weigh their two dimensions (appendix A):
           compliance  1 if EVERY attribute (and so every letter) is right, else 0;
           fidelity    how near the picture is to the nearest drawing, place by place: 1 at what the autoencoder makes
                       of that drawing, 0 at that drawing blurred or noised until a person calls it bad.

An edit must leave the rest alone, so there the open entries are those of the SOURCE and only those that the instruction
opens are fitted: a face that moved is far from the drawing, and fidelity says so. `kept` is the same distance over the
pixels that the edit should not have touched; it is reported beside the score.

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
# What an attribute's other values leave open in turn: a stray house may stand anywhere.
OPENS = {"weather": ("clouds",), "thing": ("side", "step")}

# (B, 128, 128, 3) pictures in [0, 1] -> the same, through the autoencoder and back.
Reconstruct = Callable[[np.ndarray], np.ndarray]


@dataclass
class Verdict:
    right: dict[str, bool]  # by attribute; for a style edit with "style"
    fitted: dict  # the nearest spec: the attributes as read, the open entries as fitted
    fidelity: float  # 0 to 1
    kept: float | None  # 0 to 1, edits only: fidelity where nothing should have changed

    @property
    def exact(self) -> bool:
        return all(self.right.values())

    @property
    def score(self) -> float:
        return 0.5 * self.exact + 0.5 * self.fidelity


def judge(pictures: list[Image.Image], cases: list[Case], reconstruct: Reconstruct) -> list[Verdict]:
    """Scores pictures (any size, any mode) against their cases."""
    small = [world.shrink(picture) for picture in pictures]
    reads = [read(picture, case) for picture, case in zip(small, cases)]
    drawn = np.stack([_large(world.render(spec, style)) for spec, _, style in reads])  # (B, 128, 128, 3)
    again = reconstruct(drawn)
    verdicts = []
    for i, (spec, right, _) in enumerate(reads):
        side = drawn.shape[1]
        flat = Image.alpha_composite(Image.new("RGBA", pictures[i].size, "white"), pictures[i].convert("RGBA"))
        picture = np.asarray(flat.convert("RGB").resize((side, side), Image.BOX), dtype=np.float32) / 255
        kept = None
        if cases[i].edit:
            kept = fidelity(picture, drawn[i], again[i], _untouched(cases[i].edit))
        verdicts.append(Verdict(right, spec, fidelity(picture, drawn[i], again[i]), kept))
    return verdicts


def read(picture: np.ndarray, case: Case) -> tuple[dict, dict[str, bool], str | None]:
    """(32, 32, 3) -> the nearest spec, which attributes are right, and the style it is nearest to."""
    style = case.edit.style if case.edit else None
    groups = tuple((name,) for name in case.edit.free) if case.edit else world.TOGETHER[case.target["category"]]
    spec = fit(picture, case.target, groups, style)
    right, nearest = {}, dict(spec)
    for name, values in world.attributes(spec).items():
        candidates = []
        for value in values:
            opened = OPENS.get(name, ()) if value != spec[name] else ()
            lists = world.ATTRIBUTES[spec["category"]] | world.OPEN[spec["category"]]
            for choice in product(*(lists[o] for o in opened)):
                candidates.append(world.settle(spec | {name: value} | dict(zip(opened, choice))))
        best = min(candidates, key=lambda candidate: _distance(picture, world.render(candidate, style)))
        right[name] = best[name] == spec[name]
        nearest |= {name: best[name]} | {o: best[o] for o in OPENS.get(name, ())}
    if case.edit and case.edit.family == "style":
        styles = [None, *world.STYLES]
        best = min(styles, key=lambda other: _distance(picture, world.render(spec, other)))
        right["style"] = best == style
    return world.settle(nearest), right, style


def fit_open(picture: np.ndarray, case: Case) -> tuple:
    """(32, 32, 3) of a T2I case -> its open entries, as fitted: which of the many right pictures this is."""
    spec = fit(picture, case.target, world.TOGETHER[case.target["category"]], None)
    return tuple(spec[name] for name in world.OPEN[spec["category"]])


def fit(picture: np.ndarray, spec: dict, groups: tuple[tuple[str, ...], ...], style: str | None) -> dict:
    """The spec with its open entries chosen so that the drawing comes nearest: coordinate descent over the groups, until
    a sweep changes nothing. Entries of one group are tried in all combinations."""
    lists = world.OPEN[spec["category"]]
    spec = world.settle(spec | {name: lists[name][0] for group in groups for name in group})
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


def fidelity(picture: np.ndarray, drawn: np.ndarray, again: np.ndarray, where: np.ndarray | None = None) -> float:
    """All (128, 128, 3) in [0, 1]; `where` an optional (128, 128) mask. 1 at `again`, 0 at a bad blur or noise of `drawn`."""
    small = drawn[:: world.ENLARGE, :: world.ENLARGE]
    noise = np.random.default_rng(0).normal(0, BAD_NOISE, small.shape)
    bad = min(
        local_error(_large(world.blur(small, BAD_BLUR)), drawn, where),
        local_error(_large(np.clip(small + noise, 0, 1)), drawn, where),
    )
    best = local_error(again, drawn, where)
    if bad <= best:  # so little to see (an even sky) that blur cannot be told from the autoencoder's own error
        return 1.0 if local_error(picture, drawn, where) <= best else 0.0
    return float(np.clip((bad - local_error(picture, drawn, where)) / (bad - best), 0, 1))


def local_error(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> float:
    """A fourth-power mean of the error inside each of the 8 x 8 latent positions, then the root mean square over them.

    Fourth power, because blur errs much at few pixels (the edges) and noise errs little at all of them; with squares alone
    a picture that is plainly blurred would count as one with hardly visible noise.
    """
    error = np.square(np.square(a - b).mean(axis=2))
    weight = np.ones_like(error) if where is None else where.astype(np.float32)
    error, weight = (x.reshape(8, 16, 8, 16).sum(axis=(1, 3)) for x in (error * weight, weight))
    seen = weight > 0
    return float(np.sqrt(np.sqrt(error[seen] / weight[seen]).mean())) if seen.any() else 0.0


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.square(a - b).sum())


def _large(small: np.ndarray) -> np.ndarray:
    return small.repeat(world.ENLARGE, axis=0).repeat(world.ENLARGE, axis=1)


def _untouched(edit: Edit) -> np.ndarray | None:
    """(128, 128): where the clean source and the target agree. None where the edit concerns every pixel."""
    if edit.style:
        return None
    same = np.abs(world.render(edit.source) - world.render(edit.target)).max(axis=2) < 1 / 255
    return _large(same[..., None])[..., 0]
