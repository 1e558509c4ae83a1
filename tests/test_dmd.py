"""dmd.py against closed forms: every expectation here was derived by hand."""

import pytest
import torch
from test_flow import draw, gaussian_velocity
from torch import nn

import dmd
import flow

SIGMAS = flow.student_sigmas(4)


class Affine(nn.Module):
    """v = a z + b: the smallest network whose gradients can be written down."""

    def __init__(self, a=0.3, b=-0.2):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, z, t):
        return self.a * z + self.b


def gradients(network):
    return [parameter.grad for parameter in network.parameters()]


def look(real, fake, x_theta, xi, t):
    """g, x0_real and x0_fake at x_theta."""
    x_t = flow.add_noise(x_theta, xi, t)
    x0_real, x0_fake = flow.predict_x0(real, x_t, t), flow.predict_x0(fake, x_t, t)
    return dmd.dmd_gradient(x_theta, x0_real, x0_fake), x0_real, x0_fake


def round_of(student, fake, real, noises, k, xi, t, sigmas=SIGMAS):
    return dmd.Round(student, fake, real, noises, sigmas, k, xi, t, fresh=lambda name, shape: draw(len(t), *shape))


def counted(velocity, calls):
    def counting(z, t):
        calls.append(t)
        return velocity(z, t)

    return counting


# ---- rollout ----


@pytest.mark.parametrize("renoise", [False, True])
@pytest.mark.parametrize("k", range(4))
def test_gradient_flows_through_step_k_alone(k, renoise):
    student, noises = Affine(), draw(4, 3, 2, 2)
    z_k = noises[0]
    for i in range(k):
        v = 0.3 * z_k - 0.2
        x0, eps = z_k - SIGMAS[i] * v, z_k + (1 - SIGMAS[i]) * v  # Euler's method keeps the predicted noise
        z_k = (1 - SIGMAS[i + 1]) * x0 + SIGMAS[i + 1] * (noises[i + 1] if renoise else eps)
    calls = []
    x_theta = dmd.rollout(counted(student, calls), noises if renoise else noises[:1], SIGMAS, k)
    assert [t[0].item() for t in calls] == pytest.approx(SIGMAS[: k + 1])
    torch.testing.assert_close(x_theta, z_k - SIGMAS[k] * (0.3 * z_k - 0.2))
    # d x_theta / da = -sigma_k z_k and d x_theta / db = -sigma_k, with z_k held fixed although it depends on a and b.
    x_theta.sum().backward()
    torch.testing.assert_close(student.a.grad, -SIGMAS[k] * z_k.sum())
    torch.testing.assert_close(student.b.grad, torch.tensor(-SIGMAS[k] * z_k.numel()))


@pytest.mark.parametrize("noises", [1, 4])
def test_the_last_step_of_a_rollout_is_what_the_sampler_draws(noises):
    student, noises = Affine(), draw(noises, 3, 2, 2)
    torch.testing.assert_close(dmd.rollout(student, noises, SIGMAS, 3), flow.walk(student, noises, SIGMAS))


def test_a_gradient_through_all_steps_is_that_of_the_whole_walk():
    """d x_theta / da of x_theta = z_0 (1 - d a)(1 - sigma a) with d = sigma_0 - sigma_1: by hand, and by autograd."""
    student, noise = Affine(b=0.0), draw(1, 3, 2)
    x_theta = dmd.rollout(student, noise, SIGMAS, 1, through=True)
    x_theta.sum().backward()
    a, d, sigma = 0.3, SIGMAS[0] - SIGMAS[1], SIGMAS[1]
    by_hand = (-d * (1 - sigma * a) - sigma * (1 - d * a)) * noise.sum()
    torch.testing.assert_close(student.a.grad, by_hand)


# ---- mixture ----


def test_mixture_of_scores_is_the_score_of_the_mixed_velocity():
    z, t = draw(4, 3, 2), torch.tensor([0.02, 0.3, 0.7, 0.98])
    base, text = gaussian_velocity(0.7, 0.4), flow.guided(gaussian_velocity(-1.0, 0.1), lambda z, t: z.cos(), 2.5)
    mixed = dmd.RealScore({"base": 0.3, "text": 0.7}, {"base": base, "text": text})
    scores = 0.3 * flow.score_from_velocity(z, base(z, t), t) + 0.7 * flow.score_from_velocity(z, text(z, t), t)
    torch.testing.assert_close(flow.score_from_velocity(z, mixed(z, t), t), scores, rtol=1e-4, atol=1e-4)


def test_a_zero_weight_and_a_guidance_of_one_cost_no_forward():
    calls = {"base": [], "empty": [], "text": []}
    conditional = {name: counted(Affine(), calls[name]) for name in ("base", "text")}
    unconditional = {"base": counted(Affine(), calls["empty"])}
    dmd.RealScore({"base": 1.0, "text": 0.0}, conditional)(draw(2, 3), torch.ones(2))
    assert [len(made) for made in calls.values()] == [1, 0, 0]
    dmd.RealScore({"base": 1.0}, conditional, unconditional, w=2.0)(draw(2, 3), torch.ones(2))
    assert [len(made) for made in calls.values()] == [2, 1, 0]


