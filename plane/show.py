"""The main job, `python -m plane`: students learn to draw and to edit, in one picture and an animation."""

from pathlib import Path

import torch
from torch import Tensor

from dmd import dmd_gradient
from flow import Velocity, add_noise, euler, predict_x0
from plane import panels
from plane.method import SIGMAS, TASKS, TEACHER_SIGMAS, Setting, evaluate, train
from plane.rows import Scores, heading, means, values_cell, write
from recipe import Recipe


def look(real: Velocity, fake: Velocity, x_theta: Tensor, xi: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g, x0_real and x0_fake, (N, 2) each, of samples x_theta that are noised again by xi (N, 2) at times t (N,)."""
    x_t = add_noise(x_theta, xi, t)
    x0_real, x0_fake = predict_x0(real, x_t, t), predict_x0(fake, x_t, t)
    return dmd_gradient(x_theta, x0_real, x0_fake), x0_real, x0_fake


@torch.no_grad()
def correction(real: Velocity, fake: Velocity, x_theta: Tensor) -> list[Tensor]:
    """Of the sample that is nearest to a place between two modes: x_theta, x_t, x0_real and x0_fake, (2,) each."""
    nearest = (x_theta - torch.tensor([0.3, 0.9])).norm(dim=1).argmin()
    x = x_theta[nearest].expand_as(x_theta)  # copies: a network under N conditions takes N samples
    xi, t = torch.tensor([0.9, -0.1]).expand_as(x), torch.full((len(x),), 0.5)
    _, x0_real, x0_fake = look(real, fake, x, xi, t)
    return [x[0], add_noise(x, xi, t)[0], x0_real[0], x0_fake[0]]


@torch.no_grad()
def mean_gradient(real: Velocity, fake: Velocity, x_theta: Tensor) -> Tensor:
    """g of all samples, (N, 2), the mean of 60 noises. They are samples of the last step, so times end at its sigma, 0.5."""
    rng, g = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        xi = torch.randn(x_theta.shape, generator=rng)
        t = 0.02 + 0.48 * torch.rand(len(x_theta), generator=rng)
        g = g + look(real, fake, x_theta, xi, t)[0] / 60
    return g


def show(setting: Setting, recipe: Recipe, out: Path) -> None:
    """Students learn by a recipe: OUT/dmd.md and .json, a table; dmd.png, six panels; and dmd.gif, an animation."""
    updates, base = setting.updates, setting.teacher()
    early = min(30, updates)  # when the gradient is drawn; at the start it is zero, because all three networks agree
    frames_at = {0, *(round(updates ** (i / 23)) for i in range(24))}
    marks = {round(updates * i / 5) for i in range(6)}  # when students are measured
    n = setting.seeds * max(1, 300 // setting.seeds)  # samples to draw, of all seeds
    noises, _, source, _ = setting.draw(n, torch.Generator().manual_seed(setting.seed + 1))
    source = source[:1].expand_as(source)  # one edit, for which there are several right answers
    truths = {category: setting.mixture("truth", category, source[:1]) for category in TASKS}
    frames, measured = [], {}  # measured: updates -> category -> measures, of the students
    for step, students, fake in train(setting, recipe, {early, *frames_at, *marks}):
        with torch.no_grad():
            samples = {category: euler(students(category, source), noises[0], SIGMAS) for category in TASKS}
        if step in frames_at:
            frames.append(panels.frame(step, samples, truths, source[:1]))
        if step in marks:
            scored = evaluate(setting, students, SIGMAS)
            measured[step] = means(scored)
        if step == early:
            x_theta = samples["portrait"]
            scores = base("portrait", source), fake("portrait", source, 3 if setting.told else None)
            corrections = correction(*scores, x_theta), mean_gradient(*scores, x_theta), x_theta

    models = {
        "Teacher, 40 steps": (base, TEACHER_SIGMAS),
        "Teacher, 4 steps": (base, SIGMAS),
        "Student, 4 steps": (students, SIGMAS),
    }
    history, ways = {}, {}  # model -> updates -> category -> measures; model -> stops of its samples, (steps + 1, N, 2)
    for name, (model, sigmas) in models.items():
        if model is students:
            history[name] = measured
        else:  # a teacher's curve is a level line
            history[name] = dict.fromkeys((0, updates), means(evaluate(setting, model, sigmas)))
        with torch.no_grad():
            velocity = model("portrait", source)
            ways[name] = torch.stack([euler(velocity, noises[0], sigmas[: i + 1]) for i in range(len(sigmas))])
    panels.six_panels(truths["portrait"], ways, early, corrections, history).save(out / "dmd.png", optimize=True)
    frames[0].save(out / "dmd.gif", save_all=True, append_images=frames[1:] + frames[-1:] * 8, duration=200, loop=0)

    result = {name: by_updates[updates] for name, by_updates in history.items()}
    lines = [["model", *TASKS]]
    for name, averages in result.items():
        lines.append([name, *map(values_cell, averages.values())])
    title = f"{heading(setting)[:-1]}: precision / coverage / energy distance to exact samples."
    write(out / "dmd", title, lines, result | {"Each student": of_each(scored)})


def of_each(scored: Scores) -> dict[str, dict[str, str]]:
    """category -> measure -> the values of all students in one line, in the order of their seeds."""
    lines = {}
    for category, measures in scored.items():
        lines[category] = {name: " ".join(f"{v:.3f}" for v in values.tolist()) for name, values in measures.items()}
    return lines
