"""DMD where a picture is a point in the plane, and a teacher's velocity is a formula.

It uses flow.py, dmd.py and recipe.py as they are. For every category a teacher draws from a mixture of Gaussians, so it has
no errors but those that Setting gives it. The commands are in plane/__main__.py.

    S        seeds: students that train side by side, each with its own weights and draws, as one batched product
    N        samples of all seeds together, seed after seed; states are (N, 2)
    M        modes of a mixture
    truth    what a perfect model would draw; "base", "text" and "edit" are the teachers, each with its own errors
"""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot, silu
from tqdm import tqdm

from dmd import RealScore, Round, fake_losses, first_step_losses, lowest_step, rollout, student_losses
from flow import Velocity, add_noise, per_sample, renoise_times, shifted_uniform, student_sigmas, walk
from recipe import Recipe

SIGMAS = student_sigmas(4)  # the student's: 1, 0.9, 0.75, 0.5, 0
TEACHER_SIGMAS = [1 - i / 40 for i in range(41)]
CATEGORIES = {"t2i": ("landscape", "portrait", "text"), "edit": ("object", "style")}
TASKS = {category: task for task, categories in CATEGORIES.items() for category in categories}
Model = Callable[[str, Tensor], Velocity]  # category, source (N, 2) -> velocity


