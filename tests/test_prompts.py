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


@pytest.mark.parametrize("there", ["NFC", "NFD"])
@pytest.mark.parametrize("named", ["NFC", "NFD"])
def test_a_name_is_found_in_composed_and_decomposed_letters(folder, there, named):
    name = "pictures/café.png"
    (folder / "pictures/a.png").rename(folder / unicodedata.normalize(there, name))
    line = EDIT | {"images": [unicodedata.normalize(named, name)], "target": unicodedata.normalize(named, name)}
    (folder / "prompts.jsonl").write_text(json.dumps(line), encoding="utf-8")
    (prompt,) = read_prompts([folder / "prompts.jsonl"])
    assert prompt.images[0].is_file() and prompt.target.is_file()


def test_the_fingerprint_of_prompts_knows_their_pictures(folder):
    (folder / "one.jsonl").write_text(json.dumps(EDIT | {"target": "pictures/b.png"}))
    before = prompts_fingerprint([folder / "one.jsonl"])
    (folder / "one.jsonl").write_text("\n" + json.dumps(EDIT | {"target": "pictures/b.png"}))  # the same prompts
    assert prompts_fingerprint([folder / "one.jsonl"]) == before
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4), "red").save(folder / "pictures" / name)
        assert before != (before := prompts_fingerprint([folder / "one.jsonl"]))
