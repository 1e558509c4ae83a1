"""The toy world: fixed cases, captions that say all and only what they should, edits that change what they say, and a
bench that training never sees."""

import random
import subprocess
import sys
from itertools import product

import numpy as np
import pytest

from toy import world
from toy.world import ATTRIBUTES, CATEGORIES, FAMILIES, OPEN

STREAMS = [("t2i", category) for category in CATEGORIES] + [("edit", family) for family in FAMILIES]


def specs(category: str, count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [world.draw_spec(category, rng) for _ in range(count)]


def combination(spec: dict) -> tuple:
    """What the bench keeps to itself: a poster's word, or all attributes of the other categories."""
    names = ("letter0", "letter1", "letter2") if spec["category"] == "text" else ATTRIBUTES[spec["category"]]
    return spec["category"], *(spec[name] for name in names)


# ----------------------------------------------------------------------------------------------------------------------
# Cases


@pytest.mark.parametrize(("task", "category"), STREAMS)
def test_case_depends_on_its_index_alone(task, category):
    first = [world.draw_case(task, category, 3, index, benched=True) for index in range(6)]
    random.seed(1)
    np.random.seed(1)
    world.draw_case("edit", "enhance", 9, 0, benched=False)
    for index in (5, 2, 0):
        again = world.draw_case(task, category, 3, index, benched=True)
        for name in ("prompt", "target", "free", "images", "source"):
            assert getattr(again, name) == getattr(first[index], name)
    assert [case.prompt for case in world.bench_cases(task, category, 3)] == [
        world.draw_case(task, category, 2026, index, benched=True).prompt for index in range(3)
    ]
    assert len({str(world.draw_case(task, category, seed, 0, benched=True).target) for seed in range(8)}) > 1


def test_training_never_meets_the_bench():
    """Over 200 benched cases and 600 training cases of every category and family."""
    benched, trained = set(), set()
    for task, category in STREAMS:
        for case in world.bench_cases(task, category, 200):
            benched.add(combination(case.target))
            if case.source:
                benched.add(combination(case.source))
        for index in range(600):
            case = world.draw_case(task, category, 7, index, benched=False)
            trained.add(combination(case.target))
            if case.source:
                trained.add(combination(case.source))
    assert not benched & trained
    for category in CATEGORIES:  # neither set is empty, and the bench has some variety
        assert sum(c[0] == category for c in benched) >= 30
        assert sum(c[0] == category for c in trained) >= 150


def test_training_prompts_are_these_cases():
    prompts = world.training_prompts("edit", "style", 4, seed=5)
    for index, prompt in enumerate(prompts):
        case = world.draw_case("edit", "style", 5, index, benched=False)
        assert (prompt.prompt, prompt.images) == (case.prompt, case.images)
        assert prompt.target == case.answer()
        assert prompt.target != case.images[0]
    assert world.training_prompts("t2i", "text", 1, seed=5, targets=False)[0].target is None


# ----------------------------------------------------------------------------------------------------------------------
# Captions


@pytest.mark.parametrize("category", CATEGORIES)
def test_captions_name_every_attribute_and_nothing_else(category):
    """One caption for each combination of attributes, whatever the open entries."""
    lists = dict(ATTRIBUTES[category])
    if category == "text":
        lists |= {"letter0": tuple("ACE"), "letter1": tuple("HLN"), "letter2": tuple("OPT")}
    captions = {}
    rng = random.Random(0)
    for values in product(*lists.values()):
        spec = world.settle(world.draw_spec(category, rng) | dict(zip(lists, values)))
        other = world.settle(world.draw_spec(category, rng) | dict(zip(lists, values)))
        named = tuple(spec[name] for name in ATTRIBUTES[category])
        captions.setdefault(named, set()).update((world.caption(spec), world.caption(other)))
    assert all(len(texts) == 1 for texts in captions.values())
    assert len(set.union(*captions.values())) == len(captions)


def test_attributes_are_what_the_caption_names():
    for category in CATEGORIES:
        for spec in specs(category, 40):
            for name, values in world.attributes(spec).items():
                others = {world.caption(spec | {name: value}) for value in values}
                assert len(others) == len(values), name


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("category", CATEGORIES)
def test_equal_pictures_are_equal_specs(category):
    """Among random specs and all their neighbours in one entry."""
    lists = ATTRIBUTES[category] | OPEN[category]
    pictures = {}
    for spec in specs(category, 30):
        neighbours = [spec] + [world.settle(spec | {name: value}) for name in lists for value in lists[name]]
        for neighbour in neighbours:
            pictures.setdefault(world.render(neighbour).tobytes(), set()).add(str(sorted(neighbour.items())))
            assert world.settle(neighbour) == neighbour
    assert len(pictures) > 500
    assert all(len(equal) == 1 for equal in pictures.values())


def test_pictures_are_large_pixels():
    for category in CATEGORIES:
        for spec in specs(category, 5):
            small = world.render(spec)
            picture = world.enlarge(small)
            assert (picture.mode, picture.size) == ("RGBA", (128, 128))
            pixels = np.asarray(picture)
            blocks = pixels.reshape(32, 4, 32, 4, 4)
            assert (blocks == blocks[:, :1, :, :1]).all() and (pixels[..., 3] == 255).all()
            assert np.abs(world.shrink(picture) - small).max() <= 0.5 / 255 + 1e-6
            whole = (small * 255).round() / np.float32(255)  # in the steps of a picture nothing is lost
            assert (world.shrink(world.enlarge(whole)) == whole).all()


def test_damaged_pictures():
    for spec in specs("landscape", 5) + specs("portrait", 5):
        small = world.render(spec)
        noisy = world.add_noise(small, 0)
        assert 0 <= noisy.min() and noisy.max() <= 1 and np.abs(noisy - small).mean() > 0.05
        visible = world.draw_half(random.Random(0))
        shown = world.hide(small, visible)
        assert visible.mean() == 0.5 and (shown[visible] == small[visible]).all() and (shown[~visible] == 0.5).all()


def test_narrow_pictures_have_fewer_modes():
    """A specialised teacher's pictures: the same attributes, but half of every list of open entries."""
    rng = random.Random(0)
    for category in CATEGORIES:
        for name, values in OPEN[category].items():
            drawn = {world.draw_spec(category, rng, narrow=True)[name] for _ in range(200)}
            assert drawn <= set(values[: (len(values) + 1) // 2])
    for family in FAMILIES:
        for index in range(60):
            case = world.draw_case("edit", family, 3, index, benched=False, narrow=True)
            for name in case.free.keys() & OPEN[case.target["category"]].keys() if case.visible is None else ():
                values = OPEN[case.target["category"]][name]
                assert case.target[name] in (*values[: (len(values) + 1) // 2], ("none", 0))
                assert case.target[name] in case.free[name]  # other clothes are not the same ones


# ----------------------------------------------------------------------------------------------------------------------
# Edits


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_change_what_they_say(family):
    """What was asked for is in the words; what is kept is the source's; what is free may have every value that it lists."""
    seen, free = set(), set()
    for seed in range(300):
        case = world.draw_edit(family, random.Random(seed))
        source, target = case.source, case.target
        assert world.settle(source) == source and world.settle(target) == target
        changed = {name for name in target if target[name] != source[name]}
        for name in changed - case.free.keys():  # clouds under a sky that has become clear, and the like
            assert str(target[name]) in case.prompt or name in ("clouds", "step", "side", "sticker_a", "sticker_b")
        for name, values in case.free.items():
            assert target[name] in values or target[name] in (("none", 0), 0, "left")
        seen |= changed
        free |= case.free.keys()
        assert (np.asarray(case.images[0]) != np.asarray(world.enlarge(world.render(target)))).any()
    assert (seen - free - {"clouds", "step", "side", "sticker_a", "sticker_b"}, free) == {
        "scene": ({"time", "ground"}, {"side", "weather", "horizon", "phase", "sun", "clouds", "step"}),
        "enhance": (set(), set().union(*(ATTRIBUTES[c] | OPEN[c] for c in CATEGORIES))),
        "object": (set(), {"thing", "hat", "hair", "length"}),
        "text": ({"sign"}, {"wall", *OPEN["text"]}),
        "identity": ({"backdrop"}, {"hat", "mouth", "x", "size", "clothes", "pattern"}),
        "style": (set(), {"time", "sun", "clothes", "backdrop", "pattern", "sign", "wall"}),
    }[family]


# ----------------------------------------------------------------------------------------------------------------------
# The sheet


def test_command_line(tmp_path, monkeypatch):
    world.main([str(tmp_path / "sheet.png")])
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    with pytest.raises(SystemExit) as stop:
        world.main(["--rows", "3"])
    assert stop.value.code == 2
    command = [sys.executable, "-m", "toy.world", str(tmp_path / "none" / "sheet.png")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=world.Path(world.__file__).parent.parent)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "none" in run.stderr
