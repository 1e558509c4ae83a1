"""The MMDiT of Qwen-Image-2.x: one network that is teacher, student and fake score.

One sequence holds the prompt's states, the source pictures' latents where the prompt names them, and at the end the
target's noisy latents. Attention is block-causal: text sees itself and what stands before it, a picture also all of
itself, the target everything. So nothing in the PREFIX (text and sources) depends on the target; with
`causal_condition` not on the time either. Its keys and values can be computed once and kept, and then only the target
is carried through the blocks. MMDiT: multimodal diffusion transformer.

Conventions: z_t = (1 - t) x + t eps, so t = 1 is noise; v = eps - x. Latents are grids (B, 64, h, w) outside, tokens in
row-major order inside. Parameter names are those of the published files.

    B  samples in the batch              D  width, H * d
    L  language-model states             H  attention heads
    P  prefix tokens (text, sources)     d  channels of one head
    N  target tokens, h * w              n  tokens that are carried: S, or N with a kept prefix
    S  all tokens, P + N
"""

import math
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right

from checkpoint.files import config_from_json, save_config
from checkpoint.weights import load_weights, save_weights
from networks.attention import attend, rotate_pairs
from program.ranges import Ranged, within

KeysValues = tuple[Tensor, Tensor]  # 2 x (B, H, S, d), of a kept prefix 2 x (B, H, P, d)
Prefix = list[KeysValues]  # of every block, for text and sources


@dataclass
class MMDiTConfig(Ranged):
    """The keys of transformer/config.json; the defaults are the published 7.1B network's."""

    patch_size: int = 1  # latent pixels per token and side; 2.x has no other value
    in_channels: int = within(64, "[1, 4096]")  # channels of the VAE's latent
    out_channels: int = within(64, "[1, 4096]")
    num_layers: int = within(32, "[1, 512]")
    attention_head_dim: int = within(128, "[2, 1024]")
    num_attention_heads: int = within(32, "[1, 1024]")
    context_in_dim: int = within(4096, "[1, 65536]")  # width of the language model's states
    mlp_ratio: int = within(3, "[1, 64]")
    # Head channels that are turned by frame, height and width.
    axes_dims_rope: tuple[int, int, int] = within((16, 56, 56), "[2, 1024]")
    eps: float = within(1e-6, "(0, 0.1]")
    causal_condition: bool = True  # text and sources are modulated as at t = 0

    def __post_init__(self):
        super().__post_init__()
        if self.patch_size != 1:
            raise ValueError(f"patch_size is {self.patch_size}; only 1 is known (a token is a latent pixel)")
        axes = self.axes_dims_rope
        if len(axes) != 3 or any(n % 2 for n in axes) or sum(axes) != self.attention_head_dim:
            raise ValueError(f"axes_dims_rope is {axes}; three even numbers must add up to {self.attention_head_dim}")


# ----------------------------------------------------------------------------------------------------------------------
# The condition, and who stands where and sees whom


@dataclass
class Condition:
    """What the network is told: the language model's states of the prompt, and the source pictures' latents.

    How prompt and pictures become a condition: the head of sample.py. One layout serves the batch: slots and source sizes
    are the same in every sample. Each source replaces its run of `<|image_pad|>` states, four latent tokens to a slot.
    ValueError where the fields do not fit each other.
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
        # Number of leading states that are real in every sample. Computed once, because reading it stalls the GPU.
        real = self.mask.all(0).tolist()
        self.unpadded = real.index(False) if False in real else length
        if (self.mask[:, 1:] & ~self.mask[:, :-1]).any():
            raise ValueError("mask has padding before a real token; padding belongs on the right")
        # The prefix in order: (start, stop, None) a run of text states, (start, stop, (h, w)) a source instead of them.
        self.pieces: list[tuple[int, int, tuple[int, int] | None]] = []
        cursor = 0
        for source, (start, stop) in zip(self.sources, self.slots, strict=True):
            h, w = source.shape[-2:]
            if not cursor <= start < stop <= self.unpadded or 4 * (stop - start) != h * w:
                raise ValueError(f"slots [{start}, {stop}) of {self.unpadded} states do not fit a source of {h} x {w}")
            self.pieces += [(cursor, start, None)] * (start > cursor) + [(start, stop, (h, w))]
            cursor = stop
        self.pieces += [(cursor, length, None)] * (length > cursor)

    def to(self, device: str | torch.device, dtype: torch.dtype) -> "Condition":
        moved = copy(self)  # not checked again: the checks read values, and so would wait for the device
        moved.states, moved.mask = self.states.to(device, dtype), self.mask.to(device)
        moved.sources = [source.to(device, dtype) for source in self.sources]
        return moved


# Query rows, how many keys they see, and the mask among these: None; a causal_lower_right; or (B, 1, 1, keys) of 0 and -inf.
Segment = tuple[int, int, Tensor | CausalBias | None]


@lru_cache(maxsize=64)
def rotations(layout: tuple, axes: tuple[int, int, int], device: torch.device) -> Tensor:
    """Cosines and sines (S, 1, d/2, 2) that turn a token's channel pairs; kept for the next call with this layout.

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
        return torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).to(device)


