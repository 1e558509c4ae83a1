"""Sheets: pictures in rows, with the rows' names on the left and words above the columns.

    Grid          rows of pictures, and the words above them
    write_sheet   grids -> one PNG, one grid below the other
    font_for      a font that can write a text

Pillow's own font has little more than the letters of English. For other texts a font of the system is used. If none has
the letters, the sheet says `text 1`, and a .txt file beside the picture has the text.
"""

import subprocess
import unicodedata
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from checkpoint.files import aside

MOST_LINES = 6  # of the words above a picture
NO_LETTER = "\U0010ffff"  # no font has it, so a font draws it like any letter that it lacks
UNSEEN = ("Zs", "Zl", "Zp", "Cc", "Cf")  # Unicode's categories of spaces and invisible marks
FONT_FOLDERS = (  # where systems without fontconfig keep their fonts: Linux, macOS, Windows
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "C:/Windows/Fonts",
)


@dataclass
class Grid:
    """Rows of pictures. All rows have one picture for each head."""

    rows: dict[str, list[Image.Image]]  # by the name on the left
    heads: list[str]  # the words above each column
    titles: list[str] = field(default_factory=list)  # of each column, above its head; neighbours share an equal title


def write_sheet(grids: list[Grid], path: Path) -> None:
    """Write the grids into one PNG, one below the other. Rows and grids without pictures are left out.

    Every picture gets the space of the largest one. Transparent parts are white. ValueError: there is no picture.
    """
    shown = []
    for grid in grids:
        rows = {name: row for name, row in grid.rows.items() if row}
        if rows:
            shown.append(Grid(rows, grid.heads, grid.titles))
    sizes = [picture.size for grid in shown for row in grid.rows.values() for picture in row]
    if not sizes:
        raise ValueError(f"{path}: there are no pictures to show")
    width = max(width for width, _ in sizes)
    height = max(height for _, height in sizes)

    unwritable: list[str] = []  # texts with letters that no font has
    names = [written(name, name_size(height), unwritable) for grid in shown for name in grid.rows]
    left = height // 8 + max(round(font.getlength(name)) for name, font in names)
    drawn = [draw_grid(grid, left, width, height, unwritable) for grid in shown]
    size = max(grid.width for grid in drawn), sum(grid.height for grid in drawn)
    sheet = Image.new("RGB", size, "white")
    y = 0
    for grid in drawn:
        sheet.paste(grid, (0, y))
        y += grid.height

    with aside(path) as part:
        sheet.save(part, "PNG")
    if unwritable:
        lines = [f"{number}: {' '.join(text.split())}\n" for number, text in enumerate(unwritable, start=1)]
        with aside(path.with_suffix(".txt")) as part:
            part.write_text("".join(lines), encoding="utf-8")


