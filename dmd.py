"""Distribution matching distillation: a student of a few steps learns to draw from its teacher's distribution.

    symbol (paper)        here            what it is
    G_theta               student         few-step generator, trained
    z_k                   z               the student's state before its step k (the paper does not say how it gets there)
    x_theta               x_theta         the student's clean prediction at step k, (B, ...)
    xi, t                 xi, t           fresh noise, and the time at which x_theta is noised again, (B,)
    x_t                   x_t             (1 - t) x_theta + t xi
    s_real                real            the frozen teachers, guided and mixed
    s_stu                 fake            the "fake score": a network that learns the score of what the student draws
    lambda_{k,m}(c)       weights[m]      weight of teacher m at student step k under condition c
    g                     g               the DMD gradient; x_theta moves along -g

What DMD does. Two networks look at the same noised picture x_t and guess the clean one. Each guess leans towards what
its own model draws often: the real score's towards the teacher's pictures, the fake score's towards the student's. g is
the difference of the guesses, which is a difference of scores (flow.score_from_velocity). A step along -g leads away from
what the student draws too often, towards what it draws too rarely. Up to a positive factor at each t, g is the gradient
of a reverse KL divergence, KL(student || teacher) (Eq. 3). With one teacher for all steps, g is 0 for every x_t and t
where the student's pictures have the teacher's distribution.

All networks are callables velocity(z, t) -> v with the condition bound to them (flow.py: noise is at t = 1, guidance
w = 1 is off). So this file knows nothing of prompts, optimisers or devices. A network's guess of the clean picture is
flow.predict_x0; a picture is here what the networks see of it, its latent.

In training several updates of the fake score come first, each on a fresh rollout, then one update of the student.
Several, because g is a difference of two scores: if the fake score lags behind, g describes an earlier student.

One fake score serves all student steps, as in DMD2. It is not told k. So the pictures of all steps, taken together, are
matched to the teacher. With another teacher at each step (Eq. 5) there is no exact match, and students may drift: on the
plane they do (results/plane/findings.md). Two changes take most of the drift away there. Either the fake score is told k,
or step k's picture is noised again only up to its own level sigma_k (flow.renoise_times, below).

References: Yin et al. (DMD2), arXiv 2405.14867; Qwen-Image-Flash, arXiv 2606.03746, sections 2.2 and 4 (Eq. 3 to 7);
DP-DMD, arXiv 2602.03139 (the first-step loss).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flow import Velocity, add_noise, euler, flow_matching_loss, guided, predict_x0, time_like, walk


class RealScore:
    """The real score's velocity at one student step: the teachers, guided and mixed (Eq. 5). A Velocity.

    weights: teacher's name -> lambda >= 0, with a sum of 1 (Eq. 6), else ValueError. They belong to the student step k
    whose output is scored, and to the batch's condition; the time t of x_t plays no part. conditional, unconditional:
    name -> velocity; the second is needed for a guidance w above 1 alone. A teacher with weight 0 is not evaluated. The
    weights are the same on all ranks, and so are the teachers that run.

    The paper mixes scores, this mixes velocities. At fixed (x_t, t) a score is a + b v, with the same a and b for every
    network. So sum lambda (a + b v) = a + b sum lambda v, exactly when the lambdas sum to 1. Hence the check.
    """

    def __init__(
        self,
        weights: dict[str, float],
        conditional: dict[str, Velocity],
        unconditional: dict[str, Velocity] | None = None,
        w: float = 1.0,
    ):
        if not (all(weight >= 0 for weight in weights.values()) and abs(sum(weights.values()) - 1) < 1e-6):
            raise ValueError(f"the teachers' weights must be >= 0 and sum to 1: {weights}")
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.conditional, self.unconditional, self.w = conditional, unconditional, w

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        """sum over m of lambda_m (u_m + w (v_m - u_m)), (B, ...); u without the prompt's words, v with them."""
        v = 0.0
        for name, weight in self.weights.items():
            teacher = self.conditional[name]
            if self.w != 1:
                teacher = guided(teacher, self.unconditional[name], self.w)
            v = v + weight * teacher(z, t).float()  # Eq. 5
        return v

    def plain(self, z: Tensor, t: Tensor) -> Tensor:
        """Its part without guidance, sum of lambda_m v_m, (B, ...)."""
        return sum(weight * self.conditional[name](z, t).float() for name, weight in self.weights.items())

    def guidance(self, z: Tensor, t: Tensor) -> Tensor:
        """What guidance adds to `plain`, (w - 1) sum of lambda_m (v_m - u_m), (B, ...)."""
        if self.w == 1:
            return torch.zeros_like(z, dtype=torch.float32)
        difference = 0.0
        for name, weight in self.weights.items():
            v, u = self.conditional[name](z, t).float(), self.unconditional[name](z, t).float()
            difference = difference + weight * (v - u)
        return (self.w - 1) * difference


@dataclass
class Round:
    """What a loss of this file works with: three networks under one condition, and one micro-batch of draws.

    Both worlds, train.py and plane/method.py, build it and leave the rest to this file. The caller draws k, and must draw
    the same k on all ranks: under sharding, ranks at different steps would wait for each other for ever.
    """

    student: Velocity
    fake: Velocity
    real: RealScore
    noises: Tensor  # (K, B, ...) for a student that re-noises, (1, B, ...) for one that follows Euler's method
    sigmas: Sequence[float]  # flow.student_sigmas, K + 1 numbers
    k: int  # the student's step, 0 .. K - 1
    xi: Tensor  # (B, ...)
    t: Tensor  # (B,): flow.renoise_times
    # fresh(name, shape) -> (B, *shape): more noise, for experiments. It moves no other draw.
    fresh: Callable[[str, tuple[int, ...]], Tensor]


