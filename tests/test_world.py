"""The toy world: fixed cases, captions that say all and only what they should, edits that change what they say, and a
bench that training never sees."""

import random
import subprocess
import sys
from itertools import combinations, product

import numpy as np
import pytest

from toy import world
from toy.world import ATTRIBUTES, CATEGORIES, FAMILIES, OPEN, STYLES

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
        assert again == first[index]  # prompt, specs, instruction, and the source's pixels
    assert [case.prompt for case in world.bench(task, category, 3)] == [
        world.draw_case(task, category, 2026, index, benched=True).prompt for index in range(3)
    ]
    assert len({str(world.draw_case(task, category, seed, 0, benched=True).target) for seed in range(8)}) > 1


def test_training_never_meets_the_bench(monkeypatch):
    """Over 200 benched cases and 600 training cases of every category and family."""
    monkeypatch.setattr(world, "source_picture", lambda edit, rng: None)  # the specs say it all
    benched, trained = set(), set()
    for task, category in STREAMS:
        for case in world.bench(task, category, 200):
            benched.add(combination(case.target))
        for index in range(600):
            case = world.draw_case(task, category, 7, index, benched=False)
            trained.add(combination(case.target))
            if case.edit:
                trained.add(combination(case.edit.source))
    assert not benched & trained
    for category in CATEGORIES:  # neither set is empty, and the bench has some variety
        assert sum(c[0] == category for c in benched) >= 30
        assert sum(c[0] == category for c in trained) >= 150


def test_training_prompts_are_these_cases():
    prompts = world.training_prompts("edit", "style", 4, seed=5)
    for index, prompt in enumerate(prompts):
        case = world.draw_case("edit", "style", 5, index, benched=False)
        assert (prompt.prompt, prompt.images) == (case.prompt, case.images)
        assert prompt.target == world.enlarge(world.render(case.target, case.edit.style))
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
        said = tuple(spec[name] for name in ATTRIBUTES[category])
        captions.setdefault(said, set()).add(world.caption(spec))
        captions[said].add(world.caption(world.settle(world.draw_spec(category, rng) | dict(zip(lists, values)))))
    assert all(len(some) == 1 for some in captions.values())
    assert len(set.union(*captions.values())) == len(captions)


def test_attributes_are_what_the_caption_names():
    for category in CATEGORIES:
        for spec in specs(category, 40):
            for name, values in world.attributes(spec).items():
                others = {world.caption(spec | {name: value}) for value in values}
                assert len(others) == len(values), name


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_attribute_shows(category):
    """Each value against each other, plain and under each style: somewhere a large pixel differs by at least 0.05."""
    for spec in specs(category, 12):
        for name, values in ATTRIBUTES[category].items():
            settled = [world.settle(spec | {name: value}) for value in values]
            for style in (None, *STYLES):
                drawn = {str(s): world.render(s, style) for s in settled}
                for a, b in combinations(drawn.values(), 2):
                    assert np.abs(a - b).max() > 0.05, (name, style, spec)


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
    assert all(len(some) == 1 for some in pictures.values())


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


def test_letters_lie_on_the_token_grid():
    """Another letter changes one column of tokens, two high: 4 x 8 large pixels."""
    for spec in specs("text", 20):
        for i in range(3):
            others = [world.render(spec | {f"letter{i}": letter}) for letter in world.LETTERS]
            ys, xs = np.nonzero(np.ptp(np.stack(others), axis=0).max(axis=2))
            assert set(xs // 4) == {(spec["column"] + 4 * i) // 4}
            assert set(ys // 4) <= {spec["row"] // 4, spec["row"] // 4 + 1}


def test_degradations_and_styles_keep_the_range():
    for spec in specs("landscape", 5) + specs("portrait", 5):
        small = world.render(spec)
        for how in world.DEGRADATIONS:
            bad = world.degrade(small, how, random.Random(0))
            assert 0 <= bad.min() and bad.max() <= 1 and np.abs(bad - small).mean() > 0.01
        for style in STYLES:
            other = world.restyle(small, style)
            assert 0 <= other.min() and other.max() <= 1 and np.abs(other - small).mean() > 0.02


# ----------------------------------------------------------------------------------------------------------------------
# Edits


LETTERS = {"letter0", "letter1", "letter2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_change_what_they_say(family):
    seen, opened = set(), set()
    for seed in range(200):
        edit = world.draw_edit(family, random.Random(seed))
        source, target, said = edit.source, edit.target, edit.instruction
        assert world.settle(source) == source and world.settle(target) == target
        changed = {name for name in target if target[name] != source[name]}
        seen |= changed
        if family in ("enhance", "style"):
            assert not changed and (edit.degradation is None, edit.style is None) == (
                family == "style",
                family != "style",
            )
            phrases = world.DEGRADATIONS[edit.degradation] if family == "enhance" else world.STYLES[edit.style]
            assert phrases in said
        elif family == "text":
            assert changed & LETTERS and changed <= LETTERS | {"sign", *edit.free}
            assert f'"{world.word(target)}"' in said and world.word(source) not in said
            assert edit.free == (("column", "row") if "sign" in changed else ())
            assert "sign" not in changed or target["sign"] in said
        else:
            named = {
                "scene": ("time", "ground", "backdrop", "wall"),
                "object": ("thing", "weather", "hat"),
                "identity": ("hair", "eyes", "mouth"),
            }[family]
            (name,) = changed & set(named)
            follows = {"thing": {"side", "step"}, "weather": {"clouds"}}.get(name, set())
            assert changed - {name} - set(edit.free) <= follows
            if "thing" in changed and changed & follows:  # only a thing that was not there can choose its place
                assert "nothing" in (source["thing"], target["thing"])
            if name == "weather":
                assert said == ("Add clouds." if target[name] == "cloudy" else "Remove the clouds.")
            else:
                assert all(v in said for v in (target[name],) if v != "nothing")
                assert family != "object" or all(v in said for v in (source[name],) if v != "nothing")
            if "Add" in said and name == "thing":
                assert target["side"] in said and edit.free == ("step",)
        opened |= set(edit.free)
        shown = np.asarray(world.source_picture(edit, random.Random(0)))
        assert (shown != np.asarray(world.enlarge(world.render(target, edit.style)))).any()
    expected = {  # what changes, and what an instruction leaves open
        "scene": (
            {"time", "ground", "backdrop", "wall"},
            {"sun_x", "sun_y", "horizon", "phase", "steep", "pattern", "bricks"},
        ),
        "enhance": (set(), set()),
        "object": ({"thing", "side", "hat", "weather"}, {"step", "clouds"}),
        "text": (LETTERS | {"sign"}, {"column", "row"}),
        "identity": ({"hair", "eyes", "mouth"}, {"length"}),
        "style": (set(), set()),
    }
    assert (seen - opened, opened) == expected[family]


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
