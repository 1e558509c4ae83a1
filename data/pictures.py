"""Pictures: opened upright in sRGB from any mode, fitted to the latent grid, as tensors, written with their settings.

Broken metadata (a camera's rotation mark, a colour profile, texts) do not keep a picture from being read. A notice says
that they are not used.
"""

import json
import math
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageChops, ImageCms, ImageOps, PngImagePlugin
from torch import Tensor

from checkpoint.files import aside
from checkpoint.layout import MULTIPLE, check_stage
from program.edges import notice

with suppress(ImportError):  # Pillow itself reads no HEIC
    from pillow_heif import register_heif_opener

    register_heif_opener()

Source = str | Path | Image.Image  # a picture, or the file it is in
MOST_PIXELS = 4096 * 4096  # of a picture to draw; also the most that the published processor reads
LARGE = 178_956_970  # pixels; a larger file is read at half its width and height. Pillow's own limit
LARGEST = 500_000_000  # pixels; a larger file is rejected. This many take 2 GB
Image.MAX_IMAGE_PIXELS = LARGEST  # otherwise Pillow rejects what is LARGE
PngImagePlugin.MAX_TEXT_CHUNK = 64 * 2**20  # bytes, of profiles too: a printer's exceeds Pillow's 1 MiB
TURNS = {  # a camera's mark, the EXIF key ORIENTATION -> how to turn the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112


def open_picture(source: Source) -> Image.Image:
    """Read a picture of any mode: upright, in sRGB, as RGBA. With more than LARGE pixels it is read at half its sides.

    OSError or ValueError name the file.

    The reference leaves three traps to the caller: it does not apply a camera's rotation mark, it ignores colour
    profiles, and it clips 16-bit grey at 255, which turns it white.
    """
    return _read(source, _upright)


def upright_size(source: Source) -> tuple[int, int]:
    """(width, height) of what open_picture returns, from the file's header where that is reliable."""

    def size(picture: Image.Image, name: str) -> tuple[int, int]:
        if picture.format not in (None, "JPEG", "PNG", "WEBP"):  # decoders of others may turn or resize them
            return _upright(picture, name).size
        width, height = picture.size
        if width * height > LARGE:
            width, height = math.ceil(width / 2), math.ceil(height / 2)
        quarter_turn = _mark(picture, name) in (5, 6, 7, 8)
        return (height, width) if quarter_turn else (width, height)

    return _read(source, size)


def fitted_size(source: Source, resolution: int) -> tuple[int, int]:
    """The size that `fit` will give a picture."""
    return sides(*upright_size(source), resolution, name_of(source))


def name_of(source: Source) -> str:
    return "the picture" if isinstance(source, Image.Image) else str(source)


def _read(source: Source, use):
    """use(picture, its name). Every error of a decoder becomes one that names the file."""
    name = name_of(source)
    try:
        if isinstance(source, Image.Image):
            return use(source, name)
        try:
            return _open(source, name, use)
        except Exception as error:
            # Metadata may be the cause. First try to keep the profile and the camera's mark.
            for chunks in ((b"tRNS", b"iCCP", b"eXIf"), (b"tRNS",)):
                with suppress(Exception):
                    result = _open(BytesIO(_png_with_only(source, chunks)), name, use)
                    notice("metadata", f"{name}: its metadata are broken and not used ({error})")
                    return result
            raise
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such picture") from None
    except Exception as error:  # decoders raise nearly every class
        heic = Path(name).suffix.lower() in (".heic", ".heif", ".hif")
        advice = "; for HEIC install the package pillow-heif" if heic else ""
        raise ValueError(f"{name}: cannot be read as a picture ({error or type(error).__name__}{advice})") from None


def _open(file: str | Path | BytesIO, name: str, use):
    with Image.open(file) as picture:
        if picture.width * picture.height > LARGEST:
            raise ValueError(f"{picture.width} x {picture.height}: at most {LARGEST:,} pixels are read")
        return use(picture, name)


def _png_with_only(file: str | Path, ancillary: tuple[bytes, ...]) -> bytes:
    """A PNG's bytes with only these ancillary chunks. An ancillary chunk's name begins with a small letter."""
    with open(file, "rb") as opened:
        signature = opened.read(8)
        if signature != b"\x89PNG\r\n\x1a\n":
            raise ValueError(f"{file}: not a PNG")
        content = signature + opened.read()
    chunks, start = [signature], len(signature)
    while start < len(content):
        stop = start + 12 + int.from_bytes(content[start : start + 4], "big")  # length, name, data, checksum
        name = content[start + 4 : start + 8]
        if name[:1].isupper() or name in ancillary:
            chunks.append(content[start:stop])
        start = stop
    return b"".join(chunks)


def _mark(picture: Image.Image, name: str) -> int | None:
    """A camera's mark, which says how the camera was held; None if it is missing or unreadable."""
    if picture.format == "PNG":
        picture.load()  # outside of the try: the mark may follow the pixels, whose errors are not the mark's
    try:
        mark = picture.getexif().get(ORIENTATION)
    except Exception as error:  # as of decoders: nearly every class
        notice("exif", f"{name}: its EXIF data are broken and not used ({error or type(error).__name__})")
        return None
    return mark if isinstance(mark, int) else None


def _upright(picture: Image.Image, name: str) -> Image.Image:
    if picture.width * picture.height > LARGE:
        picture.draft(None, (picture.width // 2, picture.height // 2))  # halves it where the decoder can: JPEG
    deep = any("16" in str(tile[-1]) for tile in getattr(picture, "tile", ()))  # 16 bits in the file
    picture.load()  # before the mark is read: some decoders turn the picture themselves and remove the mark
    profile, mark = picture.info.get("icc_profile"), _mark(picture, name)
    picture = _eight_bits(picture, deep)
    if picture.mode in ("F", "LAB"):  # floats without a known range; a mode that Pillow converts to wrong colours
        raise ValueError(f"mode {picture.mode} has no sure colours; save it as RGB")
    if picture.width * picture.height > LARGE:
        if picture.mode in ("1", "P", "PA") or "transparency" in picture.info:  # such values have no average
            picture = picture.convert("RGBA")
        picture = picture.reduce(2)
    if mark in TURNS:
        picture = picture.transpose(TURNS[mark])
    rgba = picture.convert("RGBA")
    if profile:
        mode = {"L": "L", "LA": "L", "CMYK": "CMYK"}.get(picture.mode, "RGB")  # of the colours that it describes
        colours = picture if mode == "CMYK" else rgba.convert(mode)
        rgba = _srgb(colours, rgba, profile, name)
    rgba.info = {}  # mark and profile are applied, and must not be applied again
    return rgba


def _eight_bits(picture: Image.Image, deep: bool) -> Image.Image:
    """The picture with 8 bits a channel: 16-bit grey as L, or as LA if one grey is transparent. Others unchanged.

    deep: the file has 16 bits a channel. Of colours Pillow has kept the upper 8 bits, but not of the transparent one.
    """
    clear = picture.info.get("transparency")  # a PNG's one transparent colour, as in the file
    if picture.mode.startswith("I"):  # I;16 and its byte orders; older files of 16 bits open as I
        values = np.asarray(picture).clip(0, 65535)
        greys = (np.arange(65536) / 257).round().astype(np.uint8)  # 65535 -> 255
        grey = Image.fromarray(greys[values])
        if clear is None:
            return grey
        alpha = np.where(values == clear, 0, 255).astype(np.uint8)
        return Image.merge("LA", [grey, Image.fromarray(alpha)])
    if deep and picture.mode == "RGB" and clear is not None:
        picture = picture.copy()
        picture.info["transparency"] = tuple(value >> 8 for value in clear)
    return picture


def _srgb(colours: Image.Image, rgba: Image.Image, profile: bytes, name: str) -> Image.Image:
    """`rgba` converted to sRGB by the profile, which describes `colours`."""
    try:
        own, srgb = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB")
        colours = ImageCms.profileToProfile(colours, own, srgb, outputMode="RGB")
    except Exception as error:
        notice("profile", f"{name}: its colour profile is broken and not applied ({error})")
        return rgba
    if max(high for _, high in ImageChops.difference(colours, rgba.convert("RGB")).getextrema()) <= 1:
        return rgba  # the profile is sRGB's own; the difference is rounding
    colours.putalpha(rgba.getchannel("A"))
    return colours


def fit(source: Source, resolution: int, how: str = "stretch", size: tuple[int, int] | None = None) -> Image.Image:
    """Open a picture and resize it to about resolution^2 pixels in its own shape, sides rounded to multiples of 32.

    size    (width, height) to use instead
    how     if the shape changes: "stretch" the picture, as the reference does; "crop" it, equally on both sides;
            or "pad" it with white

    The language model and the VAE see the same resized picture. It is resized in RGBA, where Pillow weights colours by
    their alpha.
    """
    picture, name = open_picture(source), name_of(source)
    width, height = size or sides(picture.width, picture.height, resolution, name)
    lanczos = Image.Resampling.LANCZOS
    if how == "crop":
        return ImageOps.fit(picture, (width, height), lanczos)
    if how == "pad":
        return ImageOps.pad(picture, (width, height), lanczos, "white")
    change = picture.width * height / (picture.height * width)
    stretch = max(change, 1 / change)
    if stretch > 1.03:
        sizes = f"{picture.width} x {picture.height} becomes {width} x {height}"
        notice("shape", f"{name}: {sizes}, stretched by {stretch - 1:.0%}; --fit crop or pad keeps the shape")
    return picture.resize((width, height), lanczos)


def sides(width: float, height: float, resolution: int, name: str = "the shape") -> tuple[int, int]:
    """The sides of this aspect ratio at an area of about resolution^2, rounded to multiples of 32."""
    ratio = width / height
    exact = math.sqrt(resolution * resolution * ratio)
    size = round(exact / MULTIPLE) * MULTIPLE, round(exact / ratio / MULTIPLE) * MULTIPLE
    if min(size) == 0:
        raise ValueError(f"{name}: {width:g} x {height:g} is too thin for the area {resolution}^2")
    return size


def check_areas(sources: list[Source], fitted: list[tuple[int, int]], resolution: int, fewest: int, most: int) -> None:
    """ValueError if a source has fewer or more pixels than the language model reads. It names the first such picture,
    and the nearest resolution that suits all of them. fitted: the (width, height) of each source at this resolution."""

    def suits(width: int, height: int) -> bool:
        return fewest <= width * height <= most

    unsuitable = [number for number, size in enumerate(fitted) if not suits(*size)]
    if not unsuitable:
        return
    name, (width, height) = name_of(sources[unsuitable[0]]), fitted[unsuitable[0]]
    shapes = dict.fromkeys(upright_size(source) for source in sources)  # each once
    larger, smaller = range(resolution + 1, 4097), range(resolution - 1, MULTIPLE, -1)
    advice = "no resolution suits all pictures"
    for side in larger if width * height < fewest else smaller:
        if side % MULTIPLE == 0 and all(suits(*sides(*shape, side, name)) for shape in shapes):
            advice = f"--resolution {side} suits all pictures"
            break
    raise ValueError(
        f"{name}: becomes {width} x {height} at --resolution {resolution}, and the language model reads pictures of "
        f"{fewest:,} to {most:,} pixels (processor/preprocessor_config.json); {advice}"
    )


def latent_grid(height: int, width: int, own: int) -> tuple[int, int]:
    """(h, w) of the latent for a picture to draw, whose sides in pixels are rounded down to multiples of 32.

    own: the side that the checkpoint was trained at. A notice says that sides were rounded, or that the area differs
    from the trained one. ValueError: too small, or too large to be intended.
    """
    h, w = (side // MULTIPLE for side in (height, width))
    drawn = f"{w * MULTIPLE} x {h * MULTIPLE}"
    if min(h, w) < 1:
        raise ValueError(f"{width} x {height} pixels: both sides must be at least {MULTIPLE}")
    area = h * w * MULTIPLE**2
    if area > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels: at most {MOST_PIXELS} are drawn, and these would be {area}, "
                         f"{area * 16 / 2**30:.3g} GiB for the pixels alone")  # fmt: skip
    if (height, width) != (h * MULTIPLE, w * MULTIPLE):
        notice("floor", f"{width} x {height} pixels: drawn as {drawn}; sides are multiples of {MULTIPLE}")
    if not 0.95 < area / own**2 < 1.05:
        notice("area", f"{drawn} pixels: the checkpoint was trained at the area {own} x {own}, and may draw worse here")
    return 2 * h, 2 * w


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    """B RGBA pictures of one size -> (B, 4, H, W) in [-1, 1], fp32."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))  # (B, H, W, 4) in 0 .. 255
    return rearrange(pixels.float() / 255 * 2 - 1, "b h w c -> b c h w")


def to_pictures(images: Tensor) -> list[Image.Image]:
    """(B, 4, H, W), clamped to [-1, 1] -> B RGBA pictures. ValueError: a value is not finite."""
    check_stage("the decoded pixels", images, images.dtype)
    pixels = (images.float().clamp(-1, 1) / 2 + 0.5) * 255
    pixels = rearrange(pixels.round().to(torch.uint8), "b c h w -> b h w c").cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def save(picture: Image.Image, path: str | Path, settings: dict) -> None:
    """Write a PNG, whole or not at all, with the settings as JSON under the text key `parameters`."""
    info = PngImagePlugin.PngInfo()
    text = json.dumps(settings, ensure_ascii=False)  # readable, except for undecodable bytes of file names
    info.add_itxt("parameters", text.encode("utf-8", "backslashreplace").decode())
    with aside(path) as part:
        picture.save(part, "PNG", pnginfo=info)
