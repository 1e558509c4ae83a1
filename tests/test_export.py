"""What is copied from a base checkpoint belongs to whoever exports."""

import os
import shutil
from pathlib import Path

import pytest
import reference
from test_files import OTHERS

from checkpoint.export import export
from model import MMDiT


@pytest.fixture
def base(tmp_path) -> Path:
    """A checkpoint that is read-only, as downloads and shared disks are, and has other programs' files in it."""
    folder = reference.write_checkpoint(tmp_path / "base")
    for name in OTHERS:
        (folder / "vae" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "vae" / name).touch()
    for path in sorted(folder.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


def modes(folder: Path) -> dict[str, set[int]]:
    paths = [folder, *folder.rglob("*")]
    kinds = {"folders": [p for p in paths if p.is_dir()], "files": [p for p in paths if p.is_file()]}
    return {kind: {path.stat().st_mode & 0o777 for path in some} for kind, some in kinds.items()}


def test_a_read_only_base_makes_no_read_only_export(base, tmp_path):
    before = os.umask(0o027)
    try:
        export(base, MMDiT.from_pretrained(base / "transformer"), [1.0, 0.5], tmp_path / "student")
    finally:
        os.umask(before)
    assert modes(tmp_path / "student") == {"folders": {0o750}, "files": {0o640}}
    assert {path.name for path in (tmp_path / "student" / "vae").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert modes(base / "vae") == {"folders": {0o555}, "files": {0o444}}


def test_a_full_disk_leaves_nothing_that_is_read_only(base, tmp_path, monkeypatch):
    """What is left of a failed export is removed, so the next one works; as root it would be removed in any case."""
    student, seen, real = MMDiT.from_pretrained(base / "transformer"), [], shutil.copyfile

    def full(source, target):
        if Path(source).parent.name == "text_encoder":
            seen.append(modes(target.parents[1]))
            raise OSError(28, "No space left on device")
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="student: cannot be written"):
            export(base, student, [1.0], tmp_path / "student")
    assert all(mode & 0o200 for some in seen[0].values() for mode in some)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    export(base, student, [1.0], tmp_path / "student")
