"""The folder of encoded prompts: what is in it is not encoded again; what is not in it, is torn or has changed, is."""

import json
import os
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import reference
import torch
from safetensors.torch import save_file

from checkpoint.files import visible
from data import encode, pictures
from data.batches import condition_of
from data.encode import How, encode_prompts
from data.pool import Entry
from networks.qwen3vl import Qwen3VL
from networks.vae import VAE
from recipe import Prompt, read_prompts
from sample import Pipeline

SIZE = 64


@pytest.fixture
def grouped(tmp_path) -> Path:
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
    seen, real = [], encode.encode_group

    def watched(encoder, vae, prompts, *arguments):
        seen.extend(prompt.prompt for prompt in prompts)
        return real(encoder, vae, prompts, *arguments)

    monkeypatch.setattr(encode, "encode_group", watched)
    return seen


def equal(a: Entry, b: Entry) -> bool:
    tensors = [[e.states, e.empty, *e.sources] for e in (a, b)]
    rest = [(e.task, e.category, e.slots, e.size, e.target) for e in (a, b)]
    return rest[0] == rest[1] and all(map(torch.equal, *tensors))


def test_pool_holds_what_the_pipeline_would_encode(checkpoint, prompts, pools):
    pipeline = Pipeline.from_pretrained(checkpoint)
    listed = read_prompts([prompts])
    for prompt, entry in zip(listed, pools["flow"].entries, strict=True):
        assert (entry.task, entry.category) == (prompt.task, prompt.category)
        for text, states in ((prompt.prompt, entry.states), ("", entry.empty)):
            condition = pipeline.condition([text], [prompt.images] if prompt.images else None, resolution=64)
            assert entry.slots == condition.slots
            words = [condition.states[0, start:stop] for start, stop, grid in condition.pieces if grid is None]
            torch.testing.assert_close(states.float(), torch.cat(words), rtol=1e-2, atol=1e-2)
        for mine, theirs in zip(entry.sources, condition.sources, strict=True):
            torch.testing.assert_close(mine.float(), theirs[0], rtol=1e-2, atol=1e-2)
        assert entry.size == tuple(entry.target.shape[1:])  # the picture to learn has the size that is to be drawn
    assert len({entry.size for entry in pools["flow"].entries}) == 2  # one source is wider than the others


def test_only_what_is_missing_is_encoded(checkpoint, grouped, tmp_path, encoded, monkeypatch):
    folder = tmp_path / "cache"
    words = [prompt.prompt for prompt in read_prompts([grouped])]
    expected = encode_prompts(tmp_path / "expected", read_prompts([grouped]), checkpoint, How(SIZE))
    assert sorted(encoded) == sorted(words)
    assert len({entry.size for entry in expected.entries}) == 3  # the turned one stands upright

    def again(interrupted_after: int | None = None, resolution: int = SIZE) -> tuple[list[Entry], list[str]]:
        encoded.clear()
        with monkeypatch.context() as patch:
            if interrupted_after is not None:
                write = encode.write_shard
                left = [None] * interrupted_after
                patch.setattr(encode, "write_shard", lambda *a: (left.pop(), write(*a)))
            pool = encode_prompts(folder, read_prompts([grouped]), checkpoint, How(resolution))
        return pool.entries, sorted(encoded)

    with pytest.raises(IndexError):  # killed when two of four groups were kept, of two prompts and of one
        again(interrupted_after=2)
    kept = set(encoded[:3])
    entries, rest = again()
    assert set(rest) == set(words) - kept and len(rest) == 3
    assert all(map(equal, entries, expected.entries))
    with monkeypatch.context() as patch:  # a second start does not even open the encoders
        patch.setattr(encode.VAE, "from_pretrained", None)
        patch.setattr(encode.Qwen3VL, "from_pretrained", None)
        entries, new = again()
    assert new == [] and all(map(equal, entries, expected.entries))

    shards = visible(folder)
    assert len(shards) == 4
    length = shards[0].stat().st_size
    os.truncate(shards[0], length - 100)
    entries, new = again()
    assert 0 < len(new) < len(words) and all(map(equal, entries, expected.entries))
    assert visible(folder) == shards and shards[0].stat().st_size == length

    reference.picture(64, 64, 99).save(grouped.parent / "0.jpg")
    entries, new = again()
    assert new == ["red"] and not equal(entries[0], expected.entries[0])
    assert all(map(equal, entries[1:], expected.entries[1:]))
    assert again(resolution=96)[1] == sorted(words)
    with monkeypatch.context() as patch:
        patch.setattr(encode, "fingerprint", lambda *places, kept: "other weights")
        assert again()[1] == sorted(words)