# ---- the world and its teachers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """M Gaussians of equal weight and one standard deviation sd, around centre + modes. The velocity in closed form:

    Given mode j, z = (1 - t) x + t eps is Gaussian around (1 - t) mu_j, with variance var = (1 - t)^2 sd^2 + t^2. So

        P(j | z)      = softmax over j of -|z - (1 - t) mu_j|^2 / (2 var)
        E[x | z, j]   = mu_j + (1 - t) sd^2 / var (z - (1 - t) mu_j)
        E[eps | z, j] = t / var (z - (1 - t) mu_j)
        v = E[eps - x | z] = (t - (1 - t) sd^2) / var (z - (1 - t) mu) - mu,  with mu = sum_j P(j | z) mu_j
    """

    modes: Tensor  # (M, 2), or (S, M, 2): other modes for each seed
    sd: float
    centre: Tensor | float = 0.0  # (N, 2) or 0: moves all modes of a sample; an edit's answers lie around its source

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        t = per_sample(t, z)  # (N, 1)
        var = (1 - t) ** 2 * self.sd**2 + t**2  # (N, 1)
        y = z - (1 - t) * self.centre  # as if the centre were 0
        split = (*self.modes.shape[:-2], -1)  # (N,); (S, N / S) where each seed has its own modes
        # The exponent without |y|^2, which is the same for all j: (1 - t) / var (y mu_j - (1 - t) |mu_j|^2 / 2)
        logits = y.reshape(*split, z.shape[-1]) @ self.modes.mT  # (N, M)
        logits = logits - (1 - t).reshape(*split, 1) * self.modes.square().sum(-1)[..., None, :] / 2  # (N, M)
        logits = ((1 - t) / var).reshape(*split, 1) * logits  # (N, M)
        mu = (logits.softmax(-1) @ self.modes).reshape(z.shape)  # (N, 2)
        return (t - (1 - t) * self.sd**2) / var * (y - (1 - t) * mu) - mu - self.centre

    def log_density(self, z: Tensor, t: Tensor) -> Tensor:
        """log p_t(z) without the constant -log(2 pi), (N,); modes (M, 2)."""
        t = per_sample(t, z)  # (N, 1)
        var = (1 - t) ** 2 * self.sd**2 + t**2  # (N, 1)
        off = (z - (1 - t) * self.centre)[:, None] - (1 - t)[..., None] * self.modes  # (N, M, 2)
        each = -off.square().sum(-1) / (2 * var) - var.log()  # (N, M)
        return each.logsumexp(1) - math.log(len(self.modes))

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """n exact samples, (n, 2); modes (M, 2)."""
        chosen = self.modes[torch.randint(len(self.modes), (n,), generator=rng)]
        return self.centre + chosen + self.sd * torch.randn(chosen.shape, generator=rng)


def ring(modes: int, radius: float, turn: float = 0.0) -> Tensor:
    """Modes on a circle, (modes, 2); turn in radians."""
    angles = turn + torch.arange(modes) * (2 * math.pi / modes)
    return radius * torch.stack([angles.cos(), angles.sin()], dim=1)


@dataclass(frozen=True)
class Setting:
    """What there is to draw, how teachers err, and how students are trained. A sweep may change any field. All numbers are
    ours."""

    dims = 2  # numbers of a picture. This is no field: plane/dimension.py alone has others

    blur: float = 2.0  # the base's standard deviation at text, in the truth's
    sharp: float = 0.5  # a specialist's standard deviation, in the truth's
    displaced: float = 0.5  # how far a specialist's modes are moved, in the truth's standard deviations
    open: float = 1.0  # radius of the circle of right answers to an edit; at 0 there is one answer
    # All rows are trained alike. These numbers were chosen with seed 1, by how close a student of the base comes to its
    # teacher (plane/tables.py, CHOICES).
    seeds: int = 32
    seed: int = 0  # of all draws
    updates: int = 6000  # of the student
    batch: int = 64  # samples of one seed, all of one category
    fake_updates: int = 2  # before each of the student
    lr: float = 1e-3
    fake_lr: float = 5e-3  # higher, because the fake score has to keep up with the student
    beta1: float = 0.0  # Adam's
    shift: float = 1.0  # of the times p(t): above 1 they move towards noise
    tail: float = 0.1  # students draw with averaged weights, of about the last tenth of the updates so far
    width: int = 64  # of the three hidden layers
    guidance: float = 1.0  # w of the teachers; 1 is off
    guided_above: bool = False  # what guidance adds is seen at times of its own, in [sigma_k, 0.98]
    renoise: bool = False  # students draw with new noise at every step, and not by Euler's method
    below: bool = True  # step k's pictures are noised again up to sigma_k only, the noise that it has to remove
    told: bool = True  # the fake score is told k, and so learns each step's pictures and not their pool
    oracle: bool = False  # the fake score is computed from samples, not learned; T2I only

    def mixture(self, teacher: str, category: str, source: Tensor) -> Mixture:
        """What a teacher, or the "truth", draws. source: (N, 2); only edits use it."""
        line = torch.tensor([-1.2, 0.0, 1.2])
        modes, sd, blur, centre = {
            "landscape": (ring(4, 1.5), 0.3, 1.0, 0.0),
            "portrait": (ring(4, 1.5, math.pi / 4), 0.3, 1.0, 0.0),
            "text": (torch.cartesian_prod(line, line), 0.12, self.blur, 0.0),  # many narrow modes
            "object": (ring(3, self.open), 0.2, 1.5, source * torch.tensor([-1.0, 1.0])),  # the source, mirrored
            "style": (ring(4, self.open), 0.2, 1.5, 0.7 * source.flip(1)),
        }[category]
        if teacher == "truth":
            return Mixture(modes, sd, centre)
        if teacher == "base":
            return Mixture(modes, sd * blur, centre)
        return Mixture(modes + torch.tensor([self.displaced * sd, 0.0]), sd * self.sharp, centre)

    def unconditional(self, teacher: str, category: str, source: Tensor) -> Velocity:
        """A teacher's velocity without words: it draws all categories of the task, each as often."""
        mixtures = [self.mixture(teacher, other, source) for other in CATEGORIES[TASKS[category]]]

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            likely = torch.stack([mixture.log_density(z, t) for mixture in mixtures]).softmax(0)  # (categories, N)
            return sum(share[:, None] * mixture.velocity(z, t) for share, mixture in zip(likely, mixtures))

        return velocity

    def real_score(self, weights: dict[str, float], category: str, source: Tensor) -> RealScore:
        """The teachers, mixed by the recipe's lambdas (Eq. 5), with guidance."""
        conditional = {name: self.mixture(name, category, source).velocity for name in weights}
        unconditional = {name: self.unconditional(name, category, source) for name in weights}
        return RealScore(weights, conditional, unconditional, self.guidance)

    def teacher(self, specialised: bool = False) -> Model:
        """The base teacher; or the specialised ones, each for what it was made for."""
        teachers = {"text": "text", "object": "edit", "style": "edit"} if specialised else {}
        return lambda category, source: self.real_score({teachers.get(category, "base"): 1.0}, category, source)

    def draw(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """noises (1, n, 2), or (4, n, 2) to re-noise; xi, source (n, 2); u (n,), uniform, for the time.

        Every recipe gets the same numbers in the same order, so rows are paired.
        """
        noises, xi = torch.randn(2, 1, n, self.dims, generator=rng)
        source = self.mixture("truth", "landscape", xi[0]).sample(n, rng)  # an edit changes a landscape
        u = torch.rand(n, generator=rng)
        if self.renoise:
            noises = torch.cat([noises, torch.randn(len(SIGMAS) - 2, n, self.dims, generator=rng)])
        return noises, xi[0], source, u


# ---- student and fake score ----------------------------------------------------------------------------------------


class Network:
    """S networks at once, a Model: the base teacher's velocity plus an MLP whose last layer is zero at the start."""

    def __init__(self, setting: Setting, rng: torch.Generator):
        inputs = 3 * setting.dims + 8 + len(TASKS) + 4  # z, the base's v, source; t; category; step
        sizes = [inputs, *[setting.width] * 3, setting.dims]
        self.setting, self.weights, self.biases = setting, [], []
        for i, (inside, outside) in enumerate(zip(sizes, sizes[1:])):
            weight = torch.randn(setting.seeds, inside, outside, generator=rng)  # (S, inside, outside)
            self.weights.append(weight * (inside**-0.5 if i < 3 else 0.0))
            self.biases.append(torch.zeros(setting.seeds, 1, outside))
        self.parameters = [p.requires_grad_() for p in self.weights + self.biases]

    def __call__(self, category: str, source: Tensor, k: int | None = None) -> Velocity:
        """The velocity under a condition. source: (N, 2). k: the student's step, which a fake score may be told."""
        base = self.setting.mixture("base", category, source)
        words = torch.zeros(len(source), len(TASKS) + 4)
        words[:, list(TASKS).index(category)] = 1
        if k is not None:
            words[:, len(TASKS) + k] = 1
        condition = torch.cat([words, source * (TASKS[category] == "edit")], dim=1)
        octaves = math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0])

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            v = base.velocity(z, t)  # (N, 2)
            waves = per_sample(t, z) * octaves  # (N, 4)
            h = torch.cat([z, v, waves.sin(), waves.cos(), condition], dim=1)
            h = h.reshape(self.setting.seeds, -1, h.shape[1])  # (S, N / S, inputs)
            for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
                h = torch.baddbmm(bias, silu(h) if i else h, weight)  # (S, N / S, width), at last 2
            return v + h.reshape(z.shape)

        return velocity


