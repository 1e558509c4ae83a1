"""Distribution matching distillation: a student of a few steps learns to draw from its teacher's distribution.

    symbol (paper)        here            what it is
    G_theta               student         few-step generator, trained
    z_k                   z               the student's state before its step k
    x_theta               x_theta         the student's clean prediction at step k, (B, ...)
    xi, t                 xi, t           fresh noise, and the time at which x_theta is noised again, (B,)
    x_t                   x_t             (1 - t) x_theta + t xi
    s_real                real            the frozen teachers, guided and mixed
    s_stu                 fake            the "fake score": a network that learns the score of what the student draws
    lambda_{k,m}(c)       weights[m]      share of teacher m at student step k under condition c
    g                     g               the direction in which x_theta should NOT go

All networks are callables velocity(z, t) -> v with the condition bound to them (flow.py: noise is at t = 1, guidance
w = 1 is off), so this file knows nothing of prompts, optimisers, devices or ranks. One round of training is: several
updates of the fake score on fresh rollouts, then one of the student. Several, because g is a DIFFERENCE of two scores:
while the fake score lags behind the student, g points from where the student was. It is one network for all student
steps, as in DMD2: it sees their pictures pooled, so it is the pool that is matched to the teacher, not each step alone.

References: Yin et al. (DMD2), arXiv 2405.14867; Qwen-Image-Flash, arXiv 2606.03746, sections 2.2 and 4 (Eq. 3 to 7);
DP-DMD, arXiv 2602.03139 (the first-step loss).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flow import Velocity, add_noise, euler, flow_matching_loss, time_like, x0_from_velocity


def rollout(student: Velocity, noise: Tensor, sigmas: list[float], k: int) -> Tensor:
    """x_theta: the student's clean prediction at its step k, reached as it will be reached when it draws.

    Backward simulation: steps 0 to k - 1 run from pure noise on the student's OWN states, without gradient, so that it
    is trained on what it will meet and not on noised data. Only step k carries gradient: a gradient through all of
    them costs k times the memory. noise (B, ...); sigmas: flow.student_sigmas, K + 1 numbers; k in 0 .. K - 1, drawn by
    the caller, the same on all ranks (under sharding, ranks at different k wait for each other for ever).
    """
    if not 0 <= k < len(sigmas) - 1:
        raise ValueError(f"student step k = {k} of {len(sigmas) - 1}: k runs from 0 to {len(sigmas) - 2}")
    z = euler(student, noise, sigmas[: k + 1])  # without gradient; k = 0 takes no step
    t = time_like(z, sigmas[k])
    return x0_from_velocity(z, student(z, t), t)


def mixture(weights: dict[str, float], teachers: dict[str, Velocity]) -> Velocity:
    """The real score's velocity at one student step: sum over m of lambda_m v_m (Eq. 5).

    weights: teacher's name -> lambda >= 0, together 1 (Eq. 6), for the student step k whose output is scored (not for
    the time t it is noised to) and for the batch's condition. teachers: name -> velocity, ALREADY guided, each by its
    own w. A weight of zero costs no forward; since weights follow from k and the batch's condition alone, and those are
    the same on all ranks, so are the teachers that run.

    The paper mixes scores. At fixed (x_t, t) a score is a + b v with a and b the same for every network, so
    sum lambda (a + b v) = a + b sum lambda v exactly when the lambdas sum to 1. Hence the check.
    """
    if not (all(weight >= 0 for weight in weights.values()) and abs(sum(weights.values()) - 1) < 1e-6):
        raise ValueError(f"the teachers' weights must be >= 0 and sum to 1: {weights}")
    if unknown := weights.keys() - teachers.keys():
        raise ValueError(f"weights for {sorted(unknown)}, but the teachers are {sorted(teachers)}")
    active = {name: weight for name, weight in weights.items() if weight > 0}

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        return sum(weight * teachers[name](z, t).float() for name, weight in active.items())  # Eq. 5

    return velocity


# ---- the fake score's update ---------------------------------------------------------------------------------------


def fake_score_loss(fake: Velocity, x_theta: Tensor, xi: Tensor, t: Tensor) -> Tensor:
    """Flow matching on the student's pictures as if they were data, (B,): nothing flows back into the student."""
    return flow_matching_loss(fake, x_theta.detach(), xi, t)


