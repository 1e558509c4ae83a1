"""LoRA files: against diffusers and peft, against an SVD, in the spellings of public files."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig
from reference import (
    EVERYTHING,
    IDENTITY,
    assert_close,
    merged,
    open_pipeline,
    picture,
    random_lora,
    write_model_index,
    write_scheduler,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoint.lora import factorise, merge, read_lora, write_lora
from model import MMDiT
from sample import Pipeline

SIGMAS = [1.0, 0.9, 0.75, 0.5]


@pytest.fixture(scope="module")
def base(checkpoint, tmp_path_factory):
    """The shared checkpoint with a student's schedule."""
    directory = shutil.copytree(checkpoint, tmp_path_factory.mktemp("base") / "checkpoint")
    write_scheduler(directory, **IDENTITY)
    write_model_index(directory, resolution=64, sample_sigmas=SIGMAS)
    return directory


@pytest.fixture
def model(base):
    return MMDiT.from_pretrained(base / "transformer")


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
    merge(ours.mmdit, [(file, again, 1.0)])
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
def test_alphas_in_the_header(model, tmp_path):
    """Rank 64 with lora_alpha 128 in lora_adapter_metadata, as Pruna's files have it (zhongkaifu/TensorSharp reads them at
    scale 2): with the part's name before the key as a pipeline of diffusers writes it, and bare as a network of it does."""
    lora = random_lora(model, 4, 4.0)
    for prefix in "transformer.", "":
        tensors = {f"{prefix}{n}.lora_A.weight": a for n, (a, _, _) in lora.items()}
        tensors |= {f"{prefix}{n}.lora_B.weight": b for n, (_, b, _) in lora.items()}
        header = {"lora_adapter_metadata": json.dumps({f"{prefix}lora_alpha": 8, f"{prefix}r": 4})}
        save_file(tensors, tmp_path / "pruna.safetensors", header)
        read, *_ = read_lora(tmp_path / "pruna.safetensors", model)
        assert read.keys() == lora.keys() and {alpha for _, _, alpha in read.values()} == {8.0}


@torch.no_grad()
def test_the_extracted_turbo_lora(model, tmp_path):
    """Comfy-Org's qwen_image_2.1_turbo_lora_avg_rank_178_bf16: gate and value of the MLP as one layer, the gate's rows
    first, and changed gains of norms as .diff. (A reader that checks all its keys: apply_qwen21_extracted_weights of
    photo_edit_studio.)"""
    rng, prefix, tensors = torch.Generator().manual_seed(0), "diffusion_model.", {}
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    for layer, halves in (
        ("transformer_blocks.0.attn.to_q", ["transformer_blocks.0.attn.to_q"]),
        ("transformer_blocks.1.img_mlp.gate_up", [f"transformer_blocks.1.img_mlp.{n}" for n in ("gate_layer", "proj")]),
    ):
        out, width = expected[f"{halves[0]}.weight"].shape
        a, b = torch.randn(3, width, generator=rng), torch.randn(len(halves) * out, 3, generator=rng)
        tensors |= {f"{prefix}{layer}.lora_down.weight": a, f"{prefix}{layer}.lora_up.weight": b}
        tensors[f"{prefix}{layer}.alpha"] = torch.tensor(6.0)
        for half, rows in zip(halves, b.split(out)):
            expected[f"{half}.weight"] += 2 * rows @ a
    for layer in "transformer_blocks.0.attn.norm_q", "txt_in.text_norm":
        tensors[f"{prefix}{layer}.diff"] = torch.randn(expected[f"{layer}.weight"].shape, generator=rng)
        expected[f"{layer}.weight"] += tensors[f"{prefix}{layer}.diff"]
    save_file(tensors, tmp_path / "turbo.safetensors")
    lora, *_ = read_lora(tmp_path / "turbo.safetensors", model)
    for name, weight in merged(model, lora).state_dict().items():
        assert_close(weight, expected[name])


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
            merge(model, [("file", lora, 1.0) for lora in loras_at_once])
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