@pytest.mark.parametrize("w", [1.0, 2.5])
def test_the_real_score_is_its_plain_part_and_its_guidance(w):
    """Both by hand: two teachers with weights .3 and .7; v + (w - 1)(v - u) of each."""
    z, t = draw(4, 3), torch.tensor([0.1, 0.4, 0.7, 0.9])
    conditional = {"base": Affine(0.3), "text": Affine(0.5, 0.1)}
    unconditional = {"base": Affine(-0.2), "text": Affine(0.0, 0.4)}
    weights = {"base": 0.3, "text": 0.7}
    real = dmd.RealScore(weights, conditional, unconditional, w)
    plain = 0.3 * (0.3 * z - 0.2) + 0.7 * (0.5 * z + 0.1)
    difference = 0.3 * (0.5 * z) + 0.7 * (0.5 * z - 0.3)
    torch.testing.assert_close(real.plain(z, t), plain)
    torch.testing.assert_close(real.guidance(z, t), (w - 1) * difference)
    torch.testing.assert_close(real(z, t), plain + (w - 1) * difference)


# ---- the two losses ----


def test_gradient_is_the_score_difference_rescaled():
    """g = (s_stu - s_real) t^2 / (1 - t) / mean |x_theta - x0_real|, each factor by hand."""
    real, fake = gaussian_velocity(0.7, 0.4), gaussian_velocity(0.1, 0.8)
    x_theta, xi, t = draw(3, 2, 2), draw(3, 2, 2, seed=1), torch.tensor([0.1, 0.5, 0.9])
    g, x0_real, x0_fake = look(real, fake, x_theta, xi, t)
    x_t, s = flow.add_noise(x_theta, xi, t), t[:, None, None]
    difference = flow.score_from_velocity(x_t, fake(x_t, t), t) - flow.score_from_velocity(x_t, real(x_t, t), t)
    distance = (x_theta - x0_real).abs().mean((1, 2), keepdim=True)
    torch.testing.assert_close(g, difference * s**2 / (1 - s) / distance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x0_fake - x0_real, g * distance, rtol=1e-4, atol=1e-5)


def test_gradient_is_zero_when_fake_equals_real():
    g, _, _ = look(Affine(), Affine(), draw(3, 4), draw(3, 4, seed=1), torch.tensor([0.1, 0.5, 0.9]))
    assert g.abs().max() == 0


def test_surrogate_has_the_hand_written_gradient():
    x_theta, g = draw(3, 2, 2).requires_grad_(), draw(3, 2, 2, seed=1)
    dmd.surrogate_loss(x_theta, g).mean().backward()
    torch.testing.assert_close(x_theta.grad, g / 12)
    # and through a student: with x_theta = z - sigma (a z + b), dL/da = -sum(g sigma z) / numel
    student, z = Affine(), draw(3, 2, 2)
    dmd.surrogate_loss(dmd.rollout(student, z[None], SIGMAS, 0), g).mean().backward()
    torch.testing.assert_close(student.a.grad, -(g * z).sum() / 12)
    torch.testing.assert_close(student.b.grad, -g.sum() / 12)


def test_each_loss_touches_its_own_network_alone():
    student, fake, base, text = Affine(), Affine(0.1), Affine(0.2), Affine(0.4)
    noises, xi, t = draw(4, 2, 3), draw(2, 3, seed=1), torch.tensor([0.3, 0.6])
    real = dmd.RealScore({"base": 0.5, "text": 0.5}, {"base": base, "text": text})
    round = round_of(student, fake, real, noises, 2, xi, t)

    dmd.fake_losses(round).mean().backward()
    assert all(gradient.abs() > 0 for gradient in gradients(fake))
    assert all(gradient is None for network in (student, base, text) for gradient in gradients(network))

    fake.zero_grad()
    losses, panel = dmd.student_losses(round)
    assert not any(values.requires_grad for values in panel.values())  # no graph through teachers and fake score
    (losses + dmd.first_step_losses(student, real, noises[0], [1.0, 0.9, 0.8])).mean().backward()
    assert all(gradient.abs() > 0 for gradient in gradients(student))
    assert all(gradient is None for network in (fake, base, text) for gradient in gradients(network))


def test_the_students_loss_is_made_of_these_parts():
    """rollout, noise again, both guesses, g, surrogate: put together by hand."""
    student, fake, base = Affine(), Affine(0.1), Affine(0.2)
    noises, xi, t = draw(4, 2, 3), draw(2, 3, seed=1), torch.tensor([0.3, 0.6])
    real = dmd.RealScore({"base": 1.0}, {"base": base})
    losses, panel = dmd.student_losses(round_of(student, fake, real, noises, 2, xi, t))
    x_theta = dmd.rollout(student, noises, SIGMAS, 2).detach()
    g, x0_real, x0_fake = look(base, fake, x_theta, xi, t)
    for name, expected in (("x_theta", x_theta), ("x0_real", x0_real), ("x0_fake", x0_fake)):
        torch.testing.assert_close(panel[name], expected.detach())
    torch.testing.assert_close(losses, 0.5 * g.square().mean(1))


