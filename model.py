"""The MMDiT of Qwen-Image-2.x: one network that is teacher, student and fake score.

One sequence holds the prompt's states, the source pictures' latents where the prompt names them, and at the end the
target's noisy latents. Attention is block-causal: text sees what stands before it, a picture also itself, the target
everything. So nothing in the PREFIX (text and sources) depends on the target, nor with `causal_condition` on the time:
its keys and values can be computed once and kept, and then only the target is carried through the blocks.

Conventions: z_t = (1 - t) x + t eps, so t = 1 is noise; v = eps - x. Latents are grids (B, 64, h, w) outside, tokens in
row-major order inside. Parameter names are those of the published files.

    B  samples in the batch              D  width, H * d
    L  language-model states             H  attention heads
    P  prefix tokens (text, sources)     d  channels of one head
    N  target tokens, h * w              n  tokens that are carried: S, or P or N alone
    S  all tokens, P + N                 m  keys that a segment's queries may see
"""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

KeysValues = tuple[Tensor, Tensor]  # 2 x (B, H, n, d)
Prefix = list[KeysValues]  # of every block, for text and sources


@dataclass
class MMDiTConfig:
    """The keys of transformer/config.json; the defaults are the published 7.1B network's."""

    patch_size: int = 1  # latent pixels per token and side; 2.x has no other value
    in_channels: int = 64  # channels of the VAE's latent
    out_channels: int = 64
    num_layers: int = 32
    attention_head_dim: int = 128
    num_attention_heads: int = 32
    context_in_dim: int = 4096  # width of the language model's states
    mlp_ratio: int = 3
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)  # head channels turned by frame, height and width
    eps: float = 1e-6
    causal_condition: bool = True  # text and sources are modulated as at t = 0

    def __post_init__(self):
        if self.patch_size != 1:
            raise ValueError(f"patch_size is {self.patch_size}; only 1 is known (a token is a latent pixel)")
        axes = self.axes_dims_rope
        if len(axes) != 3 or any(n % 2 for n in axes) or sum(axes) != self.attention_head_dim:
            raise ValueError(f"axes_dims_rope is {axes}; three even numbers must add up to {self.attention_head_dim}")

    @classmethod
    def from_json(cls, path: str | Path) -> "MMDiTConfig":
        return config_from_json(cls, path)


# ----------------------------------------------------------------------------------------------------------------------
# The condition, and who stands where and sees whom


@dataclass
class Condition:
    """What the network is told: the language model's states of the prompt, and the source pictures' latents.

    One layout serves the batch: slots and source sizes are the same in every sample. Each source replaces its run of
    `<|image_pad|>` states, four latent tokens to a slot. ValueError where the fields do not fit each other.
    """

    states: Tensor  # (B, L, context_in_dim), zero-padded on the right
    mask: Tensor  # (B, L) bool, True where a token is real
    sources: list[Tensor]  # each (B, 64, h_i, w_i), normalised latents in the prompt's order; [] for text to image
    slots: list[tuple[int, int]]  # [start, stop) along L of each source's run

    def __post_init__(self):
        length = self.states.shape[1]
        if self.mask.dtype != torch.bool or self.mask.shape != self.states.shape[:2]:
            raise ValueError(f"mask must be bool of shape {tuple(self.states.shape[:2])}, as the states say")
        if len(self.sources) != len(self.slots):
            raise ValueError(f"{len(self.sources)} sources, but slots for {len(self.slots)}")
        # How many leading states are real in EVERY sample. Read here and once, because the host waits for the device.
        real = self.mask.all(0).tolist()
        self.real = real.index(False) if False in real else length
        if (self.mask[:, 1:] & ~self.mask[:, :-1]).any():
            raise ValueError("mask has padding before a real token; padding belongs on the right")
        # The prefix in order: (start, stop, None) a run of text states, (start, stop, (h, w)) a source instead of them.
        self.pieces: list[tuple[int, int, tuple[int, int] | None]] = []
        cursor = 0
        for source, (start, stop) in zip(self.sources, self.slots, strict=True):
            h, w = source.shape[-2:]
            if not cursor <= start < stop <= self.real or 4 * (stop - start) != h * w:
                raise ValueError(f"slots [{start}, {stop}) of {self.real} states do not fit a source of {h} x {w}")
            self.pieces += [(cursor, start, None)] * (start > cursor) + [(start, stop, (h, w))]
            cursor = stop
        self.pieces += [(cursor, length, None)] * (length > cursor)

    def to(self, device: str | torch.device, dtype: torch.dtype) -> "Condition":
        sources = [source.to(device, dtype) for source in self.sources]
        return Condition(self.states.to(device, dtype), self.mask.to(device), sources, self.slots)


