"""The judge is exact on ground truth and finds what is wrong with anything else. The autoencoder is the identity here,
unless a test brings its own."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from toy import judge, world
from toy.world import CATEGORIES, FAMILIES, STYLES

STREAMS = [("t2i", category) for category in CATEGORIES] + [("edit", family) for family in FAMILIES]


def cases(task: str, category: str, count: int) -> list[world.Case]:
    return [world.draw_case(task, category, 77, index, benched=True) for index in range(count)]


def draw(spec: dict, style: str | None = None) -> Image.Image:
    return world.enlarge(world.render(world.settle(spec), style))


def truth(case: world.Case) -> Image.Image:
    return draw(case.target, case.edit and case.edit.style)


def verdict(picture: Image.Image, case: world.Case) -> judge.Verdict:
    return judge.judge([picture], [case], lambda pictures: pictures)[0]


def wrong(picture: Image.Image, case: world.Case) -> set[str]:
    return {name for name, right in verdict(picture, case).right.items() if not right}


# ----------------------------------------------------------------------------------------------------------------------
# Right pictures


@pytest.mark.parametrize(("task", "category"), STREAMS)
def test_exact_on_ground_truth(task, category):
    """Every attribute right, fidelity 1, and the open entries found in the picture: read() starts without them."""
    some = cases(task, category, 10)
    for case, found in zip(some, judge.judge([truth(c) for c in some], some, lambda pictures: pictures)):
        assert found.compliance and found.fidelity == 1 and found.score == 1
        assert found.fitted == case.target
        assert found.kept in ((None,) if task == "t2i" else (1, None))
        assert set(found.right) == {*world.attributes(case.target), *(["style"] if category == "style" else [])}
    assert task == "t2i" or any(case.edit for case in some)


@pytest.mark.parametrize("category", CATEGORIES)
def test_open_entries_are_read_from_the_picture(category):
    """One prompt, many right pictures: all score 1, and fit_open tells which one it is."""
    case = cases("t2i", category, 1)[0]
    rng = random.Random(0)
    for _ in range(6):
        spec = world.settle(case.target | {n: rng.choice(values) for n, values in world.OPEN[category].items()})
        assert verdict(draw(spec), case).score == 1
        assert judge.fit_open(world.shrink(draw(spec)), case) == tuple(spec[name] for name in world.OPEN[category])


@pytest.mark.parametrize("family", ["scene", "object", "text", "identity"])
def test_what_an_edit_opens_is_free(family):
    """ "Add a house on the left": anywhere on the left. All answers score 1, and the judge tells which one it is."""
    rng = random.Random(0)
    some = [case for case in cases("edit", family, 60) if case.edit.free]
    for case in {case.edit.free: case for case in some}.values():  # one of each kind
        for _ in range(4):
            lists = world.OPEN[case.target["category"]]
            spec = world.settle(case.target | {name: rng.choice(lists[name]) for name in case.edit.free})
            found = verdict(draw(spec), case)
            assert found.score == 1 and found.kept in (1, None)
            assert (draw(found.fitted).tobytes()) == draw(spec).tobytes()


def test_any_size_and_mode():
    case = cases("t2i", "portrait", 1)[0]
    for picture in (truth(case).resize((32, 32), Image.BOX), truth(case).resize((256, 256), Image.NEAREST)):
        assert verdict(picture, case).score == 1
        assert verdict(picture.convert("RGB"), case).score == 1


def test_transparent_is_white():
    case = cases("t2i", "landscape", 1)[0]
    picture, white = truth(case), truth(case)
    hole = Image.new("L", picture.size, 255)
    hole.paste(0, (40, 0, 128, 60))
    picture.putalpha(hole)
    white.paste("white", (40, 0, 128, 60))
    assert verdict(picture, case) == verdict(white, case)
    assert verdict(white, case).fidelity < 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Wrong pictures


@pytest.mark.parametrize("category", CATEGORIES)
def test_wrong_attribute_is_named(category):
    """Exactly one attribute has another value, all open entries are drawn anew. This one is called wrong, no other."""
    rng = random.Random(0)
    for case in cases("t2i", category, 4):
        spec = case.target | {name: rng.choice(values) for name, values in world.OPEN[category].items()}
        for name, values in world.attributes(case.target).items():
            value = rng.choice([value for value in values if value != case.target[name]])
            found = verdict(draw(spec | {name: value}), case)
            expected = {name, "side"} if value == "nothing" and name == "thing" else {name}  # nothing stands nowhere
            assert {name for name, right in found.right.items() if not right} == expected
            assert found.fitted[name] == value and found.fidelity == 1 and found.score == 0.5


def test_several_wrong_attributes_are_named():
    case = cases("t2i", "portrait", 1)[0]
    other = {name: values[values.index(case.target[name]) - 1] for name, values in world.ATTRIBUTES["portrait"].items()}
    some = {name: other[name] for name in ("hair", "mouth", "backdrop")}
    assert wrong(draw(case.target | some), case) == {*some}
    case = cases("t2i", "text", 1)[0]
    other = {"letter0": "Z", "letter2": "T", "sign": "yellow" if case.target["sign"] != "yellow" else "blue"}
    assert wrong(draw(case.target | other), case) == {n for n, value in other.items() if case.target[n] != value}


def test_stray_object_is_found():
    for category, name, strays in (("landscape", "thing", ("house", "tree")), ("portrait", "hat", ("cap", "crown"))):
        case = next(c for c in cases("t2i", category, 60) if c.target[name] == "nothing")
        for stray in strays:
            assert wrong(draw(case.target | {name: stray, "side": "right", "step": 4}), case) == {name}


@pytest.mark.parametrize("family", ["scene", "object", "text", "identity"])
def test_edit_that_changes_nothing(family):
    """The source itself: faultless to look at, nothing that should have stayed is touched, and not what was asked for."""
    for case in cases("edit", family, 4):
        found = verdict(draw(case.edit.source), case)
        asked = {name for name in case.target if case.target[name] != case.edit.source[name]}
        assert {name for name, right in found.right.items() if not right} & asked
        assert found.fidelity == 1 and found.kept in (1, None)


def test_edit_that_changes_too_much():
    """What was asked for, and another backdrop: not compliant, and not kept, though the picture is a good one."""
    case = cases("edit", "identity", 1)[0]
    backdrop = next(b for b in world.BACKDROP if b != case.target["backdrop"])
    found = verdict(draw(case.target | {"backdrop": backdrop}), case)
    assert not found.right["backdrop"] and sum(found.right.values()) == len(found.right) - 1
    assert found.fidelity == 1 and found.kept == 0


def test_edit_that_moves_the_face():
    """In an edit the open entries are the source's."""
    for case in cases("edit", "identity", 3):
        place = 11 if case.target["x"] > 15 else 21
        found = verdict(draw(case.target | {"x": place}), case)
        assert found.fidelity == 0 and found.kept == 0
        clothes = next(c for c in world.CLOTHES if c != case.target["clothes"])
        found = verdict(draw(case.target | {"clothes": clothes}), case)
        assert found.compliance and found.fidelity < 0.4 and found.kept < 0.4


