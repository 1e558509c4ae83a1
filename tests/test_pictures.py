"""Pictures as they are opened: upright, in sRGB, in any mode and format; and brought to their size."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from reference import difference, picture

from data import pictures
from data.pictures import check_areas, fit, fitted_size, open_picture, upright_size


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


def chunk(name: bytes, data: bytes, damaged: bool = False) -> bytes:
    """A part of a PNG, with its checksum."""
    checksum = zlib.crc32(name + data) ^ damaged
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def with_chunk(file: Path, *chunks: bytes) -> Path:
    """The PNG with further chunks behind its header."""
    content = file.read_bytes()
    file.write_bytes(content[:33] + b"".join(chunks) + content[33:])
    return file


def exif(mark: int, damage: str = "") -> bytes:
    """A block of EXIF with a camera's mark; damage: "odd tag" beside the mark, or "broken" from its first byte on."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, mark, 0)
    count = 1
    if damage == "odd tag":  # a text whose type says that it is a number
        entries, count = entries + struct.pack("<HHI4s", 0x9000, 10, 1, b"\xff\xff\xff\xff"), 2
    block = b"II*\0" + struct.pack("<IH", 8, count) + entries + bytes(4)
    return b"nothing" * 4 if damage == "broken" else block


@pytest.mark.parametrize("damage", ["", "odd tag", "broken"])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_broken_exif_does_not_keep_a_picture_from_being_read(tmp_path, capsys, kind, damage):
    """It stands upright where the camera's mark can be read, and as the pixels stand where not."""
    plain, file = Image.new("RGB", (64, 32), "blue"), tmp_path / f"photo.{kind}"
    plain.paste("red", (0, 0, 32, 32))
    content = exif(6, damage)
    if kind == "png":
        plain.save(file)
        with_chunk(file, chunk(b"eXIf", content))
    else:
        plain.save(file, exif=b"Exif\0\0" + content, quality=95)
    drawn = open_picture(file)
    upright = plain if damage == "broken" else plain.rotate(270, expand=True)
    assert upright_size(file) == drawn.size == upright.size
    off = np.abs(np.asarray(drawn).astype(int) - np.asarray(upright.convert("RGBA")))
    assert off.mean() < 8  # JPEG blurs the edge
    said = damage == "broken" and kind != "jpeg"  # Pillow passes over a JPEG's by itself
    assert ("its EXIF data are broken" in capsys.readouterr().err) == said


TEXT = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 3_000_000))  # as ComfyUI writes them
PROFILE = chunk(b"iCCP", b"own\0\0" + zlib.compress(bytes(100_000_000)))
TURNED = chunk(b"eXIf", exif(6))


@pytest.mark.parametrize(
    ("chunks", "turned", "said"),
    [
        ([TURNED, TEXT], True, False),
        ([TURNED, *[TEXT] * 25], True, True),  # more than Pillow takes in all
        ([TURNED, PROFILE], False, True),
        ([TURNED, chunk(b"tEXt", b"a\0b", damaged=True)], True, True),
        ([chunk(b"eXIf", exif(6), damaged=True)], False, True),
        ([chunk(b"gAMA", b"1")], False, True),
    ],
)
def test_metadata_do_not_keep_a_picture_from_being_read(tmp_path, capsys, chunks, turned, said):
    """Megabytes of texts, a profile that unpacks to 100 MB, wrong checksums. A camera's mark stays in force where it can."""
    plain = picture(64, 32, 1, "RGBA")
    plain.save(tmp_path / "picture.png")
    upright = plain.rotate(270, expand=True) if turned else plain
    file = with_chunk(tmp_path / "picture.png", *chunks)
    assert difference(open_picture(file), upright) == 0 and upright_size(file) == upright.size
    assert ("its metadata are broken" in capsys.readouterr().err) == said


def test_a_profile_of_megabytes_is_applied(tmp_path):
    """Behind its table of tags a profile may be as long as it likes."""
    plain = picture(48, 32, 1, "RGBA")
    own = bytearray(profile(True) + np.random.default_rng(0).bytes(3_000_000))
    own[:4] = struct.pack(">I", len(own))  # its length
    plain.save(tmp_path / "large.png", icc_profile=bytes(own))
    exchanged = Image.merge("RGBA", [plain.getchannel(c) for c in "GRBA"])
    assert difference(open_picture(tmp_path / "large.png"), exchanged) <= 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "P", "1", "I;16"])
