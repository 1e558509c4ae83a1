"""The paper's three experiments in the toy world: train the students of a table, score them, and say what holds.

    python eval.py --experiment composition      which prompts                section 3, table 1
    python eval.py --experiment teachers         which teacher, when          section 4, table 2; section 6.1
    python eval.py --experiment mixture          how many edits               section 5, tables 3 and 4

A ROW of a table is a recipe (recipe.py); its students differ in the seed alone. All rows of all tables have the same
optimisation, STUDENT, and the same prompts. No number here was chosen by looking at a table. CLAIMS are the paper's, in our
words, each as comparisons of rows. They were written down before any table was made. Intervals decide: agree, disagree, or
cannot tell. Everything is kept on the way (Workshop), so a killed run goes on where it was.
"""

import fcntl
import math
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
from PIL import Image

import flow
import recipe as recipes
import train
from checkpoint.files import aside, digest, read_json, write_json
from data.encode import How, encode_prompts
from data.pool import Pool
from model import Condition, MMDiT
from program.eval_options import Args
from sample import Pipeline
from scores import rows as statistics
from scores.charts import chart
from scores.rows import T, check_place, markdown
from toy import judge, world
from toy import score as benches
from toy.figures import contact_sheet
from toy.score import Sampler
from training.options import TrainOptions
from training.run import faster_dtype, find_teachers, open_run, whole_checkpoints

# One optimisation for all rows of all tables. It is the main job's, but with smaller and fewer updates, so that all three
# tables fit into an evening, and without decay: a run is made in stages, and each would end with it.
STUDENT = TrainOptions(decay=0.0, steps=100, batch=12)
TIMES = 5  # so many times as long are the rows that ask what happens later
# Prompts in a category or family. Two categories have twice as many as one, as in the paper.
POOL = {"t2i": 512, "edit": 256}
STAGES = 4  # a student is scored after each quarter of its steps
START, TEACHER, SPECIALISTS = "undistilled, same steps", "base teacher", "specialised teachers"  # rows without training
PLANE = Path(__file__).parents[1] / "results" / "plane" / "claims.json"  # the verdicts of plane/claims.py
# Behind a row's name.
LONGER = ", longer"  # the same student after TIMES as many updates
HALFWAY = ", halfway"  # after half of its updates


@dataclass(frozen=True)
class Above:
    """Part of a claim: that `row` scores higher than `other`."""

    row: str
    other: str
    category: str = "average"
    bench: str = "t2i"
    part: str = "score"


@dataclass(frozen=True)
class Experiment:
    """A table. One student may stand in two: E5 is "base only", and "step-wise" is 10:0."""

    rows: dict[str, str]  # name: recipe
    paper: dict[str, dict[str, str]]  # bench: {row: the averages of Gemini / GPT, from 1 to 5}
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
            "The first-step loss steadies the structure": [Above(FIRST_STEP, "specialised only", part="attributes")],
            "... at some cost in visual quality.": [Above("specialised only", FIRST_STEP, part="fidelity")],
        },
    ),
    "mixture": Experiment(  # section 5, tables 3 and 4
        {"10:0": "step-wise", "9:1": "mix-9-1", "7:3": "mix-7-3", "5:5": "mix-5-5", "0:10": "mix-0-10"},
        {
            "t2i": {SPECIALISTS: "3.74 / 4.26"}
            | {"10:0": "3.56 / 4.15", "9:1": "3.60 / 4.18", "7:3": "3.60 / 4.20", "5:5": "3.65 / 4.16"},
            "edit": {SPECIALISTS: "2.77 / 3.44"}
            | {"10:0": "2.77 / 3.28", "9:1": "2.58 / 3.31", "7:3": "2.87 / 3.36", "5:5": "2.97 / 3.41"},
        },
        {
            "Editing needs editing data: 5:5 stands above none.": [Above("5:5", "10:0", bench="edit")],
            "Of the mixtures 5:5 edits best.": [Above("5:5", other, bench="edit") for other in ("9:1", "7:3")],
            "A little is worse than none (Gemini; GPT says the opposite).": [Above("10:0", "9:1", bench="edit")],
            "At 5:5 the student edits better than its teachers (Gemini; not GPT).": [
                Above("5:5", SPECIALISTS, bench="edit")
            ],
            "Editing data helps drawing, too.": [Above("5:5", "10:0")],
        },
    ),
}