# ---- training ------------------------------------------------------------------------------------------------------


def from_samples(student: Velocity, noises: Tensor, seeds: int) -> Mixture:
    """The oracle: a narrow Gaussian around each of the student's fresh samples, of all its steps.

    noises: a rollout's, for each of the four steps, (4, 1 or 4, N, 2).
    """
    with torch.no_grad():
        samples = [rollout(student, noises[k], SIGMAS, k) for k in range(len(noises))]  # (N, 2) each
    modes = torch.cat([x_theta.reshape(seeds, -1, 2) for x_theta in samples], dim=1)  # (S, 4 N / S, 2)
    return Mixture(modes, sd=0.1)


def guided_above(round: Round) -> Velocity:
    """The real score with guidance from other noise than the round's own (Decoupled DMD).

    x_theta is noised a second time, at a time in [sigma_k, 0.98], where step k begins or earlier. What guidance adds to the
    clean picture there is added to it at every time of the round.
    """
    real, sigma = round.real, round.sigmas[round.k]
    with torch.no_grad():
        x_theta = rollout(round.student, round.noises, round.sigmas, round.k)
        u = torch.special.ndtr(round.fresh("u", ()))  # (N,), uniform
        t = shifted_uniform(sigma + (1 - sigma) * u, 1.0)
        z = add_noise(x_theta, round.fresh("xi", (2,)), t)
        push = per_sample(t, z) * real.guidance(z, t)  # (N, 2)
    return lambda z, t: real.plain(z, t) + push / per_sample(t, z)


