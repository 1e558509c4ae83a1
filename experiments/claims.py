"""The paper's claims, in our words, as comparisons of rows; and the rows of its three tables.

They were written down before any table was made. A ROW of a table is a recipe (recipe.py), or a model that needs no
training. The picture world (experiments/tables.py) and the plane (plane/tables.py) ask the same claims.
"""

from dataclasses import dataclass

START, TEACHER, SPECIALISTS = "undistilled, same steps", "base teacher", "specialised teachers"  # rows without training
# Behind a row's name.
LONGER = ", longer"  # the same student after five times as many updates
HALFWAY = ", halfway"  # after half of its updates


@dataclass(frozen=True)
class Above:
    """Part of a claim: that `row` scores higher than `other`."""

    row: str
    other: str
    category: str = "average"
    task: str = "t2i"
    measure: str = "score"  # one of eval.PARTS


@dataclass(frozen=True)
class Experiment:
    """A table. One student may stand in two: E5 is "base only", and "step-wise" is 10:0."""

    rows: dict[str, str]  # name: recipe
    paper: dict[str, dict[str, str]]  # task: {row: the averages of Gemini / GPT, from 1 to 5}
    claims: dict[str, list[Above]]  # the paper's, in our words: all parts of one must hold


E1, E2, E3, E4, E5 = "E1 landscape", "E2 portrait", "E3 text", "E4 landscape, portrait", "E5 all three"
FIRST_STEP = "specialised, first-step loss"
EXPERIMENTS = {
    "composition": Experiment(  # section 3, table 1
        {E1: "e1-landscape", E2: "e2-portrait", E3: "e3-text", E4: "e4-landscape-portrait", E5: "e5-all"},
        {"t2i": {E1: "3.30 / 4.13", E2: "3.42 / 4.15", E3: "2.63 / 3.29", E4: "3.40 / 4.06", E5: "3.02 / 3.62"}},
        {
            "One category carries over to another that it never showed.": [
                Above(E1, START, "portrait"),
                Above(E2, START, "landscape"),
            ],
            "It carries over to text, too.": [Above(E1, START, "text"), Above(E2, START, "text")],
            "Text-centric prompts alone are the worst choice.": [Above(row, E3) for row in (E1, E2, E4, E5)],
            "They are so even for text.": [Above(E1, E3, "text"), Above(E2, E3, "text")],
            "Mixed into the others they hurt text.": [Above(E4, E5, "text")],
            "More categories are not better: portraits alone stand above all three.": [Above(E2, E5)],
        },
    ),
    "teachers": Experiment(  # section 4, table 2, and section 6.1
        {
            "base only": "e5-all",
            "specialised only": "specialised-only",
            "average": "average",
            "step-wise": "step-wise",
            FIRST_STEP: "specialised-first-step",
            "specialised only" + LONGER: "specialised-only",
            "step-wise" + LONGER: "step-wise",
        },
        {"t2i": {TEACHER: "3.41 / 4.09", SPECIALISTS: "3.74 / 4.26", "step-wise": "3.56 / 4.15"}},
        {
            "Under specialised teachers alone the score first rises": [
                Above("specialised only" + LONGER + HALFWAY, START)
            ],
            "... and then degrades.": [
                Above("specialised only" + LONGER + HALFWAY, "specialised only" + LONGER),
            ],
            "Step-wise teachers are better than the base alone.": [Above("step-wise", "base only")],
            "They are better than specialised teachers alone.": [Above("step-wise", "specialised only")],
            "(Ours) They are better than the average at every step.": [Above("step-wise", "average")],
            "Their student stands between the two teachers at 80 evaluations.": [
                Above("step-wise", TEACHER),
                Above(SPECIALISTS, "step-wise"),
            ],
            "The first-step loss steadies the structure": [Above(FIRST_STEP, "specialised only", measure="attributes")],
            "... at some cost in visual quality.": [Above("specialised only", FIRST_STEP, measure="fidelity")],
        },
    ),
    "mixture": Experiment(  # section 5, tables 3 and 4
        {"10:0": "step-wise", "9:1": "mix-9-1", "7:3": "mix-7-3", "5:5": "flash", "0:10": "mix-0-10"},
        {
            "t2i": {SPECIALISTS: "3.74 / 4.26"}
            | {"10:0": "3.56 / 4.15", "9:1": "3.60 / 4.18", "7:3": "3.60 / 4.20", "5:5": "3.65 / 4.16"},
            "edit": {SPECIALISTS: "2.77 / 3.44"}
            | {"10:0": "2.77 / 3.28", "9:1": "2.58 / 3.31", "7:3": "2.87 / 3.36", "5:5": "2.97 / 3.41"},
        },
        {
            "Editing needs editing data: 5:5 stands above none.": [Above("5:5", "10:0", task="edit")],
            "Of the mixtures 5:5 edits best.": [Above("5:5", other, task="edit") for other in ("9:1", "7:3")],
            "A little is worse than none (Gemini; GPT says the opposite).": [Above("10:0", "9:1", task="edit")],
            "At 5:5 the student edits better than its teachers (Gemini; not GPT).": [
                Above("5:5", SPECIALISTS, task="edit")
            ],
            "Editing data helps drawing, too.": [Above("5:5", "10:0")],
        },
    ),
}