Segment = tuple[int, int, Tensor | None]  # query rows, how many keys they see, bias (B or 1, 1, rows or 1, keys)


@lru_cache(maxsize=64)
def rotations(layout: tuple, axes: tuple[int, int, int], device: torch.device) -> Tensor:
    """Unit complex numbers (S, 1, d/2) that turn a token's channel pairs; kept for the next call with this layout.

    layout: in order, n for a run of n text tokens, (h, w) for a picture. Text advances one counter, its position on all
    three axes; padded text does too. A picture stands at the counter on the frame axis, its rows and columns on a grid
    centred on zero; then the counter advances by the longer side.
    """
    positions, counter = [], 0
    with torch.inference_mode(False):  # a tensor born in inference mode could not be used in training later
        for piece in layout:
            if isinstance(piece, int):
                positions.append(torch.arange(counter, counter + piece)[:, None].expand(-1, 3))  # (piece, 3)
                counter += piece
            else:
                rows, columns = (torch.arange(side) - (side - side // 2) for side in piece)  # (h,), (w,)
                positions.append(torch.cartesian_prod(torch.tensor([counter]), rows, columns))  # (h w, 3)
                counter += max(piece)
        positions = torch.cat(positions)  # (S, 3)
        frequencies = [1.0 / 10000.0 ** (torch.arange(0, n, 2, dtype=torch.float32) / n) for n in axes]  # 3 x (n/2,)
        angles = torch.cat([positions[:, i : i + 1] * f for i, f in enumerate(frequencies)], 1)[:, None]  # (S, 1, d/2)
        return torch.polar(torch.ones_like(angles), angles).to(device)


@lru_cache(maxsize=64)
def prefix_segments(layout: tuple, dtype: torch.dtype, device: torch.device) -> list[Segment]:
    """The block-causal structure of text and sources, `layout` as above; kept likewise.

    Only text needs a mask, its triangle: a source's queries all see every key up to the source's own end. Padding needs
    none: it stands last, where only padding looks back at it, and no such query is ever without a key.
    """
    segments, end = [], 0
    with torch.inference_mode(False):
        for piece in layout:
            n = piece if isinstance(piece, int) else piece[0] * piece[1]
            end += n
            later = torch.full((n, end), -torch.inf, dtype=dtype, device=device).triu(end - n + 1)  # (n, m)
            segments.append((n, end, later[None, None] if isinstance(piece, int) else None))
    return segments


@dataclass
class Part:
    """What every block needs beside its tokens: the whole sequence, or the prefix alone, or the target alone. The
    modulation is shared by all blocks. Not a tuple, on purpose: FSDP's mixed precision casts the tensors it finds in
    tuples, and would ruin the angles."""

    scale1: Tensor  # (B, n or 1, D), or (1, 1, D) at t = 0; the 1 of (1 + scale) is in it
    gate1: Tensor  # the same; the tanh is in it
    scale2: Tensor
    gate2: Tensor
    rotations: Tensor  # (n, 1, d/2) complex
    segments: list[Segment]


# ----------------------------------------------------------------------------------------------------------------------
# Roles: teacher, student and fake score on one copy of the weights (LoRA, arXiv 2106.09685)

LoRA = dict[str, tuple[Tensor, Tensor, float]]  # layer: A (r, in), B (out, r), alpha; they change its W by alpha/r B A
ATTENTION = r"transformer_blocks\.\d+\.attn\.to_(q|k|v|out\.0)"  # the layers that the family's LoRA files change


@dataclass
class Stage:
    """Which role is on. One object for the whole network, so that its layers cannot disagree."""

    roles: set[str] = field(default_factory=set)
    role: str | None = None


class Adapter(nn.Module):
    def __init__(self, a: Tensor, b: Tensor, alpha: float):
        super().__init__()
        self.A, self.B, self.alpha = nn.Parameter(a), nn.Parameter(b), alpha

    def forward(self, x: Tensor) -> Tensor:
        # Factors in fp32 may sit on weights in bf16: they learn, and need no second copy to learn in.
        x = F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))  # (B, n, out)
        return self.alpha / len(self.A) * x  # (B, n, out)


