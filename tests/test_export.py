"""Students as checkpoints of their own: folders that diffusers opens, and that are written whole or not at all."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import QwenImage21Pipeline
from reference import IDENTITY, PROMPT, Both, changed, difference, open_pipeline, picture
from safetensors import safe_open
from safetensors.torch import load_file
from test_files import OTHERS

import sample
from checkpoint.export import export
from checkpoint.files import may_write, read_json
from checkpoint.layout import how_it_draws
from checkpoint.lora import merge, new_lora, read_lora, write_lora
from model import MMDiT
from program.options import TOY
from sample import Pipeline

TALL = picture(40, 90, 2, "RGBA")


@pytest.fixture(scope="module")
def shifted(checkpoint):
    return Both(checkpoint)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stochastic", [True, False])
def test_exported_student(checkpoint, tmp_path, shifted, stochastic):
    """Trained weights, own sigmas, frozen rest: opens on both sides and draws the same; bf16 weights by default."""
    student = MMDiT.from_pretrained(checkpoint / "transformer")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    sigmas = [1.0, 0.9, 0.75, 0.5]
    export(checkpoint, student, sigmas, tmp_path / "student", stochastic=stochastic)
    index = read_json(tmp_path / "student" / "model_index.json")
    assert (index["sample_sigmas"], index["resolution"], index["guidance"]) == (sigmas, 96, 1.0)
    both = Both(tmp_path / "student")
    drawn = both.agree(images=[TALL])[0]
    assert changed(drawn, shifted.ours(PROMPT, [TALL], steps=4)) > 0.2

    # Its README.md says how it draws, and warns where it re-noises, which other programs do not.
    text = (tmp_path / "student" / "README.md").read_text()
    assert how_it_draws(sigmas, stochastic) in text and "4 steps at the times [1.0, 0.9, 0.75, 0.5]" in text
    assert ("new noise after each step" in text and "ComfyUI" in text) == stochastic
    assert ("by Euler's method." in text) == (not stochastic)

    # In fp32 the file's picture is that of the model in memory at those sigmas.
    export(checkpoint, student, sigmas, tmp_path / "linked", dtype=torch.float32, link=True)
    shutil.copytree(tmp_path / "linked", tmp_path / "copy")
    reopened = Pipeline.from_pretrained(tmp_path / "copy")
    condition = reopened.condition([PROMPT], [[TALL]])
    z, t = torch.randn(1, 64, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9])
    assert torch.equal(reopened.mmdit(z, t, condition), student(z, t, condition))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "linked", "student"]


@pytest.mark.parametrize("link", [False, True])
def test_exported_student_has_the_whole_processor(toy_checkpoint, tmp_path, link):
    export(toy_checkpoint, MMDiT.from_pretrained(toy_checkpoint / "transformer"), [1.0], tmp_path / "s", link=link)
    files, expected = (
        {path.name: path.read_bytes() for path in (folder / "processor").iterdir()}
        for folder in (tmp_path / "s", toy_checkpoint)
    )
    assert files == expected and "video_preprocessor_config.json" in files


@pytest.mark.parametrize("link", [False, True])
def test_the_library_opens_folders_by_itself(toy_checkpoint, tmp_path, link):
    """The committed checkpoint, and a student of one like it, without the processor that tests/reference.py makes."""
    pytest.importorskip("torchvision", reason="the library's own processor wants torchvision, which is not installed")
    student = tmp_path / "student"
    export(toy_checkpoint, MMDiT.from_pretrained(toy_checkpoint / "transformer"), [1.0, 0.5], student, link=link)
    for folder in (student, TOY) if TOY.is_dir() else (student,):
        both = Both(folder)
        both.theirs = QwenImage21Pipeline.from_pretrained(folder, dtype=torch.float32)
        steps = None if folder == student else 4
        result, expected = both.draw("a red house on a hill", images=[picture(100, 70)], steps=steps)
        assert difference(result[0], expected[0]) <= 2 and changed(result[0], expected[0]) < 0.02


def test_export_overwrites_nothing_else(checkpoint, tmp_path):
    student = MMDiT.from_pretrained(checkpoint / "transformer")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("three years of work")
    published = shutil.copytree(checkpoint, tmp_path / "checkpoint")  # it has a model_index.json, but no mark
    there = tree(tmp_path)
    for out in tmp_path / "notes", tmp_path / "notes" / "thesis.txt", checkpoint, published:
        with pytest.raises(ValueError, match=str(out)):
            export(checkpoint, student, [1.0, 0.5], out)
    for sigmas in [], [0.5, 1.0], [1.0, 0.0], [1.5], [1.0, float("nan")]:
        with pytest.raises(ValueError, match="sigmas"):
            export(checkpoint, student, sigmas, tmp_path / "student")
    assert tree(tmp_path) == there


def test_weights_that_are_not_finite_are_not_exported(checkpoint, tmp_path):
    student = MMDiT.from_pretrained(checkpoint / "transformer")
    with torch.no_grad():
        student.img_in.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="student: img_in.weight holds values that are not finite"):
        export(checkpoint, student, [1.0], tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_files_that_are_there_are_not_replaced(tmp_path):
    """But on demand."""
    for end in "png", "safetensors":
        (tmp_path / f"there.{end}").write_bytes(b"something")
    there = tree(tmp_path)
    for end in "png", "safetensors":
        may_write(tmp_path / "new" / f"folder.{end}")
        with pytest.raises(ValueError, match=f"there.{end}: exists.*--overwrite"):
            may_write(tmp_path / f"there.{end}")
        may_write(tmp_path / f"there.{end}", overwrite=True)
    with pytest.raises(ValueError, match="new: is a folder"):
        may_write(tmp_path / "new")
    with pytest.raises(ValueError, match="there.png: exists; name another$"):
        may_write(tmp_path / "there.png", folder=True)
    with pytest.raises(OSError, match="cannot be written"):
        may_write(tmp_path / "there.png" / "x.png")
    assert tree(tmp_path) == there


def test_a_bent_schedule_is_exported_as_it_is_drawn(checkpoint, tmp_path):
    """Lightning's, fused: raw sigmas, and a scheduler that shifts them by the picture's size, without a terminal."""
    student = f"--checkpoint {checkpoint} --sigmas 1 0.75 0.5 0.25 --device cpu --dtype float32".split()
    for shift, bent in ("dynamic", {"use_dynamic_shifting": True, "shift": 1.0}), ("3", IDENTITY | {"shift": 3.0}):
        folder = tmp_path / shift
        sample.main([*student, "--shift", shift, "--export", str(folder)])
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        assert scheduler.items() >= (bent | {"shift_terminal": None, "stochastic_sampling": False}).items()
        assert "which its scheduler shifts" in (folder / "README.md").read_text()
        assert read_json(folder / "model_index.json")["sample_sigmas"] == [1.0, 0.75, 0.5, 0.25]
        Both(folder).agree()
    sample.main([*student, "--shift", "3", "--export", str(tmp_path / "a.safetensors"), "--base", str(checkpoint)])
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["sample_sigmas"]) == pytest.approx([1.0, 0.9, 0.75, 0.5])


@torch.no_grad()
def test_exact_layers_of_a_lora(checkpoint, tmp_path, capsys):
    """Whole changes, gains of norms too: bit for bit those of the student, whose weights are bf16 like the base's."""
    student = MMDiT.from_pretrained(checkpoint / "transformer", torch.bfloat16)
    rng = torch.Generator().manual_seed(0)
    for parameter in student.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    export(checkpoint, student, [1.0, 0.5], tmp_path / "student", stochastic=False)
    command = ["--checkpoint", str(tmp_path / "student"), "--base", str(checkpoint), "--rank", "2", "--device", "cpu"]
    names = ["img_in", "proj_out", "time_text_embed", "norm_q"]
    shares = []
    for number, exact in enumerate(([], ["--exact", *names])):
        file = tmp_path / f"{number}.safetensors"
        sample.main([*command, "--dtype", "bfloat16", "--export", str(file), *exact])
        shares.append(float(re.search(r"([\d.]+)% of what the student changed", capsys.readouterr().out)[1]))
    assert shares[1] > shares[0] + 1
    stored = load_file(file)
    whole = {key.removesuffix(".diff") for key in stored if key.endswith(".diff")}
    assert whole == {
        "img_in", "proj_out", *(f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)),
        *(f"transformer_blocks.{i}.attn.norm_q" for i in (0, 1)),
    }  # fmt: skip
    network = MMDiT.from_pretrained(checkpoint / "transformer", torch.bfloat16)
    lora, sigmas, stochastic = read_lora(file, network)
    merge(network, [(file, lora, 1.0)])
    assert (sigmas, stochastic) == ([1.0, 0.5], False)
    for layer in whole:
        weight = f"{layer}.weight"
        assert torch.equal(network.state_dict()[weight], student.state_dict()[weight]), layer
    with pytest.raises(ValueError, match="should be empty"):  # docs/checkpoints.md: diffusers does not read such a file
        open_pipeline(checkpoint).load_lora_weights(file)


