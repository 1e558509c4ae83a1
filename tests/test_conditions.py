"""The cache of encoded prompts: what is in it is not encoded again, and what is not, or is torn, or has changed, is."""

import json
import os
import re
from pathlib import Path

import pytest
import reference
import torch
from safetensors.torch import save_file

from recipe import Prompt, read_prompts
from support import conditions, pictures
from support.conditions import Entry, cached_pool, encode_pool

SIZE = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("conditions") / "checkpoint"
    for write in (reference.write_processor, reference.write_text_encoder, reference.write_vae):
        write(folder)
    return folder


@pytest.fixture
def prompts(tmp_path) -> Path:
    """Six prompts in four groups; a picture that a camera took lying on its side is among the sources."""
    lines = []
    for i in range(4):
        exif = reference.Image.Exif()
        exif[0x0112] = 6 if i == 3 else 1
        reference.picture(*((100, 40) if i > 1 else (64, 64)), i).save(tmp_path / f"{i}.jpg", exif=exif)
        lines.append({"task": "edit", "category": "scene", "prompt": f"red{', red' * i}", "images": [f"{i}.jpg"]})
    lines += [{"task": "t2i", "category": "text", "prompt": f"a wizard{' hat' * i}"} for i in range(2)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "prompts.jsonl"


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The words of every prompt that is encoded from now on."""
    seen, real = [], conditions.encode

    def watched(encoders, prompts, *arguments):
        seen.extend(prompt.prompt for prompt in prompts)
        return real(encoders, prompts, *arguments)

    monkeypatch.setattr(conditions, "encode", watched)
    return seen


def equal(a: Entry, b: Entry) -> bool:
    tensors = [[e.states, e.empty, *e.sources] for e in (a, b)]
    rest = [(e.task, e.category, e.slots, e.size, e.target) for e in (a, b)]
    return rest[0] == rest[1] and all(map(torch.equal, *tensors))


def test_cache(checkpoint, prompts, tmp_path, encoded, monkeypatch):
    folder = tmp_path / "cache"
    words = [prompt.prompt for prompt in read_prompts([prompts])]
    pipeline = conditions.Encoders.from_pretrained(checkpoint, torch.float32, "cpu")
    expected = encode_pool(pipeline, read_prompts([prompts]), SIZE)
    assert sorted(encoded) == sorted(words)
    assert len({entry.size for entry in expected.entries}) == 3  # the turned one stands upright

    def again(interrupted_after: int | None = None, resolution: int = SIZE) -> tuple[list[Entry], list[str]]:
        encoded.clear()
        with monkeypatch.context() as patch:
            if interrupted_after is not None:
                write = conditions.write_shard
                left = [None] * interrupted_after
                patch.setattr(conditions, "write_shard", lambda *a: (left.pop(), write(*a)))
            listed = read_prompts([prompts])
            pool = cached_pool(folder, listed, checkpoint, torch.float32, "cpu", resolution)
        return pool.entries, sorted(encoded)

    with pytest.raises(IndexError):  # killed when two of four groups were kept, of two prompts and of one
        again(interrupted_after=2)
    kept = set(encoded[:3])
    entries, rest = again()
    assert set(rest) == set(words) - kept and len(rest) == 3
    assert all(map(equal, entries, expected.entries))
    with monkeypatch.context() as patch:  # a second start does not even open the encoders
        patch.setattr(conditions.Encoders, "from_pretrained", None)
        entries, new = again()
    assert new == [] and all(map(equal, entries, expected.entries))

    shards = {path: set(conditions.read_shard(path)) for path in conditions.shards(folder)}
    assert len(shards) == 4
    for spoil in ("cut", "zeros"):  # a header that fits, and bytes that do not
        path = next(iter(shards))
        content = path.read_bytes()
        path.write_bytes(content[:-100] if spoil == "cut" else content[:-100] + bytes(100))
        entries, new = again()
        assert len(new) == len(shards[path]) and all(map(equal, entries, expected.entries))

    reference.picture(64, 64, 99).save(prompts.parent / "0.jpg")
    entries, new = again()
    assert new == ["red"] and not equal(entries[0], expected.entries[0])
    assert all(map(equal, entries[1:], expected.entries[1:]))
    assert again(resolution=96)[1] == sorted(words)
    with monkeypatch.context() as patch:
        patch.setattr(conditions, "fingerprint", lambda checkpoint: "other weights")
        assert again()[1] == sorted(words)


def test_fingerprint_knows_the_weights(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "a.safetensors").write_bytes(b"1")
    before = conditions.fingerprint(tmp_path)
    assert conditions.fingerprint(tmp_path) == before
    (tmp_path / "vae" / "a.safetensors").write_bytes(b"2")
    assert conditions.fingerprint(tmp_path) != before


def test_a_folder_with_other_files_is_refused_and_keeps_them(checkpoint, prompts, tmp_path, encoded):
    """Weights of somebody, a shard's name on other contents, a shard without its header, any other file."""
    listed, folder = read_prompts([prompts]), tmp_path / "cache"
    cached_pool(folder, listed, checkpoint, torch.float32, "cpu", SIZE)
    shard = conditions.shards(folder)[0]
    weights = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(3)}, weights)
    (folder / f"{'0' * 32}.{os.getpid()}.part").touch()  # a writer that was killed left it
    damaged = shard.read_bytes()[:-1]
    for name, content in {
        "model.safetensors": weights.read_bytes(),
        f"{'1' * 32}.safetensors": weights.read_bytes(),
        f"{'2' * 32}.safetensors": shard.read_bytes()[:40],
        f"{'3' * 32}.safetensors": b"",
        "notes.txt": b"mine",
    }.items():
        (folder / name).write_bytes(content)
        shard.write_bytes(damaged)  # ours, and yet it stays as it is, for the folder is not touched at all
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        encoded.clear()
        with pytest.raises(ValueError, match=rf"{re.escape(name)}: not a file of encoded prompts"):
            cached_pool(folder, listed, checkpoint, torch.float32, "cpu", SIZE)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before and not encoded
        (folder / name).unlink()
    cached_pool(folder, listed, checkpoint, torch.float32, "cpu", SIZE)
    assert encoded and shard.read_bytes() != damaged


@pytest.mark.parametrize("how", ["stretch", "crop", "pad"])
def test_sources_and_targets_are_fitted_as_asked(checkpoint, tmp_path, how):
    """A target of another shape comes to the size of its edit's source, by the way that is asked for."""
    reference.picture(64, 64, 1).save(tmp_path / "source.png")
    reference.picture(96, 32, 2).save(tmp_path / "target.png")
    prompt = Prompt("edit", "scene", "a hat", [tmp_path / "source.png"], tmp_path / "target.png")
    encoders = conditions.Encoders.from_pretrained(checkpoint, torch.float32, "cpu")
    (entry,) = encode_pool(encoders, [prompt], 64, targets=True, how=how).entries
    fitted = pictures.fit(prompt.target, 64, how, (64, 64))
    expected = encoders.vae.encode(pictures.to_tensor([fitted]))[0].bfloat16()  # (64, h, w)
    assert entry.size == (4, 4) and torch.equal(entry.target, expected)