class RoleLinear(nn.Module):
    """A linear layer, and what each role that changes it adds; the weight keeps its name in the state dict."""

    def __init__(self, linear: nn.Linear, stage: Stage):
        super().__init__()
        self.weight, self.stage, self.adapters = linear.weight, stage, nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)  # (B, n, out)
        role = self.stage.role
        return y + self.adapters[role](x) if role in self.adapters else y  # (B, n, out)


def new_lora(
    model: nn.Module, rank: int, alpha: float | None = None, layers: str = ATTENTION, rng: torch.Generator | None = None
) -> LoRA:
    """A LoRA that changes nothing yet: A is random, B zero. alpha None: the rank. `layers`: a regular expression."""
    lora = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, RoleLinear)) and re.fullmatch(layers, name):
            out, width = module.weight.shape
            a = torch.randn(rank, width, generator=rng) * width**-0.5  # (r, in), on the CPU: the same on every device
            lora[name] = a, torch.zeros(out, rank), float(rank if alpha is None else alpha)
    return lora


# ----------------------------------------------------------------------------------------------------------------------
# The network


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention of q (B, H, n, d) over k and v (B, H, m, d); a bias of -inf hides a key."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        # The fused form's bf16 backward takes several times as long on a CPU as these plain products.
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, n, m)
        scores = scores if bias is None else scores + bias  # (B, H, n, m)
        return scores.softmax(-1) @ v  # (B, H, n, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, H, n, d)


class HeadNorm(nn.Module):
    """RMSNorm over one head's channels, then the rotation of adjacent channel pairs; one trip to fp32 for both."""

    def __init__(self, head_dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:
        h = x.float()  # (B, n, H, d)
        h = h * (torch.rsqrt(h.square().mean(-1, True) + self.eps) * self.weight.float())  # (B, n, H, d)
        h = torch.view_as_complex(h.unflatten(-1, (-1, 2))) * rotations  # (B, n, H, d/2)
        return torch.view_as_real(h).flatten(-2).to(x.dtype)  # (B, n, H, d)


class Attention(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.head_dim = config.attention_head_dim
        width = config.num_attention_heads * config.attention_head_dim
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.norm_q = HeadNorm(self.head_dim, config.eps)
        self.norm_k = HeadNorm(self.head_dim, config.eps)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])

    def forward(self, x: Tensor, part: Part, past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        q, k, v = (to(x).unflatten(-1, (-1, self.head_dim)) for to in (self.to_q, self.to_k, self.to_v))  # (B, n, H, d)
        q, k = self.norm_q(q, part.rotations), self.norm_k(k, part.rotations)  # (B, n, H, d)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, n, d)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)  # (B, H, S, d)
        # Block-causal: each segment's queries meet the keys up to their own segment's end.
        rows = q.split([rows for rows, _, _ in part.segments], 2)  # each (B, H, rows, d)
        out = [attend(q, k[:, :, :m], v[:, :, :m], bias) for q, (_, m, bias) in zip(rows, part.segments, strict=True)]
        out = torch.cat(out, 2).transpose(1, 2).flatten(2)  # (B, n, D)
        return self.to_out[0](out), (k, v)  # (B, n, D), 2 x (B, H, P or S, d)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, hidden, bias=False)
        self.gate_layer = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.gate_layer(x)) * self.proj(x))  # (B, n, D)