# Who sees whom, for a prompt with one source. Every row of a picture sees the same keys, so only text needs a rule.
#
#             keys    text    source   text    target
#     queries
#     text            \\                                  causal: itself and what stands before
#     source          ####    ######                     everything up to its own end
#     text            ####    ######   \\                 causal
#     target          ####    ######   ####    ######    everything


@lru_cache(maxsize=64)
def prefix_segments(layout: tuple) -> list[Segment]:
    """The block-causal structure of text and sources, `layout` as above; cached, too. No mask is written out for it.

    Padding needs no mask here: it stands last, where only padding looks back at it, and no such query is without a key.
    """
    segments, end = [], 0
    with torch.inference_mode(False):
        for piece in layout:
            n = piece if isinstance(piece, int) else piece[0] * piece[1]
            end += n
            segments.append((n, end, causal_lower_right(n, end) if isinstance(piece, int) else None))
    return segments


@dataclass
class Part:
    """What every block needs beside its tokens: those of the whole sequence, or the target's alone. All blocks share the
    modulation. Not a tuple, on purpose: FSDP's mixed precision casts the tensors it finds in tuples, and would ruin the
    angles."""

    scale1: Tensor  # (B, n, D), or (B, 1, D) where all tokens have one time; the 1 of (1 + scale) is in it
    gate1: Tensor  # the same; the tanh is in it
    scale2: Tensor
    gate2: Tensor
    cos_sin: Tensor  # (n, 1, d/2, 2): a token's rotations
    segments: list[Segment]


# ----------------------------------------------------------------------------------------------------------------------
# The network


class HeadNorm(nn.Module):
    """RMSNorm over one head's channels, then the rotation of adjacent channel pairs; one trip to fp32 for both."""

    def __init__(self, head_dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor, cos_sin: Tensor) -> Tensor:
        y = x.float()  # (B, n, H, d)
        y = y * (torch.rsqrt(y.square().mean(-1, True) + self.eps) * self.weight.float())  # (B, n, H, d)
        return rotate_pairs(y, cos_sin).to(x.dtype)  # (B, n, H, d)


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
        q, k = self.norm_q(q, part.cos_sin), self.norm_k(k, part.cos_sin)  # (B, n, H, d)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, n, d)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)  # (B, H, S, d)
        # Block-causal: each segment's queries meet the keys up to their own segment's end.
        queries = q.split([n for n, _, _ in part.segments], 2)  # each (B, H, n of the segment, d)
        pairs = zip(queries, part.segments, strict=True)
        out = [attend(q, k[:, :, :end], v[:, :, :end], mask) for q, (_, end, mask) in pairs]
        out = [o.transpose(1, 2).flatten(2) for o in out]  # each (B, rows, D)
        out = torch.cat(out, 1) if len(out) > 1 else out[0]  # (B, n, D)
        return self.to_out[0](out), (k, v)  # (B, n, D), 2 x (B, H, S, d)


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
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps) * part.scale1  # (B, n, D)
        y, keys_values = self.attn(y, part, past)  # (B, n, D)
        x = torch.addcmul(x, part.gate1, y)  # (B, n, D)

        y = F.layer_norm(x, x.shape[-1:], eps=self.eps) * part.scale2  # (B, n, D)
        x = torch.addcmul(x, part.gate2, self.img_mlp(y))  # (B, n, D)
        return x, keys_values


