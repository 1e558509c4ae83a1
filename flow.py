"""Flow matching: the path between data and noise, its loss, the times, and the samplers that walk along it.

Everything here is a pure function of tensors, floats and callables `velocity(z, t) -> v`. A velocity may be a network
under one prompt, or a formula (as in the tests and in plane/method.py).

    x, eps   data and Gaussian noise, any shape (B, ...)
    t        time, (B,), in [0, 1]: t = 1 is NOISE, t = 0 is DATA (some codebases have it the other way round)
    z        a state on the path, the shape of x
    v        velocity dz/dt = eps - x, the shape of x: what the network predicts
    sigma    a time at which a sampler stops; on this path sigma and t are the same number

Guidance is v_uncond + w (v_cond - v_uncond), so w = 1 is off. (In code that writes v_cond + w (...), w is ours minus 1.)

The path is computed in fp32 whatever the network's dtype. Near t = 1 the data's part of z is (1 - t) x, and the 8 bits
of a bf16 number would round it away. A network in bf16 casts z when it reads it; the state itself stays in fp32.

References: Lipman et al., arXiv 2210.02747; Esser et al., arXiv 2403.03206 (logit-normal times and the shift);
Qwen-Image-Flash, arXiv 2606.03746, section 2.1 (Eq. 1 and 2).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # z (B, ...), t (B,) -> v (B, ...)


# ---- the path ----------------------------------------------------------------------------------------------------


def per_sample(t: Tensor, z: Tensor) -> Tensor:
    """Times (B,) as fp32 (B, 1, ..., 1), ready to multiply the states z (B, ...)."""
    return t.float().reshape(-1, *[1] * (z.ndim - 1))


def network_time(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The times that a network of this dtype is told: t (B,) in fp32, rounded as the published pipeline rounds it.

    In bf16 a time of 0.75 is told as 0.75390625. Training, sampling and panels all use this function. Otherwise a student
    would be trained at one time and drawn at another. The samplers still walk to 0.75 itself. A rounded time stays as it
    is when it is rounded again. In fp32 nothing changes.
    """
    return t if dtype == torch.float32 else ((1000 * t).to(dtype) / 1000).to(t.dtype)