class Block(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        width = config.num_attention_heads * config.attention_head_dim
        self.eps = config.eps
        self.attn = Attention(config)
        self.img_mlp = MLP(width, config.mlp_ratio * width)

    def forward(self, x: Tensor, part: Part, past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """The tokens x (B, n, D) after this block, and the keys and values that they saw; `past`: those of a kept prefix."""
        h = F.layer_norm(x, x.shape[-1:], eps=self.eps) * part.scale1  # (B, n, D)
        h, keys_values = self.attn(h, part, past)  # (B, n, D)
        x = torch.addcmul(x, part.gate1, h)  # (B, n, D)

        h = F.layer_norm(x, x.shape[-1:], eps=self.eps) * part.scale2  # (B, n, D)
        x = torch.addcmul(x, part.gate2, self.img_mlp(h))  # (B, n, D)
        return x, keys_values


class TimeEmbedding(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(256, width, bias=False)
        self.linear_2 = nn.Linear(width, width, bias=False)

    def forward(self, t: Tensor) -> Tensor:
        dtype = self.linear_1.weight.dtype
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        # t is rounded to the weights' type, as the published networks do: near 1, bf16 knows only steps of 1/256.
        angles = 1000.0 * t.to(dtype).float()[:, None] * frequencies  # (B, 128)
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(dtype)  # (B, 256)
        return self.linear_2(F.silu(self.linear_1(waves)))  # (B, D)


class TextNorm(nn.Module):
    """RMSNorm in fp32 whose stored weight is scale - 1."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), self.eps).to(x.dtype)  # (B, L, context)


class TextIn(nn.Module):
    def __init__(self, context: int, width: int, eps: float):
        super().__init__()
        self.text_norm = TextNorm(context, eps)
        self.in_layer = nn.Linear(context, width, bias=False)
        self.out_layer = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.gelu(self.in_layer(self.text_norm(x)), approximate="tanh"))  # (B, L, D)


class MMDiT(nn.Module):
    """The velocity v = eps - x of noisy latents under a Condition. `gradient_checkpointing = True` saves memory: every
    block's inside is computed once more in the backward pass."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        width = config.num_attention_heads * config.attention_head_dim
        self.config = config
        self.stage = Stage()
        self.gradient_checkpointing = False
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": TimeEmbedding(width)})
        self.txt_in = TextIn(config.context_in_dim, width, config.eps)
        self.img_in = nn.Linear(config.in_channels, width, bias=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width, bias=False))
        self.transformer_blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(width, width, bias=False)})
        self.proj_out = nn.Linear(width, config.out_channels, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights: linears keep their input's variance; gates at 0 make each block begin as the identity, v as 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for module in (self.modulation[1], self.norm_out["linear"], self.proj_out):
            nn.init.zeros_(module.weight)

    def forward(self, z: Tensor, t: Tensor, condition: Condition, prefix: Prefix | None = None) -> Tensor:
        """v (B, out_channels, h, w), in the weights' dtype, of latents z (B, in_channels, h, w) at times t (B,) in [0, 1].
        `prefix`, from `self.prefix(condition)`, spares computing text and sources again."""
        h, w = z.shape[-2:]
        *modulation, scale_out = self.modulate(t)  # 4 x (B, 1, D), (B, 1, D)
        turns, segments = self.places(condition, (h, w))  # (S, 1, d/2)
        x = self.embed(z)  # (B, N, D)
        if prefix is None:
            tokens = self.tokens(condition)  # (B, P, D)
            if self.config.causal_condition:  # text and sources live at t = 0 whatever the step
                still = self.modulate(t.new_zeros(1))[:4]  # 4 x (1, 1, D)
                pairs = zip(still, modulation, strict=True)
                modulation = [torch.cat([a.expand_as(tokens), b.expand_as(x)], 1) for a, b in pairs]  # 4 x (B, S, D)
            x = torch.cat([tokens, x], 1)  # (B, S, D)
        else:
            turns, segments = turns[-h * w :], segments[-1:]  # (N, 1, d/2)
        part = Part(*modulation, turns, segments)
        for i, block in enumerate(self.transformer_blocks):
            x, _ = self.run(block, x, part, None if prefix is None else prefix[i])  # (B, S or N, D)
        x = x[:, -h * w :]  # (B, N, D)
        x = F.layer_norm(x, x.shape[-1:], eps=self.config.eps) * scale_out  # (B, N, D)
        return rearrange(self.proj_out(x), "b (h w) c -> b c h w", h=h, w=w)  # (B, out_channels, h, w)

    def prefix(self, condition: Condition) -> Prefix:
        """Keys and values of text and sources in every block. With causal_condition they depend neither on time nor on
        the target, so one prefix serves all steps exactly; without it this is a ValueError."""
        if not self.config.causal_condition:
            raise ValueError("without causal_condition a prefix holds for one time only, and cannot be kept")
        x, prefix = self.tokens(condition), []  # (B, P, D)
        still = self.modulate(torch.zeros(1, device=x.device))[:4]  # 4 x (1, 1, D)
        turns, segments = self.places(condition, (0, 0))  # (P, 1, d/2)
        part = Part(*still, turns, segments[:-1])
        for block in self.transformer_blocks:
            x, keys_values = self.run(block, x, part, None)  # (B, P, D), 2 x (B, H, P, d)
            prefix.append(keys_values)
        return prefix

    def run(self, block: Block, *arguments) -> tuple:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # The backward pass computes the block again, at a time when another role may be on.
            block = partial(self.as_role, self.stage.role, block)
            return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        return block(*arguments)

    def as_role(self, role: str | None, block: Block, *arguments) -> tuple:
        with self.playing(role):
            return block(*arguments)

    @contextmanager
    def playing(self, role: str | None) -> Iterator["MMDiT"]:
        """Within, the network is that role; None, as always without this, the shared weights alone."""
        if role is not None and role not in self.stage.roles:
            raise ValueError(f"role {role!r} is not among {sorted(self.stage.roles)}; add_role makes it known")
        before, self.stage.role = self.stage.role, role
        try:
            yield self
        finally:
            self.stage.role = before

    def add_role(self, role: str, lora: LoRA) -> None:
        """Another role on the same weights: they, changed by `lora`, whose tensors are its parameters from now on."""
        if role in self.stage.roles or "." in role or hasattr(nn.ModuleDict, role):
            raise ValueError(f"role {role!r}: there is one already, or the word is one of torch's own")
        for name, (a, b, alpha) in lora.items():
            layer = self.get_submodule(name)
            if not isinstance(layer, RoleLinear):
                layer = RoleLinear(layer, self.stage)
                self.set_submodule(name, layer)
            layer.adapters[role] = Adapter(a.to(layer.weight.device), b.to(layer.weight.device), alpha)
        self.stage.roles.add(role)

    def lora(self, role: str) -> LoRA:
        """A role's own parameters, by layer: what an optimiser trains and a file keeps."""
        layers = {name: layer.adapters for name, layer in self.named_modules() if isinstance(layer, RoleLinear)}
        own = {name: adapters[role] for name, adapters in layers.items() if role in adapters}
        return {name: (adapter.A, adapter.B, adapter.alpha) for name, adapter in own.items()}

    @torch.no_grad()
    def merge(self, lora: LoRA, scale: float = 1.0) -> None:
        """Change the weights themselves, by `scale` times `lora`; in fp32, rounded once."""
        for name, (a, b, alpha) in lora.items():
            weight = self.get_submodule(name).weight
            change = b.to(weight.device).float() @ a.to(weight.device).float()  # (out, in)
            weight.copy_(weight.float() + scale * alpha / len(a) * change)

    def modulate(self, t: Tensor) -> tuple[Tensor, ...]:
        """scale1, gate1, scale2, gate2 of all blocks and the scale of the output, each (B, 1, D)."""
        time = self.time_text_embed["timestep_embedder"](t)  # (B, D)
        scale1, gate1, scale2, gate2 = self.modulation(time)[:, None].chunk(4, -1)  # each (B, 1, D)
        scale_out = self.norm_out["linear"](F.silu(time))[:, None]  # (B, 1, D)
        return 1 + scale1, gate1.tanh(), 1 + scale2, gate2.tanh(), 1 + scale_out

    def tokens(self, condition: Condition) -> Tensor:
        """The prefix's tokens (B, P, D): text, and each source in the place of its slots."""
        text = [condition.states[:, start:stop] for start, stop, grid in condition.pieces if grid is None]
        states = torch.cat(text, 1).to(self.img_in.weight.dtype)  # (B, all text, context)
        runs = iter(self.txt_in(states).split([run.shape[1] for run in text], 1))  # each (B, run, D)
        sources = map(self.embed, condition.sources)  # each (B, h w, D)
        return torch.cat([next(runs if grid is None else sources) for _, _, grid in condition.pieces], 1)  # (B, P, D)

    def embed(self, grid: Tensor) -> Tensor:
        return self.img_in(rearrange(grid, "b c h w -> b (h w) c").to(self.img_in.weight.dtype))  # (B, h w, D)

    def places(self, condition: Condition, grid: tuple[int, int]) -> tuple[Tensor, list[Segment]]:
        """Rotations (S, 1, d/2) and segments of the prefix and, last, of a target of `grid` (h, w) tokens."""
        weight, tokens = self.img_in.weight, grid[0] * grid[1]
        layout = tuple(size or stop - start for start, stop, size in condition.pieces)
        turns = rotations((*layout, grid), self.config.axes_dims_rope, weight.device)  # (S, 1, d/2)
        length, bias = len(turns) - tokens, None
        padding = ~condition.mask[:, None, None, condition.real :]  # (B, 1, 1, L - real)
        if padding.shape[-1] > 0:  # the target sees the whole prefix but that
            bias = weight.new_zeros(len(padding), 1, 1, len(turns))  # (B, 1, 1, S)
            bias[..., length - padding.shape[-1] : length].masked_fill_(padding, -torch.inf)
        return turns, [*prefix_segments(layout, weight.dtype, weight.device), (tokens, len(turns), bias)]

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> "MMDiT":
        """Load a transformer/ folder of the published layout; ValueError or FileNotFoundError name what is wrong."""
        config = MMDiTConfig.from_json(Path(directory) / "config.json")
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, directory, "diffusion_pytorch_model", dtype, device)
        return model

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write a transformer/ folder of the published layout, which diffusers reads too."""
        if self.stage.roles:
            raise ValueError(
                f"the roles {sorted(self.stage.roles)} are not in such a folder; write a LoRA file, or merge one"
            )
        save_weights(self.state_dict(), directory, "diffusion_pytorch_model", dtype)
        save_config(self.config, Path(directory) / "config.json", "QwenImage21Transformer2DModel")


# ----------------------------------------------------------------------------------------------------------------------
# Files, for this network and the encoders: strict both ways, and an error names the file and the key or tensor


def read_json(path: str | Path) -> dict:
    """Read a file that holds one JSON object; FileNotFoundError or ValueError otherwise."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint in the published layout has it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is expected, found {type(content).__name__}")  # noqa: TRY004
    return content


