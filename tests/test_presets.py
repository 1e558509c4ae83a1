"""The defaults that depend on the objective and the network's size."""

import json

import pytest

import train
from model import MMDiTConfig
from program.options import TOY
from training import presets
from training.options import TrainOptions

SIZES = {"toy": 0, "100M": 100_000_000, "7B": 7_100_000_000}


@pytest.mark.parametrize("lora_rank", [0, 32])
def test_networks_of_billions_are_drawn_by_eulers_method(lora_rank):
    args = TrainOptions(**presets.defaults("dmd", SIZES["7B"], lora_rank))
    assert args.sampler == "euler"
    given = TrainOptions(**presets.defaults("dmd", SIZES["7B"], lora_rank) | {"sampler": "renoise"})
    assert given.sampler == "renoise"


@pytest.mark.parametrize("lora_rank", [0, 32])
@pytest.mark.parametrize("size", ["toy", "100M"])
def test_small_networks_re_noise(size, lora_rank):
    assert TrainOptions(**presets.defaults("dmd", SIZES[size], lora_rank)).sampler == "renoise"


def test_the_command_line_asks_the_checkpoint_for_its_size(tmp_path):
    """The published config's 7.1B parameters say euler, the toy renoise, and a given sampler is taken at both."""
    (tmp_path / "transformer").mkdir()
    config = {"_class_name": "QwenImage21Transformer2DModel"} | vars(MMDiTConfig())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    for checkpoint, expected in ((tmp_path, "euler"), (TOY, "renoise")):
        words = ["--checkpoint", str(checkpoint)]
        assert train.parse(words).sampler == expected
        assert train.parse([*words, "--lora-rank", "32"]).sampler == expected
        for sampler in "renoise", "euler":
            assert train.parse([*words, "--sampler", sampler]).sampler == sampler
