"""The Qwen-Image-2.x autoencoder: pictures in, latents 16 times smaller out, and back.

A residual convolutional autoencoder, f16c64: four halvings of height and width, 64 latent channels; it reads and
writes RGBA. It descends from a causal VIDEO autoencoder and is used here for a single picture, so no axis of time is
left in this file but for two marks. The published file holds `time_conv` weights that a single frame never meets
(skipped by name, written back as zeros), and where the video network would halve or double the number of frames the
parameter-free shortcuts of a block still reckon with the frames that are not there (`Down.shortcut`, `Up.shortcut`).

    encoder   conv_in - Down x 5 - Mid - norm, SiLU, conv_out - quant_conv - 128 moments: mean and log variance
    decoder   post_quant_conv - conv_in - Mid - Up x 5 - norm, SiLU, conv_out

Module and parameter names are those of the published tensors, which is why some modules look deeper than they need.

Shapes: B pictures; C channels, H height and W width of the current level; o an output's channels; h, w those of the
latent grid, 1/16 of the picture's; z = 64 latent channels; d = C of the middle block.
Reference for behaviour: `AutoencoderKLQwenImage21` of diffusers 0.42.1; tests/test_vae.py holds us to it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from checkpoint.files import config_from_json, save_config
from checkpoint.weights import load_weights, save_weights
from program.ranges import Ranged, within

STEM = "diffusion_pytorch_model"  # file name of the weights in the published layout
ENCODED = 4 * 64 * 64  # latent pixels of a batch that are encoded at once; ours, for memory: four of 1024 x 1024
DECODED = 64 * 64  # latent pixels of each picture that are decoded at once


@dataclass
class VAEConfig(Ranged):
    """The keys of vae/config.json, with the published values as defaults (the latents' statistics excepted).

    ValueError names the key whose value is impossible, or asks for a network that is not built here.
    """

    base_dim: int = within(96, "[1, 4096]")  # channels of the encoder's first level
    decoder_base_dim: int | None = within(144, "[1, 4096]")  # of the decoder's last level; null: base_dim
    z_dim: int = within(64, "[1, 4096]")
    # Channels of a level / base_dim. Every level but the last halves the sides.
    dim_mult: tuple[int, ...] = within((1, 2, 4, 8, 8), "[1, 256]")
    num_res_blocks: int = within(2, "[1, 64]")  # in a level of the encoder; the decoder's levels have one more
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True, True)  # (sic) which halvings are of time, too
    dropout: float = 0.0
    # Mean and deviation of each latent channel over many pictures. The published 64 come with the checkpoint.
    latents_mean: tuple[float, ...] = within((0.0,) * 64, "[-1e6, 1e6]")
    latents_std: tuple[float, ...] = within((1.0,) * 64, "[1e-6, 1e6]")
    is_residual: bool = True
    in_channels: int = within(4, "[4, 4]")  # RGBA
    out_channels: int = within(4, "[4, 4]")
    patch_size: int | None = None
    scale_factor_temporal: int = 8  # this and the next only describe: what the network
    scale_factor_spatial: int = 16  # really does follows from dim_mult, see `factor`

    def __post_init__(self):
        super().__post_init__()
        if self.decoder_base_dim is None:
            self.decoder_base_dim = self.base_dim
        for key in ("dim_mult", "attn_scales", "temperal_downsample", "latents_mean", "latents_std"):
            setattr(self, key, tuple(getattr(self, key)))
        for key, built in {"is_residual": True, "attn_scales": (), "dropout": 0.0, "patch_size": None}.items():
            if getattr(self, key) != built:
                raise ValueError(f"{key} is {getattr(self, key)!r}; only {built!r}, as published, is built here")
        if not 2 <= len(self.dim_mult) <= 8:
            raise ValueError(f"dim_mult has {len(self.dim_mult)} levels; 2 to 8 are expected")
        lengths = {"temperal_downsample": len(self.dim_mult) - 1, "latents_mean": self.z_dim, "latents_std": self.z_dim}
        for key, length in lengths.items():
            if len(getattr(self, key)) != length:
                raise ValueError(f"{key} has {len(getattr(self, key))} values; by the other keys {length} are expected")
        # The shortcuts regroup channels, which works for whole groups only.
        rests = [c * 4**space * 2**time % o for c, o, space, time in self.encoder_levels()]
        rests += [o * 4 * 2**time % c for c, o, space, time in self.decoder_levels() if space]
        if any(rests):
            raise ValueError(f"dim_mult is {self.dim_mult}; the channels of two neighbours do not divide into groups")

    @property
    def factor(self) -> int:
        """Pixels of the picture per pixel of the latent grid and side; 16 as published."""
        return 2 ** (len(self.dim_mult) - 1)

    def encoder_levels(self) -> list[tuple[int, int, bool, bool]]:
        """(channels in, channels out, halves space, halves time) of every level, in the order of the forward pass."""
        return self._levels(self.base_dim, (1, *self.dim_mult), self.temperal_downsample)

    def decoder_levels(self) -> list[tuple[int, int, bool, bool]]:
        """(channels in, channels out, doubles space, doubles time) likewise: the encoder's mirror image."""
        multiples = (self.dim_mult[-1], *self.dim_mult[::-1])
        return self._levels(self.decoder_base_dim, multiples, self.temperal_downsample[::-1])

    def _levels(self, base: int, multiples: tuple[int, ...], times: tuple[bool, ...]):
        dims = [base * multiple for multiple in multiples]
        changes_space = [True] * len(times) + [False]
        changes_time = [*times, False]
        return list(zip(dims[:-1], dims[1:], changes_space, changes_time, strict=True))


class Norm(nn.Module):
    """x / rms(x over channels) * gamma: the direction of every pixel's channel vector, rescaled."""

    def __init__(self, dim: int, ones: int = 3):
        super().__init__()
        # The published gamma keeps the video's axes: (C, 1, 1, 1), in the attention (C, 1, 1).
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * ones))

    def forward(self, x: Tensor) -> Tensor:
        # The length stays fp32 up to the division: rounded to bf16 it would be off for all of a pixel's channels alike.
        # Clamped, so that a zero pixel stays zero.
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)  # (B, 1, H, W)
        scale = x.shape[1] ** 0.5 / length.clamp(min=1e-12)  # (B, 1, H, W)
        gamma = self.gamma.view(-1, 1, 1).to(x.dtype)  # (C, 1, 1); under autocast it is fp32 and would promote x
        return x * scale.to(x.dtype) * gamma  # (B, C, H, W)


