"""Why re-noising helps pictures and hurts on the plane: `python -m plane --experiment dimension`.

In the picture world four re-noising steps beat four Euler steps; on the plane it is the other way round. Is the dimension the
reason? Here the plane's T2I world stands in D = 2, 8 or 64 dimensions, with its modes, widths and blurred base teacher.

The modes lie in a plane of the D dimensions. ACROSS this plane a mixture is one Gaussian, and it is independent of the modes.
There a velocity is linear. So only two things can change with D: what happens across, and how far the modes are apart.

    as on the plane    the same distances: neighbouring modes are as many standard deviations apart for every D
    sqrt(D / 2)        each coordinate is as large as on the plane, as in pictures, whose latents have unit variance for
                       any D. So modes are sqrt(D / 2) times as far apart. Measured in sqrt(D) standard deviations, which is how
                       far samples are from their mode, this is the same distance for every D

Expected, written down before the first run:

1. At the plane's distances D changes nothing. Re-noising loses as much in 64 dimensions as in two, because across the
   modes both samplers draw equally narrow samples.
2. At distances of sqrt(D / 2) re-noising wins at D = 64. There a sample chooses its mode at sigma 0.9, and new noise cannot
   undo the choice. On the plane it chooses near 0.5, so each new noise throws the choice away, and the last one leaves too
   little time for another. Euler's method keeps its noise and so its choice. But its first step leads to the mean of all
   modes, so later states hold too little of their mode, and samples end short of it: the farther apart the modes, the more.
3. At these distances two dimensions give the same as 64. Then the distance in units of the noise is the reason, and the
   dimension matters only because pictures of more numbers are farther apart.
4. With more steps Euler's error falls faster, and re-noising wins less or not at all.
5. Students differ as their teachers do, and by less.

Added after a first look at teachers: D = 512, and the distances of pictures of 4,096 numbers, because at 64 the gap had closed
but not turned; and text beside landscapes, not averaged with them. Text has a mode in the middle, where the first step ends.

Found, with 8 seeds and 1,000 updates (results/plane/dimension.md): 1 and 3 are right. 2 is right too late: in four steps of
the teacher both are equal at D = 64, and re-noising wins at 512. 4 is wrong: in more steps re-noising draws narrower samples
than its teacher, and gains precision but no distance. 5 cannot be told: at 512 and at the largest distances students lose modes.

Precision, coverage and distance are those of the plane, of samples projected onto the plane of the modes, so they mean the
same for every D. A radius in all D dimensions would not: at D = 64 the one that holds 98.9% of exact samples holds none of
an exact but blurred teacher. What is across is one number: the samples' standard deviation, in the truth's.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flow import student_sigmas, walk
from plane.method import SIGMAS, Mixture, Model, Setting, measure, train
from plane.rows import BASE, ROWS, Scores, cell, heading, means, values_cell, write
from scores.statistics import mean_over_seeds

# D, and how many times as far apart the modes are as on the plane.
WORLDS = ((2, 1.0), (8, 1.0), (64, 1.0), (8, 2.0), (64, 32**0.5), (512, 16.0), (2, 32**0.5), (2, 2048**0.5))
STEPS = (4, 8, 16)  # of the teacher; students have four
CATEGORIES = ("landscape", "text")  # four wide modes, which the base draws exactly; nine narrow ones, which it blurs
SAMPLES = 500  # of each seed and category


def embed(points: Tensor, dims: int) -> Tensor:
    """Points of the plane (N, 2) in dims dimensions, (N, dims), in all coordinates alike. Distances stay."""
    copies = dims // 2
    return points.repeat(1, copies) / math.sqrt(copies)


def project(points: Tensor) -> Tensor:
    """(N, dims) onto the plane that embed fills, (N, 2)."""
    copies = points.shape[1] // 2
    return points.reshape(len(points), copies, 2).sum(1) / math.sqrt(copies)


@dataclass(frozen=True)
class World(Setting):
    """The plane's T2I categories in other dimensions."""

    dims: int = 2  # even
    apart: float = 1.0  # distance between modes, in the plane's

    def flat(self, teacher: str, category: str) -> Mixture:
        """What is seen in the plane of the modes."""
        plane = super().mixture(teacher, category, torch.zeros(1, 2))
        return replace(plane, modes=self.apart * plane.modes)

    def mixture(self, teacher: str, category: str, source: Tensor) -> Mixture:
        flat = self.flat(teacher, category)
        return replace(flat, modes=embed(flat.modes, self.dims))


@torch.no_grad()
def scores(world: World, model: Model, sigmas: list[float], renoise: bool) -> Scores:
    """The plane's measures, with distance in units of `apart`, and "across". Both samplers start from the same noise."""
    rng, by_category = torch.Generator().manual_seed(10**6), {}
    for category in CATEGORIES:
        noises = torch.randn(len(sigmas) - 1, world.seeds * SAMPLES, world.dims, generator=rng)
        points = walk(model(category, noises[0]), noises if renoise else noises[:1], sigmas)
        truth = world.flat("truth", category)
        measured = measure(project(points), truth, world.seeds, rng)
        measured["distance"] = measured["distance"] / world.apart
        if world.dims > 2:
            off = points - embed(project(points), world.dims)
            variance = off.square().reshape(world.seeds, -1).sum(1) / (SAMPLES * (world.dims - 2))
            measured["across"] = variance.sqrt() / truth.sd
        by_category[category] = measured
    return by_category


def student(world: World, renoise: bool) -> Model:
    ((_, students, _),) = train(replace(world, renoise=renoise), ROWS[BASE], {world.updates})
    return students


def dimension(setting: Setting, out: Path) -> None:
    """Euler's method against re-noising in all worlds, of the base teacher and of its students; OUT/dimension.md, .json."""
    columns = [
        f"{category}: {column}"
        for category in CATEGORIES
        for column in ("Euler", "re-noising", "precision", "distance")
    ]
    lines, result = [["D", "modes apart", "model", *columns]], {}
    for dims, apart in tqdm(WORLDS, "dimension"):
        world = World(seeds=setting.seeds, updates=setting.updates, dims=dims, apart=apart)
        base = world.teacher()
        models = {f"teacher, {steps} steps": (base, base, student_sigmas(steps)) for steps in STEPS}
        models["student, 4 steps"] = student(world, renoise=False), student(world, renoise=True), SIGMAS
        for name, (eulers, renoising, sigmas) in models.items():
            euler, renoise = scores(world, eulers, sigmas, False), scores(world, renoising, sigmas, True)
            averages = {"euler": means(euler), "renoise": means(renoise)}
            cells = []
            for category in CATEGORIES:
                for sampler in averages:
                    measured = averages[sampler][category]
                    across = f" / {measured['across']:.3f}" if dims > 2 else ""
                    cells.append(values_cell(measured) + across)
                for measure_name in ("precision", "distance"):
                    gain = renoise[category][measure_name] - euler[category][measure_name]  # (S,)
                    cells.append(cell(mean_over_seeds(gain.tolist())))
            lines.append([f"{dims}", f"{apart:.3g}", name, *cells])
            result[f"D {dims}, apart {apart:.3g}, {name}"] = averages
    legend = "Precision / coverage / distance / width across the modes; then re-noising minus Euler."
    write(out / "dimension", f"# dimension\n\n{heading(setting)} {legend}", lines, result)