def add_noise(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The state at time t on the straight line from data x to noise eps (Eq. 1)."""
    t = per_sample(t, x)
    return (1 - t) * x.float() + t * eps.float()  # Eq. 1


def x0_from_velocity(z: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The clean prediction x0: follow the straight line from z to t = 0."""
    return z.float() - per_sample(t, z) * v.float()


def predict_x0(velocity: Velocity, z: Tensor, t: Tensor) -> Tensor:
    """A network's guess of the clean data behind z (B, ...) at time t (B,)."""
    return x0_from_velocity(z, velocity(z, t), t)


def score_from_velocity(z: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The score, the gradient in z of log p_t(z), from a velocity; t in (0, 1].

    p_t(z | x) is a Gaussian around (1 - t) x with variance t^2, so the score is ((1 - t) x0 - z) / t^2. With
    x0 = z - t v one t cancels. The result is a + b v, where a and b depend on z and t alone. This is why dmd.py may mix
    the velocities of several teachers where the paper mixes their scores.
    """
    t = per_sample(t, z)
    return -(z.float() + (1 - t) * v.float()) / t


def flow_matching_loss(velocity: Velocity, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Squared error of the predicted velocity, one number for each sample: (B,).

    It is not averaged over the batch, so that the caller can look at the loss by t. A flow model that is wrong is
    usually wrong at one end of the path, and an average hides that.
    """
    return velocity_loss(velocity(add_noise(x, eps, t), t), x, eps)


def velocity_loss(v: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """The squared error of a velocity that was predicted between data x and noise eps, (B,)."""
    return (v.float() - (eps.float() - x.float())).square().flatten(1).mean(1)  # Eq. 2


# ---- p(t): times to train at, from uniform numbers in [0, 1) -------------------------------------------------------
# The caller draws the uniform numbers, so that it alone decides what they depend on (seed, update and sample).


def shift_time(s: float | Tensor, a: float) -> float | Tensor:
    """Moves times in [0, 1] towards noise (a > 1) and keeps both ends; a = 1 changes nothing. logit(s) grows by log a."""
    return a * s / (1 + (a - 1) * s)


def shifted_uniform(u: Tensor, time_shift: float, low: float = 0.02, high: float = 0.98) -> Tensor:
    """DMD's p(t): uniform, shifted, and clamped away from both ends. At t = 0 there is no noise to explain. At t = 1 the
    score is -z, whatever the data. The paper does not give p(t). The clamp is that of DMD2's code (min_step_percent 0.02,
    max_step_percent 0.98). Public trainers shift by 1, 3 or 5. On the plane 1 is best (results/plane/findings.md)."""
    return shift_time(u.float(), time_shift).clamp(low, high)


def renoise_times(u: Tensor, time_shift: float, sigmas: Sequence[float], k: int, below: bool = False) -> Tensor:
    """The times (B,) at which DMD noises the student's picture of step k again, from uniform numbers u (B,).

    sigmas: the student's, K + 1 numbers. By default p(t) is the same for all steps, as in DMD2: k plays no part.
    below: only times up to the step's own level, sigma_k. Why this can matter: the head of dmd.py.
    """
    t = shifted_uniform(u, time_shift)
    return (0.02 + (sigmas[k] - 0.02) * t).clamp(max=0.98) if below else t


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """A teacher's p(t): sigmoid of a normal variable. mean = log a is the same as shifting by a afterwards."""
    u = u.float().clamp(1e-6, 1 - 1e-6)  # u = 0 would become t = 0 exactly
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


# ---- the sigmas: where a sampler stops, from 1 down to a final 0 ---------------------------------------------------


def student_sigmas(steps: int, sigma_shift: float = 3.0) -> list[float]:
    """K shifted steps and the final 0: K + 1 numbers. Four steps with a shift of 3: [1, 0.9, 0.75, 0.5, 0].

    ONE list serves training, sampling and the exported checkpoint. If the lists differ, pictures keep residual noise.
    """
    return [shift_time(1 - i / steps, sigma_shift) for i in range(steps)] + [0.0]


def teacher_sigmas(
    steps: int | Sequence[float],
    tokens: int,
    *,
    use_dynamic_shifting: bool = True,
    shift: float = 1.0,
    base_shift: float = 0.5,
    max_shift: float = 0.9,
    base_image_seq_len: int = 256,
    max_image_seq_len: int = 8192,
    shift_terminal: float | None = 0.02,
) -> list[float]:
    """The sigmas that a published checkpoint is sampled at, final 0 included.

    steps: how many, evenly spaced before the shift; or the sigmas themselves (a checkpoint's sample_sigmas, without
        the final 0), which pass through the same shift and stretch.
    tokens: of the picture to draw; larger pictures need more of their steps near the noise.
    The other names are keys of scheduler_config.json; the defaults are those of the 7B. A few-step student is published
    with the identity: use_dynamic_shifting False, shift 1, shift_terminal None.
    """
    sigmas = [1 - i / steps for i in range(steps)] if isinstance(steps, int) else steps
    if use_dynamic_shifting:  # log a is linear in the number of tokens, and goes on beyond both ends
        slope = (max_shift - base_shift) / (max_image_seq_len - base_image_seq_len)
        shift = math.exp(base_shift + slope * (tokens - base_image_seq_len))
    sigmas = [shift_time(s, shift) for s in sigmas]
    # Stretch, so that the last stop is shift_terminal. With one step the last stop is 1 and cannot be stretched. The
    # reference divides by zero there; here the step goes from 1 to 0.
    if shift_terminal and sigmas[-1] < 1:
        stretch = (1 - shift_terminal) / (1 - sigmas[-1])
        sigmas = [1 - (1 - s) * stretch for s in sigmas]
    return [*sigmas, 0.0]


# ---- samplers ----------------------------------------------------------------------------------------------------
# They carry a gradient where the caller allows one. Whoever only draws calls them under torch.no_grad().


def guided(conditional: Velocity, unconditional: Velocity, w: float) -> Velocity:
    """Classifier-free guidance as a velocity like any other. w = 1 is off, and then costs no second forward."""
    if w == 1:
        return conditional

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        v_uncond = unconditional(z, t).float()
        return v_uncond + w * (conditional(z, t).float() - v_uncond)

    return velocity


def time_like(z: Tensor, sigma: float) -> Tensor:
    """One time for the whole batch: (B,) fp32 on z's device."""
    return torch.full((z.shape[0],), sigma, device=z.device)


def euler(velocity: Velocity, z: Tensor, sigmas: Iterable[float]) -> Tensor:
    """Integrates dz/dt = v from sigmas[0] to sigmas[-1] in straight steps; z (B, ...) is the state at sigmas[0].

    The whole list goes from noise to data; a part of it stops on the way.
    """
    z = z.float()
    for sigma, sigma_next in pairwise(sigmas):
        z = z + (sigma_next - sigma) * velocity(z, time_like(z, sigma)).float()
    return z


def renoise(velocity: Velocity, noises: Tensor, sigmas: Iterable[float]) -> Tensor:
    """From noise to data without integrating: at each stop the clean prediction, then NEW noise on it for the next stop.

    noises (K, B, ...): where it starts, and one for each later stop but the final 0. sigmas: K + 1 stops, or the first of
    them, to end on the way. Returns the state there. (In diffusers: "stochastic sampling".)
    """
    z = noises[0].float()
    for k, (sigma, sigma_next) in enumerate(pairwise(sigmas), 1):
        z = predict_x0(velocity, z, time_like(z, sigma))
        if sigma_next > 0:
            z = add_noise(z, noises[k], time_like(z, sigma_next))
    return z


def walk(velocity: Velocity, noises: Tensor, sigmas: Sequence[float]) -> Tensor:
    """A student's way from noise to data, in training and after; arguments and result are those of renoise.

    One noise, (1, B, ...), is followed by Euler's method. With one for each step, (K, B, ...), the student re-noises. In
    small steps the two draw alike, in four they do not. Which is better depends on the network: results/README.md.
    """
    return renoise(velocity, noises, sigmas) if len(noises) > 1 else euler(velocity, noises[0], sigmas)


def draw(velocities: Sequence[Velocity], noises: Tensor, sigmas: Sequence[float], guidance: float = 1.0) -> Tensor:
    """A walk under one velocity, or under two with guidance: [conditional], or [conditional, unconditional]."""
    return walk(guided(*velocities, guidance) if len(velocities) > 1 else velocities[0], noises, sigmas)
