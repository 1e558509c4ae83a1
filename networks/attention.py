"""Softmax attention and rotary positions, computed in the way that suits the device."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias

# With a mask and a gradient, torch's first choice on a GPU is cuDNN, whose backward pass can give NaN (pytorch issue
# 196678). These two accept a mask and do not have this fault.
SAFE_WITH_MASK = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def rotate_pairs(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x (B, n, H, d) in fp32 with its adjacent channel pairs turned by cosines and sines (n, 1, d/2, 2).

    Eager mode multiplies complex numbers, which is 2 to 3 times as fast as real pairs on a CPU. torch.compile cannot
    generate code for complex numbers, so it gets real pairs. Both agree within 1e-6.
    """
    pairs = x.unflatten(-1, (-1, 2))  # (B, n, H, d/2, 2)
    if not torch.compiler.is_compiling():
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(cos_sin)  # (B, n, H, d/2)
        return torch.view_as_real(turned).flatten(-2)  # (B, n, H, d)
    a, b = pairs.unbind(-1)  # (B, n, H, d/2) each
    cos, sin = cos_sin.unbind(-1)  # (n, 1, d/2) each
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)  # (B, n, H, d)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | CausalBias | None) -> Tensor:
    """Softmax attention of q (B, H, n, d) over k and v (B, H, m, d).

    mask: None, so that every query sees every key; causal_lower_right(n, m), so that the queries are the last n of m
    tokens and see themselves and all tokens before them; or a tensor that is added to the scores, in which -inf hides
    a key.

    A causal_lower_right is a rule and not a tensor. GPU kernels apply it directly. On a CPU torch makes a tensor of
    it if n < m. With n = m it becomes is_causal=True everywhere.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        return _products(q, k, v, mask)  # (B, H, n, d)
    if q.device.type == "cuda" and mask is not None and not isinstance(mask, CausalBias):
        with sdpa_kernel(SAFE_WITH_MASK):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, n, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, n, d)


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | CausalBias | None) -> Tensor:
    """The same, written out. In bf16 on a CPU its backward pass is several times faster than torch's."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, n, m)
    n, m = scores.shape[-2:]
    if isinstance(mask, CausalBias):
        hidden = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)  # (n, m)
        scores = scores.masked_fill(hidden, -torch.inf)  # (B, H, n, m)
    elif mask is not None:
        scores = scores + mask  # (B, H, n, m)
    return scores.softmax(-1) @ v  # (B, H, n, d)


def kernels(head_dim: int, dtype: torch.dtype, device: str) -> str:
    """For the log: the names of the kernels that torch chooses without a mask, and with one."""
    q = torch.empty(1, 1, 128, head_dim, dtype=dtype, device=device, requires_grad=True)
    free = SDPBackend(torch._fused_sdp_choice(q, q, q)).name
    with sdpa_kernel(SAFE_WITH_MASK):
        masked = SDPBackend(torch._fused_sdp_choice(q, q, q, attn_mask=q.new_zeros(1, 1, 1, 128))).name
    return f"attention: {free}; where texts are padded: {masked if q.is_cuda else free}"
