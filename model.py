"""The MMDiT of Qwen-Image-2.x: one network that is teacher, student and fake score.

One sequence holds the prompt's states, the source pictures' latents where the prompt names them, and the target's noisy
latents at the end. Attention is block-causal: text sees what stands before it, a picture also itself, the target
everything. So nothing in the PREFIX (text and sources) depends on the target, and with `causal_condition` not on the
time either; that is why the two are carried as two tensors here, and why the prefix can be computed once and kept.

Conventions: z_t = (1 - t) x + t eps, t = 1 is noise, v = eps - x. Latents outside are grids (B, 64, h, w), inside they
are tokens in row-major order. Parameter names are those of the published files.

    B  samples in the batch             D  width, H * d
    L  language-model states            H  attention heads
    P  prefix tokens (text + sources)   d  channels of one head
    N  target tokens, h * w             n  query tokens of one attention call
    S  all tokens, P + N                m  keys these may see
"""

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Prefix = list[tuple[Tensor, Tensor]]  # for every block, keys and values (B, H, P, d) of text and sources


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
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)  # head dims turned by frame, height and width
    eps: float = 1e-6
    causal_condition: bool = True  # text and sources are modulated as at t = 0, so their keys do not depend on t

    def __post_init__(self):
        if self.patch_size != 1:
            raise ValueError(f"patch_size {self.patch_size}: only 1 is known (one token per latent pixel)")
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(d % 2 for d in self.axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope {list(self.axes_dims_rope)}: three even numbers that sum to attention_head_dim "
                f"({self.attention_head_dim}) are needed"
            )

    @classmethod
    def from_json(cls, path: str | Path) -> "MMDiTConfig":
        return config_from_json(cls, path)


# ----------------------------------------------------------------------------------------------------------------------
# The condition, and where its tokens stand


@dataclass
class Condition:
    """What the network is told: the language model's states of the prompt, and the source pictures' latents.

    One layout serves the whole batch: slots and source sizes are the same in every sample. Sources stand in the order
    of the prompt; each replaces its run of `<|image_pad|>` states, four latent tokens to a slot. ValueError otherwise.
    """

    states: Tensor  # (B, L, context_in_dim), zero-padded on the right
    mask: Tensor  # (B, L) bool, True where a token is real
    sources: list[Tensor]  # each (B, 64, h_i, w_i), normalised latents; [] for text to image
    slots: list[tuple[int, int]]  # [start, stop) along L of each source's run

    def __post_init__(self):
        length = self.states.shape[1]
        if self.mask.dtype != torch.bool or self.mask.shape != self.states.shape[:2]:
            raise ValueError(f"mask: bool of shape {tuple(self.states.shape[:2])} is expected, as the states have")
        if len(self.sources) != len(self.slots):
            raise ValueError(f"{len(self.sources)} sources, but slots for {len(self.slots)}")
        # The prefix in order: (start, stop, None) a run of states, (start, stop, (h, w)) a source in their place.
        self.pieces: list[tuple[int, int, tuple[int, int] | None]] = []
        cursor = 0
        for source, (start, stop) in zip(self.sources, self.slots, strict=True):
            h, w = source.shape[-2:]
            if not cursor <= start < stop <= length or 4 * (stop - start) != h * w:
                raise ValueError(f"slots [{start}, {stop}) of {length} states cannot hold a source of {h} x {w} tokens")
            self.pieces += [(cursor, start, None)] * (start > cursor) + [(start, stop, (h, w))]
            cursor = stop
        self.pieces += [(cursor, length, None)] * (length > cursor)
        # How many leading states are real in EVERY sample: whoever sees only those needs no mask. Read once here,
        # because every look at a tensor's values makes the host wait for the device.
        real = self.mask.all(0).tolist()
        self.clean = real.index(False) if False in real else length

    def to(self, device: str | torch.device, dtype: torch.dtype) -> "Condition":
        sources = [source.to(device, dtype) for source in self.sources]
        return Condition(self.states.to(device, dtype), self.mask.to(device), sources, self.slots)


