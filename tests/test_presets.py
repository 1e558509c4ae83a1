"""The defaults that depend on the objective and the network's size."""

import pytest

import train
from checkpoint.files import save_config
from model import MMDiTConfig
from training import presets
from training.options import TrainOptions


@pytest.mark.parametrize("lora_rank", [0, 32])
@pytest.mark.parametrize("parameters, sampler", [(0, "renoise"), (100_000_000, "renoise"), (7_100_000_000, "euler")])
def test_small_networks_re_noise_and_networks_of_billions_are_drawn_by_eulers_method(parameters, sampler, lora_rank):
    assert TrainOptions(**presets.defaults("dmd", parameters, lora_rank)).sampler == sampler


@pytest.mark.parametrize("objective", ["dmd", "flow"])
@pytest.mark.parametrize("rank", [0, 32])
def test_a_network_of_billions_has_numbers_of_its_own(tmp_path, objective, rank):
    """Nothing of the toy's: AdamW, small rates, recomputation. The 7B's config alone decides, and flags go before it."""
    save_config(MMDiTConfig(), tmp_path / "transformer" / "config.json", "QwenImage21Transformer2DModel")
    words = ["--checkpoint", str(tmp_path), "--objective", objective, "--lora-rank", str(rank)]
    args = train.parse(words)
    assert args.muon_lr == args.fake_muon_lr * (objective == "dmd") == 0 and args.recompute
    assert (args.lr, args.micro_batch) == ((1e-4, 2) if rank else (2e-6 if objective == "dmd" else 1e-5, 8))
    assert args.batch == 32 and args.dtype == "bfloat16" and args.objective == objective
    given = train.parse([*words, "--lr", "3e-6", "--sampler", "renoise"])
    assert (given.lr, given.sampler) == (3e-6, "renoise")
    small = train.parse(words[2:])
    if objective == "dmd":
        assert (args.sampler, small.sampler) == ("euler", "renoise")
    assert small.muon_lr > 0 and not small.recompute
