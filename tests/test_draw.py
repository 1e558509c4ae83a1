"""The toy world's cases, drawn: alone or together, from the same noise, by every sampler. The networks are tiny and random, so
the pictures are nonsense and depend on everything."""

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from data.pictures import to_pictures, to_tensor
from sample import Pipeline
from toy import draw, world
from toy.draw import Sampler, draw_cases, open_checkpoint, reconstruct

SIGMAS = [1.0, 0.6, 0.3, 0.0]


@pytest.fixture(scope="module")
def pipeline(toy_checkpoint) -> Pipeline:
    return open_checkpoint(toy_checkpoint)


def pixel_difference(a: Image.Image, b: Image.Image) -> float:
    """Mean, of 255. Rounding alone comes to less than 0.01."""
    return float(np.abs(np.asarray(a).astype(int) - np.asarray(b)).mean())


def lengths(pipeline: Pipeline, cases: list[world.Case]) -> set[int]:
    condition = pipeline.condition([case.prompt for case in cases], [case.images for case in cases])
    return set(condition.mask.sum(1).tolist())


@pytest.mark.parametrize(("task", "category"), [("t2i", "landscape"), ("edit", "enhance")])
def test_draws_what_sample_draws_alone(pipeline, monkeypatch, task, category):
    """Whatever the batch: prompts of unequal length, guided, from the same noise, one by one through the pipeline."""
    cases = world.bench_cases(task, category, 8)
    assert len(lengths(pipeline, cases)) > 1  # so padding would have come in
    sampler = Sampler("x", pipeline.sigmas(3, 64), guidance=2.0)
    together, _ = draw_cases(pipeline, sampler, cases, list(range(8)))
    monkeypatch.setattr(draw, "BATCH", 3)
    in_parts, _ = draw_cases(pipeline, sampler, cases, list(range(8)))
    for i, case in enumerate(cases):
        noise = torch.randn(64, 8, 8, generator=torch.Generator().manual_seed(1000 * i))
        noise = rearrange(noise, "c h w -> 1 (h w) c")
        alone = pipeline(case.prompt, case.images, steps=3, guidance=2.0, noise=noise)
        assert pixel_difference(together[i], alone) < 0.01 and pixel_difference(in_parts[i], alone) < 0.01
    assert pixel_difference(together[0], together[1]) > 5  # and cases are told apart


def test_padding_would_have_mattered(pipeline):
    """The reason for the groups of equal length: a longer neighbour in the batch changes a picture."""
    short, long = sorted((case.prompt for case in world.bench_cases("t2i", "landscape", 8)), key=len)[::7]
    noise = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    padded = pipeline([short, long], steps=3, noise=noise.expand(2, -1, -1))[0]
    assert pixel_difference(padded, pipeline(short, steps=3, noise=noise)) > 0.1


def latents(pipeline: Pipeline, monkeypatch, sampler: Sampler, count: int = 3) -> torch.Tensor:
    """What is drawn where the velocity is 0 everywhere: the noise itself, or for Euler at any number of steps."""
    kept = []

    def decode(z: torch.Tensor) -> torch.Tensor:
        kept.append(z)
        return torch.zeros(len(z), 4, 128, 128)

    monkeypatch.setattr(pipeline, "velocity", lambda condition: lambda z, t: torch.zeros_like(z))
    monkeypatch.setattr(pipeline.vae, "decode", decode)
    draw_cases(pipeline, sampler, world.bench_cases("t2i", "text", count), list(range(10, 10 + count)))
    monkeypatch.undo()
    return torch.cat(kept)


def test_all_samplers_start_from_the_same_noise(pipeline, monkeypatch):
    euler = latents(pipeline, monkeypatch, Sampler("a", SIGMAS))
    assert torch.equal(euler, latents(pipeline, monkeypatch, Sampler("b", pipeline.sigmas(40, 64), guidance=2.0)))
    assert torch.equal(euler, latents(pipeline, monkeypatch, Sampler("c", [1.0, 0.0], renoise=True)))
    assert torch.equal(euler[:2], latents(pipeline, monkeypatch, Sampler("d", SIGMAS), count=2))
    assert (euler[0] - euler[1]).std() > 1
    # The re-noising sampler puts new noise on at every stop: z1 = (1 - s) z0 + s n.
    once = latents(pipeline, monkeypatch, Sampler("e", [1.0, 0.5, 0.0], renoise=True))
    new = 2 * once - euler
    assert 0.9 < new.std() < 1.1 and abs((new * euler).mean()) < 0.05


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("renoise", [False, True])
def test_network_evaluations_are_counted(pipeline, monkeypatch, guidance, renoise):
    pictures = []
    for name in ("forward", "with_prefix"):  # the first call of a rollout also gives the prefix
        real = getattr(pipeline.mmdit, name)
        monkeypatch.setattr(
            pipeline.mmdit, name, lambda z, *rest, real=real: (pictures.append(len(z)), real(z, *rest))[1]
        )
    sampler = Sampler("x", SIGMAS, guidance, renoise)
    draw_cases(pipeline, sampler, world.bench_cases("edit", "text", 4), list(range(4)))
    assert sum(pictures) == 4 * sampler.nfe == 4 * 3 * guidance


def test_reconstruction_is_the_autoencoders(pipeline):
    """Opaque pictures in [0, 1], through the VAE and back, over white."""
    pictures = [case.answer() for case in world.bench_cases("t2i", "portrait", 2)]
    arrays = np.stack([np.asarray(picture)[..., :3] / np.float32(255) for picture in pictures])
    again = reconstruct(pipeline, arrays)
    with torch.no_grad():
        expected = pipeline.vae.decode(pipeline.vae.encode(to_tensor(pictures)))
    for ours, theirs in zip(again, to_pictures(expected)):
        white = Image.new("RGBA", theirs.size, "white")
        white.alpha_composite(theirs)
        assert np.abs(ours * 255 - np.asarray(white)[..., :3]).max() < 2