@lru_cache(maxsize=64)
def rope_table(
    layout: tuple[int | tuple[int, int], ...], axes: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (S, 1, d/2) fp32, of a sequence's rotary angles, kept for the next call with the same layout.

    layout: in order, n for a run of n text tokens, (h, w) for a picture. Text advances one counter, which is its
    position on all three axes. A picture stands at the counter on the frame axis, its rows and columns on a grid centred
    on zero; then the counter advances by its longer side.
    """
    positions, counter = [], 0
    with torch.inference_mode(False), torch.device("cpu"):  # a table born in inference mode could never train
        for piece in layout:
            if isinstance(piece, int):
                positions.append(torch.arange(counter, counter + piece)[:, None].expand(-1, 3))  # (n, 3)
                counter += piece
            else:
                h, w = piece
                rows, columns = torch.arange(h) - (h - h // 2), torch.arange(w) - (w - w // 2)  # (h,), (w,)
                positions.append(torch.cartesian_prod(torch.tensor([counter]), rows, columns))  # (h w, 3)
                counter += max(h, w)
        positions = torch.cat(positions)  # (S, 3)
        frequencies = [1.0 / 10000.0 ** (torch.arange(0, n, 2, dtype=torch.float32) / n) for n in axes]  # 3 x (n/2,)
        angles = torch.cat([positions[:, i : i + 1] * f for i, f in enumerate(frequencies)], 1)[:, None]  # (S, 1, d/2)
        return angles.cos().to(device), angles.sin().to(device)


def segments(condition: Condition, tokens: int, dtype: torch.dtype) -> tuple[list, list]:
    """The block-causal structure, once per forward: for the prefix and for a target of `tokens`, lists of
    (query rows, keys they see from the first on, bias (B or 1, 1, rows or 1, keys) on their scores or None).

    Only text has a triangle of its own; a picture's queries all see the same keys, so they need no mask but that of
    padded text, one row for all of them.
    """
    mask = condition.mask
    real = [mask[:, a:b] if grid is None else mask.new_ones(len(mask), 4 * (b - a)) for a, b, grid in condition.pieces]
    real = torch.cat([*real, mask.new_ones(len(mask), tokens)], 1)  # (B, S)

    def bias(seen: Tensor) -> Tensor:
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None]

    prefix, end = [], 0
    for start, stop, grid in condition.pieces:
        rows = stop - start if grid is None else 4 * (stop - start)
        end += rows
        seen = real[:, None, :end] if stop > condition.clean else None  # (B, 1, m)
        if grid is None:
            triangle = mask.new_ones(rows, end).tril(end - rows)  # (n, m)
            # Every query may see itself: with nothing to see, a padded one would be 0 / 0 and poison the gradients.
            seen = triangle[None] if seen is None else triangle & seen | triangle.triu(end - rows)  # (B or 1, n, m)
        prefix.append((rows, end, None if seen is None else bias(seen)))
    padded = condition.clean < mask.shape[1]
    return prefix, [(tokens, end + tokens, bias(real[:, None]) if padded else None)]


# ----------------------------------------------------------------------------------------------------------------------
# The network


class Modulation(NamedTuple):
    """The factors all blocks share, each (B, 1, D), or (1, 1, D) at t = 0: 1 + scale, and tanh(gate)."""

    scale1: Tensor
    gate1: Tensor
    scale2: Tensor
    gate2: Tensor


@dataclass
class Part:
    """What the blocks know of the prefix, or of the target, beside its tokens. No pytree, on purpose: FSDP's mixed
    precision casts every tensor it finds among a block's arguments, and angles in bf16 would ruin positions."""

    modulation: Modulation
    rope: tuple[Tensor, Tensor]  # cos and sin, each (n, 1, d/2) fp32
    segments: list[tuple[int, int, Tensor | None]]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the adjacent channel pairs (a, b) of x (B, n, H, d) by their token's angles, in fp32."""
    cos, sin = rope  # 2 x (n, 1, d/2)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # 2 x (B, n, H, d/2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)  # (B, n, H, d)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention of q (B, H, n, d) over k, v (B, H, m, d); bias is added to the scores (-inf hides a key)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        # The fused form's bf16 backward is several times slower on the CPU than three plain products.
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, n, m)
        scores = scores if bias is None else scores + bias  # (B, H, n, m)
        return scores.softmax(-1) @ v  # (B, H, n, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, H, n, d)