def write_json(path: str | Path, content: dict) -> None:
    """Write one JSON object, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def config_from_json(cls: type, path: str | Path):
    """Build the dataclass `cls` from a JSON file with exactly its fields as keys, else ValueError. Keys that begin with
    "_" are notes of the library that wrote it; lists become tuples; a value has the type of the field's default."""
    content = {key: _tuples(value) for key, value in read_json(path).items() if not key.startswith("_")}
    defaults = {field.name: field.default for field in fields(cls)}
    for key in content:
        if key not in defaults:
            raise ValueError(f"{path}: unknown key {key!r}; {cls.__name__} has {', '.join(defaults)}")
    for key, default in defaults.items():
        if key not in content:
            raise ValueError(f"{path}: key {key!r} is missing")
        kinds = (int, float) if type(default) is float else (type(default),)
        if default is not MISSING and default is not None and type(content[key]) not in kinds:
            raise ValueError(f"{path}: {key} is {content[key]!r}, {kinds[-1].__name__} is expected")
    try:
        return cls(**content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def save_config(config, path: str | Path, class_name: str) -> None:
    """Write a config dataclass as config.json of the published layout, for the diffusers class `class_name`."""
    write_json(path, {"_class_name": class_name, **asdict(config)})


def load_weights(
    module: nn.Module,
    directory: str | Path,
    stem: str,
    dtype: torch.dtype,
    device: str | torch.device,
    skip: tuple[str, ...] = (),
) -> None:
    """Fill `module`, built on the meta device, from `{stem}.safetensors` or the shards in `{stem}.safetensors.index.json`.

    The files must hold exactly the module's tensors in its shapes, but for those whose whole name matches a regular
    expression in `skip`. Tensors are mapped from disk and placed one by one: at its peak, memory holds the module and one
    tensor.
    """
    directory = Path(directory)
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file() == index.is_file():
        raise FileNotFoundError(f"{directory}: one of {single.name} and {index.name} is expected, not both or neither")
    listed = {}  # {tensor: file name}, from the index
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ValueError(f"{index}: weight_map is missing or empty")
    for name, file in listed.items():
        # As text, without resolving links: download caches keep shards as links that lead elsewhere.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: puts {name} into {file!r}, which is no .safetensors file of its folder")
        if not (directory / file).is_file():
            raise FileNotFoundError(f"{directory / file}: no such file, but {index.name} puts {name} into it")

    wanted, places = module.state_dict(), {}  # {tensor: path}
    for path in [directory / file for file in sorted(set(listed.values()))] or [single]:
        with open_weights(path) as file:
            for name in list(file.keys()):
                if listed and listed.get(name) != path.name:
                    raise ValueError(f"{path}: holds {name}, which {index.name} does not put there")
                if any(re.fullmatch(pattern, name) for pattern in skip):
                    continue
                if name not in wanted:
                    raise ValueError(f"{path}: tensor {name} is unknown to {type(module).__name__}")
                shape, expected = list(file.get_slice(name).get_shape()), list(wanted[name].shape)
                if shape != expected:
                    raise ValueError(f"{path}: {name} has shape {shape}, but by the config {expected}")
                places[name] = path
    if missing := wanted.keys() - places.keys():
        where = directory / listed.get(min(missing), index.name if listed else single.name)
        raise ValueError(f"{where}: tensor {min(missing)} is missing ({len(missing)} in all)")

    for name, path in places.items():
        with open_weights(
            path
        ) as file:  # anew for each tensor: what was read of a mapped file counts as ours until it closes
            tensor = file.get_tensor(name)
            dtype_here = dtype if tensor.is_floating_point() else tensor.dtype
            tensor = tensor.to(device=device, dtype=dtype_here, copy=True)  # off the file, which may be written over
        owner, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner)
        is_parameter = isinstance(getattr(owner, leaf), nn.Parameter)
        setattr(owner, leaf, nn.Parameter(tensor) if is_parameter else tensor)


