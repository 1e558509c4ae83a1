"""The paper's subject: not WHICH loss distils a student, but what it is fed. Three axes, as plain data.

    1. data composition      which categories of prompts the student sees, and in which ratio       (section 3)
    2. teacher routing       which teacher scores which student step, under which condition         (section 4)
    3. task mixture          the ratio of T2I (text to image, drawing) to editing                   (section 5)

A micro-batch is a few samples that run through the networks at once. Counted in micro-batches, a recipe is followed
exactly, or the run does not start: a wrong ratio and missing prompts are errors. Samples have the same ratio where
micro_batch divides batch; where it does not, the run says so. There is one exception. Where a checkpoint lacks a
teacher, the base teacher takes its weight, and the run says so.

ONE micro-batch has ONE task and ONE category. So lambda is the same for the whole micro-batch, and all processes run the
same teachers. Nothing here is random: the task and category of the i-th micro-batch follow from i alone.

Each number names its source: (section N) of Qwen-Image-Flash, arXiv 2606.03746, or "ours".
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from data.prompts import TASKS, Prompt, read_prompts  # noqa: F401 (read_prompts is imported from here)

RATIO_PARTS = 10  # the paper writes every ratio in tenths: 9:1, 7:3, 5:5 (section 5)


def categories(prompts: Iterable[Prompt]) -> dict[str, list[str]]:
    """The categories that occur, by task, sorted; for Recipe.resolve."""
    prompts = list(prompts)
    return {task: sorted({p.category for p in prompts if p.task == task}) for task in TASKS}


# ---- the recipe --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A rule for one specialised teacher: its weight in the real score, lambda_{k,m}(c) of Eq. 5.

    If a category has rules of its own, the rules for its whole task do not apply to it. Rules for the same condition add
    up. Without a rule a teacher has weight 0.
    """

    teacher: str  # its name in the checkpoint's teachers/ folder, or in --teacher NAME=...
    task: str  # the condition c: this task ...
    category: str | None  # ... and this category; None is every category of the task
    # Lambda in each quarter of the student's steps; with 4 steps, one number a step.
    by_quarter: tuple[float, float, float, float]


