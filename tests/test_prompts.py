"""Prompt files: what is read, and every complaint about a line."""

import json
import unicodedata

import pytest
from PIL import Image

from data.prompts import prompts_fingerprint, read_prompts
from recipe import categories


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / name)
    return tmp_path


T2I = {"task": "t2i", "category": "portrait", "prompt": "a face"}
EDIT = {"task": "edit", "category": "scene", "prompt": "at night", "images": ["pictures/a.png"]}


def test_prompts_are_read(folder):
    lines = [T2I | {"target": "pictures/b.png"}, T2I | {"prompt": "two\u2028lines"}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\r\n\n"
    (folder / "one.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())  # with a byte order mark, as some editors write
    (folder / "two.jsonl").write_text(json.dumps(EDIT | {"images": ["pictures/b.png", "pictures/a.png"]}))
    first, second, third = read_prompts([folder / "one.jsonl", str(folder / "two.jsonl")])
    assert (first.task, first.category, first.prompt, first.images) == ("t2i", "portrait", "a face", [])
    assert first.target == folder / "pictures/b.png" and second.target is None
    assert second.prompt == "two\u2028lines"
    assert third.images == [folder / "pictures/b.png", folder / "pictures/a.png"]
    assert categories([first, second, third]) == {"t2i": ["portrait"], "edit": ["scene"]}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"task": "t2i", ', "not valid JSON"),
        (b'{"task": "\xff"}', "not valid JSON"),
        ('["t2i"]', "must be a JSON object"),
        (T2I | {"negative": ""}, r"unknown key \['negative'\]"),
        ({"task": "t2i", "prompt": "a face"}, "'category' is missing"),
        (T2I | {"prompt": 3}, "'prompt' must be a text"),
        (T2I | {"prompt": " "}, "'prompt' must be a text that is not empty"),
        (T2I | {"category": None}, "'category' must be a text"),
        (T2I | {"target": ["pictures/a.png"]}, "'target' must be a text"),
        (T2I | {"task": "video"}, "'task' must be one of.*'video'"),
        (T2I | {"images": ["pictures/a.png"]}, "t2i takes no 'images'"),
        (EDIT | {"images": []}, "an edit needs its source"),
        ({key: EDIT[key] for key in ("task", "category", "prompt")}, "an edit needs its source"),
        (EDIT | {"images": "pictures/a.png"}, "'images' must be a list"),
        (EDIT | {"images": [1]}, "'images' must be a list"),
        (EDIT | {"images": ["pictures/a.png", "pictures/c.png"]}, r"no picture at .*pictures/c.png"),
        (EDIT | {"target": "pictures"}, "no picture at .*pictures"),
        (EDIT | {"images": ["x" * 5000]}, "File name too long"),
        (EDIT | {"images": ["a\0b.png"]}, "no picture at"),
        (EDIT | {"images": ["pictures/a.png"] * 11}, "11 pictures in 'images'"),
        (r'{"task": "t2i", "category": "a", "prompt": "cat \ud83d"}', "'prompt' has half of a character"),
        (r'{"task": "t2i", "category": "\ude00", "prompt": "cat"}', "'category' has half of a character"),
        (r'{"task": "edit", "category": "a", "prompt": "b", "images": ["\ud83d.png"]}', "'images' has half of a char"),
        (T2I | {"prompt": "cat" * 10_000}, "'prompt' has 30,000 characters"),
        (T2I | {"prompt": "a <|image_pad|>"}, "which stands for a picture"),
        ('{"task": "t2i", "category": "a", "prompt": "b", "prompt": "c"}', "is given twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_a_bad_line_is_named(folder, line, complaint):
    line = json.dumps(line) if isinstance(line, dict) else line
    file = folder / "bad.jsonl"
    file.write_bytes(json.dumps(T2I).encode() + b"\n\n" + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 3: .*{complaint}"):
        read_prompts([file])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-8-sig"])
def test_a_file_may_be_in_another_encoding_with_its_mark(folder, encoding):
    """As PowerShell writes them, and as a Mac of old did."""
    lines = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in (T2I | {"prompt": "Öl\u2028油画 🎨"}, EDIT))
    mark = "\ufeff".encode(encoding) if encoding == "utf-16-be" else b""
    (folder / "prompts.jsonl").write_bytes(mark + lines.encode(encoding))
    first, second = read_prompts([folder / "prompts.jsonl"])
    assert first.prompt == "Öl\u2028油画 🎨" and second.images == [folder / "pictures/a.png"]
    (folder / "prompts.jsonl").write_bytes(mark + f"{lines}\n\n{{".encode(encoding))
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 4: not valid JSON"):
        read_prompts([folder / "prompts.jsonl"])


def test_an_encoding_that_cannot_be_read_is_named(folder):
    text = json.dumps(T2I)
    for content, complaint in (
        (text.encode("utf-16") + b"\n", "begins as UTF-16 and does not go on so"),
        (text.encode("utf-16-le"), "zero bytes, as UTF-16 without its mark"),
    ):
        (folder / "prompts.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=rf"prompts\.jsonl: .*{complaint}"):
            read_prompts([folder / "prompts.jsonl"])


@pytest.mark.parametrize("there", ["NFC", "NFD"])
@pytest.mark.parametrize("named", ["NFC", "NFD"])
def test_a_name_is_found_in_composed_and_decomposed_letters(folder, there, named):
    name = "pictures/café.png"
    (folder / "pictures/a.png").rename(folder / unicodedata.normalize(there, name))
    line = EDIT | {"images": [unicodedata.normalize(named, name)], "target": unicodedata.normalize(named, name)}
    (folder / "prompts.jsonl").write_text(json.dumps(line), encoding="utf-8")
    (prompt,) = read_prompts([folder / "prompts.jsonl"])
    assert prompt.images[0].is_file() and prompt.target.is_file()


def test_an_empty_or_missing_file(folder):
    (folder / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: no prompts"):
        read_prompts([folder / "empty.jsonl"])
    for name in ("none.jsonl", "pictures"):
        with pytest.raises(FileNotFoundError, match=rf"{name}: no such file"):
            read_prompts([folder / name])


def test_the_fingerprint_of_prompts_knows_their_pictures(folder):
    (folder / "one.jsonl").write_text(json.dumps(EDIT | {"target": "pictures/b.png"}))
    before = prompts_fingerprint([folder / "one.jsonl"])
    (folder / "one.jsonl").write_text("\n" + json.dumps(EDIT | {"target": "pictures/b.png"}))  # the same prompts
    assert prompts_fingerprint([folder / "one.jsonl"]) == before
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4), "red").save(folder / "pictures" / name)
        assert before != (before := prompts_fingerprint([folder / "one.jsonl"]))