def rollout(student: Velocity, noises: Tensor, sigmas: Sequence[float], k: int, through: bool = False) -> Tensor:
    """x_theta, (B, ...): the student's clean prediction at its step k, in training as in drawing (flow.walk).

    This is what DMD2 calls backward simulation. Steps 0 to k - 1 run from pure noise on the student's own states. So the
    student is trained on the states that it meets when it draws, and not on noised data. These steps carry no gradient:
    the state before step k is taken as given, and the student is not told how earlier steps could have led to a better
    one. through: they do carry it, for k + 1 times the memory. noises, sigmas and k: as in Round.
    """
    if not 0 <= k < len(sigmas) - 1:
        raise ValueError(f"student step k = {k} of {len(sigmas) - 1}: k runs from 0 to {len(sigmas) - 2}")
    with torch.set_grad_enabled(through and torch.is_grad_enabled()):
        z = walk(student, noises, sigmas[: k + 1])  # k = 0 takes no step
    return predict_x0(student, z, time_like(z, sigmas[k]))


# ---- the fake score's update ---------------------------------------------------------------------------------------


def fake_losses(round: Round) -> Tensor:
    """Flow matching (Eq. 2) with the student's pictures as the data, (B,). No gradient reaches the student."""
    with torch.no_grad():
        x_theta = rollout(round.student, round.noises, round.sigmas, round.k)
    return flow_matching_loss(round.fake, x_theta, round.xi, round.t)


# ---- the student's update ------------------------------------------------------------------------------------------


def student_losses(round: Round) -> tuple[Tensor, dict[str, Tensor]]:
    """The student's loss for each sample, (B,), and what a panel shows: x_theta, x0_real and x0_fake, (B, ...) each."""
    x_theta = rollout(round.student, round.noises, round.sigmas, round.k)  # (B, ...), with gradient of step k
    x_t = add_noise(x_theta.detach(), round.xi, round.t)
    with torch.no_grad():
        x0_real = predict_x0(round.real, x_t, round.t)
        x0_fake = predict_x0(round.fake, x_t, round.t)
    g = dmd_gradient(x_theta.detach(), x0_real, x0_fake)
    return surrogate_loss(x_theta, g), {"x_theta": x_theta.detach(), "x0_real": x0_real, "x0_fake": x0_fake}


def dmd_gradient(x_theta: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """g at x_theta, from the two guesses of the clean picture behind x_t; all (B, ...).

    Eq. 4 (Eq. 7 with mixed teachers) has s_stu - s_real, which equals (1 - t) / t^2 (x0_fake - x0_real). The factor in
    front runs from 0.02 to 2450 over p(t), so it is replaced (DMD, DMD2): each sample's difference is divided by
    mean |x_theta - x0_real|, its distance from the teacher's guess. The direction stays, and all times count alike. Where
    mean |g| is 1, x0_fake is as far from x0_real as x_theta is.

    A g that is not finite makes a loss that is not. It is never replaced by zeros, which would hide the fault.
    """
    distance = (x_theta - x0_real).abs().flatten(1).mean(1)  # (B,)
    return (x0_fake - x0_real) / (distance.reshape(-1, *[1] * (x_theta.ndim - 1)) + 1e-6)  # Eq. 4, 7


def surrogate_loss(x_theta: Tensor, g: Tensor) -> Tensor:
    """A loss for each sample, (B,), whose gradient in x_theta (B, ...) is g / n, for n numbers in a sample.

    We know the gradient of the KL divergence (Eq. 3), but not its value, and an optimiser in torch needs a value. So we
    take the squared distance to a fixed target, target = x_theta - g. The target is detached, so the derivative of
    1/2 (x_theta - target)^2 is x_theta - target = g; the mean divides it by n. Autograd carries it on into theta: this is
    the factor d x_theta / d theta of Eq. 4.

    The value of this loss is no measure of progress: it also depends on how well the fake score keeps up.
    """
    target = (x_theta - g).detach()
    return 0.5 * (x_theta - target).square().flatten(1).mean(1)


def first_step_losses(student: Velocity, real: Velocity, noise: Tensor, stops: Sequence[float]) -> Tensor:
    """Optional, against mode drop (section 6.1, after DP-DMD): the student's first step imitates the teacher, (B,).

    The teacher, `real` at step 0, walks from noise (B, ...) through `stops`, small steps from 1 to a time above 0. The
    straight line from the noise to where it ends has the velocity that the student should have at t = 1. This is a
    regression, so every noise keeps its own mode; the reverse KL alone may drop modes. DP-DMD gives the first step only
    this loss, with weight 0.05, and draws k from 1 .. K - 1 for DMD; so do our callers. The paper found steadier structure
    and slightly less visual quality.
    """
    with torch.no_grad():
        z_teacher = euler(real, noise, stops)
    chord = (noise.float() - z_teacher) / (stops[0] - stops[-1])
    v = student(noise, time_like(noise, stops[0])).float()
    return (v - chord).square().flatten(1).mean(1)


def lowest_step(first_step_weight: float, steps: int) -> int:
    """The smallest k that DMD draws: 1 if step 0 learns by first_step_losses alone. A student of one step has no other."""
    return 1 if first_step_weight and steps > 1 else 0