@dataclass(frozen=True)
class Recipe:
    """A choice on each of the three axes. ValueError if its numbers do not add up."""

    name: str
    ratio: tuple[int, int]  # T2I : Edit, in tenths of the micro-batches
    t2i: dict[str, int] = field(default_factory=dict)  # category -> parts; empty: all that have prompts, equally
    edit: dict[str, int] = field(default_factory=dict)  # the same for edits
    rules: tuple[Rule, ...] = ()  # the base teacher, T_0, has the rest of the weight
    first_step_weight: float = 0.0  # of dmd.first_step_losses; 0 is without (section 6.1)

    def __post_init__(self):
        def whole_numbers(parts: Iterable[int], least: int) -> bool:
            return all(type(part) is int and part >= least for part in parts)

        wrong = ""
        if len(self.ratio) != 2 or not whole_numbers(self.ratio, 0) or sum(self.ratio) != RATIO_PARTS:
            wrong = f"the T2I:Edit ratio {self.ratio} must be two whole parts that add up to {RATIO_PARTS}"
        elif not whole_numbers([*self.t2i.values(), *self.edit.values()], 1):
            wrong = "a composition has whole parts from 1 on; leave a category out to have none of it"
        elif not 0 <= self.first_step_weight < math.inf:
            wrong = f"first_step_weight {self.first_step_weight} must be a number from 0 on"
        for rule in self.rules:
            if rule.teacher == "base" or rule.task not in TASKS or len(rule.by_quarter) != 4:
                wrong = f"{rule}: the teacher is not 'base', the task is t2i or edit, and there are four lambdas"
        if wrong:
            raise ValueError(f"recipe {self.name!r}: {wrong}")
        for task in TASKS:
            for category in (None, *(rule.category for rule in self.rules)):  # None: any that has no rule of its own
                for k in range(4):
                    self.weights(k, 4, task, category)  # checks Eq. 6

    @property
    def teacher_names(self) -> set[str]:
        """The specialised teachers whose weight is above 0 somewhere, at a task that the ratio has."""
        parts = dict(zip(TASKS, self.ratio, strict=True))
        return {rule.teacher for rule in self.rules if any(rule.by_quarter) and parts[rule.task]}

    def weights(self, k: int, steps: int, task: str, category: str | None) -> dict[str, float]:
        """lambda_{k,m}(c) (Eq. 5): teacher -> weight, for student step k of 0 .. steps - 1; zeros are left out.

        The weights are >= 0 and their sum is 1 (Eq. 6), or ValueError. The only step of a one-step student is in the
        first quarter.
        """
        quarter = 4 * k // steps
        rules = [rule for rule in self.rules if rule.task == task]
        own = [rule for rule in rules if rule.category is not None and rule.category == category]
        weights = {}
        for rule in own or [rule for rule in rules if rule.category is None]:
            weights[rule.teacher] = weights.get(rule.teacher, 0.0) + rule.by_quarter[quarter]
        weights["base"] = 1.0 - sum(weights.values())
        if not all(weight > -1e-9 for weight in weights.values()):  # "not all >" rather than "any <": NaN fails too
            where = f"{task}, category {category or '(any other)'}, quarter {quarter}"
            weights = {teacher: round(weight, 6) for teacher, weight in weights.items()}
            raise ValueError(f"recipe {self.name!r}: for {where} the lambdas are not >= 0 with a sum of 1: {weights}")
        return {teacher: weight for teacher, weight in weights.items() if weight > 1e-9}

    def mean_teachers(self, k: int, steps: int, task: str) -> float:
        """How many teachers are evaluated at step k, on average over the task's categories. Without a composition these
        are, in equal parts, the categories with rules of their own and one more for all others."""
        categories: list[str | None] = [None]
        categories += sorted({rule.category for rule in self.rules if rule.task == task and rule.category})
        if self.composition(task):
            categories = list(spread(self.composition(task)))
        return sum(len(self.weights(k, steps, task, category)) for category in categories) / len(categories)

    def composition(self, task: str) -> dict[str, int]:
        return self.t2i if task == "t2i" else self.edit

    def turn(self, i: int) -> tuple[str, str, int]:
        """(task, category, n) of the i-th micro-batch, of a resolved recipe.

        n counts the earlier micro-batches of this task and category. It chooses the prompts, so that at any time all
        prompts of a category were seen equally often, or once less (exceptions: nth_entries in data/batches.py). Any ten
        turns in a row hold the ratio of tasks exactly. Within a task, any full round of its composition does. Both are
        spread evenly. The student's micro-batches and the fake score's are counted separately.
        """
        task, of_task = nth_name(dict(zip(TASKS, self.ratio, strict=True)), i)
        category, n = nth_name(self.composition(task), of_task)
        return task, category, n

    def resolve(self, available: dict[str, Iterable[str]], teachers: Iterable[str]) -> "Recipe":
        """This recipe on a certain data set, with certain teachers: the one to train with.

        available: task -> categories that have prompts (see `categories`). An empty composition becomes all of them, in
        equal parts. ValueError for a task or category without prompts. teachers: the names of the specialised ones.
        """
        compositions = {}
        for task, parts, composition in zip(TASKS, self.ratio, (self.t2i, self.edit), strict=True):
            found = sorted(available.get(task, ()))
            wanted = sorted(composition) or found
            if parts and (not found or set(wanted) - set(found)):
                needs = f"recipe {self.name!r} takes {parts} of {RATIO_PARTS} micro-batches from {task} prompts"
                of = f" of the categories {wanted}" if wanted else ""
                raise ValueError(f"{needs}{of}, but there are {found or 'none'}; add some, or choose another recipe")
            compositions[task] = composition or dict.fromkeys(found, 1)
        return replace(self, **compositions).with_teachers(teachers)

    def with_teachers(self, teachers: Iterable[str]) -> "Recipe":
        """This recipe where only these specialised teachers exist: the base teacher takes the part of all others."""
        teachers = set(teachers)
        rules = [rule if rule.teacher in teachers else replace(rule, by_quarter=(0.0,) * 4) for rule in self.rules]
        return replace(self, rules=tuple(rules))


