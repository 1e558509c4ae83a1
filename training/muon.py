"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the step is the matrix of gradients made orthogonal.

AdamW scales each number by its own history. Muon changes a matrix equally in all directions, so the rare directions of a
gradient are learnt as fast as the common ones. The toy's networks need a fraction of AdamW's steps with it.

`torch.optim.Muon` does the same (tests/test_muon.py compares the two), but always in bfloat16. On a processor without
bfloat16 units that takes 5.3 seconds, and 0.3 in fp32: more than everything else in a step of the toy.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: steep at zero, so that small singular values grow fast
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """For matrices (rows, columns): W <- W - lr sqrt(max(1, rows / columns)) orthogonal(momentum), without weight decay.
    dtype: that of the products, which take most of the time; gradients, momentum and weights keep theirs."""

    def __init__(self, matrices: Iterable[Tensor], lr: float, dtype: torch.dtype = torch.float32):
        super().__init__(matrices, {"lr": lr})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                momentum = self.state[w].setdefault("momentum_buffer", torch.zeros_like(w))  # (rows, columns)
                momentum.lerp_(w.grad, 1 - MOMENTUM)
                g = w.grad.lerp(momentum, MOMENTUM)  # Nesterov's: where the momentum will be
                direction = orthogonal(g, self.dtype).to(w.dtype)
                w.sub_(direction, alpha=group["lr"] * max(1, w.shape[0] / w.shape[1]) ** 0.5)


def orthogonal(g: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(rows, columns) -> nearly U V^T, where U S V^T is its singular value decomposition: all singular values come near 1
    (0.7 to 1.2). Newton-Schulz iterations need only products of matrices."""
    a, b, c = COEFFICIENTS
    tall = g.shape[0] > g.shape[1]
    x = g.float().T if tall else g.float()  # (n, m), n <= m: the smaller side first makes the gram matrix small
    x = (x / x.norm().clamp(min=1e-7)).to(dtype)  # (n, m), singular values <= 1, where the iteration converges
    for _ in range(ITERATIONS):
        gram = x @ x.T  # (n, n)
        x = a * x + (b * gram + c * gram @ gram) @ x  # (n, m); S <- a S + b S^3 + c S^5
    return x.T if tall else x  # (rows, columns)
