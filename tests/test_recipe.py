"""recipe.py: the named recipes against the paper's tables, exactness against counting, and every complaint it can make."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import recipe
from recipe import RECIPES, Recipe, Rule

FAMILIES = ["scene", "enhance", "object", "text", "identity", "style"]
WORLD = {"t2i": ["landscape", "portrait", "text"], "edit": FAMILIES}
LOADED = ["text", "edit"]


# ---- the named recipes ----


def test_ratios_and_compositions_are_the_papers():
    mixtures = {"step-wise": (10, 0), "mix-9-1": (9, 1), "mix-7-3": (7, 3), "flash": (5, 5), "mix-0-10": (0, 10)}
    assert {name: RECIPES[name].ratio for name in mixtures} == mixtures
    assert len({RECIPES[name].rules for name in mixtures}) == 1  # they differ in the ratio alone
    compositions = {name: set(r.t2i) for name, r in RECIPES.items() if name.startswith("e")}
    assert compositions == {
        "e1-landscape": {"landscape"},
        "e2-portrait": {"portrait"},
        "e3-text": {"text"},
        "e4-landscape-portrait": {"landscape", "portrait"},
        "e5-all": {"landscape", "portrait", "text"},
    }
    for name in compositions:  # section 3: the base teacher alone, T2I alone, as many prompts in every category
        assert RECIPES[name].ratio == (10, 0) and not RECIPES[name].teacher_names
        assert set(RECIPES[name].t2i.values()) == {1}


def test_no_two_recipes_are_twins():
    recipes = [replace(recipe, name="") for recipe in RECIPES.values()]
    assert all(recipes.count(recipe) == 1 for recipe in recipes)


def test_a_teacher_of_a_task_without_prompts_is_not_opened():
    names = {name: RECIPES[name].teacher_names for name in ("step-wise", "mix-0-10", "flash", "base-only")}
    assert names == {"step-wise": {"text"}, "mix-0-10": {"edit"}, "flash": {"text", "edit"}, "base-only": set()}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_lambdas_of_every_recipe(name, steps):
    for k in range(steps):
        for task, words in WORLD.items():
            for category in [*words, "a word of the user's"]:
                weights = RECIPES[name].weights(k, steps, task, category)
                assert min(weights.values()) > 0 and sum(weights.values()) == pytest.approx(1)
                # A specialist speaks under its own conditions only.
                own = "edit" if task == "edit" else "text" if category == "text" else None
                assert set(weights) <= {"base", own}
                used = RECIPES[name].ratio[task == "edit"] > 0  # a teacher of a task without prompts is not opened
                assert (set(weights) <= {"base"} | RECIPES[name].teacher_names) or not used


@pytest.mark.parametrize(
    ("name", "steps", "shares"),
    [
        ("base-only", 4, [0, 0, 0, 0]),
        ("specialised-only", 4, [1, 1, 1, 1]),
        ("specialised-first-step", 4, [1, 1, 1, 1]),
        ("average", 4, [0.5, 0.5, 0.5, 0.5]),
        ("step-wise", 4, [0, 0, 0.5, 1]),  # base alone early, specialists late
        ("flash", 4, [0, 0, 0.5, 1]),
        ("flash", 1, [0]),
        ("flash", 2, [0, 0.5]),
        ("flash", 8, [0, 0, 0, 0, 0.5, 0.5, 1, 1]),
    ],
)
def test_strategies(name, steps, shares):
    for task, category, teacher in [("t2i", "text", "text"), ("edit", "scene", "edit"), ("edit", "text", "edit")]:
        rows = [RECIPES[name].weights(k, steps, task, category) for k in range(steps)]
        assert [row.get(teacher, 0) for row in rows] == shares
        assert [row.get("base", 0) for row in rows] == [1 - share for share in shares]


# ---- turns ----


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("mix")])
def test_the_ratio_is_exact_in_every_window_of_ten(name):
    r = RECIPES[name].resolve(WORLD, LOADED)
    tasks = [r.turn(m)[0] for m in range(200)]
    for start in range(190):
        assert tasks[start : start + 10].count("edit") == r.ratio[1]
    for m in range(1, 200):  # and evenly: never a whole turn ahead of or behind the share
        assert abs(tasks[:m].count("edit") - m * r.ratio[1] / 10) < 1


def test_categories_are_exact_within_their_task_and_n_counts_them():
    r = Recipe("own", (7, 3), t2i={"a": 3, "b": 1}, edit={"c": 2, "d": 3, "e": 1})
    turns = [r.turn(m) for m in range(600)]
    seen = Counter()
    for task, category, n in turns:
        assert n == seen[task, category]
        seen[task, category] += 1
    assert seen == {("t2i", "a"): 315, ("t2i", "b"): 105, ("edit", "c"): 60, ("edit", "d"): 90, ("edit", "e"): 30}
    for task, parts in (("t2i", r.t2i), ("edit", r.edit)):
        words, total = [category for t, category, _ in turns if t == task], sum(parts.values())
        for start in range(len(words) - total):
            assert Counter(words[start : start + total]) == parts


def test_large_parts_are_reduced():
    assert recipe.spread({"a": 200, "b": 200, "c": 400}) == recipe.spread({"a": 1, "b": 1, "c": 2})


# ---- resolve ----


def test_an_empty_composition_is_every_category_there_is():
    r = RECIPES["flash"].resolve({"t2i": ["cats", "boats"], "edit": ["weather"]}, LOADED)
    assert (r.t2i, r.edit) == ({"boats": 1, "cats": 1}, {"weather": 1})
    assert RECIPES["e2-portrait"].resolve(WORLD, []).t2i == {"portrait": 1}


def test_a_missing_teachers_weight_goes_to_the_base():
    flash = RECIPES["flash"]
    assert flash.teacher_names == {"text", "edit"}
    r = flash.resolve(WORLD, ["edit"])
    assert r.teacher_names == {"edit"} and flash.teacher_names - {"edit"} == {"text"}
    assert r.weights(3, 4, "t2i", "text") == {"base": 1}
    assert r.weights(3, 4, "edit", "text") == {"edit": 1}


# ---- recipes that do not add up ----


def rule(*by_quarter, teacher="text", task="t2i", category="text"):
    return Rule(teacher, task, category, by_quarter)


def test_two_specialists_may_share_a_condition():
    r = Recipe("mine", (5, 5), rules=(rule(0, 0.5, 0, 0.5), rule(0, 0.25, 0, 0.5, teacher="sharp")))
    assert r.weights(1, 4, "t2i", "text") == {"base": 0.25, "text": 0.5, "sharp": 0.25}
    assert r.weights(3, 4, "t2i", "text") == {"text": 0.5, "sharp": 0.5}
    assert r.weights(3, 4, "t2i", "portrait") == {"base": 1}


@pytest.mark.parametrize("rules, base", [(recipe.STEP_WISE, [1, 1, 0.5, 0]), (recipe.AVERAGE, [0.5] * 4)])
@pytest.mark.parametrize("first", [True, False])
def test_the_specific_rule_goes_before_the_general_one(rules, base, first):
    """In any order; the base keeps its part, and a teacher that is missing leaves its part to the base, not to others."""
    style = Rule("style", "edit", "style", tuple(1 - part for part in base))
    r = Recipe("mine", (5, 5), rules=(style, *rules) if first else (*rules, style))
    for k in range(4):
        for category, teacher in (("style", "style"), ("scene", "edit")):
            expected = {"base": base[k], teacher: 1 - base[k]}
            assert r.weights(k, 4, "edit", category) == {name: w for name, w in expected.items() if w}
        without = r.resolve(WORLD, LOADED)
        assert without.teacher_names == {"text", "edit"} and without.weights(k, 4, "edit", "style") == {"base": 1}
        assert without.weights(k, 4, "edit", "scene") == r.weights(k, 4, "edit", "scene")


def test_the_third_teacher_of_the_readme():
    """Its lines as they stand there, in the table of recipes."""
    text = (Path(recipe.__file__).parent / "README.md").read_text()
    lines = text.split("## A third teacher")[1].split("```python\n")[1].split("```")[0]
    own, student = eval(f"[{lines}]", vars(recipe))
    assert own.resolve(WORLD, []).turn(5) == ("edit", "style", 5)
    r = student.resolve(WORLD, ["text", "edit", "style"])
    assert r.teacher_names == {"text", "edit", "style"} and r.ratio == (5, 5)
    rows = [[r.weights(k, 4, "edit", category) for k in range(4)] for category in ("style", "scene")]
    assert rows[0] == [{"base": 1}, {"base": 1}, {"base": 0.5, "style": 0.5}, {"style": 1}]
    assert rows[1] == [{"base": 1}, {"base": 1}, {"base": 0.5, "edit": 0.5}, {"edit": 1}]
    assert r.weights(3, 4, "t2i", "text") == {"text": 1}


def test_the_mean_number_of_teachers_is_over_the_categories():
    """In the third quarter a specialist and the base teacher share text and edits; other pictures have the base alone."""
    flash = recipe.find("flash")
    assert [flash.mean_teachers(k, 4, "t2i") for k in range(4)] == [1, 1, 1.5, 1]  # text, and any other category
    assert [flash.mean_teachers(k, 4, "edit") for k in range(4)] == [1, 1, 2, 1]
    resolved = flash.resolve({"t2i": ["landscape", "portrait", "text"], "edit": ["scene"]}, ["text", "edit"])
    assert resolved.mean_teachers(2, 4, "t2i") == (1 + 1 + 2) / 3