class Attention(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.head_dim = config.attention_head_dim
        width = config.num_attention_heads * config.attention_head_dim
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.norm_q = nn.RMSNorm(self.head_dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(self.head_dim, eps=config.eps)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])

    def forward(self, x: Tensor, part: Part, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (to(x).unflatten(-1, (-1, self.head_dim)) for to in (self.to_q, self.to_k, self.to_v))  # (B, n, H, d)
        q = rotate(self.norm_q(q), part.rope).transpose(1, 2)  # (B, H, n, d)
        k = rotate(self.norm_k(k), part.rope).transpose(1, 2)  # (B, H, n, d)
        v = v.transpose(1, 2)  # (B, H, n, d)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)  # (B, H, S, d)
        # Block-causal attention without a mask of image tokens: each segment's queries meet the keys up to its end.
        rows = q.split([n for n, _, _ in part.segments], 2)  # each (B, H, n, d)
        out = [attend(q, k[:, :, :m], v[:, :, :m], bias) for q, (_, m, bias) in zip(rows, part.segments, strict=True)]
        out = torch.cat(out, 2).transpose(1, 2).flatten(2)  # (B, n, D)
        return self.to_out[0](out), (k, v)  # (B, n, D)


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

    def forward(
        self, prefix: Tensor | None, target: Tensor | None, parts: tuple[Part, Part], past: tuple | None
    ) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor]]:
        """Both parts' tokens (B, P, D) and (B, N, D), and the prefix's keys and values, which `past` gives instead of
        the prefix. One call for both, so that sharded weights are gathered once."""
        if past is None:
            prefix, past = self.step(prefix, parts[0], None)  # (B, P, D), 2 x (B, H, P, d)
        if target is not None:
            target, _ = self.step(target, parts[1], past)  # (B, N, D)
        return prefix, target, past

    def step(self, x: Tensor, part: Part, past: tuple | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mod = part.modulation

        h = F.layer_norm(x, x.shape[-1:], eps=self.eps) * mod.scale1  # (B, n, D)
        h, keys = self.attn(h, part, past)  # (B, n, D)
        x = torch.addcmul(x, mod.gate1, h)  # (B, n, D)

        h = F.layer_norm(x, x.shape[-1:], eps=self.eps) * mod.scale2  # (B, n, D)
        x = torch.addcmul(x, mod.gate2, self.img_mlp(h))  # (B, n, D)
        return x, keys


class TimeEmbedding(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(256, width, bias=False)
        self.linear_2 = nn.Linear(width, width, bias=False)

    def forward(self, t: Tensor) -> Tensor:
        dtype = self.linear_1.weight.dtype
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        # The published networks see t in the weights' type: in bf16 it comes in steps of 1/256 near 1.
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
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), self.eps).to(x.dtype)  # (B, n, C)


class TextIn(nn.Module):
    def __init__(self, context: int, width: int, eps: float):
        super().__init__()
        self.text_norm = TextNorm(context, eps)
        self.in_layer = nn.Linear(context, width, bias=False)
        self.out_layer = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.gelu(self.in_layer(self.text_norm(x)), approximate="tanh"))  # (B, n, D)