class TimeEmbedding(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(256, width, bias=False)
        self.linear_2 = nn.Linear(width, width, bias=False)

    def forward(self, t: Tensor) -> Tensor:
        dtype = self.linear_1.weight.dtype
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        # t is rounded to the weights' type, as the published networks do: near 1, bf16 knows only steps of 1/256. Callers
        # have rounded it before (flow.network_time), and to round twice changes nothing.
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
    """The velocity v = eps - x of noisy latents under a Condition."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        width = config.num_attention_heads * config.attention_head_dim
        self.config = config
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
            if isinstance(module, nn.Linear) and not module.weight.is_meta:  # there a file's weights follow
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for module in (self.modulation[1], self.norm_out["linear"], self.proj_out):
            nn.init.zeros_(module.weight)

    def forward(self, z: Tensor, t: Tensor, condition: Condition, prefix: Prefix | None = None) -> Tensor:
        """v (B, out_channels, h, w), in the weights' dtype, of latents z (B, in_channels, h, w) at times t (B,) in [0, 1].
        `prefix`, from `with_prefix` under the same condition, spares computing text and sources again."""
        return self._run(z, t, condition, prefix, keep=False)[0]

    def with_prefix(self, z: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Prefix]:
        """The same v, and what the next calls under this condition may reuse: keys and values of text and sources in every
        block. With causal_condition they depend neither on time nor on the target, so one prefix serves all steps exactly.
        Without it this is a ValueError."""
        if not self.config.causal_condition:
            raise ValueError("without causal_condition a prefix holds for one time only, and cannot be kept")
        return self._run(z, t, condition, None, keep=True)

    def _run(
        self, z: Tensor, t: Tensor, condition: Condition, prefix: Prefix | None, keep: bool
    ) -> tuple[Tensor, Prefix]:
        h, w = z.shape[-2:]
        *modulation, scale_out = self.modulate(t)  # 4 x (B, 1, D), (B, 1, D)
        cos_sin, segments = self.geometry(condition, (h, w))  # (S, 1, d/2, 2)
        x = self.embed(z)  # (B, N, D)
        if prefix is None:
            tokens = self.tokens(condition)  # (B, P, D)
            if self.config.causal_condition:  # text and sources live at t = 0 whatever the step
                still = self.modulate(t.new_zeros(1))[:4]  # 4 x (1, 1, D)
                pairs = zip(still, modulation, strict=True)
                modulation = [torch.cat([a.expand_as(tokens), b.expand_as(x)], 1) for a, b in pairs]  # 4 x (B, S, D)
            x = torch.cat([tokens, x], 1)  # (B, S, D)
        else:
            cos_sin, segments = cos_sin[-h * w :], segments[-1:]  # (N, 1, d/2, 2)
        part, kept = Part(*modulation, cos_sin, segments), []
        for i, block in enumerate(self.transformer_blocks):
            x, keys_values = block(x, part, None if prefix is None else prefix[i])  # (B, S or N, D)
            if keep:  # copies, or the target's would stay in memory, too
                kept.append(tuple(both[:, :, : -h * w].clone() for both in keys_values))  # 2 x (B, H, P, d)
        x = x[:, -h * w :]  # (B, N, D)
        x = F.layer_norm(x, x.shape[-1:], eps=self.config.eps) * scale_out  # (B, N, D)
        return rearrange(self.proj_out(x), "b (h w) c -> b c h w", h=h, w=w), kept  # (B, out_channels, h, w)

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

    def geometry(self, condition: Condition, grid: tuple[int, int]) -> tuple[Tensor, list[Segment]]:
        """Rotations (S, 1, d/2, 2) and segments of the prefix and, last, of a target of `grid` (h, w) tokens."""
        weight, tokens = self.img_in.weight, grid[0] * grid[1]
        layout = tuple(size or stop - start for start, stop, size in condition.pieces)
        cos_sin = rotations((*layout, grid), self.config.axes_dims_rope, weight.device)  # (S, 1, d/2, 2)
        length, bias = len(cos_sin) - tokens, None
        padding = ~condition.mask[:, None, None, condition.unpadded :]  # (B, 1, 1, L - unpadded)
        if padding.shape[-1] > 0:  # the target sees the whole prefix without its padding
            bias = weight.new_zeros(len(padding), 1, 1, len(cos_sin))  # (B, 1, 1, S)
            bias[..., length - padding.shape[-1] : length].masked_fill_(padding, -torch.inf)
        return cos_sin, [*prefix_segments(layout), (tokens, len(cos_sin), bias)]

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> "MMDiT":
        """Load a transformer/ folder of the published layout; ValueError or FileNotFoundError name what is wrong."""
        config = config_from_json(MMDiTConfig, Path(directory) / "config.json")
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, directory, "diffusion_pytorch_model", dtype, device)
        return model

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write a transformer/ folder of the published layout, which diffusers reads too."""
        save_weights(self.state_dict(), directory, "diffusion_pytorch_model", dtype)
        save_config(self.config, Path(directory) / "config.json", "QwenImage21Transformer2DModel")
