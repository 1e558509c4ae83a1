"""Students of the picture world, trained in stages, and their rows: what the paper's tables and the long rows share.

All students have the same optimisation, STUDENT, and the same prompts. They differ in recipe and seed; those of the long
rows also in the noise levels of their pictures. Finished students and rows are reused, so a killed command resumes.
"""

import math
import shutil
from collections.abc import Iterable
from copy import copy
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

from PIL import Image

import eval as evaluation
import flow
import recipe as recipes
import train
from checkpoint.files import aside
from data.encode import How, encode_prompts
from data.pool import Pool
from experiments.claims import SPECIALISTS, START, TEACHER
from experiments.kept import check_settings, kept_row, row_name
from model import Condition, MMDiT
from sample import Pipeline
from toy import world
from toy.draw import RESOLUTION, Sampler, default_sampler, open_checkpoint
from training.options import TrainOptions
from training.run import find_teachers, open_run, whole_checkpoints

# One optimisation for all rows of all tables. It is the main job's with smaller and fewer updates, so that the three tables
# take an evening, and without decay, because a run is made in stages and each stage would end with it.
STUDENT = TrainOptions(decay=0.0, batch=12)
# Prompts in a category or family. Two categories have twice as many as one, as in the paper.
POOL = {"t2i": 512, "edit": 256}
# Options of train.py that each student has for itself, or that change nothing in it.
OWN = "checkpoint prompts recipe out teacher student_steps steps seed resume device dtype compile".split()


def stages(steps: int, count: int) -> list[int]:
    """The steps at which a student is scored: `count` evenly spaced ones, the last at the end; fewer if it has fewer."""
    return sorted({math.ceil(steps * i / count) for i in range(1, count + 1)})


