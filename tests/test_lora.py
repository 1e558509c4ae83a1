"""LoRA files: against diffusers and peft, against an SVD, in the spellings of public files."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig
from reference import (
    EVERYTHING,
    assert_close,
    merged,
    open_pipeline,
    picture,
    random_lora,
    write_checkpoint,
    write_scheduler,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoint.lora import factorise, merge, merge_all, read_lora, write_lora
from model import MMDiT
from sample import Pipeline

SIGMAS = [1.0, 0.9, 0.75, 0.5]
IDENTITY = {"use_dynamic_shifting": False, "shift": 1.0, "shift_terminal": None}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("base"), resolution=64, sample_sigmas=SIGMAS)
    write_scheduler(directory, **IDENTITY)
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


def fun_acc(layer: str) -> dict[str, torch.Tensor]:
    """As slmonker/ComfyUI-QwenImage21-Fun-PDD lists the keys of PAI's Qwen-Image-2.1-Fun-Acc-4Step."""
    return {
        f"{layer}.lora_down": torch.ones(4, 64),
        f"{layer}.lora_up": torch.ones(64, 4),
        "transformer_blocks.0.attn.norm_q.weight": torch.ones(32),
        "proj_out.weight": torch.ones(4, 64, 64),
    }


LAYER = "transformer_blocks.0.attn.to_q"
PAIR = {f"{LAYER}.lora_A.weight": torch.ones(4, 64), f"{LAYER}.lora_B.weight": torch.ones(64, 4)}
OTHERS = {  # what it is: (its tensors, its header, the complaint); the keys as a public source shows them
    "Fun-Acc": (
        fun_acc(LAYER),
        {"format": "qwenimage21_extracted_prefused_v1"},
        "a PDD student .Fun-Acc., which has an output layer for each of its steps; 2 of its 4 keys are unknown: proj_out.weight",
    ),
    "Fun-Acc under another header": (fun_acc(LAYER), {}, "it replaces whole layers; 2 of its 4 keys are unknown: proj_out.weight"),
    # ComfyUI's loader (comfy/lora.py), and peft's own name for it (peft/tuners/lora)
    "DoRA, ComfyUI": (PAIR | {f"{LAYER}.dora_scale": torch.ones(64, 1)}, {}, f"a DoRA, .*: {LAYER}.dora_scale"),
    "DoRA, peft": (PAIR | {f"{LAYER}.lora_magnitude_vector.weight": torch.ones(64)}, {}, "a DoRA"),
    # comfyanonymous/ComfyUI, QUANTIZATION.md, and its earlier scaled fp8
    "fp8, ComfyUI": (
        {f"{LAYER}.weight": torch.ones(64, 64).to(torch.float8_e4m3fn), f"{LAYER}.weight_scale": torch.tensor(1.0)},
        {},
        f"a network in scaled fp8 .*; 2 of its 2 keys are unknown: {LAYER}.weight, {LAYER}.weight_scale",
    ),
    "fp8, ComfyUI's earlier": (
        {f"{LAYER}.weight": torch.ones(64, 64).to(torch.float8_e4m3fn), f"{LAYER}.scale_weight": torch.tensor(1.0),
         "scaled_fp8": torch.ones(2).to(torch.float8_e4m3fn)},
        {},
        "a network in scaled fp8",
    ),
    # imnotednamode/mochi-1-preview-mix-nf4, whose index lists them
    "nf4, bitsandbytes": (
        {f"{LAYER}.weight": torch.ones(64, 32, dtype=torch.uint8), f"{LAYER}.weight.absmax": torch.ones(4),
         f"{LAYER}.weight.quant_state.bitsandbytes__nf4": torch.ones(4, dtype=torch.uint8)},
        {},
        "a network quantised by bitsandbytes",
    ),
    # Qwen-Image of 20B, which has a second stream for the text (diffusers, QwenImageTransformer2DModel)
    "a LoRA for Qwen-Image": (
        {f"{LAYER[:-4]}add_q_proj.lora_{x}.weight": torch.ones(4, 4) for x in "AB"},
        {},
        "made for another network: transformer_blocks.0.attn.add_q_proj is no linear layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_files_that_cannot_be_placed_are_named(model, tmp_path, kind):
    """What the file is and which of its keys are unknown, in one line."""
    tensors, header, message = OTHERS[kind]
    save_file(tensors, tmp_path / "other.safetensors", header or None)
    with pytest.raises(ValueError, match=message) as error:
        read_lora(tmp_path / "other.safetensors", model)
    assert "other.safetensors" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


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
        (
            {f"{layer}.lora_B.weight": torch.ones(64, 5)},
            rf"{layer} has A \[4, 64\] and B \[64, 5\], which make no product",
        ),
        ({f"{layer}.lora_A.weight": torch.ones(4, 63)}, rf"{layer} has A \[4, 63\]"),
        (
            {f"{layer}.lora_A.weight": torch.ones(0, 64), f"{layer}.lora_B.weight": torch.ones(64, 0)},
            f"{layer}.lora_A.* empty",
        ),
        ({f"{layer}.lora_B.weight": torch.full((64, 4), torch.nan)}, f"{layer}.lora_B.* not finite"),
        ({f"{layer}.alpha": torch.ones(2)}, rf"{layer}.alpha has shape \[2\]; one number"),
        ({f"{layer}.dora_scale": torch.ones(64)}, f"a DoRA, .*; 1 of its 4 keys are unknown: {layer}.dora_scale"),
        ({f"{layer}.lora_magnitude_vector.weight": torch.ones(64)}, "a DoRA"),
        ({f"{layer}.lokr_w1": torch.ones(64)}, f"a LoKr or LoHa.*: {layer}.lokr_w1"),
        ({f"{layer}.hada_w1_a": torch.ones(64)}, "a LoKr or LoHa"),
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
        ({"lora_adapter_metadata": '{"transformer.lora_alpha": "rank"}'}, "no number as lora_alpha"),
        ({"lora_adapter_metadata": "[]"}, "no JSON object"),
        ({"lora_adapter_metadata": '{"transformer.lora_alpha": 1' + "0" * 400 + "}"}, "no number as lora_alpha"),
        ({"lora_adapter_metadata": '{"transformer.lora_alpha": NaN}'}, "no number as lora_alpha"),
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
