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
what the student draws too often, towards what it draws too rarely. Where the two agree for every x_t and t, g is 0 and
the student's pictures have the teacher's distribution. In other words: up to a positive factor at each t, g is the
gradient of a reverse KL divergence, KL(student || teacher) (Eq. 3).

All networks are callables velocity(z, t) -> v with the condition bound to them (flow.py: noise is at t = 1, guidance
w = 1 is off). So this file knows nothing of prompts, optimisers or devices. A network's guess of the clean picture is
x0_from_velocity; a picture is here what the networks see of it, its latent.

One round of training is several updates of the fake score on fresh rollouts, then one update of the student. Several,
because g is a difference of two scores: if the fake score lags behind, g describes an earlier student. One fake score
serves all student steps, as in DMD2. It is not told k. So the pictures of all steps taken together are matched to the
teacher, and not those of each step alone. With another teacher at each step there is no exact match (results/plane/).

References: Yin et al. (DMD2), arXiv 2405.14867; Qwen-Image-Flash, arXiv 2606.03746, sections 2.2 and 4 (Eq. 3 to 7);
DP-DMD, arXiv 2602.03139 (the first-step loss).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flow import Velocity, add_noise, flow_matching_loss, time_like, walk, x0_from_velocity


def rollout(student: Velocity, noises: Tensor, sigmas: list[float], k: int) -> Tensor:
    """x_theta, (B, ...): the student's clean prediction at its step k, in training as in drawing (flow.walk).

    This is what DMD2 calls backward simulation. Steps 0 to k - 1 run from pure noise on the student's own states. So the
    student is trained on the states that it meets when it draws, and not on noised data. These steps carry no gradient
    (flow.walk has none): the state before step k is taken as given, and the student is not told how earlier steps could
    have led to a better one. The full gradient would cost k + 1 times the memory.

    noises: (K, B, ...) for a student that re-noises, (1, B, ...) for one that follows Euler's method. sigmas:
    flow.student_sigmas, K + 1 numbers; k in 0 .. K - 1. The caller draws k, and must draw the same k on all ranks: under
    sharding, ranks at different steps would wait for each other for ever.
    """
    if not 0 <= k < len(sigmas) - 1:
        raise ValueError(f"student step k = {k} of {len(sigmas) - 1}: k runs from 0 to {len(sigmas) - 2}")
    z = walk(student, noises, sigmas[: k + 1])  # without gradient; k = 0 takes no step
    t = time_like(z, sigmas[k])
    return x0_from_velocity(z, student(z, t), t)


# ---- the fake score's update ---------------------------------------------------------------------------------------


def fake_score_loss(fake: Velocity, x_theta: Tensor, xi: Tensor, t: Tensor) -> Tensor:
    """Flow matching with the student's pictures as the data, (B,). No gradient reaches the student."""
    return flow_matching_loss(fake, x_theta.detach(), xi, t)


# ---- the student's update ------------------------------------------------------------------------------------------


def mix_teachers(weights: dict[str, float], teachers: dict[str, Velocity]) -> Velocity:
    """The real score's velocity at one student step: sum over m of lambda_m v_m (Eq. 5).

    weights: teacher's name -> lambda >= 0, with a sum of 1 (Eq. 6). They belong to the student step k whose output is
    scored, and to the batch's condition; the time t of x_t plays no part. teachers: name -> velocity, already
    guided. A teacher with weight 0 is not evaluated. The weights are the same on all ranks, and so are the teachers
    that run.

    The paper mixes scores, this mixes velocities. At fixed (x_t, t) a score is a + b v, with the same a and b for every
    network. So sum lambda (a + b v) = a + b sum lambda v, exactly when the lambdas sum to 1. Hence the check.
    """
    if not (all(weight >= 0 for weight in weights.values()) and abs(sum(weights.values()) - 1) < 1e-6):
        raise ValueError(f"the teachers' weights must be >= 0 and sum to 1: {weights}")
    active = {name: weight for name, weight in weights.items() if weight > 0}

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        return sum(weight * teachers[name](z, t).float() for name, weight in active.items())  # Eq. 5

    return velocity


class Gradient(NamedTuple):
    """What one evaluation of the DMD gradient gives; all (B, ...), all without gradient of their own."""

    g: Tensor  # normalised: where its mean |g| is 1, x0_fake is as far from x0_real as x_theta is
    x0_real: Tensor  # the teachers' clean prediction from x_t, for the panels
    x0_fake: Tensor  # the fake score's clean prediction from x_t


@torch.no_grad()
def dmd_gradient(real: Velocity, fake: Velocity, x_theta: Tensor, xi: Tensor, t: Tensor) -> Gradient:
    """g at x_theta (B, ...), which is noised to x_t by xi (B, ...) at times t (B,).

    Eq. 4 (Eq. 7 with mixed teachers) has s_stu - s_real, which equals (1 - t) / t^2 (x0_fake - x0_real). The factor in
    front runs from 0.02 to 2450 over p(t), so it is replaced (DMD, DMD2): each sample's difference is divided by
    mean |x_theta - x0_real|, its distance from the teacher's prediction. The direction stays, and all times count alike.

    FloatingPointError: g is not finite. It is never replaced by zeros, which would hide the fault and train on.
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
    """A scalar, (), whose gradient in x_theta is g / numel.

    We know the gradient of the KL divergence (Eq. 3), but not its value, and an optimiser in torch needs a value. So we
    take the squared distance to a fixed target, target = x_theta - g. The target is detached, so the derivative of
    1/2 (x_theta - target)^2 is x_theta - target = g; the mean divides it by numel. Autograd carries it on into theta:
    this is the factor d x_theta / d theta of Eq. 4.

    The value of this loss is no measure of progress: it also depends on how well the fake score keeps up.
    """
    target = (x_theta - g).detach()
    return 0.5 * (x_theta - target).square().mean()


def first_step_loss(student: Velocity, noise: Tensor, z_teacher: Tensor, t_teacher: float) -> Tensor:
    """Optional, against mode drop (section 6.1, after DP-DMD): the student's first step imitates the teacher, (B,).

    The teacher walks from the same noise to z_teacher, at time t_teacher < 1. The straight line from the noise to
    z_teacher has the velocity that the student should have at t = 1. This is a regression, so every noise keeps its own
    mode; the reverse KL alone may drop modes. DP-DMD gives the first step only this loss, with weight 0.05, and draws k
    from 1 .. K - 1 for DMD. So does training/batches.py. The paper found steadier structure and slightly less visual
    quality.
    """
    chord = (noise.float() - z_teacher.float()) / (1 - t_teacher)
    v = student(noise, time_like(noise, 1.0)).float()
    return (v - chord).square().flatten(1).mean(1)
