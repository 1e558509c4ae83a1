"""Pictures: opened upright in any mode, resized to the latent grid, as tensors, and written with their settings."""

import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

Source = str | Path | Image.Image  # a picture, or the file it is in
MOST_SOURCES = 10  # of one edit
MULTIPLE = 32  # sides are multiples of this: a slot of the language model is 2 x 2 latent tokens of 16 x 16 pixels


def open_picture(source: Source) -> Image.Image:
    """Read a picture of any mode, upright, as RGBA.

    The reference leaves both traps to the caller: a camera's rotation mark is not applied, and 16-bit grey is cut off
    at 255, which turns it white. OSError or ValueError name the file.
    """
    name = "the picture" if isinstance(source, Image.Image) else str(source)
    try:
        picture = source if isinstance(source, Image.Image) else Image.open(source)
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # I;16 and its byte orders; I is what older files of 16 bits open as
            grey = np.asarray(picture).astype(np.float64) / 257  # 65535 -> 255
            picture = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
        if picture.mode in ("F", "LAB"):  # floats without a known range; a mode that Pillow converts to wrong colours
            raise ValueError(f"mode {picture.mode} has no sure colours; save it as RGB")
        return picture.convert("RGBA")
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises on bad files
        raise ValueError(f"{name}: cannot be read as a picture ({error})") from None


def fit(source: Source, resolution: int) -> Image.Image:
    """Open a source and resize it to about resolution^2 pixels: its own aspect ratio, sides rounded to multiples of 32.

    One resize serves language model and VAE alike. It is done in RGBA, where Pillow weighs colours by their alpha.
    """
    picture = open_picture(source)
    return picture.resize(sides(picture.width, picture.height, resolution), Image.Resampling.LANCZOS)


def sides(width: float, height: float, resolution: int) -> tuple[int, int]:
    """The sides of this aspect ratio at an area of about resolution^2, rounded to multiples of 32."""
    ratio = width / height
    exact = math.sqrt(resolution * resolution * ratio)
    size = round(exact / MULTIPLE) * MULTIPLE, round(exact / ratio / MULTIPLE) * MULTIPLE
    if min(size) == 0:
        raise ValueError(f"{width} x {height} is too thin for the area {resolution}^2")
    return size


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    """B RGBA pictures of one size -> (B, 4, H, W) in [-1, 1], fp32."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))  # (B, H, W, 4) in 0 .. 255
    return rearrange(pixels.float() / 255 * 2 - 1, "b h w c -> b c h w")


def to_pictures(images: Tensor) -> list[Image.Image]:
    """(B, 4, H, W), clamped to [-1, 1] -> B RGBA pictures."""
    pixels = (images.float().clamp(-1, 1) / 2 + 0.5) * 255
    pixels = rearrange(pixels.round().to(torch.uint8), "b c h w -> b h w c").cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def save(picture: Image.Image, path: Path, settings: dict) -> None:
    """Write a PNG, whole or not at all, with the settings as JSON under the text key `parameters`."""
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(settings, ensure_ascii=False))
    part = path.with_name(path.name + ".part")
    picture.save(part, "PNG", pnginfo=info)
    os.replace(part, path)


def fitted_size(source: Source, resolution: int) -> tuple[int, int]:
    """The size that fit will give a picture, from its file's header alone where that says it."""
    if isinstance(source, Image.Image):
        return sides(*source.size, resolution)
    try:
        with Image.open(source) as picture:
            (width, height), turned = picture.size, picture.getexif().get(0x0112, 1) >= 5  # the camera lay on its side
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return fit(source, resolution).size  # says what is wrong with it
    return sides(*((height, width) if turned else (width, height)), resolution)
