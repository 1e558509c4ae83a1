"""Muon against torch's, and against the singular values that it is about."""

import pytest
import torch

from training.muon import Muon, orthogonal

SHAPES = [(24, 24), (24, 72), (72, 24)]


def test_three_steps_are_torchs():
    """To bfloat16's rounding, in which torch computes; gradients that change, so that the momentum counts."""
    rng = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=rng) for shape in SHAPES]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    optimizers = [Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.0)]
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=rng)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, w in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - w).norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_keeps_directions_and_evens_their_sizes(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    turned = u.T @ orthogonal(g) @ vh.T  # diagonal, if the singular vectors are kept
    sizes = turned.diagonal()
    assert (turned - sizes.diag()).abs().max() < 1e-4
    assert s.max() / s.min() > 2 and sizes.min() > 0.6 and sizes.max() < 1.25


def test_in_bfloat16_it_is_nearly_the_same():
    """The rounding of bfloat16 grows with each iteration; the weights keep their own type."""
    g = torch.randn(72, 24, generator=torch.Generator().manual_seed(2))
    exact, rough = orthogonal(g), orthogonal(g, torch.bfloat16).float()
    assert 1e-4 < (exact - rough).norm() / exact.norm() < 0.1
    w = torch.nn.Parameter(torch.zeros(72, 24))
    w.grad = 0.5 * g  # its size plays no part
    Muon([w], 0.02, torch.bfloat16).step()
    assert w.dtype == torch.float32 and (w + 0.02 * 3**0.5 * rough).norm() < 0.1 * w.norm()