# What is copied from a base belongs to whoever exports


@pytest.fixture
def read_only_base(checkpoint, tmp_path) -> Path:
    """A checkpoint that is read-only, as downloads and shared disks are, and has other programs' files in it."""
    folder = shutil.copytree(checkpoint, tmp_path / "base")
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


def test_exports_have_the_permissions_of_new_files(read_only_base, tmp_path):
    """Those that the umask leaves, whatever the base's are; safetensors' own would be private."""
    student = MMDiT.from_pretrained(read_only_base / "transformer")
    before = os.umask(0o027)
    try:
        export(read_only_base, student, [1.0, 0.5], tmp_path / "student")
        write_lora(tmp_path / "student" / "lora.safetensors", new_lora(student, 2), [1.0, 0.5])
    finally:
        os.umask(before)
    assert modes(tmp_path / "student") == {"folders": {0o750}, "files": {0o640}}
    copied = {path.name for path in (tmp_path / "student" / "vae").iterdir()}
    assert copied == {"config.json", "diffusion_pytorch_model.safetensors"}  # and no other program's files
    assert modes(read_only_base / "vae") == {"folders": {0o555}, "files": {0o444}}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_export_leaves_what_was_there(read_only_base, tmp_path, monkeypatch, error):
    """A disk that is full in the middle, and Ctrl-C: the empty folder is as before, nothing stands beside it, and the next
    export works. What was copied by then is writable; as root it would be removed in any case."""
    student, seen, real = MMDiT.from_pretrained(read_only_base / "transformer"), [], shutil.copyfile
    (tmp_path / "student").mkdir()

    def broken(source, target):
        if Path(source).parent.name == "text_encoder":
            seen.append(modes(target.parents[1]))
            raise error
        return real(source, target)

    with monkeypatch.context() as patch, pytest.raises(type(error)) as raised:
        patch.setattr(shutil, "copyfile", broken)
        export(read_only_base, student, [1.0], tmp_path / "student")
    assert isinstance(error, KeyboardInterrupt) or "student: cannot be written" in str(raised.value)
    assert all(mode & 0o200 for found in seen[0].values() for mode in found)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "student"}
    assert not list((tmp_path / "student").iterdir())
    export(read_only_base, student, [1.0], tmp_path / "student")
