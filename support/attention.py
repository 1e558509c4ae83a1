"""Softmax attention by the kernel that is fastest for the device."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention of q (B, H, n, d) over k and v (B, H, m, d); a bias of -inf hides a key."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        # The backward pass of the fused form is several times slower in bf16 on a CPU than these plain products.
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, n, m)
        scores = scores if bias is None else scores + bias  # (B, H, n, m)
        return scores.softmax(-1) @ v  # (B, H, n, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, H, n, d)
