"""Pictures as they are opened: upright, in sRGB, in any mode and format; and brought to their size."""

import numpy as np
import pytest
from PIL import Image, ImageCms
from reference import picture

from data.pictures import fit, fitted_size, open_picture


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr("program.edges._said", set())


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max())


def test_camera_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn a quarter clockwise to see it so
    upright = picture(48, 64)
    upright.rotate(90, expand=True).save(tmp_path / "photo.png", exif=exif)
    assert difference(open_picture(tmp_path / "photo.png"), upright.convert("RGBA")) == 0


@pytest.mark.parametrize("mark", [1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 65535, "text"])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif"])
def test_size_and_pixels_agree_on_camera_marks(tmp_path, kind, mark):
    """A picture of 960 x 640 in every format that keeps marks: marks from 1 to 8 turn as the standard says, others nothing."""
    if mark == "text" and kind in ("png", "avif"):
        pytest.skip("checksums keep its bytes from being changed here")
    exif = Image.Exif()
    exif[0x0112] = 6 if mark == "text" else mark
    corner = Image.new("RGB", (960, 640), "blue")
    corner.paste("red", (0, 0, 480, 320))  # the upper left quarter
    corner.save(tmp_path / f"photo.{kind}", exif=exif)
    if mark == "text":  # the entry's type, SHORT, becomes ASCII
        content = (tmp_path / f"photo.{kind}").read_bytes()
        for short, text in (b"\x12\x01\x03\0", b"\x12\x01\x02\0"), (b"\x01\x12\0\x03", b"\x01\x12\0\x02"):
            content = content.replace(short, text)
        (tmp_path / f"photo.{kind}").write_bytes(content)
        assert isinstance(Image.open(tmp_path / f"photo.{kind}").getexif()[0x0112], str)
    size = (96, 160) if mark in (5, 6, 7, 8) else (160, 96)
    fitted = fit(tmp_path / f"photo.{kind}", 128)
    assert fitted.size == fitted_size(tmp_path / f"photo.{kind}", 128) == size
    assert open_picture(fitted).size == size and not fitted.info  # not turned a second time
    right, low = mark in (2, 3, 6, 7), mark in (3, 4, 7, 8)  # where the first row and column go
    x, y = size[0] * (3 if right else 1) // 4, size[1] * (3 if low else 1) // 4
    red, _, blue, _ = fitted.getpixel((x, y))
    assert red > 200 and blue < 60