# ---- the student's update ------------------------------------------------------------------------------------------


class Gradient(NamedTuple):
    """What one evaluation of the DMD gradient gives; all (B, ...), all without gradient of their own."""

    g: Tensor  # normalised: about 1 in size wherever fake and real differ as much as x_theta and real do
    x0_real: Tensor  # what the teachers make of x_t, for the panels
    x0_fake: Tensor  # what the fake score makes of x_t


@torch.no_grad()
def dmd_gradient(real: Velocity, fake: Velocity, x_theta: Tensor, xi: Tensor, t: Tensor) -> Gradient:
    """The direction x0_fake - x0_real at x_theta, noised to x_t by xi (B, ...) and t (B,), normalised per sample.

    Eq. 4 (Eq. 7 with mixed teachers) asks for s_stu - s_real, which is (1 - t) / t^2 (x0_fake - x0_real). That factor
    runs from 0.02 to 2450 over p(t). Instead each sample is divided by its distance from the teacher's prediction, mean
    |x_theta - x0_real|: the same direction for every sample, with a length that depends neither on t nor on how far the
    student still is. It is also why the loss's VALUE says nothing: it stays flat while the student learns.

    A gradient that is not finite raises FloatingPointError; it is never turned into zeros, which would train on.
    """
    x_t = add_noise(x_theta, xi, t)
    x0_real = x0_from_velocity(x_t, real(x_t, t), t)
    x0_fake = x0_from_velocity(x_t, fake(x_t, t), t)
    distance = (x_theta - x0_real).abs().flatten(1).mean(1)  # (B,)
    g = (x0_fake - x0_real) / (distance.reshape(-1, *[1] * (x_theta.ndim - 1)) + 1e-6)  # Eq. 4, 7
    if not g.isfinite().all():
        parts = {"x_theta": x_theta, "x0_real": x0_real, "x0_fake": x0_fake}
        culprits = [name for name, part in parts.items() if not part.isfinite().all()]
        times = t[~g.flatten(1).isfinite().all(1)].tolist()
        raise FloatingPointError(f"the DMD gradient is not finite at t = {times}, because of {culprits or 'overflow'}")
    return Gradient(g, x0_real, x0_fake)


def surrogate_loss(x_theta: Tensor, g: Tensor) -> Tensor:
    """A scalar whose gradient in x_theta is g / numel: what an optimiser needs to follow g.

    The KL divergence of Eq. 3 has a gradient that we can compute and a value that we cannot. So we descend on the
    squared distance to a target one g away, target = x_theta - g. The target is detached, therefore the derivative of
    1/2 (x_theta - target)^2 is x_theta - target = g, exactly, and autograd carries it on into theta (the factor
    d x_theta / d theta of Eq. 4).
    """
    target = (x_theta - g).detach()
    return 0.5 * (x_theta - target).square().mean()


def first_step_loss(student: Velocity, noise: Tensor, z_teacher: Tensor, t_teacher: float) -> Tensor:
    """Optional, against mode drop (section 6.1, after DP-DMD): the first step imitates the teacher's own path, (B,).

    z_teacher: where the teacher is at time t_teacher < 1 when it starts from the same noise:
    flow.euler(teacher, noise, sigmas[: n + 1]), and t_teacher = sigmas[n]. The straight line from the noise to there has
    the velocity that the student should have at t = 1: regression keeps each noise on its own mode, where the reverse
    KL is content to drop some. DP-DMD gives the first step this loss alone, with weight 0.05, and lets DMD reach the
    later ones: draw k from 1 .. K - 1. The paper found steadier structure and slightly less visual quality.
    """
    chord = (noise.float() - z_teacher.float()) / (1 - t_teacher)
    v = student(noise, time_like(noise, 1.0)).float()
    return (v - chord).square().flatten(1).mean(1)
