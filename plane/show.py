"""The main job, `python -m plane`: students learn to draw and to edit, in one picture and an animation."""

from pathlib import Path

import torch
from torch import Tensor

from dmd import dmd_gradient
from flow import Velocity, add_noise, euler, predict_x0
from plane import panels
from plane.method import SIGMAS, TASKS, TEACHER_SIGMAS, Setting, evaluate, train
from plane.rows import heading, means, write
from recipe import Recipe


def look(real: Velocity, fake: Velocity, x_theta: Tensor, xi: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g, x0_real and x0_fake, (N, 2) each, of samples x_theta that are noised again by xi (N, 2) at times t (N,)."""
    x_t = add_noise(x_theta, xi, t)
    x0_real, x0_fake = predict_x0(real, x_t, t), predict_x0(fake, x_t, t)
    return dmd_gradient(x_theta, x0_real, x0_fake), x0_real, x0_fake


@torch.no_grad()
def gradients(real: Velocity, fake: Velocity, x_theta: Tensor) -> tuple[list[Tensor], Tensor]:
    """Of one sample with one noise: x_theta, x_t, x0_real, x0_fake, (2,) each. Of all, (N, 2): g, the mean of 60 noises. The
    samples are those of the last step, which are noised again up to its sigma, 0.5."""
    x = x_theta[(x_theta - torch.tensor([0.3, 0.9])).norm(dim=1).argmin()].expand_as(x_theta)  # between two modes
    xi, t = torch.tensor([0.9, -0.1]).expand_as(x), torch.full((len(x),), 0.5)
    _, x0_real, x0_fake = look(real, fake, x, xi, t)
    one, rng, g = [x[0], add_noise(x, xi, t)[0], x0_real[0], x0_fake[0]], torch.Generator().manual_seed(0), 0
    for _ in range(60):
        xi, t = torch.randn(x.shape, generator=rng), 0.02 + 0.48 * torch.rand(len(x), generator=rng)
        g = g + look(real, fake, x_theta, xi, t)[0] / 60
    return one, g


def show(setting: Setting, recipe: Recipe, out: Path) -> None:
    """Students learn by a recipe: OUT/dmd.md and .json, a table; dmd.png, six panels; and dmd.gif, an animation."""
    updates, base, student = setting.updates, setting.teacher(), "Student, 4 steps"
    early = min(30, updates)  # when the gradient is looked at: at the start it is zero, as all three are the same
    frames_at, marks = {0, *(round(updates ** (i / 23)) for i in range(24))}, {round(updates * i / 5) for i in range(6)}
    n = setting.seeds * max(1, 300 // setting.seeds)  # samples to draw, of all seeds
    (noise, *_), _, source, _ = setting.draw(n, torch.Generator().manual_seed(setting.seed + 1))
    source = source[:1].expand_as(source)  # one edit, for which there are several right answers
    truths = {category: setting.mixture("truth", category, source[:1]) for category in TASKS}
    frames, found = [], {student: {}}  # found: model -> updates -> category -> measures
    for step, students, fake in train(setting, recipe, {early, *frames_at, *marks}):
        with torch.no_grad():
            samples = {category: euler(students(category, source), noise, SIGMAS) for category in TASKS}
        if step in frames_at:
            frames.append(panels.frame(step, samples, truths, source[:1]))
        if step in marks:
            found[student][step] = means(evaluate(setting, students, SIGMAS))
        if step == early:
            velocities = base("portrait", source), fake("portrait", source, 3 if setting.told else None)
            x_theta = samples["portrait"]
            corrections = *gradients(*velocities, x_theta), x_theta

    models = {"Teacher, 40 steps": (base, TEACHER_SIGMAS), "Teacher, 4 steps": (base, SIGMAS)}
    found = {row: dict.fromkeys((0, updates), means(evaluate(setting, *models[row]))) for row in models} | found
    models[student] = students, SIGMAS
    ways = {}  # of samples from noise to picture, (steps + 1, N, 2)
    for row, (model, sigmas) in models.items():
        with torch.no_grad():
            stops = [euler(model("portrait", source), noise, sigmas[: i + 1]) for i in range(len(sigmas))]
        ways[row] = torch.stack(stops)
    panels.six_panels(truths["portrait"], ways, early, corrections, found).save(out / "dmd.png", optimize=True)
    frames[0].save(out / "dmd.gif", save_all=True, append_images=frames[1:] + frames[-1:] * 8, duration=200, loop=0)

    lines, result = [["model", *TASKS]], {row: scored[updates] for row, scored in found.items()}
    for row, some in result.items():
        cells = [f"{m['precision']:.3f} / {m['coverage']:.3f} / {m['distance']:.3f}" for m in some.values()]
        lines.append([row, *cells])
    title = f"{heading(setting)[:-1]}: precision / coverage / energy distance to exact samples."
    write(out / "dmd", title, [lines], result)
