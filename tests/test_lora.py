"""Roles on one copy of the weights, and LoRA files: against merged weights, against diffusers and peft, against an SVD."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig
from reference import assert_close, open_pipeline, picture, write_checkpoint, write_scheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoint.lora import (
    LoRA,
    add_role,
    factorise,
    merge,
    merge_all,
    new_lora,
    read_lora,
    role_lora,
    with_role,
    write_lora,
)
from model import Condition, MMDiT
from sample import Pipeline
from training.trainee import recompute

SIGMAS = [1.0, 0.9, 0.75, 0.5]
IDENTITY = {"use_dynamic_shifting": False, "shift": 1.0, "shift_terminal": None}
EVERYTHING = r".*"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("base"), resolution=64, sample_sigmas=SIGMAS)
    write_scheduler(directory, **IDENTITY)
    return directory


@pytest.fixture
def model(base):
    return MMDiT.from_pretrained(base / "transformer")


def random_lora(
    model: MMDiT, rank: int = 4, alpha: float | None = 3.0, layers: str = EVERYTHING, seed: int = 0
) -> LoRA:
    """Strong enough to change any picture."""
    rng = torch.Generator().manual_seed(seed)
    lora = new_lora(model, rank, alpha, layers, rng)
    return {n: (a, 0.5 * torch.randn(b.shape, generator=rng), alpha) for n, (a, b, alpha) in lora.items()}


def inputs(batch: int = 2) -> tuple:
    rng = torch.Generator().manual_seed(1)
    condition = Condition(
        torch.randn(batch, 7, 64, generator=rng),
        torch.ones(batch, 7, dtype=torch.bool),
        [torch.randn(batch, 64, 2, 2, generator=rng)],
        [(1, 2)],
    )
    return torch.randn(batch, 64, 3, 4, generator=rng), torch.rand(batch, generator=rng), condition


def merged(model: MMDiT, lora: LoRA, scale: float = 1.0) -> MMDiT:
    model = copy.deepcopy(model)
    merge(model, lora, scale)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Roles


@torch.no_grad()
def test_a_role_is_its_merged_network(model):
    loras = {"student": random_lora(model), "fake": random_lora(model, 2, None, r".*(to_q|proj|modulation\.1)", 1)}
    plain, expected = model(*inputs()), {name: merged(model, lora)(*inputs()) for name, lora in loras.items()}
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    for name, lora in loras.items():
        add_role(model, name, lora)
    for name in loras:
        with with_role(model, name):
            assert_close(model(*inputs()), expected[name])
            with with_role(model, None):
                assert torch.equal(model(*inputs()), plain)
            assert_close(model(*inputs(), model.with_prefix(*inputs())[1]), expected[name])
        assert (expected[name] - plain).abs().max() > 0.1 * plain.abs().max()
    assert torch.equal(model(*inputs()), plain)
    # One copy of the weights: each where it was, under its name, and unchanged.
    after = {name: (p.data_ptr(), p) for name, p in model.named_parameters() if ".adapters." not in name}
    assert after.keys() == before.keys()
    assert all(after[n][0] == before[n][0] and torch.equal(after[n][1], before[n][1]) for n in before)


def test_a_new_role_is_the_base_and_learns_alone(model):
    model.requires_grad_(False)
    with torch.no_grad():
        plain = model(*inputs())
    for name in "student", "fake":
        add_role(model, name, new_lora(model, 2))
    with with_role(model, "student"):
        v = model(*inputs())
    assert torch.equal(v, plain)  # B is zero
    v.square().mean().backward()
    assert set(re.sub(r"\d+", "N", name) for name in role_lora(model, "student")) == {
        f"transformer_blocks.N.attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.N")
    }
    for a, b, alpha in role_lora(model, "student").values():
        assert alpha == 2 and a.shape[0] == 2 and b.grad.abs().max() > 0
    students = {id(p) for a, b, _ in role_lora(model, "student").values() for p in (a, b)}
    assert all(p.grad is None for p in model.parameters() if id(p) not in students)


def test_the_backward_pass_remembers_the_role(model):
    """With gradient checkpointing a block is computed again in the backward pass, when another role may be on."""
    model.requires_grad_(False)
    for seed, name in enumerate(("student", "fake")):
        add_role(model, name, random_lora(model, layers=r".*attn.*", seed=seed))
    gradients = []
    for again in False, True:
        if again:
            recompute(model)
        with with_role(model, "student"):
            v = model(*inputs())
        with with_role(model, "fake"):
            v.square().mean().backward()
        assert all(b.grad is None for _, b, _ in role_lora(model, "fake").values())
        gradients.append([p.grad for a, b, _ in role_lora(model, "student").values() for p in (a, b)])
        model.zero_grad()
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_factors_in_fp32_learn_on_weights_in_bf16(model):
    lora = random_lora(model)
    expected = merged(model, lora).bfloat16()(*inputs())
    model.bfloat16().requires_grad_(False)
    add_role(model, "student", lora)
    with with_role(model, "student"):
        v = model(*inputs())
    v.float().square().mean().backward()
    assert v.dtype == torch.bfloat16
    assert (v - expected).abs().max() < 0.1 * expected.abs().max()
    assert all(p.grad.dtype == torch.float32 for a, b, _ in role_lora(model, "student").values() for p in (a, b))


def test_wrong_roles(model):
    add_role(model, "student", new_lora(model, 2))
    for name in "student", "train", "a.b":
        with pytest.raises(ValueError, match=f"role '{name}'"):
            add_role(model, name, new_lora(model, 2))
    with pytest.raises(ValueError, match=r"'studnet' is not among \['student'\]"), with_role(model, "studnet"):
        pass


# ----------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("layers", [r".*attn\.to_.*", EVERYTHING])
def test_diffusers_draws_with_our_file_as_we_with_merged_weights(base, tmp_path, layers):
    ours, theirs, file = Pipeline.from_pretrained(base), open_pipeline(base), tmp_path / "student.safetensors"
    ours.progress = False
    plain = ours("a house", [picture(50, 70)])
    lora = random_lora(ours.mmdit, layers=layers)
    write_lora(file, lora, SIGMAS, torch.float32)
    theirs.load_lora_weights(file)
    expected = np.asarray(theirs("a house", image=[picture(50, 70)], output_resolution=64,
                                 generator=torch.Generator().manual_seed(0)).images[0]).astype(int)  # fmt: skip
    again, sigmas, stochastic = read_lora(file, ours.mmdit)
    assert sigmas == SIGMAS and stochastic and again.keys() == lora.keys()
    merge(ours.mmdit, again)
    drawn = ours("a house", [picture(50, 70)])
    assert np.abs(np.asarray(drawn) - expected).max() <= 1
    assert np.mean(np.asarray(plain) != expected) > 0.5


def test_we_read_what_peft_and_diffusers_write(base, model, tmp_path):
    """Under `transformer.`, with alpha in the header alone."""
    theirs = open_pipeline(base).transformer
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    theirs.save_lora_adapter(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    # What the pipeline's own save_lora_weights makes of it, in which the prefix stands before keys and header alike.
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["lora_adapter_metadata"])
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in header.items()})}
    save_file({f"transformer.{key}": tensor for key, tensor in load_file(file).items()}, file, header)
    lora, sigmas, stochastic = read_lora(file, model)
    assert sigmas is None and not stochastic and all(alpha == 6 and len(a) == 4 for a, _, alpha in lora.values())
    theirs.fuse_lora()
    state = {name.replace(".base_layer", ""): p for name, p in theirs.state_dict().items() if ".lora_" not in name}
    for name, weight in merged(model, lora).state_dict().items():
        assert_close(weight, state[name])


def test_comfyui_finds_every_key(model, tmp_path):
    """The pattern of its loader (comfy/lora.py, weight_adapter/lora.py): a layer by its own name, then lora_B.weight,
    lora_A.weight (as diffusers has it) and a scalar alpha. Gate and value of the MLP are one matrix there, whose halves have these names."""
    write_lora(tmp_path / "file.safetensors", random_lora(model))
    tensors = load_file(tmp_path / "file.safetensors")
    fused = {re.sub(r"img_mlp\.(gate_layer|proj)", "img_mlp.gate_up", n) for n, _ in model.named_parameters()}
    known = {n.removesuffix(".weight") for n in fused if not n.endswith("gate_up.weight")}
    known |= {n.replace("gate_up.weight", half) for n in fused for half in ("gate_layer", "proj") if "gate_up" in n}
    for layer in known:
        parts = [tensors.pop(f"{layer}.{part}", None) for part in ("lora_B.weight", "lora_A.weight", "alpha")]
        if isinstance(dict(model.named_modules())[layer], nn.Linear):
            up, down, alpha = parts
            assert up.shape[1] == down.shape[0] == 4 and alpha.shape == () and alpha.item() == 3
    assert not tensors


def underscored(layer: str) -> str:
    return layer.replace(".", "_")


WILD = {  # spelling: (prefix and layer, A, B), alpha as a tensor or not at all
    "kohya": (lambda n: f"lora_unet_{underscored(n)}", "lora_down.weight", "lora_up.weight"),
    "kohya, transformer": (lambda n: f"lora_transformer_{underscored(n)}", "lora_down.weight", "lora_up.weight"),
    "old diffusers": (lambda n: f"transformer.{n}", "lora.down.weight", "lora.up.weight"),
    "old diffusers, unet": (lambda n: f"unet.{n}", "lora.down.weight", "lora.up.weight"),
    "peft": (lambda n: f"base_model.model.transformer.{n}", "lora_A.weight", "lora_B.weight"),
    "peft, named": (lambda n: f"base_model.model.{n}", "lora_A.default.weight", "lora_B.default.weight"),
    "comfyui": (lambda n: f"diffusion_model.{n}", "lora_down.weight", "lora_up.weight"),
    "wrapped": (lambda n: f"model.diffusion_model.{n}", "lora_A.weight", "lora_B.weight"),
}


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("spelling", WILD)
def test_spellings_in_the_wild(model, tmp_path, spelling, alpha):
    """Every layer is found, those with underscores of their own too; without alpha the change is B A."""
    lora, (layer, down, up) = random_lora(model, 4, alpha or 4.0), WILD[spelling]
    tensors = {f"{layer(n)}.{down}": a for n, (a, _, _) in lora.items()}
    tensors |= {f"{layer(n)}.{up}": b for n, (_, b, _) in lora.items()}
    if alpha:
        tensors |= {f"{layer(n)}.alpha": torch.tensor(alpha) for n in lora}
    save_file(tensors, tmp_path / "wild.safetensors")
    read, *_ = read_lora(tmp_path / "wild.safetensors", model)
    assert read.keys() == lora.keys() and any("_" in name for name in lora)
    for name, (a, b, factor) in read.items():
        assert torch.equal(a, lora[name][0]) and torch.equal(b, lora[name][1]) and factor == lora[name][2]


@torch.no_grad()
def test_several_with_scales_add_up(model):
    loras = random_lora(model, 3, 5.0), random_lora(model, 2, 2.0, r".*attn.*", 1)
    both = merged(merged(model, loras[0], 0.5), loras[1], -2.0)
    for name, weight in model.state_dict().items():
        change = torch.zeros_like(weight)
        for lora, scale in zip(loras, (0.5, -2.0), strict=True):
            if name.removesuffix(".weight") in lora:
                a, b, alpha = lora[name.removesuffix(".weight")]
                change += scale * alpha / len(a) * b @ a
        assert_close(both.state_dict()[name], weight + change)


@torch.no_grad()
def test_several_files_are_rounded_once():
    """A change of 1% of a bf16 weight, in one file or in four: 16% is lost either way. One by one it would be half."""
    rng = torch.Generator().manual_seed(0)
    layer = nn.Sequential(nn.Linear(512, 512, bias=False))
    weight = torch.randn(512, 512, generator=rng).bfloat16()
    whole = 0.01 * torch.randn(512, 512, generator=rng)
    quarters = [{"0": (torch.eye(512), whole / 4, 512.0)}] * 4

    def lost(merges) -> float:
        model = copy.deepcopy(layer).bfloat16()
        model[0].weight.copy_(weight)
        for loras_at_once in merges:
            merge_all(model, [("file", lora, 1.0) for lora in loras_at_once])
        return ((model[0].weight.float() - weight.float() - whole).norm() / whole.norm()).item()

    as_one = lost([[{"0": (torch.eye(512), whole, 512.0)}]])
    assert abs(lost([quarters]) - as_one) < 1e-3 and 0.15 < as_one < 0.18
    assert lost([[quarter] for quarter in quarters]) > 0.5


def test_factorise(model):
    """Of the student's own rank: exactly. Of a lower one: as good as the whole SVD's. Norms cannot be kept."""
    student = merged(model, random_lora(model, 6, layers=r".*(attn|img_mlp|img_in).*"))
    lora, kept = factorise(model, student, 6)
    assert kept > 1 - 1e-5
    for name, weight in merged(model, lora).state_dict().items():
        assert (weight - student.state_dict()[name]).abs().max() < 1e-4
    lora, kept = factorise(model, student, 2)
    best = total = 0.0
    for name, (a, b, alpha) in lora.items():
        change = student.get_submodule(name).weight - model.get_submodule(name).weight
        values = torch.linalg.svdvals(change).square()
        error = (change - alpha / len(a) * b @ a).square().sum()
        assert error <= 1.0001 * values[2:].sum()
        best, total = best + values[:2].sum().item(), total + values.sum().item()
    assert abs(kept - best / total) < 1e-3 and kept < 0.9
    with torch.no_grad():
        student.transformer_blocks[0].attn.norm_q.weight.add_(10)
    assert factorise(model, student, 6)[1] < kept
    assert factorise(model, model, 6) == ({}, 1.0)


def test_faulty_files_are_one_error(model, tmp_path):
    file = tmp_path / "some.safetensors"
    write_lora(file, random_lora(model, layers=r".*0\.attn\.to_q"))
    whole, layer = load_file(file), "transformer_blocks.0.attn.to_q"
    for change, message in (
        ({f"{layer}.lora_B.weight": None}, f"{layer} has only a, alpha"),
        ({f"{layer}.lora_B.weight": torch.ones(64, 5)}, rf"{layer} has A \[4, 64\] and B \[64, 5\]"),
        ({f"{layer}.lora_A.weight": torch.ones(4, 63)}, rf"{layer} has A \[4, 63\]"),
        (
            {f"{layer}.lora_A.weight": torch.ones(0, 64), f"{layer}.lora_B.weight": torch.ones(64, 0)},
            f"{layer}.lora_A.* empty",
        ),
        ({f"{layer}.lora_B.weight": torch.full((64, 4), torch.nan)}, f"{layer}.lora_B.* not finite"),
        ({f"{layer}.alpha": torch.ones(2)}, rf"{layer}.alpha has shape \[2\]; one number"),
        ({f"{layer}.dora_scale": torch.ones(64)}, f"{layer}.dora_scale is no tensor of a LoRA"),
        ({f"{layer}.lora_magnitude_vector.weight": torch.ones(64)}, "is no tensor of a LoRA"),
        ({f"{layer}.lokr_w1": torch.ones(64)}, f"{layer}.lokr_w1 is no tensor of a LoRA"),
        ({f"{layer}.hada_w1_a": torch.ones(64)}, "is no tensor of a LoRA"),
        ({f"{layer}.lora_A.weight": torch.ones(4, 64, dtype=torch.int32)}, f"{layer}.lora_A.weight has the type I32"),
        ({f"transformer.{layer}.lora_A.weight": torch.ones(4, 64)}, f"gives the a of {layer} a second time"),
        ({f"lora_unet_{underscored(layer)}.alpha": torch.tensor(1.0)}, f"gives the alpha of {layer} a second time"),
        ({"some.lora_A.weight": torch.ones(2, 2), "some.lora_B.weight": torch.ones(2, 2)}, "some is no linear layer"),
        (dict.fromkeys(whole), "holds no LoRA"),
    ):
        save_file({name: tensor for name, tensor in (whole | change).items() if tensor is not None}, file)
        with pytest.raises(ValueError, match=message) as error:
            read_lora(file, model)
        assert str(file) in str(error.value)
    for header, message in (
        ({"sample_sigmas": "[0.5, 1.0]"}, "sample_sigmas"),
        ({"sample_sigmas": "[0.5,"}, "header"),
        ({"lora_adapter_metadata": '{"transformer.use_dora": true}'}, "DoRA"),
        ({"lora_adapter_metadata": '{"transformer.lora_alpha": "rank"}'}, "no number as transformer.lora_alpha"),
        ({"lora_adapter_metadata": "[]"}, "no number as transformer.lora_alpha"),
        ({"lora_adapter_metadata": '{"transformer.lora_alpha": 1' + "0" * 400 + "}"}, "no number as transformer.lora"),
        ({"lora_adapter_metadata": '{"transformer.lora_alpha": NaN}'}, "no number as transformer.lora"),
        ({"lora_adapter_metadata": "[" * 10_000}, "header"),
        ({"sample_sigmas": "[1e400]"}, "sample_sigmas"),
    ):
        save_file(whole, file, header)
        with pytest.raises(ValueError, match=message):
            read_lora(file, model)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_lora(file, model)
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        read_lora(tmp_path / "none.safetensors", model)