class MMDiT(nn.Module):
    """The velocity v = eps - x of noisy latents, given a Condition. `gradient_checkpointing = True` trades time for
    memory: each block's inside is computed again in the backward pass."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        width = config.num_attention_heads * config.attention_head_dim
        self.config = config
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
        """Fresh weights. Linears keep the variance of their input; gates at zero make every block begin as the
        identity, and v begins at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for module in (self.modulation[1], self.norm_out["linear"], self.proj_out):
            nn.init.zeros_(module.weight)

    def forward(self, z: Tensor, t: Tensor, condition: Condition, prefix: Prefix | None = None) -> Tensor:
        """Velocity (B, out_channels, h, w), in the weights' dtype, at latents z (B, in_channels, h, w) and times
        t (B,) in [0, 1]. `prefix`: what `self.prefix(condition)` returned, to spare computing text and sources again."""
        h, w = z.shape[-2:]
        x = self.img_in(rearrange(z, "b c h w -> b (h w) c").to(self.img_in.weight.dtype))  # (B, N, D)
        modulation, scale_out = self.modulate(t)  # 4 x (B, 1, D), (B, 1, D)
        parts = self.parts(condition, (h, w), modulation)
        kept = self.tokens(condition) if prefix is None else None  # (B, P, D)
        for i, block in enumerate(self.transformer_blocks):
            kept, x, _ = self.run(block, kept, x, parts, None if prefix is None else prefix[i])  # (B, P, D), (B, N, D)
        x = F.layer_norm(x, x.shape[-1:], eps=self.config.eps) * scale_out  # (B, N, D)
        return rearrange(self.proj_out(x), "b (h w) c -> b c h w", h=h, w=w)  # (B, out_channels, h, w)

    def prefix(self, condition: Condition) -> Prefix:
        """Every block's keys and values of text and sources. With causal_condition these depend on no time and no
        target, so one prefix serves all steps and is exact; without it this is a ValueError."""
        if not self.config.causal_condition:
            raise ValueError("a prefix depends on the time step where the config says causal_condition false")
        parts = self.parts(condition, (0, 0), None)
        x, prefix = self.tokens(condition), []  # (B, P, D)
        for block in self.transformer_blocks:
            x, _, keys = self.run(block, x, None, parts, None)  # (B, P, D), 2 x (B, H, P, d)
            prefix.append(keys)
        return prefix

    def run(self, block: Block, *arguments):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        return block(*arguments)

    def modulate(self, t: Tensor) -> tuple[Modulation, Tensor]:
        time = self.time_text_embed["timestep_embedder"](t)  # (B, D)
        scale1, gate1, scale2, gate2 = self.modulation(time)[:, None].chunk(4, -1)  # each (B, 1, D)
        scale_out = self.norm_out["linear"](F.silu(time))[:, None]  # (B, 1, D)
        return Modulation(1 + scale1, gate1.tanh(), 1 + scale2, gate2.tanh()), 1 + scale_out

    def tokens(self, condition: Condition) -> Tensor:
        """The prefix's tokens (B, P, D): text, and each source in the place of its slots."""
        dtype = self.img_in.weight.dtype
        text = [condition.states[:, start:stop] for start, stop, grid in condition.pieces if grid is None]
        runs = iter(self.txt_in(torch.cat(text, 1).to(dtype)).split([run.shape[1] for run in text], 1))  # (B, n, D)
        sources = (self.img_in(rearrange(s, "b c h w -> b (h w) c").to(dtype)) for s in condition.sources)  # (B, n, D)
        return torch.cat([next(runs if grid is None else sources) for *_, grid in condition.pieces], 1)  # (B, P, D)

    def parts(self, condition: Condition, grid: tuple[int, int], modulation: Modulation | None) -> tuple[Part, Part]:
        weight, tokens = self.img_in.weight, grid[0] * grid[1]
        layout = tuple(g or b - a for a, b, g in condition.pieces)
        cos, sin = rope_table((*layout, grid), self.config.axes_dims_rope, weight.device)  # 2 x (S, 1, d/2)
        seen_prefix, seen_target = segments(condition, tokens, weight.dtype)
        cut = len(cos) - tokens
        # With causal_condition text and sources live at t = 0, whatever the step.
        zero = self.modulate(torch.zeros(1, device=weight.device))[0] if self.config.causal_condition else modulation
        return (
            Part(zero, (cos[:cut], sin[:cut]), seen_prefix),
            Part(modulation, (cos[cut:], sin[cut:]), seen_target),
        )

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> "MMDiT":
        """Load a transformer/ folder of the published layout; FileNotFoundError or ValueError name what is wrong."""
        config = MMDiTConfig.from_json(Path(directory) / "config.json")
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, directory, "diffusion_pytorch_model", dtype, device)
        return model

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write a transformer/ folder of the published layout, which diffusers reads too."""
        save_weights(self.state_dict(), directory, "diffusion_pytorch_model", dtype)
        save_config(self.config, Path(directory) / "config.json", "QwenImage21Transformer2DModel")


# ----------------------------------------------------------------------------------------------------------------------
# Files: strict in both directions, and every error names the file and the key or tensor


def read_json(path: str | Path) -> dict:
    """Read a file that holds one JSON object. FileNotFoundError or ValueError name the file (and line)."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint in the published layout has it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content


