"""Pictures as arrays, and their colours in CIELAB (D65), where distances are as large as they look.

Arrays are (H, W, 3) in sRGB, 0 to 1.
"""

import numpy as np
from PIL import Image


def pixels(picture: Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W, 3): the picture over white, resized to (width, height)."""
    flat = over_white(picture)
    if size and size != flat.size:
        flat = flat.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(flat, dtype=np.float64) / 255


def over_white(picture: Image.Image) -> Image.Image:
    """Any picture in RGB, with white where it is transparent."""
    rgba = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def lab(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) in sRGB -> (..., 3) in CIELAB: lightness L from 0 to 100, a from green to red, b from blue to yellow."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # IEC 61966-2-1
    relative = linear @ to_xyz.T / to_xyz.sum(1)  # to white
    root = np.where(relative > (6 / 29) ** 3, np.cbrt(relative), relative / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def mean_chroma(values: np.ndarray) -> np.ndarray:
    """Of (..., 3) in CIELAB: the distance from grey, averaged."""
    return np.linalg.norm(values[..., 1:], axis=-1).mean()


def colours(picture: np.ndarray) -> tuple[float, float]:
    """Saturation, the mean chroma, and contrast, the standard deviation of lightness; both in CIELAB."""
    values = lab(picture)
    return float(mean_chroma(values)), float(values[..., 0].std())
