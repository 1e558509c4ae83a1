"""The Qwen-Image-2.x autoencoder: pictures in, latents 16 times smaller out, and back.

A residual convolutional autoencoder, f16c64: four halvings of height and width, 64 latent channels. It reads and writes
RGBA. It comes from a causal VIDEO autoencoder and is used here for single pictures, so this file has no axis of time.
Two traces of it remain. The published file has `time_conv` weights that a single frame never uses: they are skipped
by name and written as zeros. And where the video network halves or doubles the number of frames, the shortcuts
without parameters still count the missing frames (`Down.shortcut`, `Up.shortcut`).

    encoder   conv_in - Down x 5 - Mid - norm, SiLU, conv_out - quant_conv - 128 moments: mean and log variance
    decoder   post_quant_conv - conv_in - Mid - Up x 5 - norm, SiLU, conv_out

Module and parameter names are those of the published tensors, so some modules are nested more deeply than they need.

Shapes: B pictures; C channels, H height and W width of the current level; o an output's channels; h, w those of the
latent grid, 1/16 of the picture's; z = 64 latent channels; d = C of the middle block.
Reference for behaviour: `AutoencoderKLQwenImage21` of diffusers 0.42.1; tests/test_vae.py compares with it.
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
from program.ranges import Ranged, only, within

STEM = "diffusion_pytorch_model"  # file name of the weights in the published layout
ENCODED = 4 * 64 * 64  # latent pixels of a batch that are encoded at once: four of 1024 x 1024; ours, for memory
DECODED = 64 * 64  # latent pixels of each picture that are decoded at once: one of 1024 x 1024


@dataclass
class VAEConfig(Ranged):
    """The keys of vae/config.json, with the published values as defaults, except for the latents' statistics.

    ValueError names the key whose value is impossible or asks for a network that is not implemented.
    """

    base_dim: int = within(96, "[1, 4096]")  # channels of the encoder's first level
    decoder_base_dim: int | None = within(144, "[1, 4096]")  # channels of the decoder's last level; null: base_dim
    z_dim: int = within(64, "[1, 4096]")
    # Channels of a level / base_dim. Every level but the last halves height and width.
    dim_mult: tuple[int, ...] = within((1, 2, 4, 8, 8), "[1, 256]")
    num_res_blocks: int = within(2, "[1, 64]")  # in a level of the encoder; the decoder's levels have one more
    attn_scales: tuple[float, ...] = only(())
    temperal_downsample: tuple[bool, ...] = (False, True, True, True)  # (sic) which levels also halve time
    dropout: float = only(0.0)
    # Mean and deviation of each latent channel over many pictures. The published 64 come with the checkpoint.
    latents_mean: tuple[float, ...] = within((0.0,) * 64, "[-1e6, 1e6]")
    latents_std: tuple[float, ...] = within((1.0,) * 64, "[1e-6, 1e6]")
    is_residual: bool = only(True)
    in_channels: int = only(4)  # RGBA
    out_channels: int = only(4)
    patch_size: int | None = only(None)
    scale_factor_temporal: int = 8  # this and the next are only descriptions;
    scale_factor_spatial: int = 16  # dim_mult decides, see `factor`

    def __post_init__(self):
        super().__post_init__()
        if self.decoder_base_dim is None:
            self.decoder_base_dim = self.base_dim
        for key in ("dim_mult", "temperal_downsample", "latents_mean", "latents_std"):
            setattr(self, key, tuple(getattr(self, key)))
        if not 2 <= len(self.dim_mult) <= 8:
            raise ValueError(f"dim_mult has {len(self.dim_mult)} levels; 2 to 8 are expected")
        lengths = {"temperal_downsample": len(self.dim_mult) - 1, "latents_mean": self.z_dim, "latents_std": self.z_dim}
        for key, length in lengths.items():
            if len(getattr(self, key)) != length:
                raise ValueError(f"{key} has {len(getattr(self, key))} values; by the other keys {length} are expected")
        # The shortcuts regroup channels, so these must divide into whole groups.
        remainders = [c * 4**space * 2**time % o for c, o, space, time in self.encoder_levels()]
        remainders += [o * 4 * 2**time % c for c, o, space, time in self.decoder_levels() if space]
        if any(remainders):
            raise ValueError(f"dim_mult is {self.dim_mult}; the channels of two neighbours do not divide into groups")

    @property
    def factor(self) -> int:
        """A picture's side / the latent grid's side; 16 as published."""
        return 2 ** (len(self.dim_mult) - 1)

    def encoder_levels(self) -> list[tuple[int, int, bool, bool]]:
        """(channels in, channels out, halves space, halves time) of every level, in the order of the forward pass."""
        return self._levels(self.base_dim, (1, *self.dim_mult), self.temperal_downsample)

    def decoder_levels(self) -> list[tuple[int, int, bool, bool]]:
        """(channels in, channels out, doubles space, doubles time) of every level, the encoder's mirror image."""
        multiples = (self.dim_mult[-1], *self.dim_mult[::-1])
        return self._levels(self.decoder_base_dim, multiples, self.temperal_downsample[::-1])

    def _levels(self, base: int, multiples: tuple[int, ...], times: tuple[bool, ...]):
        dims = [base * multiple for multiple in multiples]
        changes_space = [True] * len(times) + [False]
        changes_time = [*times, False]
        return list(zip(dims[:-1], dims[1:], changes_space, changes_time, strict=True))


