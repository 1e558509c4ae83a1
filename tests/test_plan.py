"""`train.py --plan` against measured memory on small configs, and against known numbers of the 7B's."""

import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as network
import recipe
import train
from data.encode import Entry
from model import MMDiT, MMDiTConfig
from training import plan, presets, watch
from training.options import TrainOptions

SMALL = MMDiTConfig(
    num_layers=4, num_attention_heads=4, attention_head_dim=64, context_in_dim=64, axes_dims_rope=(16, 24, 24)
)
SIDE, WORDS = 8, 20  # latent pixels of target and source; text tokens


class Held(TorchDispatchMode):
    """Bytes of all tensors that live at the same time, at their most: what an allocator has to give."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten._local_scalar_dense.default and arguments[0].is_meta:
            return True if arguments[0].dtype == torch.bool else 1.0  # a check of values, which are not there
        result = function(*arguments, **keywords or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.hold(leaf)
        return result

    def hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self.known:
            self.known.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.drop, key, storage.nbytes())

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.fixture(scope="module")
def wider(checkpoint, tmp_path_factory) -> Path:
    """The shared checkpoint with a network whose memory is mostly tensors."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("plan") / "checkpoint")
    shutil.rmtree(folder / "transformer")
    shutil.rmtree(folder / "teachers")
    MMDiT(SMALL).save_pretrained(folder / "transformer")
    reference.write_model_index(folder, resolution=192, guidance=2.0)
    return folder


@pytest.mark.parametrize("way", ["weights", "weights recomputed", "bf16", "LoRA"])
def test_measured_peak_is_within_15_percent(wider, tmp_path, monkeypatch, way):
    numbers = dict(steps=2, batch=4, micro_batch=4, recipe="mix-0-10", muon_lr=0.0, fake_muon_lr=0.0, device="cpu")
    numbers |= dict(dtype="bfloat16" if way in ("bf16", "LoRA") else "float32", recompute=way == "weights recomputed")
    numbers |= dict(lora_rank=8 if way == "LoRA" else 0, panel_every=100, save_every=100, fake_updates=1)
    args, _ = train.open_run(TrainOptions(checkpoint=wider, out=tmp_path / "run", **numbers))
    # On a CPU attention in bf16 keeps a matrix of scores for its backward pass, which a GPU's does not.
    monkeypatch.setattr(network, "attend", lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, bias))
    monkeypatch.setattr(train, "save", lambda *arguments: None)
    monkeypatch.setattr(watch, "draw_pictures", lambda *arguments: None)
    monkeypatch.setattr(train, "export_run", lambda *arguments: None)
    states = torch.randn(WORDS, SMALL.context_in_dim).bfloat16()
    slots, source = [(4, 4 + SIDE * SIDE // 4)], torch.randn(64, SIDE, SIDE).bfloat16()
    pool = train.Pool([Entry("edit", "scene", states, states, slots, [source], None, (SIDE, SIDE))] * 8)

    network.prefix_segments((4, (SIDE, SIDE), WORDS - 4))  # kept: torch cannot make these under a dispatch mode
    with Held() as held:
        train.train(args, pool, None)
    found = replace(recipe.find("mix-0-10"), rules=())
    layouts = {"edit": (WORDS + SIDE * SIDE, SIDE * SIDE)}
    planned = plan.make_plan(args, SMALL, found, gpus=1, frozen=1, layouts=layouts)
    assert abs(planned.peak / held.most - 1) < 0.15, (planned.bytes, planned.peak, held.most)


def test_numbers_of_the_published_network():
    """The work of drawing at 1024 x 1024 in 4 steps, by others' arithmetic; memory as the field counts it."""
    config, tera = MMDiTConfig(), 1e12
    assert abs(plan.parameters(config) / 1e9 - 7.1) < 0.05
    once = plan.sample_flops(config, "fake", 0, 4096, 0, 0) / 4  # a rollout of one step, and three times as much
    assert abs(4 * once / tera / 268 - 1) < 0.02  # they count all weights for a token, we those of the blocks
    training = plan.sample_flops(config, "flow", 4096, 4096, None, 0)
    edit = plan.sample_flops(config, "fake", 4096, 4096, 3, 0) - training
    assert abs(edit / tera / 370 - 1) < 0.02 and abs(4 * training / 3 / tera / 571 - 1) < 0.02

    layouts = {"t2i": (200, 4096), "edit": (4296, 4096)}
    args = TrainOptions(**presets.LARGE | dict(guidance=1.0, ema=0.0))
    planned = plan.make_plan(args, config, recipe.find("flash"), gpus=8, frozen=1, layouts=layouts)
    fixed = [planned.bytes[part] for part in ("frozen weights", "masters", "optimiser", "gradients")]
    assert abs(sum(fixed) / 1e9 - (1.8 + 7.1 * (12 + 12 + 4) / 8)) < 0.5  # one network's gradients at a time
    args = TrainOptions(**presets.LARGE_LORA, guidance=1.0, lora_rank=32)
    planned = plan.make_plan(args, config, recipe.find("flash"), gpus=1, frozen=1, layouts=layouts)
    assert planned.trained == 33_554_432
    assert 14 < (planned.peak - planned.bytes["activations"]) / 1e9 < 20


def test_plan_from_the_command_line(wider, tmp_path, monkeypatch, capsys):
    """It loads no weights, writes nothing, and more processes mean less for each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MMDiT, "from_pretrained", None)
    peaks = []
    for gpus in ("1", "4"):
        train.main(["--plan", "--checkpoint", str(wider), "--gpus", gpus, "--micro-batch", "8", "--dtype", "float32"])
        text = capsys.readouterr().out
        peaks.append(float(text.split("peak")[1].split()[0]))
        assert "TFLOP an update" in text and "rollout" in text
    assert peaks[1] < peaks[0] / 2 and not list(tmp_path.iterdir())