@pytest.mark.parametrize("culprit", ["x_theta", "real", "fake"])
def test_a_value_that_is_not_finite_reaches_the_loss_of_its_sample(culprit):
    """It is never replaced by zeros. Who trains looks at the loss before the update (Trainee.backward)."""

    def broken(z, t):
        return Affine()(z, t) + torch.where(t > 0.5, float("nan"), 0.0)[:, None]

    real, fake = (broken if culprit == name else Affine() for name in ("real", "fake"))
    noises = draw(4, 2, 3)
    if culprit == "x_theta":
        noises[0, 1, 0] = float("inf")
    score = dmd.RealScore({"base": 1.0}, {"base": real})
    round = round_of(Affine(), fake, score, noises, 0, draw(2, 3, seed=1), torch.tensor([0.25, 0.75]))
    losses, panel = dmd.student_losses(round)
    assert losses.isfinite().tolist() == [True, False]
    assert panel["x_theta"].isfinite().all() == (culprit != "x_theta")


def test_first_step_loss():
    """A student that is the teacher makes no error over one step of the teacher's, and some over three curved ones."""
    teacher, noise = gaussian_velocity(0.7, 0.4), draw(3, 4)
    sigmas = [1.0, 0.9, 0.7, 0.4]
    one = dmd.first_step_losses(teacher, teacher, noise, sigmas[:2])
    torch.testing.assert_close(one, torch.zeros(3), atol=1e-10, rtol=0)
    end = flow.euler(teacher, noise, sigmas)
    three = dmd.first_step_losses(teacher, teacher, noise, sigmas)
    at_noise = noise - 0.7  # the teacher's velocity at t = 1: eps minus the data's mean
    torch.testing.assert_close(three, ((at_noise - (noise - end) / 0.6) ** 2).mean(1))
    assert three.min() > 1e-4


# ---- all of it ----


class Steps(nn.Module):
    """A student with one affine map to x0 for each of its steps: x0 = mean_k + std_k z."""

    def __init__(self, sigmas):
        super().__init__()
        self.sigmas = sigmas[:-1]
        self.mean, self.std = (nn.Parameter(torch.full((len(self.sigmas),), value)) for value in (-0.5, 0.2))

    def forward(self, z, t):
        k = self.sigmas.index(pytest.approx(t[0].item()))
        return (z - self.mean[k] - self.std[k] * z) / self.sigmas[k]


@pytest.mark.parametrize("steps", [1, 2])
def test_gaussian_teacher_moves_the_student_to_its_mean_and_variance(steps):
    """Data N(0.7, 0.4^2), teacher exact; student and fake score start elsewhere. The only resting point of the whole
    game (rollout, fake updates, gradient, surrogate) is a student that draws N(0.7, 0.4^2) at every step.

    Each student step has a fake score of its own here. One that all steps share sees them pooled, and then only the
    pool's mean and variance are determined: steps may err in opposite directions.
    """
    torch.manual_seed(0)
    sigmas = flow.student_sigmas(steps)
    student = Steps(sigmas)
    fake = nn.ParameterDict({"mean": nn.Parameter(torch.zeros(steps)), "std": nn.Parameter(torch.ones(steps))})
    real = dmd.RealScore({"base": 1.0}, {"base": gaussian_velocity(0.7, 0.4)})
    optimisers = [torch.optim.Adam(network.parameters(), lr=0.02, betas=(0.5, 0.99)) for network in (student, fake)]
    rates = [torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, 300 * steps) for optimiser in optimisers]

    def drawn_round():
        k = int(torch.randint(steps, ()))
        noises, t = torch.randn(steps, 256, 8), flow.renoise_times(torch.rand(256), 1.0, sigmas, k)
        own = gaussian_velocity(fake["mean"][k], fake["std"][k])
        return round_of(student, own, real, noises, k, torch.randn(256, 8), t, sigmas)

    for _ in range(300 * steps):
        for _ in range(3):
            optimisers[1].zero_grad()
            dmd.fake_losses(drawn_round()).mean().backward()
            optimisers[1].step()
        optimisers[0].zero_grad()
        dmd.student_losses(drawn_round())[0].mean().backward()
        optimisers[0].step()
        for rate in rates:
            rate.step()

    for k in range(steps):
        x = dmd.rollout(student, torch.randn(steps, 20_000, 8), sigmas, k)
        assert x.mean().item() == pytest.approx(0.7, abs=0.02)
        assert x.std().item() == pytest.approx(0.4, abs=0.02)
