"""The condition encoder against diffusers' encode_prompt, which runs transformers' Qwen3-VL and processor."""

import shutil

import pytest
import reference
import torch
from PIL import Image
from transformers import Qwen3VLConfig as LibraryConfig
from transformers import Qwen3VLForConditionalGeneration

from networks.qwen3vl import SYSTEM_TURN, Processor, Qwen3VL, Qwen3VLConfig

CHECKPOINTS = {
    # Grouped heads, two deepstack levels, the library's own config spelling.
    "grouped": {},
    # As many key heads as query heads, other rope sections, deepstack out of order; shards; published spelling.
    "plain": {
        "text": {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 16,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
            },
        },
        "vision": {
            "depth": 2,
            "hidden_size": 48,
            "num_heads": 3,
            "out_hidden_size": 48,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [1, 0],
        },
        "shard_size": "100KB",
        "published_spelling": True,
    },
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def pair(request, tmp_path_factory):
    """(ours, the library's pipeline) on one checkpoint."""
    directory = tmp_path_factory.mktemp(request.param)
    reference.write_processor(directory)
    reference.write_text_encoder(directory, seed=1, **CHECKPOINTS[request.param])
    return Qwen3VL.from_pretrained(directory), reference.open_text_pipeline(directory)


PROMPTS = {
    "one": ["A capybara wearing a wizard hat"],
    "unequal lengths": [
        "a house",
        "一只戴着巫师帽的水豚 🧙‍♂️, in the style of an oil painting",
        "",
        "  two  spaces\n\nand lines ",
    ],
    "markup": ["{0} {prompt} <image1> <|im_end|>\n<|im_start|>user\nagain", "Cafe\u0301 <|vision_start|>"],
}
SOURCES = {
    "none": [],
    "one": [reference.picture(64, 64, 1)],
    "transparent, wide": [reference.picture(160, 64, 2, "RGBA")],
    "two sizes": [reference.picture(64, 96, 3, "RGBA"), reference.picture(128, 32, 4)],
    "three": [reference.picture(96, 64, 5), reference.picture(32, 32, 6), reference.picture(96, 64, 7, "RGBA")],
}


