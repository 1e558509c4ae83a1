"""flow.py against closed forms (Gaussian data, a linear ODE) and against diffusers' Euler scheduler."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import flow

# scheduler_config.json as published with the 7B, and as published with its few-step student.
PUBLISHED = {
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
}
IDENTITY = PUBLISHED | {"use_dynamic_shifting": False, "shift_terminal": None}


def gaussian_velocity(mean, std):
    """E[eps - x | z] for data N(mean, std^2): the velocity that a perfectly trained network has."""

    def velocity(z, t):
        t = flow.per_sample(t, z)
        variance = (1 - t) ** 2 * std**2 + t**2
        return (t - (1 - t) * std**2) / variance * (z - (1 - t) * mean) - mean

    return velocity


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference_scheduler(config, sigmas, tokens):
    """Set up the way the reference pipeline does it: mu is the line through the two token counts."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    mu = config["base_shift"] + slope * (tokens - config["base_image_seq_len"])
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    return scheduler


# ---- the path ----


def test_velocity_is_the_derivative_of_the_path_and_leads_back_to_the_data():
    x, eps, t = draw(5, 2, 3), draw(5, 2, 3, seed=1), torch.tensor([0.02, 0.3, 0.5, 0.8, 1.0])
    z, derivative = torch.func.jvp(lambda t: flow.add_noise(x, eps, t), (t,), (torch.ones(5),))
    torch.testing.assert_close(derivative, eps - x)
    torch.testing.assert_close(flow.x0_from_velocity(z, derivative, t), x, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(flow.add_noise(x, eps, torch.zeros(5)), x)
    torch.testing.assert_close(flow.add_noise(x, eps, torch.ones(5)), eps)


def test_score_of_gaussian_data():
    mean, std = 0.7, 0.4
    z, t = draw(6, 3), torch.tensor([0.02, 0.2, 0.4, 0.6, 0.9, 1.0])
    score = flow.score_from_velocity(z, gaussian_velocity(mean, std)(z, t), t)
    t = t[:, None]
    expected = -(z - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)
    torch.testing.assert_close(score, expected, atol=1e-4, rtol=1e-4)


def test_path_arithmetic_is_fp32_even_for_bf16_tensors():
    x, eps = draw(2, 64).bfloat16(), draw(2, 64, seed=1).bfloat16()
    t = torch.full((2,), 0.98)
    torch.testing.assert_close(flow.add_noise(x, eps, t), 0.02 * x.float() + 0.98 * eps.float(), atol=1e-6, rtol=1e-6)

    def velocity(z, t):  # a network in bf16
        assert z.dtype == t.dtype == torch.float32
        return torch.ones_like(z, dtype=torch.bfloat16)

    start, stops = torch.zeros(1, 1, dtype=torch.bfloat16), [1.0, 0.999, 0.998]
    torch.testing.assert_close(flow.euler(velocity, start, stops), torch.tensor([[-0.002]]), atol=1e-7, rtol=0)
    torch.testing.assert_close(flow.renoise(velocity, start[None], [1.0, 0.0]), torch.tensor([[-1.0]]))


def test_loss_is_smallest_at_the_true_velocity():
    """And its value there is the variance that (z, t) leave in eps - x, std^2 / ((1-t)^2 std^2 + t^2), sample by sample."""
    mean, std, t = 0.7, 0.4, torch.tensor([0.1, 0.5, 0.9])
    x, eps = mean + std * draw(3, 200_000), draw(3, 200_000, seed=1)
    velocity = gaussian_velocity(mean, std)
    loss = flow.flow_matching_loss(velocity, x, eps, t)
    torch.testing.assert_close(loss, std**2 / ((1 - t) ** 2 * std**2 + t**2), atol=0, rtol=0.02)
    for offset in (-0.1, 0.1):
        off = flow.flow_matching_loss(lambda z, t, offset=offset: velocity(z, t) + offset, x, eps, t)
        torch.testing.assert_close(off - loss, torch.full((3,), 0.01), atol=1e-3, rtol=0)


# ---- p(t) ----


def test_times_follow_their_laws():
    u = torch.tensor([0.0, 0.001, 0.25, 0.5, 0.9, 0.9999999])
    a3 = flow.shifted_uniform(u, 3.0)
    torch.testing.assert_close(a3, torch.tensor([0.02, 0.02, 0.5, 0.75, 2.7 / 2.8, 0.98]))
    torch.testing.assert_close(flow.shifted_uniform(u, 1.0)[2:5], u[2:5])
    # One standard deviation above the mean, the median, and never the ends themselves.
    u = torch.tensor([0.8413447, 0.5, 0.0, 0.9999999])
    t = flow.logit_normal(u, mean=0.5, std=2.0)
    torch.testing.assert_close(t[:2], torch.sigmoid(torch.tensor([2.5, 0.5])), atol=1e-6, rtol=1e-5)
    assert t.min() > 0 and t.max() < 1
    torch.testing.assert_close(flow.logit_normal(u, math.log(3)), flow.shift_time(flow.logit_normal(u), 3.0))


# ---- sigmas ----


@pytest.mark.parametrize("tokens", [4, 64, 256, 4096, 8192, 12_000])  # beyond both ends of the line, too
@pytest.mark.parametrize("steps", [2, 4, 7, 40, 50])
def test_teacher_sigmas_are_the_schedulers(steps, tokens):
    even = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()
    reference = reference_scheduler(PUBLISHED, even, tokens).sigmas
    torch.testing.assert_close(torch.tensor(flow.teacher_sigmas(steps, tokens)), reference, atol=1e-6, rtol=0)


TURBO = [1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568]


@pytest.mark.parametrize("sigmas", [[1.0, 0.5], [1.0, 0.9, 0.75, 0.5], TURBO])
@pytest.mark.parametrize("change", [{}, {"shift": 3.0}, {"shift_terminal": 0.1}])
@pytest.mark.parametrize("base", [PUBLISHED, IDENTITY])
def test_fixed_sigmas_pass_through_the_scheduler_config(sigmas, change, base):
    config = base | change
    ours = flow.teacher_sigmas(sigmas, 1024, **config)
    torch.testing.assert_close(torch.tensor(ours), reference_scheduler(config, sigmas, 1024).sigmas, atol=1e-6, rtol=0)
    if config == IDENTITY:
        assert ours == [*sigmas, 0.0]  # bit for bit: what a student was trained on is what it is sampled on


def test_one_step():
    identity = reference_scheduler(IDENTITY, [1.0], 64).sigmas.tolist()
    assert flow.teacher_sigmas([1.0], 64, **IDENTITY) == identity == [1.0, 0.0]
    assert flow.teacher_sigmas(1, 64) == [1.0, 0.0]  # ours: here the reference divides by zero
    assert reference_scheduler(PUBLISHED, [1.0], 64).sigmas.isnan().any()


def test_student_sigmas():
    assert flow.student_sigmas(4, 3.0) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert flow.student_sigmas(4, 5.0) == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0])
    assert flow.student_sigmas(1) == [1.0, 0.0]


