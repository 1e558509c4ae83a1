"""The toy's tokenizer and random text encoder: written by us, opened by the libraries, and of some use as a condition."""

import json
from pathlib import Path

import pytest
import reference
import torch

import toy
from networks.qwen3vl import SYSTEM_TURN, Qwen3VL
from toy.build.language import build_text_encoder, build_tokenizer

COLOURS = ("red", "blue", "green")
CAPTIONS = [
    f"A portrait of a person with {a} hair, a {b} coat and {c} eyes." for a in COLOURS for b in COLOURS for c in COLOURS
]
CAPTIONS += [
    f'A poster with the word "{word}" on a {a} sign.' for word in ("ACE", "HAT", "ZOO", "CAT") for a in COLOURS
]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("toy")
    build_tokenizer(CAPTIONS, directory)
    build_text_encoder(directory, seed=0)
    reference.write_transformer(directory, context_in_dim=128)
    reference.write_vae(directory)
    reference.write_scheduler(directory)
    reference.write_model_index(directory)
    return directory


@pytest.fixture(scope="module")
def encoder(built):
    return Qwen3VL.from_pretrained(built)


def test_the_library_opens_it_and_reads_the_same(built, encoder):
    pipeline = reference.open_pipeline(built)
    prompts = [CAPTIONS[0], 'Change the word to "HAVEN" 🙂.']
    for images in (
        [],
        [reference.picture(128, 128, 1, "RGBA")],
        [reference.picture(128, 128, 2), reference.picture(96, 64)],
    ):
        states, mask, slots = encoder.encode(prompts, [images] * 2)
        expected_states, expected_mask, expected_slots = reference.encode_prompt(pipeline, prompts, images)
        reference.assert_close(states, expected_states)
        assert torch.equal(mask, expected_mask)
        assert slots == expected_slots


def test_settings_are_the_committed_ones(built):
    """All of processor/ but the tokenizer, which follows the captions. Videos have the settings of pictures, and a class."""
    committed, written = Path(toy.__path__[0]) / "checkpoint" / "processor", built / "processor"
    names = {path.name for path in written.iterdir()}
    assert names == {path.name for path in committed.iterdir()} and len(names) == 5
    for name in names - {"tokenizer.json"}:
        assert (committed / name).read_bytes() == (written / name).read_bytes(), name
    pictures, videos = (
        json.loads((written / f"{kind}preprocessor_config.json").read_text()) for kind in ("", "video_")
    )
    del pictures["image_processor_type"]
    assert videos == pictures | {"video_processor_type": "Qwen3VLVideoProcessor"}


def test_words_of_capitals_are_spelled(encoder):
    tokenizer = encoder.processor.tokenizer
    assert tokenizer.encode('the word "HATCH"').tokens[-7:] == ['Ġ"', "H", "A", "T", "C", "H", '"']
    assert tokenizer.encode(" person").tokens == ["Ġperson"]
    assert tokenizer.encode("assistant").tokens == ["assistant"]  # the template is learned with the captions
    text = "any text: 水豚 🧙‍♂️\n\tñ"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_states_tell_the_token_and_some_context(encoder):
    tokenizer = encoder.processor.tokenizer
    states, mask, _ = encoder.encode(CAPTIONS)
    cut = len(tokenizer.encode(SYSTEM_TURN).ids)
    turns = [f"<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n" for caption in CAPTIONS]
    tokens = torch.cat([torch.tensor(tokenizer.encode(SYSTEM_TURN + turn).ids[cut:]) for turn in turns])
    states = states[mask]
    table = encoder.model["language_model"].embed_tokens.weight
    nearest = (states @ (table / table.norm(dim=-1, keepdim=True)).T).argmax(1)
    assert (nearest == tokens).float().mean() > 0.95
    # The same token differs from caption to caption by a small part of what tells tokens apart.
    count = torch.bincount(tokens, minlength=len(table)).clamp(min=1)[:, None]
    mean = torch.zeros_like(table).index_add(0, tokens, states) / count
    assert 0.02 < (states - mean[tokens]).var(0).sum() / states.var(0).sum() < 0.3


def test_states_tell_the_pictures_apart(encoder):
    pictures = [[reference.picture(128, 128, seed)] for seed in (1, 2, 1)]
    states, _, [(start, stop)] = encoder.encode(["Make it blue."] * 3, pictures)
    assert torch.equal(states[0], states[2])
    difference = (states[0] - states[1]).norm(dim=-1) / states[0].norm(dim=-1)
    assert stop - start == 16
    assert difference[start:stop].min() > 0.3
    assert difference[stop:].mean() > 0.1  # and the words that follow know of it


def test_builds_repeat_and_stay_small(built, tmp_path):
    build_tokenizer(iter(CAPTIONS), tmp_path)
    build_text_encoder(tmp_path, seed=0)
    for name in ("processor/tokenizer.json", "text_encoder/config.json", "text_encoder/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (built / name).read_bytes()
    weights = (tmp_path / "text_encoder" / "model.safetensors").read_bytes()
    assert len(weights) < 1.5e6
    build_text_encoder(tmp_path, seed=1)
    assert (tmp_path / "text_encoder" / "model.safetensors").read_bytes() != weights
