"""How the toy checkpoint is made: what its stages must leave as it was, with tiny numbers."""

import shutil
from pathlib import Path

import pytest
import torch

from model import Condition, MMDiT, MMDiTConfig
from support.files import read_json
from toy import build, train_vae


@torch.no_grad()
def test_a_grown_teacher_draws_the_same(tmp_path):
    torch.manual_seed(0)
    small = MMDiT(MMDiTConfig(**build.TEACHER | {"num_layers": max(build.GROWN_AFTER) + 1}))
    for parameter in small.parameters():  # a fresh network's gates are shut
        parameter.normal_(0, 0.1)
    small.save_pretrained(tmp_path / "shallow", torch.float32)
    for _ in range(2):  # a killed build may do it again
        blocks = build.grow(tmp_path / "shallow", tmp_path)["blocks"]
    grown = MMDiT.from_pretrained(tmp_path / "transformer")
    assert len(grown.transformer_blocks) == blocks == len(small.transformer_blocks) + len(build.GROWN_AFTER)
    states, z = torch.randn(2, 7, 128), torch.randn(2, 64, 8, 8)
    condition = Condition(states, torch.ones(2, 7, dtype=torch.bool), [torch.randn(2, 64, 4, 4)], [(1, 5)])
    t = torch.tensor([0.3, 0.8])
    assert torch.equal(grown(z, t, condition), small(z, t, condition))
    # and what is new can learn: the zero matrices' gradients are not zero
    with torch.enable_grad():
        grown(z, t, condition).square().sum().backward()
    new = grown.transformer_blocks[build.GROWN_AFTER[0] + 1]
    assert new.attn.to_out[0].weight.grad.abs().max() > 0 and new.img_mlp.out.weight.grad.abs().max() > 0


@pytest.fixture
def tiny(monkeypatch):
    """Two steps of a few small pictures."""
    monkeypatch.setattr(train_vae, "CONFIG", train_vae.CONFIG | {"dim_mult": [1, 2, 2, 2, 2]})
    measured = train_vae.pictures
    monkeypatch.setattr(train_vae, "pictures", lambda count, seed: measured(min(count, 4), seed))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_autoencoder_training_resumes(tiny, tmp_path):
    train_vae.train_vae(tmp_path / "straight", tmp_path / "a", 2, batch=4)
    train_vae.train_vae(tmp_path / "half", tmp_path / "b", 1, batch=4)
    train_vae.train_vae(tmp_path / "resumed", tmp_path / "b", 2, batch=4)
    assert files(tmp_path / "resumed") == files(tmp_path / "straight") != files(tmp_path / "half")


def test_scores_of_the_autoencoder(toy_checkpoint, monkeypatch):
    """The right answers through it and back: judged without a picture that the judge could not read."""
    monkeypatch.setattr(build.benches, "CATEGORIES", {"t2i": ("text",), "edit": ("style",)})
    monkeypatch.setattr(build.benches, "CASES", {"t2i": 2, "edit": 2})
    row = build.score_autoencoder(toy_checkpoint)
    assert row["t2i_fidelity"]["text"] == row["edit_fidelity"]["style"] == 0  # an untrained one draws nothing


def test_a_stage_trains_with_its_own_recipe_and_numbers(toy_checkpoint, tmp_path, monkeypatch):
    """One step of the stage `finish`: its recipe, its learning rates, and the result in the checkpoint's place."""
    monkeypatch.setattr(build, "TEACHERS", {"finish": ("finish", 1, 0.7)})
    monkeypatch.setattr(build, "BATCH", 2)
    monkeypatch.setattr(build, "MICRO_BATCH", 2)
    monkeypatch.setattr(build, "POOL", {"t2i": 1, "edit": 1})
    monkeypatch.setattr(build.train.watch, "draw_pictures", lambda *_: None)
    monkeypatch.setattr(build.recipes, "RECIPES", dict(build.recipes.RECIPES))
    folder = shutil.copytree(toy_checkpoint, tmp_path / "checkpoint")
    before = MMDiT.from_pretrained(folder / "transformer").state_dict()
    pool = build.build_pool(folder, tmp_path / "pool.pt")
    assert len(pool.entries) == 3 + 6 and all(entry.target is not None for entry in pool.entries)
    log = build.train_teacher("finish", folder, tmp_path / "finish", pool, compile=False)
    used = read_json(tmp_path / "finish" / "args.json")["arguments"]
    assert (used["recipe"], used["steps"], used["batch"], used["guidance"]) == ("finish", 1, 2, build.GUIDANCE)
    assert (used["muon_lr"], used["lr"]) == pytest.approx((0.7 * 0.02, 0.7 * 2e-3)) and log["steps"] == 1
    recipe = build.recipes.find("finish")
    assert recipe.ratio == (6, 4) and recipe.t2i == {"landscape": 2, "portrait": 1, "text": 3}
    assert recipe.edit == {"scene": 2, "enhance": 2, "object": 1, "text": 3, "identity": 1, "style": 1}
    after = MMDiT.from_pretrained(folder / "transformer").state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before)
