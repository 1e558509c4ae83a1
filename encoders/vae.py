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

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn


@dataclass
class VAEConfig:
    """The keys of vae/config.json, with the published values as defaults.

    Raises ValueError where a value asks for a network that this file does not build.
    """

    base_dim: int = 96  # channels of the encoder's first level
    decoder_base_dim: int | None = 144  # channels of the decoder's last level; None: base_dim
    z_dim: int = 64
    dim_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 8])  # channels of a level / base_dim
    num_res_blocks: int = 2  # per level in the encoder; the decoder has one more
    attn_scales: list[float] = field(default_factory=list)
    temperal_downsample: list[bool] = field(default_factory=lambda: [False, True, True, True])  # the field's spelling
    dropout: float = 0.0
    # Statistics of the mean over pictures, one number per channel. The published 64 live in the checkpoint's config.
    latents_mean: list[float] = field(default_factory=lambda: [0.0] * 64)
    latents_std: list[float] = field(default_factory=lambda: [1.0] * 64)
    is_residual: bool = True
    in_channels: int = 4
    out_channels: int = 4
    patch_size: int | None = None
    scale_factor_temporal: int | None = 8  # these two only describe: the true factor follows from dim_mult
    scale_factor_spatial: int | None = 16


class Norm(nn.Module):
    """x / rms(x over channels) * gamma: the direction of every pixel's channel vector, rescaled."""

    def __init__(self, dim: int, ones: int = 3):
        super().__init__()
        # The published gamma keeps the video's axes: (C, 1, 1, 1), in the attention (C, 1, 1).
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * ones))

    def forward(self, x: Tensor) -> Tensor:
        # Only the lengths need fp32: sums of squares lose too much in bf16. Clamped, so that a zero pixel stays zero.
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)  # (B, 1, H, W)
        scale = x.shape[1] ** 0.5 / length.clamp(min=1e-12)  # (B, 1, H, W)
        return x * scale.to(x.dtype) * self.gamma.view(-1, 1, 1).to(x.dtype)  # (B, C, H, W)


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