def config_from_json(cls: type, path: str | Path):
    """Build the dataclass `cls` from a JSON file that has exactly its fields as keys.

    Keys that begin with "_" are the writing library's notes and are ignored; lists become tuples; a value must have
    the type of the field's default (an int may stand for a float). Otherwise ValueError names file and key.
    """
    content = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
    known = {field.name: field.default for field in fields(cls)}
    for key in content:
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}; {cls.__name__} knows {', '.join(known)}")
    for key, default in known.items():
        if key not in content:
            raise ValueError(f"{path}: key {key!r} is missing")
        value = content[key] = _tuples(content[key])
        fits = type(value) is type(default) or (type(default) is float and type(value) is int)
        if default is not MISSING and default is not None and not fits:
            raise ValueError(f"{path}: {key} is {value!r}, a {type(default).__name__} is expected")
    try:
        return cls(**content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def load_weights(
    module: nn.Module,
    directory: str | Path,
    stem: str,
    dtype: torch.dtype,
    device: str | torch.device,
    skip: tuple[str, ...] = (),
) -> None:
    """Fill `module`, built on the meta device, with `{stem}.safetensors` or the shards of `{stem}.safetensors.index.json`.

    Strict: the files hold exactly the module's tensors, in its shapes. `skip`: regular expressions (full match) of
    tensors that are in the files and have no use here. Tensors are mapped from disk and placed one at a time, so the
    peak is the model itself. FileNotFoundError or ValueError name file and tensor.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such folder")
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise ValueError(f"{directory}: holds both {single.name} and {index.name}; delete the stale one")
    if not single.is_file() and not index.is_file():
        raise FileNotFoundError(f"{directory}: holds neither {single.name} nor {index.name}")

    listed = None  # {tensor: file name}, where an index says so
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ValueError(f"{index}: weight_map is missing or empty")
        for tensor, name in listed.items():
            # Compared as text, not resolved: download caches keep their shards as links that lead elsewhere.
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index}: {tensor} is said to be in {name!r}, which is no file of this folder")
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory / name}: no such file, but {index.name} names it for {tensor}")
    paths = [single] if listed is None else [directory / name for name in sorted(set(listed.values()))]

    wanted = module.state_dict()
    found: dict[str, Path] = {}
    for path in paths:
        with _open(path) as file:
            for name in file.keys():
                if listed is not None and listed.get(name) != path.name:
                    raise ValueError(f"{path}: holds {name}, which {index.name} does not place there")
                if any(re.fullmatch(pattern, name) for pattern in skip):
                    continue
                if name not in wanted:
                    raise ValueError(f"{path}: unexpected tensor {name}; {type(module).__name__} has none of that name")
                shape, expected = tuple(file.get_slice(name).get_shape()), tuple(wanted[name].shape)
                if shape != expected:
                    raise ValueError(f"{path}: {name} has shape {shape}, {expected} is expected from the config")
                found[name] = path
    for name in wanted:
        if name not in found:
            raise ValueError(f"{single if listed is None else index}: tensor {name} is missing")

    for path in paths:
        with _open(path) as file:
            for name in (name for name in found if found[name] == path):
                tensor = file.get_tensor(name)
                tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
                owner, _, leaf = name.rpartition(".")
                owner = module.get_submodule(owner)
                old = getattr(owner, leaf)
                is_parameter = isinstance(old, nn.Parameter)
                setattr(owner, leaf, nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor)


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}); fetch or write it again") from None


def save_weights(
    state: dict[str, Tensor], directory: str | Path, stem: str, dtype: torch.dtype, shard_bytes: int = 5 * 10**9
) -> None:
    """Write `state` ({name: tensor}) as `{stem}.safetensors`, or as shards with an index when over `shard_bytes`.

    Files are written beside and renamed: a reader (or our own mapped weights) never sees half a file.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        bytes_ = tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.itemsize)
        if shards[-1] and size + bytes_ > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    width = len(shards)
    names = [f"{stem}.safetensors"] if width == 1 else [f"{stem}-{i + 1:05}-of-{width:05}.safetensors" for i in range(width)]
    for name, shard in zip(names, shards, strict=True):
        tensors = {k: state[k].detach().to(dtype if state[k].is_floating_point() else state[k].dtype) for k in shard}
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, directory / f"{name}.part", {"format": "pt"})
        os.replace(directory / f"{name}.part", directory / name)
    written = set(names)
    if width > 1:
        total = sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.itemsize) for t in state.values())
        weight_map = {k: name for name, shard in zip(names, shards, strict=True) for k in shard}
        write_json(directory / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
        written.add(f"{stem}.safetensors.index.json")
    for old in directory.glob(f"{stem}*.safetensors*"):  # an earlier save in another number of files
        if old.name not in written:
            old.unlink()


def write_json(path: str | Path, content: dict) -> None:
    """Write one JSON object, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def save_config(config, path: str | Path, class_name: str) -> None:
    """Write a config dataclass as the published config.json; `class_name` is the diffusers class that reads it."""
    write_json(path, {"_class_name": class_name, **asdict(config)})
