"""What files hold: every byte counts, and other programs' files do not."""

import json
import os

import pytest

from checkpoint import files
from checkpoint.files import aside, digest, file_digests, visible

OTHERS = (".DS_Store", "._edit.jsonl", ".cache/huggingface/model.metadata", ".ipynb_checkpoints/config.json")
OTHERS += ("Thumbs.db", "desktop.ini")


@pytest.fixture
def large(tmp_path):
    """Larger than what is read at once."""
    (tmp_path / "large").write_bytes(bytes(5 * 2**20))
    return tmp_path / "large"


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the files whose content is hashed."""
    names, real = [], files.hashlib.file_digest

    def noted(opened, kind):
        names.append(os.path.basename(opened.name))
        return real(opened, kind)

    monkeypatch.setattr(files.hashlib, "file_digest", noted)
    monkeypatch.setattr(files, "SETTLED", 0)  # the tests' files are as new as can be
    return names


def test_a_files_digest_is_that_of_its_whole_content(large):
    assert file_digests([large]) == [digest(large.read_bytes())]


def test_what_has_not_changed_is_read_once(large, tmp_path, read):
    kept, small = tmp_path / "new" / "kept.json", tmp_path / "small"
    small.write_text("a")
    before = file_digests([large, small], kept)
    assert file_digests([small, large], kept) == before[::-1] and sorted(read) == ["large", "small"]
    read.clear()
    small.write_text("b")
    assert file_digests([large, small], kept) == [before[0], digest("b")] and read == ["small"]


def test_a_changed_byte_is_seen_behind_an_old_time_stamp(large, tmp_path, read):
    kept = tmp_path / "kept.json"
    (before,) = file_digests([large], kept)
    stat = large.stat()
    with open(large, "rb+") as file:
        file.seek(2**21)
        file.write(b"x")
    os.utime(large, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_digests([large], kept) == [digest(large.read_bytes())] != [before]


def test_a_file_that_was_just_written_is_read_again(large, tmp_path, read, monkeypatch):
    """Within one tick of the clock a second change would leave the same time stamp."""
    monkeypatch.setattr(files, "SETTLED", 60)
    file_digests([large], tmp_path / "kept.json")
    file_digests([large], tmp_path / "kept.json")
    assert read == ["large", "large"]


@pytest.mark.parametrize("damage", ["cut", "digest", "list", "no object", "empty", "a folder", "a folder above it"])
def test_a_damaged_file_of_digests_only_costs_time(large, tmp_path, read, damage):
    kept = tmp_path / "here" / "kept.json"
    before = file_digests([large], kept)
    text = kept.read_text()
    content = json.loads(text)
    if damage == "cut":
        kept.write_text(text[:-20])
    elif damage == "digest":
        kept.write_text(text.replace(before[0], "0" * 64))
    elif damage == "list":
        kept.write_text(json.dumps(content | {"files": []}))
    elif damage == "no object":
        kept.write_text("[]")
    elif damage == "empty":
        kept.write_text("")
    else:
        kept.unlink()
        kept.mkdir() if damage == "a folder" else kept.parent.rmdir()
        if damage == "a folder above it":
            kept.parent.touch()
    assert file_digests([large], kept) == before and read == ["large", "large"]


def test_other_programs_files_are_passed_over(tmp_path):
    for name in (*OTHERS, "config.json", "b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert visible(tmp_path) == [tmp_path / "b.txt", tmp_path / "config.json"]
    assert visible(tmp_path / "nowhere") == []


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    file = tmp_path / "file"
    with aside(file, ".1") as first:
        first.write_text("first, half")
        with aside(file, ".2") as second:
            second.write_text("second, whole")
        assert file.read_text() == "second, whole"
        first.write_text("first, whole")
    assert file.read_text() == "first, whole" and list(tmp_path.iterdir()) == [file]
