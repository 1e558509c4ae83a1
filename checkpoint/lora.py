"""LoRAs (arXiv 2106.09685): merged into weights, computed from full weights, written, and read in all common spellings.

LoRA    {layer: (A, B, alpha)}. It changes the layer's weight W (out, in) to W + alpha / r B A, with A (r, in) and
        B (out, r). The gains (d,) of a norm count as a matrix of one row.

training/roles.py adds LoRAs to a network without merging them.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint.files import aside
from checkpoint.layout import check_sigmas, how_it_draws
from checkpoint.weights import FLOATS, finite, open_weights, write_tensors
from program.edges import parse_json, short
from program.ranges import inside

LoRA = dict[str, tuple[Tensor, Tensor, float]]  # layer: A (r, in), B (out, r), alpha
ATTENTION = r"transformer_blocks\.\d+\.attn\.to_(q|k|v|out\.0)"  # the layers that this family's LoRA files change


def layers_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a network by layer: matrices (out, in) of linear layers, gains (d,) of norms."""
    weights = {name: weight for name, weight in model.named_parameters() if name.endswith(".weight")}
    return {name.removesuffix(".weight"): weight for name, weight in weights.items()}


def new_lora(
    model: nn.Module, rank: int, alpha: float | None = None, layers: str = ATTENTION, rng: torch.Generator | None = None
) -> LoRA:
    """A LoRA that changes nothing yet: A is random, B zero. alpha None: the rank. layers: a regular expression."""
    lora = {}
    for name, weight in layers_of(model).items():
        if weight.ndim == 2 and re.fullmatch(layers, name):
            out, width = weight.shape
            # (r, in). Drawn on the CPU, so that every device gets the same numbers.
            a = torch.randn(rank, width, generator=rng) * width**-0.5
            lora[name] = a, torch.zeros(out, rank), float(rank if alpha is None else alpha)
    return lora


# ---- merging ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(model: nn.Module, loras: list[tuple[str | Path, LoRA, float]]) -> None:
    """Add LoRAs to the weights themselves. Each is given as (its name in errors, the LoRA, its scale).

    The changes are added in fp32, and the sum is rounded once, because a change is small compared with its weight. If
    it is 1% of the weight, rounding to bf16 loses 16% of the change. Four quarters of it, merged one by one, would
    lose 55%. ValueError: a weight overflows.
    """
    layers = dict.fromkeys(layer for _, lora, _ in loras for layer in lora)  # each once, in order
    for layer in layers:
        weight = model.get_submodule(layer).weight
        changed, files = weight.float(), []
        for file, lora, scale in loras:
            if layer in lora:
                a, b, alpha = lora[layer]
                product = b.to(weight.device).float() @ a.to(weight.device).float()  # (out, in)
                changed = changed + scale * alpha / len(a) * product.view_as(weight)
                files.append(f"{file} at scale {scale}")
        weight.copy_(changed)
        if not finite(weight):
            raise ValueError(f"{' and '.join(files)}: the changed {layer} is not finite in {weight.dtype}")


# ---- from full weights -----------------------------------------------------------------------------------------------


@torch.no_grad()
def factorise(base: nn.Module, student: nn.Module, rank: int, exact: Collection[str] = ()) -> tuple[LoRA, float]:
    """The LoRA of `rank` that is nearest to the change from the base to a full student.

    Returns it, and the share of the change's squared norm that it keeps. Layers that `exact` names keep their whole
    change. Other changes of norms are lost, because only the matrices of linear layers have a rank.
    """
    lora, kept, total = {}, 0.0, 0.0
    trained = layers_of(student)
    for layer, weight in layers_of(base).items():
        change = trained[layer].float() - weight.float()  # (out, in) or (d,)
        size = change.square().sum().item()
        total += size
        if size and is_named(layer, exact):
            lora[layer] = as_factors(change)
            kept += size
        elif size and change.ndim == 2:
            a, b, values = nearest(change, rank)
            lora[layer] = a, b, float(len(a))
            kept += values.square().sum().item()
    return lora, kept / total if total else 1.0