class Attention(nn.Module):
    """One head as wide as the channels; every pixel of the latent grid sees every other."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = Norm(dim, ones=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x))  # (B, 3d, h, w)
        q, k, v = rearrange(qkv, "b (three d) h w -> three b 1 (h w) d", three=3)  # (B, 1, hw, d) each
        y = F.scaled_dot_product_attention(q, k, v)  # (B, 1, hw, d)
        y = rearrange(y, "b 1 (h w) d -> b d h w", h=x.shape[2])  # (B, d, h, w)
        return x + self.proj(y)  # (B, d, h, w)


class Mid(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(dim)])
        self.resnets = nn.ModuleList([Resnet(dim, dim), Resnet(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)  # (B, d, h, w)
        x = self.attentions[0](x)  # (B, d, h, w)
        return self.resnets[1](x)  # (B, d, h, w)


class Resample(nn.Module):
    """A change of size, then a convolution, under the published name `resample.1`."""

    def __init__(self, first: nn.Module, conv: nn.Conv2d):
        super().__init__()
        self.resample = nn.Sequential(first, conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)  # (B, C, H/2, W/2) or (B, C, 2H, 2W)


class Down(nn.Module):
    """Residual blocks, then (but in the last level) half the height and width, around a shortcut without weights."""

    def __init__(self, dim: int, out_dim: int, num_res_blocks: int, halves_space: bool, halves_time: bool):
        super().__init__()
        self.out_dim, self.halves_space, self.halves_time = out_dim, halves_space, halves_time
        self.resnets = nn.ModuleList(Resnet(dim if i == 0 else out_dim, out_dim) for i in range(num_res_blocks))
        if halves_space:
            # The zeros go right and bottom only: a symmetric padding would shift the picture by half a pixel.
            self.downsampler = Resample(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(out_dim, out_dim, 3, stride=2))

    def shortcut(self, x: Tensor) -> Tensor:
        """Space (and time) to channels, then the means of consecutive groups of channels.

        The channels are ordered (channel, frame, row, column). Our picture is the SECOND of two frames, a zero frame
        is the first. So where the channels double (groups of 4), even outputs are zero and odd ones plain 2 x 2 means;
        where they stay (groups of 8), the zeros still count in the division.
        """
        side = 2 if self.halves_space else 1
        x = rearrange(x, "b c (h p) (w q) -> b c (p q) h w", p=side, q=side)  # (B, C, 4, H/2, W/2)
        if self.halves_time:
            x = F.pad(x, (0, 0, 0, 0, side * side, 0))  # (B, C, 8, H/2, W/2)
        return x.flatten(1, 2).unflatten(1, (self.out_dim, -1)).mean(2)  # (B, o, H/2, W/2)

    def forward(self, x: Tensor) -> Tensor:
        y = x  # (B, C, H, W)
        for resnet in self.resnets:
            y = resnet(y)  # (B, o, H, W)
        if self.halves_space:
            y = self.downsampler(y)  # (B, o, H/2, W/2)
        return y + self.shortcut(x)  # (B, o, H/2, W/2)


class Up(nn.Module):
    """Residual blocks, then twice the height and width around a shortcut without weights; the last level has neither."""

    def __init__(self, dim: int, out_dim: int, num_res_blocks: int, doubles_space: bool, doubles_time: bool):
        super().__init__()
        self.out_dim, self.doubles_space, self.frames = out_dim, doubles_space, 2 if doubles_time else 1
        self.resnets = nn.ModuleList(Resnet(dim if i == 0 else out_dim, out_dim) for i in range(num_res_blocks + 1))
        if doubles_space:
            conv = nn.Conv2d(out_dim, out_dim, 3, padding=1)
            self.upsampler = Resample(nn.Upsample(scale_factor=2, mode="nearest-exact"), conv)

    def shortcut(self, x: Tensor) -> Tensor:
        """Channels repeated, then spread as (channel, frame, row, column) over space (and time).

        Of two frames the FIRST is dropped, so where the channels halve output c copies input 2c + 1.
        """
        repeats = self.out_dim * self.frames * 4 // x.shape[1]
        x = repeat(x, "b c h w -> b (c r) h w", r=repeats)  # (B, 4o or 8o, H, W)
        x = x.unflatten(1, (self.out_dim, self.frames, 2, 2))[:, :, -1]  # (B, o, 2, 2, H, W)
        return rearrange(x, "b c p q h w -> b c (h p) (w q)")  # (B, o, 2H, 2W)

    def forward(self, x: Tensor) -> Tensor:
        y = x  # (B, C, H, W)
        for resnet in self.resnets:
            y = resnet(y)  # (B, o, H, W)
        if self.doubles_space:
            y = self.upsampler(y) + self.shortcut(x)  # (B, o, 2H, 2W)
        return y  # (B, o, 2H, 2W)


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.base_dim * m for m in [1, *config.dim_mult]]
        times = [*config.temperal_downsample, False]
        last = len(config.dim_mult) - 1
        self.conv_in = nn.Conv2d(config.in_channels, dims[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Down(dims[i], dims[i + 1], config.num_res_blocks, i < last, times[i]) for i in range(last + 1)
        )
        self.mid_block = Mid(dims[-1])
        self.norm_out = Norm(dims[-1])
        self.conv_out = nn.Conv2d(dims[-1], 2 * config.z_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # (B, C, H, W)
        for block in self.down_blocks:
            x = block(x)  # (B, o, H/2, W/2)
        x = self.mid_block(x)  # (B, d, h, w)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 2z, h, w)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [(config.decoder_base_dim or config.base_dim) * m for m in [config.dim_mult[-1], *config.dim_mult[::-1]]]
        times = [*config.temperal_downsample[::-1], False]
        last = len(config.dim_mult) - 1
        self.conv_in = nn.Conv2d(config.z_dim, dims[0], 3, padding=1)
        self.mid_block = Mid(dims[0])
        self.up_blocks = nn.ModuleList(
            Up(dims[i], dims[i + 1], config.num_res_blocks, i < last, times[i]) for i in range(last + 1)
        )
        self.norm_out = Norm(dims[-1])
        self.conv_out = nn.Conv2d(dims[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)  # (B, d, h, w)
        x = self.mid_block(x)  # (B, d, h, w)
        for block in self.up_blocks:
            x = block(x)  # (B, o, 2H, 2W)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 4, H, W)


class VAE(nn.Module):
    """Two pairs of methods: `moments` and `decode_raw` are the bare networks, for training one; `encode` and `decode`
    speak the normalised latents that the MMDiT sees. All are differentiable."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 4, H, W) in [-1, 1] -> mean and log variance of the posterior, (B, 64, H/16, W/16) each, raw."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)  # (B, z, h, w) each
        return mean, logvar

    def decode_raw(self, z: Tensor) -> Tensor:
        """un-normalised latents (B, 64, h, w) -> images (B, 4, 16h, 16w), not clamped."""
        return self.decoder(self.post_quant_conv(z))  # (B, 4, 16h, 16w)

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 4, H, W) in [-1, 1], sides multiples of 16 -> normalised mode (B, 64, H/16, W/16)."""
        mean, std = self.statistics(images)  # (z, 1, 1) each
        return (self.moments(images)[0] - mean) / std  # (B, z, h, w)

    def decode(self, latents: Tensor) -> Tensor:
        """normalised latents (B, 64, h, w) -> images (B, 4, 16h, 16w), about [-1, 1]; clamping is the caller's."""
        mean, std = self.statistics(latents)  # (z, 1, 1) each
        return self.decode_raw(latents * std + mean)  # (B, 4, 16h, 16w)

    def statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.tensor(self.config.latents_mean, dtype=like.dtype, device=like.device)  # (z,)
        std = torch.tensor(self.config.latents_std, dtype=like.dtype, device=like.device)  # (z,)
        return mean.view(-1, 1, 1), std.view(-1, 1, 1)  # (z, 1, 1) each