def profile(exchanged: bool) -> bytes:
    """An sRGB profile, or one whose red and green primaries are exchanged."""
    icc = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    if exchanged:
        red, green = icc.index(b"rXYZ"), icc.index(b"gXYZ")  # the first occurrences are those of the table of tags
        icc[red : red + 4], icc[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(icc)


def test_colour_profiles_are_applied(tmp_path, capsys):
    plain = picture(48, 32, 1, "RGBA")
    plain.save(tmp_path / "srgb.png", icc_profile=profile(False))
    assert difference(open_picture(tmp_path / "srgb.png"), plain) == 0  # sRGB's own profile changes nothing
    plain.save(tmp_path / "exchanged.png", icc_profile=profile(True))
    exchanged = Image.merge("RGBA", [plain.getchannel(c) for c in "GRBA"])
    drawn = open_picture(tmp_path / "exchanged.png")
    assert difference(drawn, exchanged) <= 2  # what a colour-managed viewer shows; transparency is kept
    assert difference(open_picture(drawn), drawn) == 0  # not applied a second time
    plain.save(tmp_path / "broken.png", icc_profile=b"broken" * 40)
    for _ in range(2):
        assert difference(open_picture(tmp_path / "broken.png"), plain) == 0
    notices = capsys.readouterr().err
    assert notices.count("broken.png: its colour profile is broken") == 1
    exif = Image.Exif()
    exif[0x0112] = 3
    plain.convert("RGB").save(tmp_path / "both.tif", icc_profile=profile(True), exif=exif)
    assert difference(open_picture(tmp_path / "both.tif"), exchanged.convert("RGB").rotate(180).convert("RGBA")) <= 2


@pytest.mark.parametrize("how", ["stretch", "crop", "pad"])
def test_fit(tmp_path, capsys, how):
    """4:3 at an area of 128 x 128 is given 160 x 96, as the reference does. What happens to the shape is the caller's."""
    circle = Image.new("RGB", (400, 300), "blue")
    circle.paste("red", (100, 50, 300, 250))  # a square of 200 x 200
    circle.save(tmp_path / "photo.png")
    pixels = np.asarray(fit(tmp_path / "photo.png", 128, how)).astype(int)
    assert pixels.shape == (96, 160, 4)
    red = (pixels[..., 0] > 128) & (pixels[..., 2] < 128)
    width, height = red.any(0).sum(), red.any(1).sum()
    assert (width, height) == {"stretch": (80, 64), "crop": (80, 80), "pad": (64, 64)}[how]
    white = (pixels[..., :3] > 200).all(-1).mean()
    assert (white > 0.15) == (how == "pad") and (pixels[..., 3] == 255).all()
    assert fit(tmp_path / "photo.png", 128, how, (64, 32)).size == (64, 32)
    assert ("stretched by 25%" in capsys.readouterr().err) == (how == "stretch")


FORMATS = {"AVIF": "RGB", "BMP": "RGB", "DDS": "RGB", "GIF": "P", "ICO": "RGB", "IM": "RGB", "JPEG": "RGB",
           "JPEG2000": "RGB", "MPO": "RGB", "MSP": "1", "PCX": "RGB", "PNG": "RGB", "PPM": "RGB", "QOI": "RGB",
           "SGI": "RGB", "TGA": "RGB", "TIFF": "RGB", "WEBP": "RGB", "XBM": "1"}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_are_one_error(tmp_path, kind):
    """Bytes changed, bytes missing: a picture of the size that was said before, or one error that names the file."""
    rng, file = np.random.default_rng(0), tmp_path / "picture"
    picture(48, 40).convert(FORMATS[kind]).save(file, kind)
    whole, read = file.read_bytes(), 0
    for number in range(100):
        damaged = np.frombuffer(whole, np.uint8).copy()
        where = rng.integers(0, len(damaged) if number % 2 else min(200, len(damaged)), 1 + number % 5)
        damaged[where] = rng.integers(0, 256, len(where))
        file.write_bytes(damaged.tobytes()[: len(damaged) if number % 7 else rng.integers(1, len(damaged))])
        try:
            drawn = fit(file, 64)
        except ValueError as error:
            assert str(file) in str(error)
            continue
        assert fitted_size(file, 64) == drawn.size
        read += 1
    assert 0 < read < 100 or kind == "PNG"


def test_heic_names_its_package(tmp_path):
    (tmp_path / "photo.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(ValueError, match="photo.HEIC.*pillow-heif"):
        open_picture(tmp_path / "photo.HEIC")


def test_sixteen_bit_grey(tmp_path):
    grey = np.linspace(0, 65535, 64 * 32).round().astype(np.uint16).reshape(32, 64)
    for name in "grey.png", "grey.tif":
        Image.fromarray(grey).save(tmp_path / name)
        pixels = np.asarray(open_picture(tmp_path / name))
        assert (pixels[..., :3] == (grey / 257).round()[..., None]).all() and (pixels[..., 3] == 255).all()


def test_other_modes(tmp_path):
    """Palette with a transparent entry, grey with alpha, ink, one bit: what a viewer shows."""
    palette = picture(32, 32).quantize(8)
    palette.save(tmp_path / "palette.png", transparency=3)
    pixels = np.asarray(open_picture(tmp_path / "palette.png"))
    assert ((pixels[..., 3] == 0) == (np.asarray(palette) == 3)).all()
    assert (pixels[..., :3] == np.asarray(palette.convert("RGB"))).all()

    picture(32, 32, 1, "LA").save(tmp_path / "grey.png")
    grey, alpha = np.asarray(picture(32, 32, 1, "LA")).transpose(2, 0, 1)
    assert (np.asarray(open_picture(tmp_path / "grey.png")) == np.stack([grey, grey, grey, alpha], -1)).all()

    for mode, name in ("CMYK", "ink.tif"), ("1", "bits.png"), ("L", "l.png"):
        plain = picture(32, 32).convert(mode)
        plain.save(tmp_path / name)
        assert difference(open_picture(tmp_path / name), plain.convert("RGB").convert("RGBA")) == 0


def test_pictures_that_cannot_be_opened(tmp_path):
    whole = tmp_path / "whole.png"
    picture(64, 64).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:3000])
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(tmp_path / "float.tif")
    Image.new("LAB", (8, 8)).save(tmp_path / "lab.tif")
    for name in "half.png", "text.png", "float.tif", "lab.tif", ".", "none.png":
        with pytest.raises((ValueError, OSError), match=str(tmp_path / name)):
            fit(tmp_path / name, 96)
    with pytest.raises(ValueError, match="too thin"):
        fit(picture(2000, 3), 96)