def is_named(layer: str, names: Collection[str]) -> bool:
    """Whether the layer's name contains one of the names, as transformer_blocks.0.attn.to_q contains attn.to_q."""
    return any(f".{name}." in f".{layer}." for name in names)


def nearest(change: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A (r, in) and B (out, r) whose product is nearest to the change (out, in), and its singular values (r,)."""
    # The randomised method computes only the largest values. The fixed seed makes its result repeatable.
    r = min(rank, *change.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(change, q=min(2 * r + 8, *change.shape), niter=4)  # (out, q), (q,), (in, q)
    root = s[:r].sqrt()  # in both factors, so that neither is tiny
    return (root * v[:, :r]).T, u[:, :r] * root, s[:r]


def as_factors(change: Tensor) -> tuple[Tensor, Tensor, float]:
    """A whole change, (out, in) or (d,), as A, B and alpha: exactly, because one factor is the identity."""
    change = change.reshape(-1, change.shape[-1])  # (out, in)
    out, width = change.shape
    if out <= width:
        return change, torch.eye(out, device=change.device), float(out)
    return torch.eye(width, device=change.device), change, float(width)


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_lora(
    path: str | Path,
    lora: LoRA,
    sigmas: list[float] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    stochastic: bool = True,
    exact: Collection[str] = (),
) -> None:
    """Write one safetensors file: A (r, in), B (out, r) and alpha of every layer. Layers that `exact` names get their
    whole change instead, in fp32, as `LAYER.diff`.

    The header says how a few-step student draws: `sigmas` as `sample_sigmas`, `stochastic` (see Scheduler) as
    `stochastic_sampling`, and both in words as `description`.

    Layers' names have no prefix. With `transformer.` diffusers would reject alpha. With `diffusion_model.` ComfyUI,
    which fuses two layers of the MLP, would drop both.
    """
    tensors = {}
    for name, (a, b, alpha) in lora.items():
        if is_named(name, exact):
            change = (alpha / len(a) * b.detach().float() @ a.detach().float()).cpu()  # (out, in)
            tensors[f"{name}.diff"] = change[0] if len(b) == 1 else change  # one row: gains (d,)
            continue
        tensors[f"{name}.lora_A.weight"] = a.detach().to("cpu", dtype).contiguous()
        tensors[f"{name}.lora_B.weight"] = b.detach().to("cpu", dtype).contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    notes = {}
    if sigmas is not None:
        notes["sample_sigmas"] = json.dumps(check_sigmas(sigmas, "sigmas"))
        notes["stochastic_sampling"] = json.dumps(stochastic)
        notes["description"] = how_it_draws(sigmas, stochastic)
    with aside(path) as part:
        write_tensors(part, tensors, notes)


# ---- reading ---------------------------------------------------------------------------------------------------------

# A key begins with any number of prefixes. The layer's name follows, with dots or, from kohya's programs, underscores.
# The end is lora_A, lora_down or lora.down, or their partners, alpha, or diff, ComfyUI's name for a whole change.
LORA_KEY = re.compile(
    r"(?:base_model\.model\.|model\.|transformer\.|diffusion_model\.|unet\.|lora_unet_|lora_transformer_)*(?P<layer>.+)"
    r"\.(?:(?P<a>lora_A|lora[._]down)|(?P<b>lora_B|lora[._]up)|(?P<alpha>alpha)|(?P<diff>diff))"
    r"(?:\.default)?(?:\.weight)?"
)
# ComfyUI fuses two layers of the MLP, the gate's rows first. LoRAs that were extracted there have the fused layer.
FUSED, HALVES = "img_mlp.gate_up", ("img_mlp.gate_layer", "img_mlp.proj")
# Patterns of rejected keys -> what a file with such keys is.
REFUSED = {
    r".*\.(dora_scale|lora_magnitude_vector)(\..*)?": "a DoRA, which also scales the rows of the weights",
    r".*\.(lokr_|hada_).*": "a LoKr or LoHa, whose factors are multiplied in another way",
    r"(.*\.)?scaled_fp8|.*\.(scale_weight|scale_input|weight_scale|input_scale|comfy_quant)": "a network in scaled fp8 or "
    "another format of ComfyUI's, no LoRA",
    r".*\.weight\.(absmax|quant_map|nested_.*|quant_state\..*)": "a network quantised by bitsandbytes, no LoRA",
    r"(.*\.)?proj_out\.weight": "no plain LoRA: it replaces whole layers",
    r".*\.(weight|bias)": "no plain LoRA: it holds whole weights",
}
PDD_FORMAT = "qwenimage21_extracted_prefused"  # `format` in the header of PAI's Fun-Acc begins with this


def read_lora(path: str | Path, model: nn.Module) -> tuple[LoRA, list[float] | None, bool]:
    """Read a LoRA file for `model`, in any of the spellings in use.

    Returns the LoRA in fp32, its sample_sigmas or None, and whether it draws by stochastic sampling. Without an alpha
    the changes are B A. ValueError or FileNotFoundError name the file, and the layer or key: a layer that is not in
    `model`, comes twice or has another shape; half of a pair; a key of no LoRA; a damaged file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such LoRA file")
    weights = layers_of(model)
    with open_weights(path) as file:
        header, keys = file.metadata() or {}, list(file.keys())
        check_keys(path, keys, header)
        layers = read_tensors(path, file, keys, list(weights))
    alpha, sigmas, stochastic = read_header(header, path)

    lora: LoRA = {}
    for layer, tensors in layers.items():
        for name, (a, b, own_alpha) in changes(path, layer, tensors, alpha).items():
            shape = list(weights[name].shape)
            is_norm = len(shape) == 1
            matrix = [1, *shape] if is_norm else shape
            if [len(b), a.shape[1]] != matrix or (is_norm and "diff" not in tensors):
                factors = f"A {list(a.shape)} and B {list(b.shape)}"
                raise ValueError(f"{path}: {name} has {factors}, but its weight is {shape}")
            if name in lora:
                raise ValueError(f"{path}: changes {name} a second time, as a part of {layer}")
            lora[name] = a, b, own_alpha
    if not lora:
        raise ValueError(f"{path}: holds no LoRA")
    return lora, sigmas, stochastic


def check_keys(path: Path, keys: list[str], header: dict[str, str]) -> None:
    """Unless all keys are a LoRA's, a ValueError says what the file is and which keys are unknown."""
    unknown = [key for key in keys if not LORA_KEY.fullmatch(key)]
    if not unknown:
        return
    kinds = [kind for pattern, kind in REFUSED.items() if any(re.fullmatch(pattern, key) for key in unknown)]
    if header.get("format", "").startswith(PDD_FORMAT):
        kinds = ["a PDD student (Fun-Acc), which has an output layer for each of its steps"]
    kind = kinds[0] if kinds else "no LoRA of a kind that is read here"
    shown = ", ".join(key[:100] for key in unknown[:3]) + ", ..." * (len(unknown) > 3)
    raise ValueError(f"{path}: {kind}; {len(unknown)} of its {len(keys)} keys are unknown: {shown}")


def read_tensors(path: Path, file, keys: list[str], layers: list[str]) -> dict[str, dict[str, Tensor]]:
    """The file's tensors in fp32, by layer (FUSED is one, too) and kind: a, b, alpha or diff. layers: the model's."""
    layers = layers + [name.replace(HALVES[0], FUSED) for name in layers if name.endswith(HALVES[0])]
    spellings = {name.replace(".", "_"): name for name in layers} | {name: name for name in layers}
    tensors: dict[str, dict[str, Tensor]] = {}
    for key in keys:
        match = LORA_KEY.fullmatch(key)
        if match["layer"] not in spellings:
            problem = f"{match['layer'][:100]} is no linear layer of this one's"
            raise ValueError(f"{path}: made for another network: {problem}")
        layer, kind = spellings[match["layer"]], match.lastgroup
        dtype = file.get_slice(key).get_dtype()
        if kind != "alpha" and dtype not in FLOATS:
            raise ValueError(f"{path}: {key} has the type {dtype}; one of {', '.join(FLOATS)} is expected")
        tensor = file.get_tensor(key).float()
        shape = list(tensor.shape)
        if kind == "alpha" and tensor.numel() != 1:
            raise ValueError(f"{path}: {key} has shape {shape}; one number is expected")
        if not tensor.numel() or not finite(tensor):
            raise ValueError(f"{path}: {key} of shape {shape} is empty or holds a value that is not finite")
        if kind in tensors.setdefault(layer, {}):
            raise ValueError(f"{path}: {key} gives the {kind} of {layer} a second time")
        tensors[layer][kind] = tensor
    return tensors


def changes(path: Path, layer: str, tensors: dict[str, Tensor], alpha: float | None) -> LoRA:
    """The changes by one layer of the file: of the layer of this name, or of both HALVES. alpha: the header's."""
    if "diff" in tensors:
        whole = tensors["diff"]
        if len(tensors) > 1 or layer.endswith(FUSED) or whole.ndim > 2:
            raise ValueError(f"{path}: {layer}.diff of shape {list(whole.shape)} is not one layer's whole change")
        return {layer: as_factors(whole)}
    if not tensors.keys() >= {"a", "b"}:
        raise ValueError(f"{path}: {layer} has only {', '.join(sorted(tensors))} of a LoRA's a, b")
    a, b = tensors["a"], tensors["b"]
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        raise ValueError(f"{path}: {layer} has A {list(a.shape)} and B {list(b.shape)}, which make no product")
    default = len(a) if alpha is None else alpha
    alpha = float(tensors.get("alpha", default))
    if not layer.endswith(FUSED):
        return {layer: (a, b, alpha)}
    gate, value = (layer.replace(FUSED, half) for half in HALVES)
    rows = len(b) // 2
    return {gate: (a, b[:rows], alpha), value: (a, b[rows:], alpha)}


def read_header(header: dict[str, str], path: Path) -> tuple[float | None, list[float] | None, bool]:
    """From a LoRA file's header: alpha, which diffusers and peft write there, the sigmas, and stochastic sampling."""

    def value(key: str, default: str) -> object:
        try:
            return parse_json(header.get(key, default))
        except ValueError as error:
            raise ValueError(f"{path}: {key} in its header is not JSON: {error}") from None

    adapter = value("lora_adapter_metadata", "{}")
    if not isinstance(adapter, dict):
        raise ValueError(f"{path}: lora_adapter_metadata in its header is no JSON object: {short(adapter)}")
    # diffusers' pipeline writes the network's name before each key; a network alone does not.
    adapter = {key.removeprefix("transformer."): entry for key, entry in adapter.items()}
    alpha = adapter.get("lora_alpha")
    if alpha is not None and (type(alpha) not in (int, float) or not inside(alpha, "(0, 1e6]")):
        raise ValueError(f"{path}: lora_adapter_metadata has no number as lora_alpha: {short(alpha)}")
    if adapter.get("alpha_pattern") or adapter.get("use_rslora") or adapter.get("use_dora"):
        raise ValueError(f"{path}: its header asks for per-layer alphas, rsLoRA or DoRA, which are not read here")

    sigmas = value("sample_sigmas", "null")
    if sigmas is not None:
        sigmas = check_sigmas(sigmas, f"{path}: sample_sigmas")
    stochastic = value("stochastic_sampling", "false")
    if type(stochastic) is not bool:
        raise ValueError(f"{path}: stochastic_sampling is {short(stochastic)}; true or false is expected")
    return alpha, sigmas, stochastic
