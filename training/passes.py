"""How much a run computes, in passes: one sample through one network of the teacher's size is 1, its backward is 2.

Seconds differ from machine to machine, passes do not. results/records.md compares runs by them.
"""

from collections.abc import Iterable

from torch import Tensor

from data.prompts import TASKS
from model import MMDiT
from training.options import TrainOptions


class Passes:
    """Counts the passes of some networks from now on. `count`: those of this process."""

    def __init__(self, models: Iterable[MMDiT]):
        self.count = 0
        for model in {id(model): model for model in models}.values():  # several roles may share one
            model.proj_out.register_forward_hook(
                self.add
            )  # this layer runs once in each forward, with prefix or without

    def add(self, layer: object, inputs: tuple, output: Tensor) -> None:
        samples = len(output)
        self.count += samples
        if output.requires_grad:
            output.register_hook(lambda gradient: self.add_backward(samples))

    def add_backward(self, samples: int) -> None:
        self.count += 2 * samples


def sample_passes(name: str, k: int | None = None, scorers: float = 0) -> float:
    """By arithmetic, one sample's part of one update of the trainee `name`. scorers: forwards that make the real score; a
    guided teacher has 2. Without the first-step loss."""
    learns = 1 + 2  # a forward with gradient, and its backward
    if name == "fake":
        return (k + 1) + learns  # the student's rollout; the fake score on what came out
    if name == "student":
        return k + learns + scorers + 1  # the walk to step k; step k; the real and the fake score at x_t
    return learns


def run_passes(options: TrainOptions, recipe) -> float:
    """By arithmetic, a whole distillation; the mean over the draws of k and of the categories. recipe: a Recipe, with the
    teachers there are. A run's own number is the sum of `passes` in its metrics.jsonl."""
    of_sample = 0.0
    for task, parts in zip(TASKS, recipe.ratio, strict=True):
        for k in range(options.student_steps):
            teachers = recipe.mean_teachers(k, options.student_steps, task)
            scorers = teachers * (1 if options.guidance == 1 else 2)
            updates = options.fake_updates * sample_passes("fake", k) + sample_passes("student", k, scorers)
            of_sample += parts / sum(recipe.ratio) * updates / options.student_steps
    return options.steps * options.batch * of_sample
