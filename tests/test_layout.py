"""A checkpoint is what its files hold: each byte that is read changes its fingerprint, and nothing else does."""

import os
import shutil
from pathlib import Path

import pytest
from test_files import OTHERS

from checkpoint.layout import fingerprint, teachers_in

PLACES = ("model_index.json", "scheduler/scheduler_config.json", "text_encoder/model.safetensors")
PLACES += ("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "processor/tokenizer.json")
PLACES += ("vae/config.json", "vae/diffusion_pytorch_model.safetensors", "processor/preprocessor_config.json")


@pytest.fixture
def copied(checkpoint, tmp_path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("teachers"))


def flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", PLACES)
def test_one_flipped_bit_changes_the_fingerprint(copied, name):
    with open(copied / "vae" / "diffusion_pytorch_model.safetensors", "ab") as file:
        file.write(bytes(3 * 2**20))  # so large that its middle is far from its ends
    before = fingerprint(copied)
    flip(copied / name)
    assert fingerprint(copied) != before


def test_files_that_are_not_read_leave_the_fingerprint(copied, tmp_path):
    before = fingerprint(copied)
    for name in (*OTHERS, "README.md", "teachers/edit/config.json", "samples/weights.safetensors"):
        for folder in (copied, copied / "transformer"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
    for file in copied.rglob("*"):
        os.utime(file, (1, 1))
    assert fingerprint(copied) == before
    assert fingerprint(copied.rename(tmp_path / "elsewhere")) == before


def test_a_teacher_is_its_content_whatever_its_file_is_called(copied):
    teachers = copied / "teachers"
    shutil.copytree(copied / "transformer", teachers / "edit")
    (teachers / "text.safetensors").write_bytes(bytes(100))
    (teachers / "copy.safetensors").write_bytes(bytes(100))
    for name in OTHERS:
        (teachers / name).parent.mkdir(parents=True, exist_ok=True)
        (teachers / name).touch()
    places = teachers_in(copied)
    assert list(places) == ["copy", "edit", "text"]
    assert fingerprint(places["copy"]) == fingerprint(places["text"])
    assert fingerprint(places["edit"]) == fingerprint(copied / "transformer")
    before = fingerprint(copied, *places.values())
    flip(places["text"])
    assert fingerprint(copied, *places.values()) != before


def test_two_places_that_change_their_files_are_others(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    assert fingerprint(tmp_path / "a", tmp_path / "b") != fingerprint(tmp_path / "b", tmp_path / "a")