class Resnet(nn.Module):
    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm1 = Norm(dim)
        self.conv1 = nn.Conv2d(dim, out_dim, 3, padding=1)
        self.norm2 = Norm(out_dim)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(dim, out_dim, 1) if dim != out_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))  # (B, o, H, W)
        y = self.conv2(F.silu(self.norm2(y)))  # (B, o, H, W)
        return y + self.conv_shortcut(x)  # (B, o, H, W)


class GridAttention(nn.Module):
    """One head as wide as the channels; every pixel of the latent grid sees every other."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = Norm(dim, ones=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x))  # (B, 3d, h, w)
        q, k, v = rearrange(qkv, "b (three d) h w -> three b 1 (h w) d", three=3)  # (B, 1, hw, d) each
        # Some pixels after the other, because the fused kernels stop at 256 channels a head: here a GPU may write out
        # all scores, and a picture of 2048 x 2048 pixels has 16,384^2 of them.
        y = [F.scaled_dot_product_attention(part, k, v) for part in q.split(4096, 2)]  # each (B, 1, 4096 or less, d)
        y = torch.cat(y, 2)  # (B, 1, hw, d)
        y = rearrange(y, "b 1 (h w) d -> b d h w", h=x.shape[2])  # (B, d, h, w)
        return x + self.proj(y)  # (B, d, h, w)


class Mid(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.attentions = nn.ModuleList([GridAttention(dim)])
        self.resnets = nn.ModuleList([Resnet(dim, dim), Resnet(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)  # (B, d, h, w)
        x = self.attentions[0](x)  # (B, d, h, w)
        return self.resnets[1](x)  # (B, d, h, w)


def resample(first: nn.Module, conv: nn.Conv2d) -> nn.ModuleDict:
    """A change of size, then a convolution, under the published name `resample.1`."""
    return nn.ModuleDict({"resample": nn.Sequential(first, conv)})


class Down(nn.Module):
    """Residual blocks, then half the height and width (but not in the last level); a shortcut without weights."""

    def __init__(self, num_res_blocks: int, dim: int, out_dim: int, halves_space: bool, halves_time: bool):
        super().__init__()
        self.out_dim = out_dim
        self.halves_space = halves_space
        self.halves_time = halves_time
        self.resnets = nn.ModuleList(Resnet(dim if i == 0 else out_dim, out_dim) for i in range(num_res_blocks))
        if halves_space:
            # Zeros to the right and below only: output i looks at pixels 2i to 2i + 2. padding=1 would start at 2i - 1.
            self.downsampler = resample(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(out_dim, out_dim, 3, stride=2))

    def shortcut(self, x: Tensor) -> Tensor:
        """Space (and time) to channels, ordered (channel, frame, row, column); then means of consecutive groups.

        Of two frames our picture is the SECOND, after one of zeros. So where the channels double (groups of 4) even
        outputs are zero and odd ones plain 2 x 2 means; where they stay (groups of 8) the zeros count in the division.
        """
        side = 2 if self.halves_space else 1
        x = rearrange(x, "b c (h p) (w q) -> b c (p q) h w", p=side, q=side)  # (B, C, 4, H/2, W/2)
        if self.halves_time:
            x = F.pad(x, (0, 0, 0, 0, 4, 0))  # (B, C, 8, H/2, W/2)
        return x.flatten(1, 2).unflatten(1, (self.out_dim, -1)).mean(2)  # (B, o, H/2, W/2)

    def forward(self, x: Tensor) -> Tensor:
        y = x  # (B, C, H, W)
        for resnet in self.resnets:
            y = resnet(y)  # (B, o, H, W)
        if self.halves_space:
            y = self.downsampler["resample"](y)  # (B, o, H/2, W/2)
        return y + self.shortcut(x)  # (B, o, H/2, W/2)


class Up(nn.Module):
    """Residual blocks, then twice the height and width; a shortcut without weights. The last level has neither."""

    def __init__(self, num_res_blocks: int, dim: int, out_dim: int, doubles_space: bool, doubles_time: bool):
        super().__init__()
        self.out_dim = out_dim
        self.doubles_space = doubles_space
        self.doubles_time = doubles_time
        self.resnets = nn.ModuleList(Resnet(dim if i == 0 else out_dim, out_dim) for i in range(num_res_blocks + 1))
        if doubles_space:
            conv = nn.Conv2d(out_dim, out_dim, 3, padding=1)
            self.upsampler = resample(nn.Upsample(scale_factor=2, mode="nearest-exact"), conv)

    def shortcut(self, x: Tensor) -> Tensor:
        """Every channel repeated, then spread as (channel, frame, row, column) over space (and time).

        Of two frames the FIRST is dropped. So where the channels halve, output c copies input 2c + 1.
        """
        frames = 2 if self.doubles_time else 1
        x = repeat(x, "b c h w -> b (c r) h w", r=self.out_dim * frames * 4 // x.shape[1])  # (B, o f 4, H, W)
        x = x.unflatten(1, (self.out_dim, frames, 2, 2))[:, :, -1]  # (B, o, 2, 2, H, W)
        return rearrange(x, "b c p q h w -> b c (h p) (w q)")  # (B, o, 2H, 2W)

    def forward(self, x: Tensor) -> Tensor:
        y = x  # (B, C, H, W)
        for resnet in self.resnets:
            y = resnet(y)  # (B, o, H, W)
        if self.doubles_space:
            y = self.upsampler["resample"](y) + self.shortcut(x)  # (B, o, 2H, 2W)
        return y  # (B, o, 2H, 2W)


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        levels = config.encoder_levels()
        dim = levels[0][0]
        out_dim = levels[-1][1]
        self.conv_in = nn.Conv2d(config.in_channels, dim, 3, padding=1)
        self.down_blocks = nn.ModuleList(Down(config.num_res_blocks, *level) for level in levels)
        self.mid_block = Mid(out_dim)
        self.norm_out = Norm(out_dim)
        self.conv_out = nn.Conv2d(out_dim, 2 * config.z_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # (B, C, H, W)
        for block in self.down_blocks:
            x = block(x)  # (B, o, H/2, W/2)
        x = self.mid_block(x)  # (B, d, h, w)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 2z, h, w)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        levels = config.decoder_levels()
        dim = levels[0][0]
        out_dim = levels[-1][1]
        self.conv_in = nn.Conv2d(config.z_dim, dim, 3, padding=1)
        self.mid_block = Mid(dim)
        self.up_blocks = nn.ModuleList(Up(config.num_res_blocks, *level) for level in levels)
        self.norm_out = Norm(out_dim)
        self.conv_out = nn.Conv2d(out_dim, config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Pictures (B, 4, H, W), of at most DECODED latent pixels at once: strips of whole rows, one after the other.

        The strips are exact, not blended. Up to the middle block every pixel depends on every other, but that is done
        for the whole grid: it is small. After it come only convolutions (the norms look at one pixel), which reach a
        known way. So each level of a strip is given that many more rows of the level below than it must deliver.
        """
        x = self.mid_block(self.conv_in(z))  # (B, d, h, w)
        rows = max(1, DECODED // x.shape[3])
        strips = [self.strip(x, start, start + rows) for start in range(0, x.shape[2], rows)]
        return torch.cat(strips, 2)  # (B, 4, H, W)

    def strip(self, x: Tensor, start: int, stop: int) -> Tensor:
        """The part of the picture that belongs to the rows [start, stop) of the grid x (B, d, h, w)."""
        margins = [1]  # the rows that conv_out sees beyond its own, and before it those that each level must be given
        for block in reversed(self.up_blocks):
            # One more for the upsampler's kernel.
            doubled = (margins[0] + 2) // 2 if block.doubles_space else margins[0]
            margins.insert(0, doubled + 2 * len(block.resnets))
        top = 0  # the row where x begins; start, stop and top are rows of x, which become finer

        for block, margin in zip(self.up_blocks, margins[:-1], strict=True):
            above = max(start - margin, 0)  # the picture's own edges stay edges
            x = block(x[:, :, above - top : stop + margin - top])  # (B, o, 2H, 2W)
            top = above
            if block.doubles_space:
                start, stop, top = 2 * start, 2 * stop, 2 * top
        above = max(start - margins[-1], 0)
        x = x[:, :, above - top : stop + margins[-1] - top]  # (B, C, H, W)
        x = self.conv_out(F.silu(self.norm_out(x)))  # (B, 4, H, W)
        return x[:, :, start - above : stop - above]  # (B, 4, H, W)


class VAE(nn.Module):
    """`moments` and `decode_raw` are the bare networks, for whoever trains one; `encode` and `decode` speak the
    normalised latents that the MMDiT sees. All four are differentiable."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (B, 64, H/16, W/16) of the posterior, not normalised.

        images (B, 4, H, W) in [-1, 1], in the weights' dtype; ValueError where a side is no multiple of 16.
        """
        factor, channels = self.config.factor, self.config.in_channels
        if images.ndim != 4 or images.shape[1] != channels or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"images {tuple(images.shape)}: (B, {channels}, H, W) is expected, H and W multiples of {factor}"
            )
        return self.quant_conv(self.encoder(images)).chunk(2, dim=1)  # (B, z, h, w) each

    def decode_raw(self, z: Tensor) -> Tensor:
        """images (B, 4, 16h, 16w), not clamped, of latents z (B, 64, h, w) that are not normalised."""
        return self.decoder(self.post_quant_conv(z))  # (B, 4, 16h, 16w)

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 4, H, W) in [-1, 1] -> latents (B, 64, H/16, W/16): the posterior's mode, normalised.

        Large pictures are encoded a few at a time: 32 of 1024 x 1024 at once would take 33 GB in bf16. Whatever the dtype
        given, the weights' dtype comes back. ValueError as in `moments`.
        """
        at_once = max(1, ENCODED * self.config.factor**2 // (images.shape[-2] * images.shape[-1]))
        parts = images.to(self.quant_conv.weight.dtype).split(at_once)  # each (at_once or less, 4, H, W)
        mean = torch.cat([self.moments(part)[0] for part in parts])  # (B, z, h, w)
        center, std = self.statistics(mean.device)  # (z, 1, 1) each
        return ((mean - center) / std).to(mean.dtype)  # (B, z, h, w)

    def decode(self, latents: Tensor) -> Tensor:
        """normalised latents (B, 64, h, w) -> images (B, 4, 16h, 16w) around [-1, 1]; clamping is left to the caller.

        Whatever the dtype given, the weights' dtype comes back.
        """
        center, std = self.statistics(latents.device)  # (z, 1, 1) each
        return self.decode_raw((latents * std + center).to(self.quant_conv.weight.dtype))  # (B, 4, 16h, 16w)

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents, (64, 1, 1) each. In fp32, which promotes whatever they meet."""
        stats = torch.tensor([self.config.latents_mean, self.config.latents_std], device=device)  # (2, z)
        return stats[0, :, None, None], stats[1, :, None, None]  # (z, 1, 1) each

    def video_weights(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the published tensors that only a second frame would meet."""
        shapes = {}
        for number, (_, dim, _, time) in enumerate(self.config.encoder_levels()):
            if time:
                name = f"encoder.down_blocks.{number}.downsampler.time_conv"
                shapes |= {f"{name}.weight": (dim, dim, 1, 1), f"{name}.bias": (dim,)}
        for number, (_, dim, _, time) in enumerate(self.config.decoder_levels()):
            if time:  # one frame becomes two
                name = f"decoder.up_blocks.{number}.upsampler.time_conv"
                shapes |= {f"{name}.weight": (2 * dim, dim, 1, 1), f"{name}.bias": (2 * dim,)}
        return shapes

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> "VAE":
        """Open the vae/ folder of a checkpoint in the published layout: frozen, in evaluation mode, with the channels of a
        pixel side by side in memory, as convolutions like it (on a CPU: half the time in fp32).

        Strict: FileNotFoundError or ValueError name the file and the key or tensor that is missing, unknown or wrong.
        """
        config = config_from_json(VAEConfig, Path(directory) / "config.json")
        with torch.device("meta"):
            vae = cls(config)
        unused = tuple(re.escape(name) for name in vae.video_weights())
        load_weights(vae, directory, STEM, dtype, device, skip=unused)
        return vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and the weights, those of the video as zeros: what diffusers does not find in the file it
        leaves on the meta device, and the network can then be moved nowhere."""
        unused = {name: torch.zeros(shape) for name, shape in self.video_weights().items()}
        save_weights({**self.state_dict(), **unused}, directory, STEM, dtype)
        save_config(self.config, Path(directory) / "config.json", "AutoencoderKLQwenImage21")
