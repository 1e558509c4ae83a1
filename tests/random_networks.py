"""Networks with random weights. With a library's own start (ones, zeros, small gates) a test would be blind to many."""

import torch
from torch import nn

from model import MMDiTConfig

TINY = MMDiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=16, context_in_dim=24, axes_dims_rope=(4, 6, 6)
)


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter in place: matrices and kernels at unit gain, vectors at their initial value plus noise."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.squeeze().ndim > 1 else None
        parameter.copy_(noise / fan_in**0.5 if fan_in else parameter + 0.3 * noise)
    return module.eval()
