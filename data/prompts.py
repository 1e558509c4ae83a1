"""Prompt files: JSON lines, read and checked. docs/prompts.md describes them."""

import codecs
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from checkpoint.files import digest, file_digests
from program.edges import parse_json, short

TASKS = ("t2i", "edit")
KEYS = ("task", "category", "prompt", "images", "target")
MOST_IMAGES = 10  # sources of one edit
LONGEST = 8_000  # characters of one text; ours, because the cost of attention grows with the square
MARKS = {  # the first bytes of files that are not UTF-8; the longer ones first, because UTF-16's begins one of them
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",  # PowerShell's `>` writes it
    codecs.BOM_UTF16_BE: "utf-16",
}
RESERVED = ("<|image_pad|>", "<|video_pad|>")  # the encoder puts pictures in their places


@dataclass
class Prompt:
    """One training case. A file's cases have paths; the toy world's have pictures that it has just drawn."""

    task: str  # "t2i" or "edit"
    category: str  # any word; a recipe's composition and routing refer to it
    prompt: str
    images: list[Path | Image.Image] = field(default_factory=list)  # the sources of an edit, in the order of the prompt
    target: Path | Image.Image | None = None  # the picture to learn; only the flow objective needs it


def read_prompts(files: Iterable[str | Path]) -> list[Prompt]:
    """Read JSON lines {"task", "category", "prompt", "images", "target"}. Paths are relative to the file's folder.

    Files are UTF-8, or begin with the byte-order mark of UTF-16 or UTF-32. An edit needs images, T2I must have none.
    The target is optional. Blank lines are skipped. ValueError names file and line of any fault: a key, a type, a
    missing picture.
    """
    prompts = []
    for file in map(Path, files):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; prompts are expected in it, one JSON object a line")
        before = len(prompts)
        # Bytes are split into lines: str.splitlines also splits at U+2028 and others, which a prompt may contain.
        for number, line in enumerate(utf8(file).splitlines(), start=1):
            if line.strip():
                try:
                    prompts.append(parse_line(line, file.parent))
                except (ValueError, OSError) as error:
                    raise ValueError(f"{file}, line {number}: {error}") from None
        if len(prompts) == before:
            raise ValueError(f"{file}: no prompts in it; expected one JSON object a line")
    return prompts


def utf8(file: Path) -> bytes:
    """A file's text in UTF-8. ValueError if it is not in the encoding that its first bytes announce."""
    content = file.read_bytes()
    encoding = next((encoding for mark, encoding in MARKS.items() if content.startswith(mark)), None)
    if encoding is not None:
        try:
            return content.decode(encoding).encode()
        except ValueError as error:
            raise ValueError(f"{file}: begins as {encoding.upper()} but is not ({error})") from None
    if b"\0" in content:
        raise ValueError(f"{file}: has zero bytes, like UTF-16 without its mark; save it as UTF-8")
    return content


def parse_line(line: bytes, folder: Path) -> Prompt:
    """One line of a prompt file. ValueError or OSError say what is wrong."""
    try:
        row = parse_json(line)
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        # "line 1" of the JSON means nothing here. The caller adds the line's number in the file.
        raise ValueError(f"not valid JSON: {error}".replace("line 1 ", "")) from None
    if type(row) is not dict:
        raise ValueError("a line must be a JSON object")
    if unknown := row.keys() - KEYS:
        raise ValueError(f"unknown key {short(sorted(unknown))}; known are {', '.join(KEYS)}")
    for key in ("task", "category", "prompt"):
        if key not in row:
            raise ValueError(f"{key!r} is missing")
    images = row.get("images", [])
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise ValueError(f"'images' must be a list of paths, not {short(images)}")
    for key, value in row.items():
        if key != "images":
            check_text(key, value)
    for image in images:
        check_text("images", image)

    if row["task"] not in TASKS:
        raise ValueError(f"'task' must be one of {TASKS}, not {short(row['task'])}")
    if row["task"] == "edit" and not images:
        raise ValueError("an edit needs its source pictures in 'images'")
    if row["task"] == "t2i" and images:
        raise ValueError("t2i takes no 'images'; is this an edit, or is the picture the 'target'?")
    if len(images) > MOST_IMAGES:
        raise ValueError(f"{len(images)} pictures in 'images'; an edit has at most {MOST_IMAGES}")
    sources = [picture_at(folder, image) for image in images]
    target = picture_at(folder, row["target"]) if "target" in row else None
    return Prompt(row["task"], row["category"], row["prompt"], sources, target)


def check_text(key: str, text: object) -> None:
    """ValueError unless the value of this key is a text that the encoder can read."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{key!r} must be a text that is not empty, not {short(text)}")
    if half := re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{key!r} has half of a character, {half[0]!r} (a lone surrogate); write the whole one")
    if len(text) > LONGEST:
        raise ValueError(f"{key!r} has {len(text):,} characters; at most {LONGEST:,} are possible")
    for word in RESERVED:
        if word in text:
            raise ValueError(f"{key!r} has {word}, which stands for a picture; remove it")


def picture_at(folder: Path, name: str) -> Path:
    """The picture of this name, in either Unicode spelling: é is one character, or e and an accent. Systems that copy a
    file may change the spelling. ValueError: there is neither."""
    shown = folder / name if len(name) <= 255 else short(name)
    for spelled in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
        try:
            if (folder / spelled).is_file():
                return folder / spelled
        except OSError as error:  # for example a name that is too long
            raise ValueError(f"no picture at {shown}: {error.strerror}") from None
    raise ValueError(f"no picture at {shown}")


def prompts_fingerprint(files: Iterable[str | Path]) -> str:
    """A hash of prompt files and of every picture that they name. Errors are those of read_prompts."""
    lines, pictures = [], []
    for prompt in read_prompts(files):
        lines.append([prompt.task, prompt.category, prompt.prompt, len(prompt.images), bool(prompt.target)])
        pictures += [*prompt.images, prompt.target] if prompt.target else prompt.images
    return digest(json.dumps([lines, file_digests(pictures)]))