def train(setting: Setting, recipe: Recipe, looks: set[int]) -> Iterator[tuple[int, Network, Network]]:
    """Trains S students; yields (updates done, students with averaged weights, fake scores) at each of the looks."""
    rng = torch.Generator().manual_seed(setting.seed)
    recipe = recipe.resolve(CATEGORIES, ("text", "edit"))
    steps = len(SIGMAS) - 1
    lowest = lowest_step(recipe.first_step_weight, steps)
    student, fake, averaged = (Network(setting, rng) for _ in range(3))
    networks = {"student": student, "fake": fake}
    optimisers = {
        name: torch.optim.Adam(networks[name].parameters, lr, (setting.beta1, 0.999), fused=True)
        for name, lr in (("student", setting.lr), ("fake", setting.fake_lr))
    }

    def make_round(name: str, number: int) -> tuple[Round, str, Tensor]:
        """Draws, and the networks under this update's condition; then its category and sources."""
        _, category, _ = recipe.turn(number)
        noises, xi, source, u = setting.draw(setting.seeds * setting.batch, rng)
        k = int(torch.randint(10**6, (), generator=rng)) % (steps - lowest) + lowest

        def fresh(what: str, shape: tuple[int, ...]) -> Tensor:
            own = torch.Generator().manual_seed(zlib.crc32(f"{setting.seed} {name} {number} {what}".encode()))
            return torch.randn(len(u), *shape, generator=own)

        round = Round(
            student=student(category, source),
            fake=fake(category, source, k if setting.told else None),
            real=setting.real_score(recipe.weights(k, steps, TASKS[category], category), category, source),
            noises=noises,
            sigmas=SIGMAS,
            k=k,
            xi=xi,
            t=renoise_times(u, setting.shift, SIGMAS, k, setting.below),
            fresh=fresh,
        )
        return round, category, source

    def update(name: str, losses: Tensor) -> None:
        if not losses.isfinite().all():
            raise FloatingPointError(f"{recipe.name}: the {name}'s loss is not finite")
        optimisers[name].zero_grad()  # what another network's loss may have left there
        (losses.mean() * setting.seeds).backward()  # a sum over seeds: each has its own loss
        optimisers[name].step()
        for optimiser in optimisers.values():
            optimiser.zero_grad()

    for step in tqdm(range(setting.updates + 1), recipe.name, leave=False):
        for mean, now in zip(averaged.parameters, student.parameters):
            mean.detach().lerp_(now.detach(), min(1.0, 1 / (setting.tail * max(step, 1))))  # at first a copy
        if step in looks:
            yield step, averaged, fake
        if step == setting.updates:
            return
        # 1. The fake score learns what the student draws by now. The student draws, and does not learn.
        for number in range(step * setting.fake_updates, (step + 1) * setting.fake_updates):
            round, _, _ = make_round("fake", number)
            update("fake", fake_losses(round))
        # 2. The student learns once.
        round, category, source = make_round("student", step)
        if setting.oracle:
            noises = torch.randn(4, *round.noises.shape, generator=rng)
            round.fake = from_samples(round.student, noises, setting.seeds).velocity
        if setting.guided_above:
            round.real = guided_above(round)
        losses, _ = student_losses(round)
        if recipe.first_step_weight:  # imitate the teacher's own four small steps to where the student's first one ends
            real = setting.real_score(recipe.weights(0, steps, TASKS[category], category), category, source)
            first = first_step_losses(round.student, real, round.noises[0], TEACHER_SIGMAS[:5])  # (N,)
            losses = losses + recipe.first_step_weight * first
        update("student", losses)


# ---- measuring -----------------------------------------------------------------------------------------------------


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """2 E|x - y| - E|x - x'| - E|y - y'| of samples (n, 2), (); without the pairs of a sample with itself."""
    within = (torch.cdist(x, x) + torch.cdist(y, y)).sum() / (len(x) * (len(x) - 1))
    return 2 * torch.cdist(x, y).mean() - within


def measure(points: Tensor, truth: Mixture, seeds: int, rng: torch.Generator) -> dict[str, Tensor]:
    """How good samples (N, 2) are; each (S,).

    precision: share within 3 standard deviations of a true mode. It looks at one picture at a time, as a judge does.
    fine: share within 1 standard deviation; 0.39 of exact samples, more if they are too narrow.
    coverage: share of the modes that hold at least a quarter of the samples that they should.
    distance: energy distance to exact samples; 0 on average for the truth.
    """
    x = (points - truth.centre).reshape(seeds, -1, 2)  # (S, n, 2)
    n, modes = x.shape[1], len(truth.modes)
    y = Mixture(truth.modes, truth.sd).sample(seeds * n, rng).reshape(x.shape)
    off, nearest = torch.cdist(x, truth.modes.expand(seeds, -1, 2)).min(-1)  # (S, n) each
    held = (one_hot(nearest, modes) * (off < 3 * truth.sd)[..., None]).sum(1)  # (S, M)
    return {
        "precision": (off < 3 * truth.sd).float().mean(1),
        "fine": (off < truth.sd).float().mean(1),
        "coverage": (held >= 0.25 * n / modes).float().mean(1),
        "distance": torch.stack([energy_distance(*pair) for pair in zip(x, y)]),
    }


@torch.no_grad()
def evaluate(setting: Setting, model: Model, sigmas: list[float]) -> dict[str, dict[str, Tensor]]:
    """category -> measures, of 400 samples a seed. Every model gets the same noise, sources and exact samples."""
    rng, scores = torch.Generator().manual_seed(10**6), {}
    for category in TASKS:
        noises, _, source, _ = setting.draw(setting.seeds * 400, rng)
        if len(sigmas) > len(SIGMAS):  # a teacher's many steps follow Euler's method
            noises = noises[:1]
        points = walk(model(category, source), noises, sigmas)
        scores[category] = measure(points, setting.mixture("truth", category, source), setting.seeds, rng)
    return scores