# ---- samplers ----


def test_euler_on_a_linear_ode():
    """dz/dt = r z: every straight step multiplies by 1 + r (sigma_next - sigma)."""
    z, r, sigmas = draw(3, 2, 2), 1.7, [1.0, 0.9, 0.75, 0.5, 0.0]
    factor = math.prod(1 + r * (b - a) for a, b in pairwise(sigmas))
    torch.testing.assert_close(flow.euler(lambda z, t: r * z, z, sigmas), factor * z)
    torch.testing.assert_close(flow.euler(lambda z, t: r * z, z, sigmas[:2]), (1 - r * 0.1) * z)
    # and what depends on t alone: a left Riemann sum, each sample told the same time
    total = sum(a * (b - a) for a, b in pairwise(sigmas))
    torch.testing.assert_close(flow.euler(lambda z, t: t[:, None, None].expand_as(z), z, sigmas), z + total)


def test_many_small_steps_carry_noise_to_the_data():
    """For Gaussian data the exact flow is z -> mean + std z: a sign or a time the wrong way round cannot do this."""
    z = draw(4, 5)
    x = flow.euler(gaussian_velocity(0.7, 0.4), z, flow.teacher_sigmas(2000, 64))
    torch.testing.assert_close(x, 0.7 + 0.4 * z, atol=5e-3, rtol=0)


def curved(z, t):
    return torch.sin(3 * z) + t[:, None, None, None] * z.roll(1, 0)


@pytest.mark.parametrize("stochastic", [False, True])
def test_trajectories_equal_the_schedulers(stochastic):
    """Euler, and with stochastic sampling the re-noising sampler, from the same noise step by step."""
    scheduler = reference_scheduler(PUBLISHED | {"stochastic_sampling": stochastic}, [1.0, 0.9, 0.75, 0.5], 64)
    sigmas = flow.teacher_sigmas([1.0, 0.9, 0.75, 0.5], 64)
    z = noise = draw(2, 4, 3, 5)
    generator = torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        velocity = curved(z, t.expand(2) / 1000)
        z = scheduler.step(velocity, t, z, generator=generator).prev_sample
    generator = torch.Generator().manual_seed(7)
    noises = torch.stack([noise, *(torch.randn(2, 4, 3, 5, generator=generator) for _ in range(3))])
    ours = flow.walk(curved, noises if stochastic else noises[:1], sigmas)
    torch.testing.assert_close(ours, z, atol=1e-5, rtol=1e-5)


def test_guidance():
    calls = []

    def unconditional(z, t):
        calls.append(1)
        return -z

    z, t = draw(2, 3), torch.tensor([0.5, 0.5])
    torch.testing.assert_close(flow.guided(lambda z, t: z, unconditional, 1.0)(z, t), z)
    assert not calls  # off: no second forward
    torch.testing.assert_close(flow.guided(lambda z, t: z, unconditional, 4.0)(z, t), -z + 4 * (z + z))
    torch.testing.assert_close(flow.guided(lambda z, t: z, unconditional, 0.0)(z, t), -z)
    # A guided velocity is a velocity: the sampler takes it as it is.
    x = flow.euler(flow.guided(lambda z, t: z, unconditional, 4.0), z, [1.0, 0.0])
    torch.testing.assert_close(x, z - 7 * z)


def test_renoise_times_below_stay_under_the_steps_own_level():
    u, sigmas = torch.rand(1000), flow.student_sigmas(4)
    pooled = flow.renoise_times(u, 1.5, sigmas, 2)
    torch.testing.assert_close(pooled, flow.shifted_uniform(u, 1.5))
    for k, sigma in enumerate(sigmas[:-1]):
        t = flow.renoise_times(u, 1.0, sigmas, k, below=True)
        assert 0.02 <= t.min() < 0.06 and sigma - 0.06 < t.max() <= min(sigma, 0.98)