def spread(parts: dict[str, int]) -> list[str]:
    """The shortest round with these parts, spread evenly: each turn goes to the name that is furthest behind its part.
    {"t2i": 7, "edit": 3} -> t e t t t e t t e t; 5 and 5 -> t e."""
    common, total, order = math.gcd(*parts.values()), sum(parts.values()), []
    for i in range(1, total // common + 1):
        order.append(max(parts, key=lambda name: parts[name] * i - order.count(name) * total))
    return order


def nth_name(parts: dict[str, int], i: int) -> tuple[str, int]:
    """The i-th task or category when the round is repeated without end, and how often it came before."""
    order = spread(parts)
    rounds, place = divmod(i, len(order))
    name = order[place]
    return name, rounds * order.count(name) + order[:place].count(name)


# ---- the named recipes ---------------------------------------------------------------------------------------------


def routing(*by_quarter: float) -> tuple[Rule, ...]:
    """Our two specialised teachers, each for what it was fine-tuned on. The paper does not say how many it has, and for
    what. The strategies below differ only in the specialists' weight at each step."""
    text = Rule(teacher="text", task="t2i", category="text", by_quarter=by_quarter)
    return (text, Rule(teacher="edit", task="edit", category=None, by_quarter=by_quarter))


# Section 4: the base teacher alone in the early steps, specialists later. The lambdas are not published; these are ours.
STEP_WISE = routing(0.0, 0.0, 0.5, 1.0)
# Section 4, finding 2a: rises, then degrades. Landscapes and portraits have no specialist: the base alone.
SPECIALISED_ONLY = routing(1.0, 1.0, 1.0, 1.0)
AVERAGE = routing(0.5, 0.5, 0.5, 0.5)  # ours: the control that mixes, but not by step

RECIPES = {
    recipe.name: recipe
    for recipe in [
        # Section 3, table 1: E1 to E5, T2I only, under the base teacher; equal numbers of prompts in each category.
        Recipe("e1-landscape", (10, 0), t2i={"landscape": 1}),
        Recipe("e2-portrait", (10, 0), t2i={"portrait": 1}),
        Recipe("e3-text", (10, 0), t2i={"text": 1}),
        Recipe("e4-landscape-portrait", (10, 0), t2i={"landscape": 1, "portrait": 1}),
        Recipe("e5-all", (10, 0), t2i={"landscape": 1, "portrait": 1, "text": 1}),
        # Section 4, table 2: T2I only. From here on the composition is not published; ours: every category, equally.
        Recipe("base-only", (10, 0)),
        Recipe("specialised-only", (10, 0), rules=SPECIALISED_ONLY),
        Recipe("average", (10, 0), rules=AVERAGE),
        Recipe("step-wise", (10, 0), rules=STEP_WISE),
        # Section 6.1; the weight is DP-DMD's (arXiv 2602.03139), the paper gives none.
        Recipe("specialised-first-step", (10, 0), rules=SPECIALISED_ONLY, first_step_weight=0.05),
        # Section 5, tables 3 and 4: one budget, five ratios. 10:0 is "step-wise", 5:5 is "flash". 0:10 is ours: the other
        # end of the axis.
        Recipe("mix-9-1", (9, 1), rules=STEP_WISE),
        Recipe("mix-7-3", (7, 3), rules=STEP_WISE),
        Recipe("mix-0-10", (0, 10), rules=STEP_WISE),
        # The default, what the paper ends with: ratio 5:5 (section 5) and step-wise routing (section 4). Its composition
        # is not published; ours: every category, equally.
        Recipe("flash", (5, 5), rules=STEP_WISE),
        # Ours: the same ratio without step-wise routing.
        Recipe("base-5-5", (5, 5)),
        Recipe("specialised-5-5", (5, 5), rules=SPECIALISED_ONLY),
    ]
}


def find(name: str) -> Recipe:
    """The recipe of this name, or ValueError with all names."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]