@cache
def encoded(folder: Path, checkpoint: Path, device: str, tasks: tuple[str, ...]) -> Pool:
    """The prompts that all students of a table learn from, encoded. They are kept in the folder."""
    prompts = list(world.prompts({task: POOL[task] for task in tasks}, seed=0, targets=False))
    return encode_prompts(folder, prompts, checkpoint, How(benches.RESOLUTION), device)


@contextmanager
def alone(place: Path, wait: bool = True) -> Iterator[bool]:
    """Within, no other process makes what belongs at `place`. If one does now: wait for it (True follows), or do not (False).
    A process that dies gives way."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.with_name(f"{place.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        yield mine


class Workshop:
    """What the tables share: a folder of students and scores. Nothing in it is made twice, also by commands that run at
    the same time.

    settings.json                       what all of it was made with; other settings need another folder
    RECIPE-4nfe-80steps-seed0/          a run of train.py's
        stages/000040                   the student's weights after so many steps
        stages/000040-t2i.json          its row on one bench
    jobs/                               locks: what some command is making
    conditions/                         the encoded prompts

    The rows are all that a table needs of the seeds after the first. Their weights may be removed; and rows that were made
    on another machine, put here with its settings.json, are not made again.
    """

    def __init__(self, home: Path, checkpoint: Path, steps: int, nfe: int):
        self.home, self.checkpoint, self.steps, self.nfe = home, checkpoint, steps, nfe
        self.pipeline = benches.open_checkpoint(checkpoint)
        self.sigmas, self.conditions = flow.student_sigmas(nfe), {}
        given = "checkpoint prompts recipe out teacher student_steps steps seed resume device dtype compile".split()
        student = {name: value for name, value in asdict(STUDENT).items() if name not in given}
        some = world.digest(world.prompts({"t2i": 4, "edit": 4}, seed=0, targets=False))
        now = {
            "weights": benches.fingerprint_with_teachers(checkpoint),
            "student": student,
            "pool": POOL,
            "world": some,
        }
        file = home / "settings.json"
        with alone(file):
            # Which dtype is faster is measured once, so that all students have the same.
            if not file.exists():
                write_json(file, now | {"dtype": faster_dtype(str(self.pipeline.device))})
            then = read_json(file)
        if changed := [key for key in now if now[key] != then[key]]:
            raise ValueError(f"{home}: its students were made with other {', '.join(changed)}; name another --runs")
        self.dtype = then["dtype"]

    def stages(self, recipe: str, seed: int, longer: bool = False) -> dict[int, Path]:
        """{steps: where the weights of one student are at the end of this stage, or will be}.

        longer: the stages of the same student on its way to TIMES as many steps.
        """
        steps = TIMES * self.steps if longer else self.steps
        folder = self.home / f"{recipe}-{self.nfe}nfe-{self.steps}steps-seed{seed}" / "stages"
        ends = [math.ceil(steps * i / STAGES) for i in range(1, STAGES + 1)]
        return {step: folder / f"{step:06d}" for step in ends}

    def student(self, recipe: str, seed: int, tasks: tuple[str, ...], longer: bool = False) -> dict[int, Path]:
        """Train one student through its stages, which are returned. A killed one goes on from its last checkpoint.

        longer: through those of `longer`, too.
        """
        wanted = self.stages(recipe, seed, longer)
        out = wanted[max(wanted)].parents[1]
        with alone(out):
            for step, folder in (self.stages(recipe, seed) | wanted).items():
                if folder.exists():
                    continue
                print(f"{out.name}: to step {step}", flush=True)
                args = replace(STUDENT, checkpoint=self.checkpoint, recipe=recipe, out=out, seed=seed, steps=step)
                args = replace(args, student_steps=self.nfe, dtype=self.dtype, resume=(out / "args.json").exists())
                args, state = open_run(args)
                if state and int(state.name) > step:
                    raise ValueError(f"{out}: is past step {step}, whose weights are gone; remove the folder")
                pool = encoded(self.home / "conditions", self.checkpoint, str(self.pipeline.device), tasks)
                result = train.train(args, pool, state)
                with aside(folder) as part:
                    shutil.copytree(result / "transformer", part)
            for old in whole_checkpoints(out)[:-1]:  # 70 MB each
                shutil.rmtree(old)
        return wanted

    def judge_version(self) -> str:
        return digest(b"".join(Path(part.__file__).read_bytes() for part in (judge, world)))[:16]

    def place(self, sampler: Sampler) -> Path:
        """Where the rows of one of the `teachers` are kept."""
        return self.home / f"{sampler.name.replace(' ', '-').replace(',', '')}-{sampler.nfe}nfe"

    def known(self, place: Path, bench: str, cases: int) -> dict | None:
        """The row place-BENCH.json if it is of these cases and of this judge."""
        file = place.with_name(f"{place.name}-{bench}.json")
        row = read_json(file) if file.exists() else {}
        return row if (row.get("judge"), row.get("cases")) == (self.judge_version(), {bench: cases}) else None

    def row(self, place: Path, sampler: Sampler, bench: str, cases: int, weights: Path | None = None) -> dict:
        """The row of some weights (None: the checkpoint's own), from place-BENCH.json if it is there."""
        file = place.with_name(f"{place.name}-{bench}.json")
        with alone(file):
            row = self.known(place, bench, cases)
            if row is None:
                for category in benches.CATEGORIES[bench]:  # before the clock runs: only the first row would pay for it
                    some = world.bench(bench, category, cases)
                    self.condition([case.prompt for case in some], [case.images for case in some])
                row, _ = benches.evaluate(self.opened(weights), sampler, [bench], {bench: cases}, each=True)
                row["judge"] = self.judge_version()
                write_json(file, row)
        return row

    def few(self, name: str) -> Sampler:
        """As students draw."""
        return Sampler(name, self.sigmas, renoise=STUDENT.sampler == "renoise")

    def opened(self, weights: Path | None) -> Pipeline:
        """The checkpoint with these weights in it (None: its own)."""
        mmdit = MMDiT.from_pretrained(weights, device=self.pipeline.device).eval() if weights else self.pipeline.mmdit
        pipeline = copy(self.pipeline)
        pipeline.mmdit, pipeline.condition = mmdit, self.condition
        return pipeline

    def condition(self, prompts: list[str], images: list[list[Image.Image]]) -> Condition:
        """In place of the pipeline's own. All students get the same cases, and encoding a source takes longer than drawing
        four steps, so each condition is kept."""
        key = (*prompts, *(image.tobytes() for row in images for image in row))
        if key not in self.conditions:
            self.conditions[key] = self.pipeline.condition(prompts, images)
        return self.conditions[key]

    @cached_property
    def teachers(self) -> dict[str, Sampler]:
        """The rows that need no training. A specialised teacher draws its own categories, the base all others."""
        full = benches.default_sampler(TEACHER, self.pipeline, 40, self.pipeline.guidance)
        found = find_teachers(replace(STUDENT, checkpoint=self.checkpoint))
        networks = {name: self.opened(folder).mmdit for name, folder in found.items()}
        routing, drawn_by = recipes.find("specialised-only"), {}
        for bench in benches.CATEGORIES:
            for category in benches.CATEGORIES[bench]:
                (name,) = routing.weights(0, 4, bench, category)
                if name in networks:
                    drawn_by[bench, category] = networks[name]
        specialists = replace(full, name=SPECIALISTS, specialists=drawn_by)
        return {TEACHER: full, SPECIALISTS: specialists, START: self.few(START)}


# ---- statistics ------------------------------------------------------------------------------------------------------


def values(rows: list[dict], bench: str, part: str, category: str) -> np.ndarray:
    """(seeds, categories, cases) of some rows of one student."""
    each = [row[f"{bench}_each"][part] for row in rows]
    return np.array([[one[c] for c in (one if category == "average" else [category])] for one in each])


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean of a - b, both as `values` gives them, and half the width of its 95% interval.

    Two kinds of chance are added. Seeds: another run would have given another student. There are few of them, hence
    Student's t. A teacher has one "seed" and no such chance. Cases: another bench would have asked for other pictures. The
    cases of a and b are the same, so their differences are what scatters, in each category. Every interval holds at 95% by
    itself, not all of them together.
    """
    seeds = [x.mean(axis=(1, 2)) for x in (a, b) if len(x) > 1]
    from_seeds = sum(x.var(ddof=1) / len(x) for x in seeds) ** 0.5
    freedom = sum(len(x) - 1 for x in seeds)
    pairs = a.mean(axis=0) - b.mean(axis=0)  # (categories, cases)
    from_cases = (pairs.var(axis=1, ddof=1) / pairs.shape[1]).sum() ** 0.5 / len(pairs)
    t = T[min(freedom, len(T)) - 1] if freedom else 0.0
    return float(a.mean() - b.mean()), math.hypot(t * from_seeds, 1.96 * from_cases)


def verdict(parts: list[Above], rows: dict[tuple[str, str], list[dict]], seeds: int) -> tuple[str, list[str]]:
    """agree: the whole interval of every part is above 0; disagree: that of some part is below; else cannot tell. And the
    differences that say so."""
    differences, evidence = [], []
    for part in parts:
        sides = [values(rows[row, part.bench], part.bench, part.part, part.category) for row in (part.row, part.other)]
        mean, half = difference(*sides)
        differences.append((mean, half if seeds > 1 else math.inf))
        what = " ".join(word for word in (part.bench, part.category, part.part) if word not in ("average", "score"))
        evidence.append(f"{part.row} - {part.other}, {what}: {mean:+.3f} ± {half:.3f}")
    return statistics.verdict(differences), evidence


def averaged(bench: str, some: list[dict]) -> dict:
    """The rows of one student's seeds as one row: means, the interval over seeds and cases, and each seed's average."""
    _, half = difference(values(some, bench, "score", "average"), np.zeros((1, 1, 1)))
    out = {"nfe": some[0]["nfe"], "seeds": len(some), f"{bench}_interval": half}
    out[f"{bench}_by_seed"] = [row[bench]["average"] for row in some]
    for key in (bench, f"{bench}_compliance", f"{bench}_attributes", f"{bench}_fidelity"):
        out[key] = {name: float(np.mean([row[key][name] for row in some])) for name in some[0][key]}
    found = [row[f"{bench}_diversity"] for row in some]
    out[f"{bench}_diversity"] = {
        key: float(np.mean([one[key]["average"] for one in found])) for key in ("modes", "distance")
    }
    return out | {"seconds_per_image": float(np.mean([row["seconds_per_image"] for row in some]))}


# ---- one experiment --------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """What an experiment has measured."""

    rows: dict[tuple[str, str], list[dict]]  # (row, bench) -> what `evaluate` gives, for each seed
    curve: dict[str, dict[str, list[tuple[int, list[float]]]]]  # panel -> row -> [(steps, a score for each seed)]


def scored(shop: Workshop, plan: Experiment, label: str, seed: int) -> dict[int, dict[str, dict]]:
    """Score one student: {steps: {bench: row}}. It is trained only if one of these scores is missing.

    The end has all cases, and so has the half where a claim asks for it. Other points of a curve have the first few.
    """
    tasks, longer = tuple(plan.paper), label.endswith(LONGER)
    claimed = {row for parts in plan.claims.values() for part in parts for row in (part.row, part.other)}
    places = shop.stages(plan.rows[label], seed, longer)
    half, end = middle_and_end(places)

    def cases(step: int, bench: str) -> int:
        whole = step == end or (step == half and label + HALFWAY in claimed)
        return benches.CASES[bench] if whole else few(bench)

    if not all(shop.known(places[step], bench, cases(step, bench)) for step in places for bench in tasks):
        shop.student(plan.rows[label], seed, tasks, longer)
    rows = {step: {} for step in places}
    for bench in tasks:
        for step, place in places.items():
            sampler = shop.few(f"{label}, step {step}")
            rows[step][bench] = shop.row(place, sampler, bench, cases(step, bench), place)
    return rows


def few(bench: str) -> int:
    """Cases in a category for a point of a curve."""
    return min(benches.COMPARED[bench], benches.CASES[bench])


def middle_and_end(stages: Iterable[int]) -> tuple[int, int]:
    stages = list(stages)
    return stages[(len(stages) - 1) // 2], stages[-1]


def measure(shop: Workshop, plan: Experiment, seeds: int) -> Scores:
    """Train and score all students of a table, and score the teachers.

    Commands for one table that run at the same time share the work: each leaves out what another is making, and waits for
    it at the end.
    """
    jobs = {}  # name -> what makes its scores
    for label, sampler in shop.teachers.items():
        for bench in plan.paper:
            jobs[f"{label} {bench}"] = partial(shop.row, shop.place(sampler), sampler, bench, benches.CASES[bench])
    for label in plan.rows:
        for seed in range(seeds):
            jobs[f"{label} {seed}"] = partial(scored, shop, plan, label, seed)
    for wait in (False, True):
        for name, job in jobs.items():
            with alone(shop.home / "jobs" / name, wait) as mine:
                if mine:
                    job()

    # From here on everything is only read.
    scores = Scores({}, defaultdict(dict))

    def on_curve(rows: list[dict], bench: str) -> list[float]:
        """All points of a curve are scored on the same few cases."""
        return [float(values([row], bench, "score", "average")[..., : few(bench)].mean()) for row in rows]

    for label in shop.teachers:
        for bench in plan.paper:
            scores.rows[label, bench] = [jobs[f"{label} {bench}"]()]
    for label in plan.rows:
        students = [jobs[f"{label} {seed}"]() for seed in range(seeds)]
        half, end = middle_and_end(students[0])
        for bench in plan.paper:
            panel = scores.curve[bench + LONGER if label.endswith(LONGER) else bench]
            line = panel[label] = [(0, on_curve(scores.rows[START, bench], bench))]
            for step in students[0]:
                rows = [student[step][bench] for student in students]
                line.append((step, on_curve(rows, bench)))
                if step in (half, end):
                    scores.rows[label if step == end else label + HALFWAY, bench] = rows
            mean = np.mean([row[bench]["average"] for row in scores.rows[label, bench]])
            print(f"{label}: {bench} {mean:.3f}", flush=True)
    return scores


def run(args: Args) -> dict:
    """One experiment, from the prompts to the verdicts. Writes table.md, table.json, sheet.png and curve.png to --out."""
    name, seeds, steps = args.experiment, args.seeds, args.steps or STUDENT.steps
    out = args.out or Path("results") / (name if args.nfe == 4 else f"{name}-{args.nfe}nfe")
    result = {"experiment": name, "steps": steps, "seeds": seeds, "student_nfe": args.nfe, "cases": benches.CASES}
    check_place(out / "table.json", result, args.overwrite, ["table.md", "sheet.png", "curve.png"])
    plan, shop = EXPERIMENTS[name], Workshop(args.runs, args.checkpoint, steps, args.nfe)
    scores, tasks, shown = measure(shop, plan, seeds), list(plan.paper), [TEACHER, SPECIALISTS, START, *plan.rows]
    result |= {
        "made_with": read_json(args.runs / "settings.json"),
        "rows": {label: {} for label in shown},
        "claims": [],
    }
    chance = "seeds and cases" if seeds > 1 else "cases alone"
    counts = ", ".join(f"{bench} {benches.CASES[bench]}" for bench in tasks)
    lines = [f"# {name}", ""]
    lines.append(
        f"{seeds} seeds a row, {steps} updates of {STUDENT.batch} samples ({TIMES} times as many in a row that is called "
        f"longer), students of {args.nfe} NFE. Cases in a category: {counts}. ± is a 95% interval over {chance}; s/image is "
        "without the encoding of prompts and sources."
    )
    for bench in tasks:
        means = {label: averaged(bench, scores.rows[label, bench]) for label in shown}
        for label in shown:
            result["rows"][label] |= means[label]
        lines += ["", table(bench, means, plan.paper[bench])]
    claims, plane = [["the paper", "here", "on the plane, late", "here: differences"]], read_json(PLANE)["claims"]
    for claim, parts in plan.claims.items():
        word, evidence = verdict(parts, scores.rows, seeds)
        result["claims"].append({"claim": claim, "verdict": word, "evidence": evidence})
        claims.append([claim, f"**{word}**", plane[claim].get("late", "not run"), "; ".join(evidence)])
    lines += ["", markdown(claims)]
    if log := benches.build_log(args.checkpoint):
        premises = [["what the paper takes for granted", "these teachers", "holds"]]
        for one in log["premises"]["premises"]:
            premises.append([one["premise"], one["measured"], "yes" if one["holds"] else "no"])
        lines += ["", markdown(premises)]
    if seeds == 1:
        lines += ["", "One seed says nothing about others: nothing can be told from it."]
    write_json(out / "table.json", result | {"curve": scores.curve})
    (out / "table.md").write_text("\n".join(lines) + "\n")
    contact_sheet(pictures(shop, plan), benches.SHOWN, out / "sheet.png")
    chart(scores.curve, out / "curve.png")
    print("\n".join(lines[2:]))
    print(f"written to {out}")
    return result


def pictures(shop: Workshop, plan: Experiment) -> dict[str, dict[str, list[Image.Image]]]:
    """Of the first cases: base teacher, undistilled, and the first seed of every row."""
    drawn, tasks = {}, tuple(plan.paper)
    for label in (TEACHER, START, *plan.rows):
        weights, sampler = None, shop.teachers.get(label) or shop.few(label)
        if label in plan.rows:
            weights = list(shop.student(plan.rows[label], 0, tasks, label.endswith(LONGER)).values())[-1]
        pipeline, drawn[label] = shop.opened(weights), {}
        for bench in tasks:
            seeds = list(range(4 if bench == "t2i" else 2))
            for category in benches.CATEGORIES[bench]:
                cases = world.bench(bench, category, len(seeds))
                drawn[label][f"{bench} {category}"], _ = benches.draw_cases(pipeline, sampler, cases, seeds)
    return drawn


def table(bench: str, rows: dict[str, dict], paper: dict[str, str]) -> str:
    """Markdown, a line for each of the averaged rows."""
    categories = benches.CATEGORIES[bench]
    head = [bench, "NFE", "seeds", *categories, "average", "compliance", "fidelity", "modes", "distance", "s/image"]
    lines = [[*head, "paper: Gemini / GPT"]]
    for name, row in rows.items():
        line = [name, str(row["nfe"]), str(row["seeds"]), *(f"{row[bench][c]:.3f}" for c in categories)]
        line.append(f"**{row[bench]['average']:.3f}** ± {row[f'{bench}_interval']:.3f}")
        line += [f"{row[f'{bench}_{part}']['average']:.3f}" for part in ("compliance", "fidelity")]
        line += [f"{row[f'{bench}_diversity'][key]:.2f}" for key in ("modes", "distance")]
        lines.append([*line, f"{row['seconds_per_image']:.3f}", paper.get(name, "")])
    return markdown(lines)