class Norm(nn.Module):
    """x / rms(x over channels) * gamma: every pixel's channel vector at a fixed length, times gamma."""

    def __init__(self, dim: int, ones: int = 3):
        super().__init__()
        # The published gamma has the video's axes: (C, 1, 1, 1), and (C, 1, 1) in the attention.
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * ones))

    def forward(self, x: Tensor) -> Tensor:
        # The length is fp32 until the division. In bf16 its rounding would change all channels of a pixel alike. It is
        # clamped so that a zero pixel stays zero.
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)  # (B, 1, H, W)
        scale = x.shape[1] ** 0.5 / length.clamp(min=1e-12)  # (B, 1, H, W)
        gamma = self.gamma.view(-1, 1, 1).to(x.dtype)  # (C, 1, 1); the cast matters under autocast
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
    """Attention of one head over all channels. Every pixel of the latent grid sees every other."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = Norm(dim, ones=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x))  # (B, 3d, h, w)
        q, k, v = rearrange(qkv, "b (three d) h w -> three b 1 (h w) d", three=3)  # (B, 1, hw, d) each
        # In blocks of queries, because the fused kernels are limited to 256 channels a head. Without them a GPU
        # writes out all scores: 16,384^2 for a picture of 2048 x 2048 pixels.
        y = [F.scaled_dot_product_attention(block, k, v) for block in q.split(4096, 2)]  # each (B, 1, 4096 or less, d)
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
    """Residual blocks, then half the height and width, except in the last level. The shortcut has no weights."""

    def __init__(self, num_res_blocks: int, dim: int, out_dim: int, halves_space: bool, halves_time: bool):
        super().__init__()
        self.out_dim = out_dim
        self.halves_space = halves_space
        self.halves_time = halves_time
        self.resnets = nn.ModuleList(Resnet(dim if i == 0 else out_dim, out_dim) for i in range(num_res_blocks))
        if halves_space:
            # Zeros only on the right and below: output i sees the pixels 2i to 2i + 2. With padding=1 it would begin at
            # 2i - 1.
            self.downsampler = resample(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(out_dim, out_dim, 3, stride=2))

    def shortcut(self, x: Tensor) -> Tensor:
        """Space (and time) to channels, in the order (channel, frame, row, column). Then means of consecutive groups.

        Of two frames our picture is the SECOND; the first is zeros. So if the channels double (groups of 4), even
        outputs are zero, and odd outputs are plain 2 x 2 means. If not (groups of 8), the zeros are a part of each
        mean.
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
    """Residual blocks, twice the height and width, a shortcut without weights. The last level has only blocks."""

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
        """Every channel is repeated, then spread over space (and time) in the order (channel, frame, row, column).

        Of two frames the FIRST is dropped. So if the channels halve, output c copies input 2c + 1.
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
        """Pictures (B, 4, H, W) from latents (B, z, h, w), in strips of rows of at most DECODED latent pixels each.

        The strips are exact, not blended. Up to the middle block every pixel depends on every other, but the grid is
        small and is computed as a whole. After it come only convolutions, with a known reach (norms see one pixel).
        So each level of a strip gets as many additional rows as the following levels reach.
        """
        x = self.mid_block(self.conv_in(z))  # (B, d, h, w)
        rows = max(1, DECODED // x.shape[3])
        strips = [self.strip(x, start, start + rows) for start in range(0, x.shape[2], rows)]
        return torch.cat(strips, 2)  # (B, 4, H, W)

    def strip(self, x: Tensor, start: int, stop: int) -> Tensor:
        """The part of the picture that belongs to the rows [start, stop) of the grid x (B, d, h, w)."""
        margins = [1]  # the additional rows that each level needs above and below, and at the end those of conv_out
        for block in reversed(self.up_blocks):
            # Half as many rows before doubling, and one more for the upsampler's kernel.
            before = (margins[0] + 2) // 2 if block.doubles_space else margins[0]
            margins.insert(0, before + 2 * len(block.resnets))
        top = 0  # the row where x begins. top, start and stop count rows of x, and double with it

        for block, margin in zip(self.up_blocks, margins[:-1], strict=True):
            above = max(start - margin, 0)  # not beyond the picture's edge
            x = block(x[:, :, above - top : stop + margin - top])  # (B, o, 2H, 2W)
            top = above
            if block.doubles_space:
                start, stop, top = 2 * start, 2 * stop, 2 * top
        above = max(start - margins[-1], 0)
        x = x[:, :, above - top : stop + margins[-1] - top]  # (B, C, H, W)
        x = self.conv_out(F.silu(self.norm_out(x)))  # (B, 4, H, W)
        return x[:, :, start - above : stop - above]  # (B, 4, H, W)


class VAE(nn.Module):
    """`encode` and `decode` use the normalised latents that the MMDiT sees. `moments` and `decode_raw` are the networks
    themselves, for training one. All four are differentiable."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (B, 64, H/16, W/16) of the posterior, not normalised.

        images (B, 4, H, W) in [-1, 1], in the weights' dtype. ValueError if a side is no multiple of 16.
        """
        factor, channels = self.config.factor, self.config.in_channels
        if images.ndim != 4 or images.shape[1] != channels or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"images {tuple(images.shape)}: (B, {channels}, H, W) is expected, H and W multiples of {factor}"
            )
        return self.quant_conv(self.encoder(images)).chunk(2, dim=1)  # (B, z, h, w) each

    def decode_raw(self, z: Tensor) -> Tensor:
        """latents z (B, 64, h, w), not normalised -> images (B, 4, 16h, 16w), not clamped."""
        return self.decoder(self.post_quant_conv(z))  # (B, 4, 16h, 16w)

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 4, H, W) in [-1, 1] -> latents (B, 64, H/16, W/16): the posterior's mode, normalised.

        Large pictures are encoded a few at a time, because 32 of 1024 x 1024 at once would take 33 GB in bf16. The
        result has the weights' dtype. ValueError as in `moments`.
        """
        at_once = max(1, ENCODED * self.config.factor**2 // (images.shape[-2] * images.shape[-1]))
        parts = images.to(self.quant_conv.weight.dtype).split(at_once)  # each (at_once or less, 4, H, W)
        mean = torch.cat([self.moments(part)[0] for part in parts])  # (B, z, h, w)
        center, std = self.statistics(mean.device)  # (z, 1, 1) each
        return ((mean - center) / std).to(mean.dtype)  # (B, z, h, w)

    def decode(self, latents: Tensor) -> Tensor:
        """normalised latents (B, 64, h, w) -> images (B, 4, 16h, 16w) around [-1, 1], not clamped; in the weights' type."""
        center, std = self.statistics(latents.device)  # (z, 1, 1) each
        return self.decode_raw((latents * std + center).to(self.quant_conv.weight.dtype))  # (B, 4, 16h, 16w)

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents, (64, 1, 1) each, in fp32, so that the arithmetic with them is in fp32."""
        stats = torch.tensor([self.config.latents_mean, self.config.latents_std], device=device)  # (2, z)
        return stats[0, :, None, None], stats[1, :, None, None]  # (z, 1, 1) each

    def video_weights(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the published tensors that only a second frame would use."""
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
        """Open the vae/ folder of a checkpoint in the published layout: frozen, in evaluation mode, with the channels
        of a pixel adjacent in memory, because this halves the time of convolutions (on a CPU, in fp32).

        Strict: FileNotFoundError or ValueError name the file and the key or tensor that is missing, unknown or wrong.
        """
        config = config_from_json(VAEConfig, Path(directory) / "config.json")
        with torch.device("meta"):
            vae = cls(config)
        unused = tuple(re.escape(name) for name in vae.video_weights())
        load_weights(vae, directory, STEM, dtype, device, skip=unused)
        return vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and the weights, with zeros for the video's. Otherwise diffusers would leave these on the
        meta device and could not move the network."""
        unused = {name: torch.zeros(shape) for name, shape in self.video_weights().items()}
        save_weights({**self.state_dict(), **unused}, directory, STEM, dtype)
        save_config(self.config, Path(directory) / "config.json", "AutoencoderKLQwenImage21")
