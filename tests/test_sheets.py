"""Sheets of pictures: where pictures and words stand, and with which font."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from data import sheets
from data.sheets import Grid, font_for, wrap, write_sheet

NO_FONT_HAS_THIS = "\U0010fffe"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def boxes(where: np.ndarray) -> list[tuple[int, int]]:
    """[start, stop) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], where.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def test_pictures_stand_in_rows_under_their_words(tmp_path):
    blue, clear = Image.new("RGB", (96, 64), "blue"), Image.new("RGBA", (96, 64), (255, 0, 0, 0))
    grids = [
        Grid({"a": [blue] * 3, "b": [blue, clear, blue]}, ["one", "", "three"], ["x", "x", "y"]),
        Grid({"left out": []}, ["nothing"]),
        Grid({"c": [blue]}, ["four"]),
    ]
    write_sheet(grids, tmp_path / "new" / "sheet.png")
    sheet = pixels(tmp_path / "new" / "sheet.png")
    is_blue, ink = (sheet == [0, 0, 255]).all(2), (sheet < 100).all(2)
    columns, rows = boxes(is_blue.any(0)), boxes(is_blue.any(1))
    assert [stop - start for start, stop in columns] == [96] * 3 and [stop - start for start, stop in rows] == [64] * 3
    assert columns[2][0] - columns[1][1] > columns[1][0] - columns[0][1] > 0  # a wider gap before another title
    assert not is_blue[rows[1][0] : rows[1][1], columns[1][0] : columns[1][1]].any()  # transparent shows white
    first = rows[0][0]  # above it: titles over the first and third column, a head over each but the second
    assert [ink[:first, start:stop].any() for start, stop in columns] == [True, False, True]
    assert all(ink[start:stop, : columns[0][0]].any() for start, stop in rows)  # the rows' names
    assert not (tmp_path / "new" / "sheet.txt").exists()


def test_a_text_that_no_font_has_stands_beside_the_sheet(tmp_path):
    texts = [f"{NO_FONT_HAS_THIS} one", "plain", f"{NO_FONT_HAS_THIS}\ntwo", f"{NO_FONT_HAS_THIS} one"]
    row = {"row": [Image.new("RGB", (64, 64))] * 4}
    write_sheet([Grid(row, texts)], tmp_path / "sheet.png")
    lines = (tmp_path / "sheet.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [f"1: {NO_FONT_HAS_THIS} one", f"2: {NO_FONT_HAS_THIS} two"]
    write_sheet([Grid(row, ["text 1", "plain", "text 2", "text 1"])], tmp_path / "b.png")
    assert (pixels(tmp_path / "sheet.png") == pixels(tmp_path / "b.png")).all()


def test_a_sheet_needs_a_picture(tmp_path):
    with pytest.raises(ValueError, match="sheet.png: there are no pictures"):
        write_sheet([Grid({"row": []}, [])], tmp_path / "sheet.png")


@pytest.mark.parametrize(
    "text", ["a hat", "A hat:\n\t3 (three)!", "Größe 3 €", "", "Привет", "שלום", "مرحبا", "油画", "🎨"]
)
def test_a_font_has_every_letter_or_is_none(text):
    font = font_for(text, 20)
    assert font is None or sheets.writes(font, frozenset(text) - frozenset(" \n\t"))
    if text.startswith(("a ", "A ")):  # English: Pillow's own font, on every machine
        assert font.getname() == ImageFont.load_default(20).getname() and font.size == 20
    assert font_for(text + NO_FONT_HAS_THIS, 20) is None


def test_a_font_is_found_without_fontconfig(tmp_path, monkeypatch):
    """A font file in a known folder: here Pillow's own, under a name that is looked for."""
    letters = frozenset("abc")
    own = ImageFont.load_default(20)
    (tmp_path / "fonts").mkdir()
    (tmp_path / "fonts" / "damaged.ttf").write_bytes(b"no font" * 100_000)  # the largest comes first
    (tmp_path / "fonts" / "own.TTF").write_bytes(own.font_bytes)
    monkeypatch.setattr(sheets, "FONT_FOLDERS", (str(tmp_path / "fonts"), str(tmp_path / "none")))
    monkeypatch.setenv("PATH", "")
    for remembered in (sheets.system_font, sheets.font_files):
        remembered.cache_clear()
    try:
        assert sheets.fontconfig(letters) == []
        assert sheets.system_font(letters) == (str(tmp_path / "fonts" / "own.TTF"), 0)
        assert sheets.system_font(frozenset("油")) is None
    finally:
        for remembered in (sheets.system_font, sheets.font_files):
            remembered.cache_clear()


@pytest.mark.parametrize("text", ["a few words and more", "onelongwordwithoutspaces" * 2, "词" * 60, "word " * 300])
def test_lines_are_as_wide_as_they_may_be(text):
    font = ImageFont.load_default(12)
    lines = wrap(text, font, 80).split("\n")
    assert len(lines) <= sheets.MOST_LINES and all(font.getlength(line) <= 80 for line in lines)
    if len(text) < 100:
        assert "".join("".join(lines).split()) == "".join(text.split())
    else:
        assert lines[-1].endswith(" ...")