def test_styles():
    for case in cases("edit", "style", 6):
        for style in (None, *STYLES):
            found = verdict(draw(case.target, style), case)
            assert found.right["style"] == (style == case.edit.style)
            assert found.fidelity == 1 and found.kept == 1 and found.score == (1 if style == case.edit.style else 0.5)
        name, values = next(iter(world.attributes(case.target).items()))
        value = next(v for v in values if v != case.target[name])
        assert name in wrong(draw(case.target | {name: value}, case.edit.style), case)


def test_degraded_source_is_not_enhanced():
    for case in cases("edit", "enhance", 6):
        assert verdict(case.images[0], case).score < {"noise": 0.6, "blur": 0.6, "fade": 0.3}[case.edit.degradation]


# ----------------------------------------------------------------------------------------------------------------------
# Fidelity


@pytest.mark.parametrize("category", CATEGORIES)
def test_noise_scores_nothing(category):
    some = cases("t2i", category, 3)
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)) for _ in some]
    grain = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).resize((128, 128), 0) for _ in some]
    grey = [Image.new("RGB", (128, 128), (value, value, value)) for value in (0, 128, 255)]
    for pictures in (noise, grain, grey):
        for found in judge.judge(pictures, some, lambda pictures: pictures):
            assert found.score == 0


@pytest.mark.parametrize("category", CATEGORIES)
def test_blur_and_noise_cost_fidelity(category):
    """From 1 down to 0 at the judge's constants, and never up again."""
    for case in cases("t2i", category, 2):
        small = world.render(case.target)
        grain = np.random.default_rng(5).normal(0, 1, small.shape)
        blurred = [world.blur(small, radius) for radius in np.linspace(0, judge.BAD_BLUR, 6).tolist()]
        noised = [np.clip(small + sigma * grain, 0, 1) for sigma in np.linspace(0, judge.BAD_NOISE, 6)]
        for series in (blurred, noised):
            scores = [verdict(world.enlarge(picture), case).fidelity for picture in series]
            assert scores[0] == 1 and scores[-1] < 0.05
            assert all(a >= b for a, b in zip(scores, scores[1:])) and len(set(scores)) >= 4


def test_autoencoder_is_the_yardstick():
    """What it makes of the truth has fidelity 1; without it the same picture has less."""

    def softly(pictures: np.ndarray) -> np.ndarray:
        return np.stack([judge._large(world.blur(picture[::4, ::4], 0.4)) for picture in pictures])

    for task, category in (("t2i", "landscape"), ("edit", "identity")):
        case = cases(task, category, 1)[0]
        soft = world.enlarge(world.blur(world.render(case.target), 0.4))
        found = judge.judge([soft], [case], softly)[0]
        assert found.compliance and found.fidelity == 1 and found.kept in (None, 1)
        assert 0.1 < verdict(soft, case).fidelity < 0.95
        # An autoencoder that is worse than a bad picture makes no picture good.
        broken = judge.judge([soft, truth(case)], [case, case], lambda pictures: pictures * 0)
        assert [found.fidelity for found in broken] == [0, 0]


def test_batches_are_judged_one_by_one():
    some = [cases(task, category, 1)[0] for task, category in STREAMS]
    pictures = [truth(some[i - 1]) for i in range(len(some))]  # each the truth of its neighbour
    together = judge.judge(pictures, some, lambda pictures: pictures)
    for i in (0, 4, 8):
        assert together[i] == verdict(pictures[i], some[i])


def test_cases_are_left_alone():
    for task, category in STREAMS:
        case = cases(task, category, 1)[0]
        before = replace(case, target=dict(case.target))
        verdict(truth(case), case)
        assert case == before