def draw_grid(grid: Grid, left: int, width: int, height: int, unwritable: list[str]) -> Image.Image:
    """One grid, with names in the first `left` pixels and width x height pixels for a picture. Adds to `unwritable`."""
    gap = height // 32  # between pictures
    large, small = name_size(height), max(11, height // 12)
    titles = {}  # column -> the title that begins there
    for column, title in enumerate(grid.titles):
        if column == 0 or title != grid.titles[column - 1]:
            titles[column] = title
    xs, x = [], left  # where the columns begin
    for column in range(len(grid.heads)):
        if column and column in titles:
            x += 3 * gap
        xs.append(x)
        x += width + gap
    heads = []
    for head in grid.heads:
        text, font = written(head, small, unwritable)
        heads.append((wrap(text, font, width - gap), font))
    lines = max(text.count("\n") + 1 for text, _ in heads)
    under_titles = 3 * large // 2 if titles else 0
    top = under_titles + round(1.3 * small * lines) + gap  # where the pictures begin

    canvas = Image.new("RGB", (x, top + len(grid.rows) * (height + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for x, (text, font) in zip(xs, heads, strict=True):
        pen.multiline_text((x, top - 3), text, "black", font, anchor="ld", spacing=1)
    for column, title in titles.items():
        text, font = written(title, large, unwritable)
        pen.text((xs[column], under_titles - 4), text, "black", font, anchor="ls")
    y = top
    for name, row in grid.rows.items():
        text, font = written(name, large, unwritable)
        pen.text((4, y + height // 2), text, "black", font, anchor="lm")
        for x, picture in zip(xs, row, strict=True):
            canvas.paste(picture, (x, y), picture.convert("RGBA"))
        y += height + gap
    return canvas


def name_size(height: int) -> int:
    """The size in pixels of the letters beside and above pictures of this height."""
    return max(12, height // 8)


def written(text: str, size: int, unwritable: list[str]) -> tuple[str, ImageFont.FreeTypeFont]:
    """What the sheet shows for a text, and its font. A text that no font can write is added to `unwritable`."""
    if font := font_for(text, size):
        return text, font
    if text not in unwritable:
        unwritable.append(text)
    return f"text {unwritable.index(text) + 1}", ImageFont.load_default(size)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A text in at most MOST_LINES lines of at most `width` pixels. Lines break between words, and inside a word that
    is longer than a line. The rest is cut off."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
        if len(lines) > MOST_LINES:
            last = lines[MOST_LINES - 1]
            while last and font.getlength(f"{last} ...") > width:
                last = last[:-1]
            return "\n".join([*lines[: MOST_LINES - 1], f"{last.rstrip()} ..."])
    return "\n".join(lines)


# ---- fonts -----------------------------------------------------------------------------------------------------------


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | None:
    """A font of this size in pixels that has every letter of the text: Pillow's own, or one of the system, or None.

    Also None for a text that runs from right to left if Pillow cannot set one (its library raqm is missing).
    """
    letters = frozenset(letter for letter in text if unicodedata.category(letter) not in UNSEEN)
    own = ImageFont.load_default(size)
    if writes(own, letters):
        return own
    right_to_left = any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in letters)
    if right_to_left and not features.check("raqm"):
        return None
    font = system_font(letters)
    return ImageFont.truetype(font[0], size, font[1]) if font else None


@cache
def system_font(letters: frozenset[str]) -> tuple[str, int] | None:
    """A font file of the system that has all the letters, and the font's number in it."""
    candidates = fontconfig(letters) + [(str(file), 0) for file in font_files()]
    for file, number in candidates:
        try:
            if writes(ImageFont.truetype(file, 16, number), letters):
                return file, number
        except OSError:  # not a font, or a bitmap font of another size
            continue
    return None


def fontconfig(letters: frozenset[str]) -> list[tuple[str, int]]:
    """The font that fontconfig chooses for the letters, which may lack some; none if fontconfig is not installed."""
    codes = " ".join(f"{ord(letter):x}" for letter in sorted(letters))
    command = ["fc-match", "-f", "%{file}\n%{index}", f"sans-serif:charset={codes}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        file, number = answer.split("\n")
        return [(file, int(number) & 0xFFFF)]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


@cache
def font_files() -> list[Path]:
    """The fonts in FONT_FOLDERS, the largest files first, because they have the most letters."""
    files = []
    for folder in FONT_FOLDERS:
        inside = Path(folder).expanduser().rglob("*")
        files += [file for file in inside if file.suffix.lower() in (".ttf", ".otf", ".ttc")]
    return sorted(files, key=lambda file: file.stat().st_size, reverse=True)


def writes(font: ImageFont.FreeTypeFont, letters: frozenset[str]) -> bool:
    """Whether the font has all the letters. It draws a letter that it lacks like NO_LETTER."""

    def drawn(letter: str) -> tuple:
        mask = font.getmask(letter)
        return mask.size, bytes(mask)

    lacking = drawn(NO_LETTER)
    return all(drawn(letter) != lacking for letter in letters)