def test_a_large_picture_is_read_at_half_its_sides(tmp_path, monkeypatch, mode):
    """An odd side, turned by its mark; what is over the largest is refused by name."""
    monkeypatch.setattr(pictures, "LARGE", 60 * 30)
    kind = {"RGB": "jpeg", "CMYK": "jpeg", "L": "jpeg"}.get(mode, "png")
    plain = picture(65, 32).resize((65, 32)).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        plain = Image.fromarray(np.asarray(plain).astype(np.uint16) * 257)
    camera = Image.Exif()
    camera[0x0112] = 6
    plain.save(tmp_path / f"large.{kind}", exif=camera)
    drawn = open_picture(tmp_path / f"large.{kind}")
    assert drawn.size == upright_size(tmp_path / f"large.{kind}") == (16, 33)
    assert fit(tmp_path / f"large.{kind}", 64).size == fitted_size(tmp_path / f"large.{kind}", 64)
    monkeypatch.setattr(pictures, "LARGE", 10**6)
    whole = open_picture(tmp_path / f"large.{kind}")
    expected = np.asarray(whole.reduce(2)).astype(int)
    assert whole.size == (32, 65) and np.abs(np.asarray(drawn) - expected).mean() < 8
    monkeypatch.setattr(pictures, "LARGEST", 65 * 32 - 1)
    for read in (open_picture, upright_size):
        with pytest.raises(ValueError, match=f"large.{kind}: .*65 x 32: at most 2,079 pixels are read"):
            read(tmp_path / f"large.{kind}")


def test_pillow_leaves_the_limit_to_us(tmp_path):
    """200 million pixels, which Pillow refuses. Only the header is read here."""
    head = struct.pack(">IIBBBBB", 20_000, 10_000, 1, 0, 0, 0, 0)
    end = chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + end)
    with Image.open(tmp_path / "large.png") as opened:
        assert opened.size == (20_000, 10_000)


def test_sources_of_another_area_are_named_with_a_resolution_that_suits_all(tmp_path):
    """At 256, 4:3 becomes 288 x 224: less than the 65,536 that the published processor takes."""
    picture(64, 64).save(tmp_path / "square.png")
    picture(80, 60).save(tmp_path / "wide.png")
    picture(60, 20).save(tmp_path / "wider.png")
    files = [tmp_path / f"{name}.png" for name in ("square", "wide", "wider", "square")]

    def check(resolution: int, sources: list = files, most: int = 10**7) -> None:
        check_areas(sources, [fitted_size(file, resolution) for file in sources], resolution, 65536, most)

    check(256, files[:1])
    with pytest.raises(ValueError, match=r"wide.png: becomes 288 x 224 at --resolution 256, .* 65,536 .*") as error:
        check(256)
    suits = int(str(error.value).rsplit("--resolution ", 1)[1].split()[0])
    check(suits)
    with pytest.raises(ValueError):
        check(suits - 32)
    with pytest.raises(ValueError, match="square.png: becomes 1024 x 1024 .*--resolution 992 suits all"):
        check(1024, files[:1], most=10**6)
    with pytest.raises(ValueError, match="no resolution suits all"):
        check(256, files, most=65536)


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


@pytest.mark.parametrize("colour", [0, 2])
def test_one_transparent_colour_of_sixteen_bits(tmp_path, colour):
    """tRNS in 16 bits: grey, exactly; of colours Pillow keeps the upper 8 bits."""
    values = np.array([[0, 257, 256], [65535, 258, 5 * 257]], dtype=">u2")  # (2, 3)
    values = values[..., None].repeat(1 if colour == 0 else 3, -1)  # (2, 3, C)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    clear = struct.pack(">H", 5 * 257) * values.shape[-1]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 2, 16, colour, 0, 0, 0))
    content = head + chunk(b"tRNS", clear) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    pixels = np.asarray(open_picture(tmp_path / "deep.png"))
    assert pixels[..., 3].tolist() == [[255, 255, 255], [255, 255, 0]]
    assert pixels[..., 0].tolist() == [[0, 1, 1], [255, 1, 5]]


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
