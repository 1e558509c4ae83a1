"""LoRA files: a student of some megabytes, which other programs load onto the same base."""

import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from support.checkpoint import check_sigmas
from support.files import FLOATS, aside, finite, open_weights, write_tensors
from support.lora import LoRA, RoleLinear
from support.program import inside, parse_json, short

# In both spellings a layer has its own name, without a prefix: diffusers reads alpha there (behind `transformer.` it
# would refuse it), and ComfyUI, which fuses two of the MLP's layers, finds their halves there (behind `diffusion_model.`
# it would drop them). The first is diffusers' own, and ComfyUI knows it too; the second is what ComfyUI's users write.
SPELLINGS = {"diffusers": ("lora_A", "lora_B"), "comfyui": ("lora_down", "lora_up")}

# What is read: the layer's name behind any prefixes, with dots, or with underscores as kohya's programs write it; then
# lora_A, lora_down or lora.down, and their partners.
LORA_KEY = re.compile(
    r"(?:base_model\.model\.|model\.|transformer\.|diffusion_model\.|unet\.|lora_unet_|lora_transformer_)*(?P<layer>.+)"
    r"\.(?:(?P<a>lora_A|lora[._]down)|(?P<b>lora_B|lora[._]up)|(?P<alpha>alpha))(?:\.default)?(?:\.weight)?"
)
# Other methods, by what their tensors' names contain.
OTHERS = {"dora_scale": "DoRA", "magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT",
          "boft": "BOFT", "ia3": "IA3", "lora_mid": "LoCon", ".diff": "a full difference"}  # fmt: skip


def write_lora(
    path: str | Path,
    lora: LoRA,
    sigmas: list[float] | None = None,
    spelling: str = "diffusers",
    dtype: torch.dtype = torch.bfloat16,
    made: dict | None = None,
) -> None:
    """Write one safetensors file: for every layer A (r, in), B (out, r) and alpha.

    In the header, as text that other programs pass over: `sample_sigmas` where a few-step student has its own, and the
    settings `made` it was made with (files.made_with).
    """
    down, up = SPELLINGS[spelling]
    tensors = {}
    for name, (a, b, alpha) in lora.items():
        tensors[f"{name}.{down}.weight"] = a.detach().to("cpu", dtype).contiguous()
        tensors[f"{name}.{up}.weight"] = b.detach().to("cpu", dtype).contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    notes = {} if sigmas is None else {"sample_sigmas": json.dumps(check_sigmas(sigmas, "sigmas"))}
    with aside(path) as part:
        write_tensors(part, tensors, notes | {"made": json.dumps(made or {})})


def read_lora(path: str | Path, model: nn.Module) -> tuple[LoRA, list[float] | None]:
    """Read a LoRA file for `model`, in any spelling of the family's: (the LoRA, in fp32; its sample_sigmas or None).

    Without an alpha the changes are B A. ValueError or FileNotFoundError name the file and the layer: one that is not in
    `model`, is given twice or has another shape, half a pair, a tensor that belongs to no LoRA, a file that is torn.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such LoRA file")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, RoleLinear))}
    found: dict[str, dict[str, Tensor]] = {}
    with open_weights(path) as file:
        header = file.metadata() or {}
        for key in file.keys():
            match = LORA_KEY.fullmatch(key)
            if not match:
                method = next((f"; it is of {name}" for mark, name in OTHERS.items() if mark in key), "")
                raise ValueError(f"{path}: {key} is no tensor of a LoRA (A, B and alpha for linear layers){method}")
            layer, part = resolve(match["layer"], layers, path), match.lastgroup
            if part != "alpha" and (kind := file.get_slice(key).get_dtype()) not in FLOATS:
                raise ValueError(f"{path}: {key} has the type {kind}; one of {', '.join(FLOATS)} is expected")
            tensor = file.get_tensor(key).float()
            if match["alpha"] and tensor.numel() != 1:
                raise ValueError(f"{path}: {key} has shape {list(tensor.shape)}; one number is expected")
            if not tensor.numel() or not finite(tensor):
                raise ValueError(
                    f"{path}: {key} of shape {list(tensor.shape)} is empty or holds a value that is not finite"
                )
            if part in found.setdefault(layer, {}):
                raise ValueError(f"{path}: {key} gives the {part} of {layer} a second time")
            found[layer][part] = tensor
    try:
        said = parse_json(header.get("lora_adapter_metadata", "{}"))  # where diffusers and peft keep alpha
        sigmas = parse_json(header.get("sample_sigmas", "null"))
        alpha = said.get("transformer.lora_alpha") if isinstance(said, dict) else "no object"
        if alpha is not None and (type(alpha) not in (int, float) or not inside(alpha, "(0, 1e6]")):
            raise ValueError(f"lora_adapter_metadata has no number as transformer.lora_alpha: {short(alpha)}")
    except ValueError as error:
        raise ValueError(f"{path}: its header does not hold what a LoRA's does: {error}") from None
    if said.get("transformer.alpha_pattern") or said.get("transformer.use_rslora") or said.get("transformer.use_dora"):
        raise ValueError(f"{path}: its header asks for per-layer alphas, rsLoRA or DoRA, which are not read here")
    lora = {}
    for name, parts in found.items():
        if not parts.keys() >= {"a", "b"}:
            raise ValueError(f"{path}: {name} has only {', '.join(sorted(parts))} of a LoRA's a, b")
        a, b = parts["a"], parts["b"]
        shape = list(layers[name].weight.shape)
        if [*b.shape[:1], *a.shape[1:]] != shape or b.shape[1:] != a.shape[:1]:
            raise ValueError(f"{path}: {name} has A {list(a.shape)} and B {list(b.shape)}, but its weight is {shape}")
        lora[name] = a, b, float(parts.get("alpha", len(a) if alpha is None else alpha))
    if not lora:
        raise ValueError(f"{path}: holds no LoRA")
    return lora, None if sigmas is None else check_sigmas(sigmas, f"{path}: sample_sigmas")


def resolve(name: str, layers: dict[str, nn.Module], path: Path) -> str:
    """The layer that a file means by a name with dots or with underscores only. ValueError: none, or more than one."""
    if name in layers:
        return name
    meant = [layer for layer in layers if layer.replace(".", "_") == name]
    if len(meant) > 1:
        raise ValueError(f"{path}: {name} may be {' or '.join(meant)}")
    if not meant:
        raise ValueError(f"{path}: {name} is no linear layer of the checkpoint's transformer")
    return meant[0]


def comfyui_path(path: str | Path) -> Path:
    """Where export_lora writes the second spelling."""
    return Path(path).with_stem(f"{Path(path).stem}-comfyui")


def export_lora(path: str | Path, lora: LoRA, sigmas: list[float], made: dict | None = None) -> list[Path]:
    """A LoRA student in both spellings: `path`, and beside it NAME-comfyui.safetensors. Returns the two paths."""
    files = {"diffusers": Path(path), "comfyui": comfyui_path(path)}
    for spelling, file in files.items():
        write_lora(file, lora, sigmas, spelling, made=made)
    return list(files.values())
