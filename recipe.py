"""The paper's subject: not WHICH loss distils a student, but what it is fed. Three axes, as plain data.

    1. data composition      which categories of prompts the student sees, in which shares          (section 3)
    2. teacher routing       which teacher scores which student step, under which condition         (section 4)
    3. task mixture          how many T2I micro-batches to how many editing ones                    (section 5)

A recipe is realised exactly, or it is an error: a ratio that does not add up, or prompts that the files do not hold, stop
the run before it starts and are never quietly replaced. The only exception: a teacher that a checkpoint lacks leaves its
weight to the base, and the caller says so (`recipe.teachers - loaded` are the names to print).

ONE micro-batch is ONE task and ONE category. So lambda is a plain number in each micro-batch, all ranks run the same
teachers, and the pictures of a batch share their layout. Nothing here is random: what the m-th micro-batch holds follows
from m alone, and a resumed run needs no other state.

Every number says where it is from: (section N) of Qwen-Image-Flash, arXiv 2606.03746, or "ours".
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from support.prompts import TASKS, Prompt, read_prompts  # noqa: F401 (also for who imports them from here)

RATIO_PARTS = 10  # the paper writes every ratio in tenths: 9:1, 7:3, 5:5 (section 5)


def categories(prompts: Iterable[Prompt]) -> dict[str, list[str]]:
    """The categories that occur, by task, sorted: what Recipe.resolve wants to know of the data."""
    prompts = list(prompts)
    return {task: sorted({p.category for p in prompts if p.task == task}) for task in TASKS}


# ---- the recipe --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Specialist:
    """The share of one specialised teacher in the real score: lambda_{k,m}(c) of Eq. 5, as a table.

    It speaks under its own conditions only. A specialist that also scores what it was not made for drags that down, even
    when it speaks late.
    """

    teacher: str  # its name in the checkpoint's teachers/ folder
    task: str  # the condition c: this task ...
    category: str | None  # ... and this category; None is every category of the task
    by_quarter: tuple[float, float, float, float]  # lambda in each quarter of the student's steps; at 4 steps, at each


@dataclass(frozen=True)
class Recipe:
    """One point on the three axes. Making one checks it: what does not add up raises ValueError."""

    name: str
    ratio: tuple[int, int]  # T2I : Edit, in tenths of the micro-batches
    t2i: dict[str, int] = field(default_factory=dict)  # category -> parts; empty: all that have prompts, equally
    edit: dict[str, int] = field(default_factory=dict)  # likewise for the editing families
    specialists: tuple[Specialist, ...] = ()  # what they leave of 1 is the base teacher's, T_0
    first_step_weight: float = 0.0  # of dmd.first_step_loss; 0 is without (section 6.1)

    def __post_init__(self):
        def check(right: bool, complaint: str) -> None:
            if not right:
                raise ValueError(f"recipe {self.name!r}: {complaint}")

        parts = [*self.ratio, *self.t2i.values(), *self.edit.values()]
        check(all(isinstance(part, int) for part in parts), f"ratio and compositions are whole parts, not {parts}")
        check(
            len(self.ratio) == 2 and min(self.ratio) >= 0 and sum(self.ratio) == RATIO_PARTS,
            f"the T2I:Edit ratio {self.ratio} must be two parts that add up to {RATIO_PARTS}",
        )
        check(all(part > 0 for part in parts[2:]), "a composition leaves a category out; it does not give it 0 parts")
        check(0 <= self.first_step_weight < float("inf"), f"first_step_weight {self.first_step_weight} must be >= 0")
        for s in self.specialists:
            check(s.teacher != "base", "the base teacher takes what specialists leave, and has no rule of its own")
            check(s.task in TASKS, f"the task of teacher {s.teacher!r} must be one of {TASKS}, not {s.task!r}")
            check(len(s.by_quarter) == 4, f"teacher {s.teacher!r} needs four lambdas, one a quarter: {s.by_quarter}")
        for task in TASKS:  # Eq. 6 for every k and every condition that a rule tells apart, None being all the others
            for category in (None, *(s.category for s in self.specialists)):
                for k in range(4):
                    self.weights(k, 4, task, category)

    @property
    def teachers(self) -> set[str]:
        """Names of the specialised teachers that have a say (the base always has)."""
        return {s.teacher for s in self.specialists if any(s.by_quarter)}

    def weights(self, k: int, steps: int, task: str, category: str | None) -> dict[str, float]:
        """lambda_{k,m}(c) (Eq. 5): teacher -> weight, for student step k of 0 .. steps - 1; zeros are left out.

        >= 0 and together 1 (Eq. 6), or ValueError. A student of one step has only a first quarter: step-wise routing is
        then the base alone.
        """
        quarter = 4 * k // steps
        shares = {}
        for s in self.specialists:
            if s.task == task and s.category in (None, category):
                shares[s.teacher] = shares.get(s.teacher, 0.0) + s.by_quarter[quarter]
        shares["base"] = 1.0 - sum(shares.values())
        if not all(share > -1e-9 for share in shares.values()):  # "not all >" rather than "any <": NaN fails too
            where = f"{task}, category {category or '(any other)'}, quarter {quarter}"
            shares = {teacher: round(share, 6) for teacher, share in shares.items()}
            raise ValueError(f"recipe {self.name!r}: for {where} the lambdas are not >= 0 with a sum of 1: {shares}")
        return {teacher: share for teacher, share in shares.items() if share > 1e-9}

    def turn(self, m: int) -> tuple[str, str, int]:
        """(task, category, n) of the m-th micro-batch, of a resolved recipe.

        n counts the earlier micro-batches of this task and category: with size B, this one takes the prompts
        n B .. (n + 1) B of that category's shuffled list, so that all are seen equally often. Any RATIO_PARTS turns in a
        row hold the ratio exactly, and likewise the categories within a task; both are spread as evenly as can be.
        Count the student's micro-batches and the fake score's separately.
        """
        task, i = nth_word(dict(zip(TASKS, self.ratio, strict=True)), m)
        category, n = nth_word({"t2i": self.t2i, "edit": self.edit}[task], i)
        return task, category, n

    def resolve(self, available: dict[str, Iterable[str]], teachers: Iterable[str]) -> "Recipe":
        """This recipe on a certain data set, with certain teachers: the one to train with.

        available: task -> categories that have prompts (see `categories`). An empty composition becomes every one of
        them in equal parts; a task or category without prompts raises ValueError. Rules for teachers that are not among
        `teachers` (names) are dropped, which leaves their weight to the base.
        """
        compositions = {}
        for task, parts, composition in zip(TASKS, self.ratio, (self.t2i, self.edit), strict=True):
            found = sorted(available.get(task, ()))
            missing = sorted(composition.keys() - set(found)) if composition else []
            if parts and not found:
                other = "mix-10-0" if task == "edit" else "mix-0-10"
                raise ValueError(
                    f"recipe {self.name!r} takes {parts} of {RATIO_PARTS} micro-batches from task {task!r}, but there are "
                    f"no {task} prompts; add some, or choose a recipe without them, such as {other!r}"
                )
            if parts and missing:
                raise ValueError(
                    f"recipe {self.name!r} needs {task} prompts of category {missing}, but there are only {found}; "
                    f"add some, or choose a recipe that takes all categories, such as 'mix-10-0' or 'flash'"
                )
            compositions[task] = composition or dict.fromkeys(found, 1)
        teachers = set(teachers)
        return replace(self, **compositions, specialists=tuple(s for s in self.specialists if s.teacher in teachers))


def spread(parts: dict[str, int]) -> list[str]:
    """The shortest round with these parts, as even as can be: next is always the word that is furthest behind its share,
    so that none ever gets a whole turn ahead. {"t2i": 7, "edit": 3} -> t e t t t e t t e t; 5 and 5 -> t e."""
    common, total, order = math.gcd(*parts.values()), sum(parts.values()), []
    for i in range(1, total // common + 1):
        order.append(max(parts, key=lambda word: parts[word] * i - order.count(word) * total))
    return order


def nth_word(parts: dict[str, int], i: int) -> tuple[str, int]:
    """The i-th word of the endlessly repeated round, and how often it came before."""
    order = spread(parts)
    rounds, place = divmod(i, len(order))
    word = order[place]
    return word, rounds * order.count(word) + order[:place].count(word)


# ---- the named recipes ---------------------------------------------------------------------------------------------


def specialists(*by_quarter: float) -> tuple[Specialist, ...]:
    """Our two specialised teachers, each for what it was fine-tuned on. How many the paper has, and for what, it does
    not say: both are ours. The strategies below differ in WHEN a specialist speaks, never in for whom."""
    return (Specialist("text", "t2i", "text", by_quarter), Specialist("edit", "edit", None, by_quarter))


# Section 4: the base anchors the early steps, specialists come in later; its lambdas are not published. Ours: early
# steps lay out the picture, where a specialist's narrow modes do harm; late steps draw the detail it is good at.
STEP_WISE = specialists(0.0, 0.0, 0.5, 1.0)
SPECIALISED_ONLY = specialists(1.0, 1.0, 1.0, 1.0)  # section 4, finding 2a: rises, then degrades
AVERAGE = specialists(0.5, 0.5, 0.5, 0.5)  # ours: the control that mixes, but not by step

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
        Recipe("specialised-only", (10, 0), specialists=SPECIALISED_ONLY),
        Recipe("average", (10, 0), specialists=AVERAGE),
        Recipe("step-wise", (10, 0), specialists=STEP_WISE),
        # Section 6.1; the weight is DP-DMD's (arXiv 2602.03139), the paper gives none.
        Recipe("specialised-first-step", (10, 0), specialists=SPECIALISED_ONLY, first_step_weight=0.05),
        # Section 5, tables 3 and 4: one budget, five ratios. 0:10 is ours: the other end of the axis.
        Recipe("mix-10-0", (10, 0), specialists=STEP_WISE),
        Recipe("mix-9-1", (9, 1), specialists=STEP_WISE),
        Recipe("mix-7-3", (7, 3), specialists=STEP_WISE),
        Recipe("mix-5-5", (5, 5), specialists=STEP_WISE),
        Recipe("mix-0-10", (0, 10), specialists=STEP_WISE),
        # The default: what the paper ends with. Ratio 5:5 (section 5) and step-wise routing (section 4). Its composition
        # is not published; ours: every category, equally, since a teacher for text has a say only where there is text.
        Recipe("flash", (5, 5), specialists=STEP_WISE),
    ]
}


def find(name: str) -> Recipe:
    """A named recipe, or ValueError with the names there are."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]
