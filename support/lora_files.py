"""LoRA files: a student of some megabytes, which other programs load onto the same base."""

import json
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from support.checkpoint import check_sigmas
from support.files import open_weights, write_tensors
from support.lora import LoRA, RoleLinear

# In both spellings a layer has its own name, without a prefix: diffusers reads alpha there (behind `transformer.` it
# would refuse it), and ComfyUI, which fuses two of the MLP's layers, finds their halves there (behind `diffusion_model.`
# it would drop them). The first is diffusers' own, and ComfyUI knows it too; the second is what ComfyUI's users write.
SPELLINGS = {"diffusers": ("lora_A", "lora_B"), "comfyui": ("lora_down", "lora_up")}
LORA_KEY = re.compile(
    r"(?:base_model\.model\.|transformer\.|diffusion_model\.)?(?P<layer>.+)\."
    r"(?:(?P<a>lora_A|lora_down)|(?P<b>lora_B|lora_up)|(?P<alpha>alpha))(?:\.default)?(?:\.weight)?"
)


def write_lora(
    path: str | Path,
    lora: LoRA,
    sigmas: list[float] | None = None,
    spelling: str = "diffusers",
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write one safetensors file: for every layer A (r, in), B (out, r) and alpha; `sigmas`, where a few-step student
    has its own, as text in the header (`sample_sigmas`), which other programs pass over."""
    down, up = SPELLINGS[spelling]
    tensors = {}
    for name, (a, b, alpha) in lora.items():
        tensors[f"{name}.{down}.weight"] = a.detach().to("cpu", dtype).contiguous()
        tensors[f"{name}.{up}.weight"] = b.detach().to("cpu", dtype).contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    notes = {} if sigmas is None else {"sample_sigmas": json.dumps(check_sigmas(sigmas, "sigmas"))}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    write_tensors(part, tensors, notes)
    os.replace(part, path)


def read_lora(path: str | Path, model: nn.Module) -> tuple[LoRA, list[float] | None]:
    """Read a LoRA file for `model`, in any spelling of the family's: (the LoRA, in fp32; its sample_sigmas or None).

    Without an alpha the changes are B A. ValueError or FileNotFoundError name the file and the layer: one that is not in
    `model` or has another shape, half a pair, a tensor that is empty or belongs to no LoRA, a file that is torn.
    """
    path, layers = Path(path), dict(model.named_modules())
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such LoRA file")
    found: dict[str, dict[str, Tensor]] = {}
    with open_weights(path) as file:
        header = file.metadata() or {}
        for key in file.keys():
            match = LORA_KEY.fullmatch(key)
            if not match:
                raise ValueError(f"{path}: {key} is no tensor of a LoRA (A, B and alpha for linear layers)")
            tensor = file.get_tensor(key).float()
            if match["alpha"] and tensor.numel() != 1:
                raise ValueError(f"{path}: {key} has shape {list(tensor.shape)}; one number is expected")
            if not tensor.numel() or not tensor.isfinite().all():
                raise ValueError(
                    f"{path}: {key} of shape {list(tensor.shape)} is empty or holds a value that is not finite"
                )
            found.setdefault(match["layer"], {})[match.lastgroup] = tensor
    try:
        said = json.loads(header.get("lora_adapter_metadata", "{}"))  # where diffusers and peft keep alpha
        sigmas = json.loads(header.get("sample_sigmas", "null"))
        if not isinstance(said, dict) or not isinstance(said.get("transformer.lora_alpha", 0), (int, float)):
            raise ValueError("lora_adapter_metadata has no number as transformer.lora_alpha")
    except ValueError as error:
        raise ValueError(f"{path}: its header does not hold what a LoRA's does: {error}") from None
    if said.get("transformer.alpha_pattern") or said.get("transformer.use_rslora") or said.get("transformer.use_dora"):
        raise ValueError(f"{path}: its header asks for per-layer alphas, rsLoRA or DoRA, which are not read here")
    lora = {}
    for name, parts in found.items():
        if not parts.keys() >= {"a", "b"}:
            raise ValueError(f"{path}: {name} has only {', '.join(sorted(parts))} of a LoRA's a, b")
        a, b = parts["a"], parts["b"]
        if not isinstance(layers.get(name), (nn.Linear, RoleLinear)):
            raise ValueError(f"{path}: {name} is no linear layer of the checkpoint's transformer")
        shape = list(layers[name].weight.shape)
        if [*b.shape[:1], *a.shape[1:]] != shape or b.shape[1:] != a.shape[:1]:
            raise ValueError(f"{path}: {name} has A {list(a.shape)} and B {list(b.shape)}, but its weight is {shape}")
        lora[name] = a, b, float(parts.get("alpha", said.get("transformer.lora_alpha", len(a))))
    if not lora:
        raise ValueError(f"{path}: holds no LoRA")
    return lora, None if sigmas is None else check_sigmas(sigmas, f"{path}: sample_sigmas")


def export_lora(path: str | Path, lora: LoRA, sigmas: list[float], dtype: torch.dtype = torch.bfloat16) -> list[Path]:
    """A LoRA student in both spellings: `path`, and beside it NAME-comfyui.safetensors. Returns the two paths."""
    path = Path(path)
    files = {"diffusers": path, "comfyui": path.with_stem(f"{path.stem}-comfyui")}
    for spelling, file in files.items():
        write_lora(file, lora, sigmas, spelling, dtype)
    return list(files.values())