class Students:
    """Students, their teachers, and the rows of both, in one folder:

    settings.json                       what all of it was made with; other settings need another folder
    RECIPE-4nfe-100steps-seed0/         a run of train.py's
        stages/000050/                  the student's weights after so many steps
        stages/000050-t2i-192-judge-1a2b3c4d.json     its row on one bench with so many cases in a category
    base-teacher-80nfe-t2i-192-judge-1a2b3c4d.json    the row of a teacher
    conditions/                         the encoded prompts

    A student is named by options of train.py: STUDENT with a recipe and a seed of its own.

    Of the seeds after the first, a table needs the rows alone, so their weights may be removed. Rows from another machine
    are reused, too, if they are put here with its settings.json.
    """

    def __init__(self, folder: Path, checkpoint: Path, steps: int, nfe: int, tasks: Iterable[str]):
        """steps: updates of a student. nfe: the steps in which it draws. tasks: of the prompts that it may learn from."""
        self.folder, self.checkpoint = folder, checkpoint
        self.steps, self.nfe, self.tasks = steps, nfe, tuple(tasks)
        self.pipeline = open_checkpoint(checkpoint)
        self.conditions = {}  # see `condition`
        settings = {
            "weights": evaluation.fingerprint_with_teachers(checkpoint),
            "student": {name: value for name, value in asdict(STUDENT).items() if name not in OWN},
            "pool": POOL,
            "world": world.digest(world.prompts({"t2i": 4, "edit": 4}, seed=0, targets=False)),
        }
        self.settings = check_settings(folder, settings, str(self.pipeline.device))

    def place(self, student: TrainOptions, step: int) -> Path:
        """The folder of a student's weights after so many steps."""
        times = "" if student.renoise_times == STUDENT.renoise_times else f"-{student.renoise_times}"
        run = f"{student.recipe}{times}-{self.nfe}nfe-{self.steps}steps-seed{student.seed}"
        return self.folder / run / "stages" / f"{step:06d}"

    def weights(self, student: TrainOptions, step: int) -> Path:
        """The same folder. If it is missing, the student is trained up to this step, from its last checkpoint on."""
        place = self.place(student, step)
        if place.exists():
            return place
        run = place.parents[1]
        print(f"{run.name}: to step {step}", flush=True)
        args = replace(student, checkpoint=self.checkpoint, out=run, steps=step, student_steps=self.nfe)
        args = replace(args, dtype=self.settings["dtype"], resume=(run / "args.json").exists())
        args, state = open_run(args)
        exported = train.train(args, self.pool, state)
        with aside(place) as part:
            shutil.copytree(exported / "transformer", part)
        for old in (exported, *whole_checkpoints(run)[:-1]):
            shutil.rmtree(old)
        return place

    @cached_property
    def pool(self) -> Pool:
        """The prompts that all students learn from, encoded. The folder keeps them."""
        prompts = list(world.prompts({task: POOL[task] for task in self.tasks}, seed=0, targets=False))
        device = str(self.pipeline.device)
        return encode_prompts(self.folder / "conditions", prompts, self.checkpoint, How(RESOLUTION), device)

    def student_row(self, student: TrainOptions, step: int, task: str, cases: int) -> dict:
        """The row of a student after so many steps. It is trained only if neither row nor weights are there."""
        place = self.place(student, step)

        def score() -> dict:
            pipeline = self.opened(self.weights(student, step))
            return self.score(pipeline, self.few_steps(f"{student.recipe}, step {step}"), task, cases)

        return kept_row(place.with_name(row_name(f"{place.name}-{task}", {task: cases})), score)

    def teacher_row(self, sampler: Sampler, task: str, cases: int) -> dict:
        """The row of one of the `teachers`."""
        file = self.folder / row_name(f"{sampler.name}-{sampler.nfe}nfe-{task}", {task: cases})
        return kept_row(file, lambda: self.score(self.opened(None), sampler, task, cases))

    def score(self, pipeline: Pipeline, sampler: Sampler, task: str, cases: int) -> dict:
        for category in evaluation.BENCHES[task]:  # before the clock runs: only the first row would pay for it
            benched = world.bench_cases(task, category, cases)
            self.condition([case.prompt for case in benched], [case.images for case in benched])
        return evaluation.evaluate(pipeline, sampler, {task: cases})[0]

    def few_steps(self, name: str) -> Sampler:
        """The students' sampler."""
        return Sampler(name, flow.student_sigmas(self.nfe), renoise=STUDENT.sampler == "renoise")

    def opened(self, weights: Path | None) -> Pipeline:
        """The checkpoint with these weights in it (None: its own)."""
        pipeline = copy(self.pipeline)
        pipeline.condition = self.condition
        if weights:
            pipeline.mmdit = MMDiT.from_pretrained(weights, device=self.pipeline.device).eval()
        return pipeline

    def condition(self, prompts: list[str], images: list[list[Image.Image]]) -> Condition:
        """In place of the pipeline's own method. All students draw the same cases, and encoding a source takes longer than
        drawing four steps, so each condition is kept."""
        key = (*prompts, *(image.tobytes() for row in images for image in row))
        if key not in self.conditions:
            self.conditions[key] = self.pipeline.condition(prompts, images)
        return self.conditions[key]

    @cached_property
    def teachers(self) -> dict[str, Sampler]:
        """The models that need no training. A specialised teacher draws its own categories, the base all others."""
        full = default_sampler(TEACHER, self.pipeline, 40, self.pipeline.guidance)
        folders = find_teachers(replace(STUDENT, checkpoint=self.checkpoint))
        networks = {name: self.opened(folder).mmdit for name, folder in folders.items()}
        routing = recipes.find("specialised-only")
        drawn_by = {}
        for task, categories in evaluation.BENCHES.items():
            for category in categories:
                (name,) = routing.weights(0, 4, task, category)
                if name in networks:
                    drawn_by[task, category] = networks[name]
        specialists = replace(full, name=SPECIALISTS, specialists=drawn_by)
        return {TEACHER: full, SPECIALISTS: specialists, START: self.few_steps(START)}