def test_a_folder_with_other_files_keeps_them(checkpoint, grouped, tmp_path, encoded):
    """Weights of somebody, a shard's name on other contents, a shard without its header, any other file."""
    listed, folder = read_prompts([grouped]), tmp_path / "cache"
    folder.mkdir()
    save_file({"a": torch.ones(3)}, folder / "model.safetensors")
    save_file({"a": torch.ones(3)}, folder / f"{'1' * 32}.safetensors")
    (folder / f"{'2' * 32}.safetensors").touch()
    (folder / f"{'0' * 32}.{os.getpid()}.part").touch()  # a writer that was killed left it
    (folder / "notes.txt").write_bytes(b"mine")
    before = {file: file.read_bytes() for file in folder.iterdir()}
    for new in (len(listed), 0):
        encoded.clear()
        encode_prompts(folder, listed, checkpoint, How(SIZE))
        assert len(encoded) == new and len(visible(folder)) == len(before) + 4
    assert before == {file: file.read_bytes() for file in before}


def test_a_full_disk_leaves_no_shard(checkpoint, grouped, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", full)
        encode_prompts(tmp_path / "cache", read_prompts([grouped]), checkpoint, How(SIZE))
    assert not visible(tmp_path / "cache")


def test_a_shard_keeps_words_and_latents_alone(checkpoint, grouped, tmp_path):
    """In bytes: no state of a source's slot, neither of the prompt nor of its twin. What trains is what the encoder says
    wherever the network reads it."""
    listed, folder = read_prompts([grouped]), tmp_path / "cache"
    pool = encode_prompts(folder, listed, checkpoint, How(SIZE))
    encoder = Qwen3VL.from_pretrained(checkpoint)
    expected, slots = 0, 0
    for entry in pool.entries:
        tensors = [entry.states, entry.empty, *entry.sources]
        expected += sum(t.numel() * 2 for t in tensors)
        slots += sum(stop - start for start, stop in entry.slots)
    kept = 0
    for shard in visible(folder):
        with open(shard, "rb") as file:
            kept += shard.stat().st_size - 8 - int.from_bytes(file.read(8), "little")  # without the header
    assert kept == expected and slots > 0

    for prompt, entry in zip(listed, pool.entries, strict=True):
        images = [pictures.fit(image, SIZE) for image in prompt.images]
        for words, empty in ((prompt.prompt, False), ("", True)):
            condition = condition_of([entry], "cpu", torch.float32, empty)
            states, mask, slots = encoder.encode([words], [images])
            assert torch.equal(condition.mask, mask) and condition.slots == slots
            for start, stop in slots:
                assert not condition.states[:, start:stop].any()
                states[:, start:stop] = 0
            assert torch.allclose(condition.states, states, rtol=1e-2, atol=1e-2)


def test_the_vision_tower_looks_once(checkpoint, grouped, tmp_path, monkeypatch):
    """For the prompts of a group and their wordless twins: each size of picture comes by once."""
    looks, real = [], encode.Qwen3VL.from_pretrained

    def opened(*arguments):
        encoder = real(*arguments)
        encoder.model["visual"].register_forward_pre_hook(lambda _, given: looks.append(len(given[0])))
        return encoder

    monkeypatch.setattr(encode.Qwen3VL, "from_pretrained", opened)
    encode_prompts(tmp_path / "cache", read_prompts([grouped]), checkpoint, How(SIZE))
    assert sorted(looks) == [1, 1, 2]


def test_pictures_are_read_ahead(checkpoint, grouped, tmp_path, monkeypatch):
    """While a group is encoded, other threads open the pictures of the next one, and of no later one."""
    opened, waiting, real = set(), [], pictures.fit
    monkeypatch.setattr(encode, "GROUP", 1)

    def noted(image, *arguments):
        assert threading.current_thread() is not threading.main_thread()
        opened.add(image)
        return real(image, *arguments)

    def encode_group(*arguments):
        while len(opened) < min(4, len(waiting) + 2):
            time.sleep(0.001)
        waiting.append(len(opened))
        states = torch.zeros(1, 1)
        return [dict(states=states, empty=None, slots=[], sources=[], target=None)]

    monkeypatch.setattr(pictures, "fit", noted)
    monkeypatch.setattr(encode, "encode_group", encode_group)
    encode_prompts(tmp_path / "cache", read_prompts([grouped])[:4], checkpoint, How(SIZE))
    assert waiting == [2, 3, 4, 4]


@pytest.mark.parametrize("resolution", [128, 1024, 1328])
def test_aspects(checkpoint, resolution):
    """Each comes often, its area is the square's, its sides suit the network, and a prompt keeps its own."""
    words, parts = [f"a hat, number {i}" for i in range(500)], dict(sources=[], target=None)
    square = [resolution // 32 * 2] * 2
    with_aspects = How(resolution, aspects=True)
    sizes = Counter(encode.drawn_size(w, parts, with_aspects) for w in words)
    assert sizes == Counter(encode.drawn_size(w, parts, with_aspects) for w in words)
    assert {encode.drawn_size(w, parts, How(resolution)) for w in words} == {tuple(square)}
    shapes = {(h, w) for h, w in sizes}
    assert shapes == {(w, h) for h, w in sizes} and tuple(square) in sizes
    assert len(sizes) == (3 if resolution == 128 else 5) and min(sizes.values()) > 60
    for h, w in sizes:
        assert h % 2 == w % 2 == 0 and abs(h * w / square[0] ** 2 - 1) < (0.1 if resolution == 128 else 0.03)
    if resolution > 128:
        ratios = sorted(w / h for h, w in sizes)
        assert ratios == pytest.approx([9 / 16, 3 / 4, 1, 4 / 3, 16 / 9], rel=0.04)


def test_aspects_change_the_size_of_t2i_alone(checkpoint, grouped, tmp_path, encoded):
    """Nothing is encoded again for them, and edits have their sources' size as before."""
    listed, plain, other = read_prompts([grouped]), {}, {}
    for entries, aspects in ((plain, False), (other, True)):
        encoded.clear()
        pool = encode_prompts(tmp_path, listed, checkpoint, How(256, aspects=aspects))
        entries |= dict(zip((p.prompt for p in listed), pool.entries, strict=True))
    assert not encoded
    for prompt in listed:
        a, b = plain[prompt.prompt], other[prompt.prompt]
        assert torch.equal(a.states, b.states)
        own = encode.drawn_size(prompt.prompt, dict(sources=[], target=None), How(256, aspects=True))
        assert b.size == (a.size if prompt.task == "edit" else own)


@pytest.mark.parametrize("how", ["stretch", "crop", "pad"])
def test_sources_and_targets_are_fitted_as_asked(checkpoint, tmp_path, how):
    """A target of another shape comes to the size of its edit's source, by the way that is asked for."""
    reference.picture(64, 64, 1).save(tmp_path / "source.png")
    reference.picture(96, 32, 2).save(tmp_path / "target.png")
    prompt = Prompt("edit", "scene", "a hat", [tmp_path / "source.png"], tmp_path / "target.png")
    (entry,) = encode_prompts(tmp_path / "cache", [prompt], checkpoint, How(64, targets=True, fit=how)).entries
    fitted = pictures.fit(prompt.target, 64, how, (64, 64))
    expected = VAE.from_pretrained(checkpoint / "vae").encode(pictures.to_tensor([fitted]))[0].bfloat16()  # (64, h, w)
    assert entry.size == (4, 4) and torch.equal(entry.target, expected)


def test_a_source_of_the_wrong_area_is_named_before_the_encoding(checkpoint, grouped, tmp_path, monkeypatch):
    """100 x 40 becomes 96 x 32 here, less than this processor takes; one such picture among others."""
    other = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    reference.write_processor(other, shortest_edge=SIZE**2)
    monkeypatch.setattr(encode.Qwen3VL, "from_pretrained", None)
    with pytest.raises(ValueError, match=r"2\.jpg: becomes 96 x 32 at --resolution 64, .*--resolution 96 suits all"):
        encode_prompts(tmp_path / "cache", read_prompts([grouped]), other, How(SIZE))
    monkeypatch.undo()
    assert len(encode_prompts(tmp_path / "cache", read_prompts([grouped]), other, How(96)).entries) == 6


def test_a_shard_without_some_states_is_not_used(tmp_path, capsys):
    """Its prompts are encoded again; the other shard stays."""
    whole = {"states": torch.ones(3, 4), "empty": None, "target": None, "sources": [], "slots": []}
    encode.write_shard(tmp_path, {"a": whole})
    encode.write_shard(tmp_path, {"b": whole | {"states": None, "empty": torch.ones(1, 4)}})
    assert set(encode.read_shards(tmp_path)) == {"a"}
    assert "damaged or of an earlier version" in "".join(capsys.readouterr())