@pytest.mark.parametrize("sources", SOURCES)
@pytest.mark.parametrize("prompts", PROMPTS)
def test_states_are_the_reference_pipelines(pair, prompts, sources):
    encoder, pipeline = pair
    prompts, images = PROMPTS[prompts], SOURCES[sources]
    states, mask, slots = encoder.encode(prompts, [images] * len(prompts))
    expected_states, expected_mask, expected_slots = reference.encode_prompt(pipeline, prompts, images)
    reference.assert_close(states, expected_states)
    assert torch.equal(mask, expected_mask)
    assert slots == expected_slots
    assert [stop - start for start, stop in slots] == [w * h // 1024 for w, h in (image.size for image in images)]


def test_bf16_is_no_less_exact_than_the_library(checkpoint):
    prompts, images = PROMPTS["unequal lengths"], SOURCES["three"]
    library = reference.open_text_pipeline(checkpoint)
    exact, _, _ = reference.encode_prompt(library, prompts, images)
    library.text_encoder.bfloat16()
    theirs, _, _ = reference.encode_prompt(library, prompts, images)
    ours, _, _ = Qwen3VL.from_pretrained(checkpoint, dtype=torch.bfloat16).encode(prompts, [images] * len(prompts))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (ours - exact).norm() < 1.2 * (theirs - exact).norm()


def test_each_prompt_has_its_own_sources(pair):
    """The reference takes one set of pictures per call; a batch with different ones is row by row the same."""
    encoder, pipeline = pair
    prompts = ["make the sky red", "put a hat on the capybara, please"]
    images = [[reference.picture(64, 32, seed), reference.picture(32, 32, seed + 10, "RGBA")] for seed in (1, 2)]
    states, mask, slots = encoder.encode(prompts, images)
    for row in range(2):
        expected, _, expected_slots = reference.encode_prompt(pipeline, prompts[row : row + 1], images[row])
        reference.assert_close(states[row, mask[row]], expected[0])
        assert slots == expected_slots


def test_transparency_shows_white(pair):
    encoder, _ = pair
    hidden = reference.picture(64, 64, 1, "RGBA")
    hidden.putalpha(0)
    states = [encoder.encode(["a"], [[image]])[0] for image in (hidden, Image.new("RGB", (64, 64), "white"))]
    assert torch.equal(*states)


def test_each_picture_is_looked_at_once(pair):
    encoder, _ = pair
    a, b, c = reference.picture(64, 32, 1), reference.picture(64, 32, 2), reference.picture(32, 32, 3)
    looks = []
    handle = encoder.model["visual"].register_forward_pre_hook(lambda _, args: looks.append(tuple(args[0].shape)))
    encoder.encode(["one", "two", "three"], [[a, c], [b, c], [a, c]])
    handle.remove()
    assert sorted(looks) == [(1, 3, 32, 32), (2, 3, 32, 64)]


def test_states_may_enter_a_training_graph(pair):
    states, _, _ = pair[0].encode(["a house"])
    layer = torch.nn.Linear(states.shape[-1], 1)
    layer(states).sum().backward()  # raises for tensors made in inference mode
    torch.testing.assert_close(layer.weight.grad[0], states[0].sum(0))


def test_tokens_are_the_librarys(checkpoint):
    ours, theirs = (Processor(checkpoint / "processor").tokenizer, reference.open_processor(checkpoint).tokenizer)
    texts = [prompt for prompts in PROMPTS.values() for prompt in prompts]
    texts += [
        SYSTEM_TURN,
        "1234567 a1b2",
        "I'M it's",
        "\t\r\n x",
        "ﬁ Å ｆｕｌｌ",
        "<|im_start|>x<|endoftext|>",
        "👩‍🚀👩‍🚀",
    ]
    for text in texts:
        assert ours.encode(text).ids == theirs(text).input_ids


def test_saved_padding_is_ignored(checkpoint, tmp_path):
    """A tokenizer that was saved after a padded call brings its padding along."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    tokenizer = Processor(checkpoint / "processor").tokenizer
    tokenizer.enable_padding(length=300)
    tokenizer.enable_truncation(30)
    tokenizer.save(str(tmp_path / "processor" / "tokenizer.json"))
    assert torch.equal(*(Qwen3VL.from_pretrained(path).encode(["a house"])[0] for path in (checkpoint, tmp_path)))


def test_a_pipeline_saved_by_the_library_opens(checkpoint, tmp_path):
    """transformers 5 writes processor_config.json in place of preprocessor_config.json."""
    shutil.copytree(checkpoint / "text_encoder", tmp_path / "text_encoder")
    processor = reference.open_processor(checkpoint)
    processor.tokenizer.save_pretrained(tmp_path / "processor")
    processor.to_json_file(tmp_path / "processor" / "processor_config.json")
    arguments = ["a house"], [[reference.picture(64, 32)]]
    assert torch.equal(*(Qwen3VL.from_pretrained(path).encode(*arguments)[0] for path in (checkpoint, tmp_path)))


def test_published_size_has_the_published_tensors():
    """Our defaults are the 8B's: the same names and shapes as the library's network of that size."""
    text = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    with torch.device("meta"):
        ours = Qwen3VL(Qwen3VLConfig(), processor=None).state_dict()
        library = LibraryConfig(text_config=text, vision_config={"out_hidden_size": 4096})
        theirs = Qwen3VLForConditionalGeneration(library).state_dict()
    del theirs["lm_head.weight"]
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_a_size_the_processor_would_change_is_an_error(checkpoint, tmp_path):
    """The reference fails in the middle there: its slots no longer fit the picture."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    reference.write_processor(tmp_path, shortest_edge=4097)
    with pytest.raises(ValueError, match="between 4097 and"):
        Qwen3VL.from_pretrained(tmp_path).encode(["a"], [[reference.picture(64, 64)]])