def open_weights(path: Path):
    """A safetensors file, mapped; ValueError where it is none or not whole."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, str] | None = None) -> None:
    """Write a safetensors file, `notes` in its header, with the permissions of any other new file: the library's own
    are the owner's alone, whatever the umask. OSError names the file."""
    try:
        path.unlink(missing_ok=True)
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, {"format": "pt", **(notes or {})})
        path.chmod(mode)
    except SafetensorError as error:  # a full disk, most likely
        raise OSError(f"{path}: cannot be written ({error})") from None


def save_weights(
    state: dict[str, Tensor], directory: str | Path, stem: str, dtype: torch.dtype, shard_bytes: int = 5 * 10**9
) -> None:
    """Write {name: tensor} as `{stem}.safetensors`, or in shards with an index where it is larger than `shard_bytes`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards, size, total = [[]], 0, 0
    for name, tensor in state.items():
        length = tensor.numel() * dtype.itemsize
        if shards[-1] and size + length > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + length, total + length
    shards = {f"{stem}-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}
    if len(shards) == 1:
        shards = {f"{stem}.safetensors": list(state)}
    for file, names in shards.items():
        # Written beside and renamed, so that no reader ever sees half a file.
        tensors = {name: state[name].detach().to("cpu", dtype).contiguous() for name in names}
        write_tensors(directory / f"{file}.part", tensors)
        os.replace(directory / f"{file}.part", directory / file)
    index = f"{stem}.safetensors.index.json"
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        write_json(directory / index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for old in directory.glob(f"{stem}*"):  # an earlier save, in another number of files
        stale = old.name not in shards and (old.name != index or len(shards) == 1)
        if stale and re.fullmatch(re.escape(stem) + r"(-\d+-of-\d+)?\.safetensors(\.index\.json)?", old.name):
            old.unlink()
