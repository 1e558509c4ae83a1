"""LoRA (arXiv 2106.09685): teacher, student and fake score as roles on one copy of the weights; and LoRA files.

LoRA    {layer: (A, B, alpha)}: with it the layer's weight W acts as W + alpha / r B A
role    a name under which a network carries one LoRA; None is the shared weights alone

add_role(model, "student", new_lora(model, rank=32))
with with_role(model, "student"):
    v = model(z, t, condition)
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint.export import how_it_draws
from checkpoint.files import aside
from checkpoint.layout import check_sigmas
from checkpoint.weights import FLOATS, finite, open_weights, write_tensors
from program.edges import parse_json, short
from program.ranges import inside

LoRA = dict[str, tuple[Tensor, Tensor, float]]  # layer: A (r, in), B (out, r), alpha
ATTENTION = r"transformer_blocks\.\d+\.attn\.to_(q|k|v|out\.0)"  # the layers that the family's LoRA files change


@dataclass
class Stage:
    """The roles of a network, and which one is on. All its layers share one object, so that they cannot disagree."""

    roles: set[str] = field(default_factory=set)
    role: str | None = None


class Adapter(nn.Module):
    """What one role adds to one layer's output y (B, n, out): alpha / r B A x."""

    def __init__(self, a: Tensor, b: Tensor, alpha: float):
        super().__init__()
        self.A, self.B, self.alpha = nn.Parameter(a), nn.Parameter(b), alpha

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # Factors in fp32 may sit on weights in bf16. They are what learns, and so need no second copy as masters.
        x = F.linear(x, self.A.to(x.dtype)).flatten(0, -2)  # (B n, r)
        changed = torch.addmm(y.flatten(0, -2), x, self.B.to(x.dtype).mT, alpha=self.alpha / len(self.A))  # (B n, out)
        return changed.view_as(y)  # (B, n, out)


class RoleLinear(nn.Module):
    """A linear layer with an adapter for each role that changes it. The weight keeps its name in the state dict."""

    def __init__(self, linear: nn.Linear, stage: Stage):
        super().__init__()
        self.weight, self.stage, self.adapters = linear.weight, stage, nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)  # (B, n, out)
        role = self.stage.role
        return self.adapters[role](x, y) if role in self.adapters else y  # (B, n, out)


def new_lora(
    model: nn.Module, rank: int, alpha: float | None = None, layers: str = ATTENTION, rng: torch.Generator | None = None
) -> LoRA:
    """A LoRA that changes nothing yet: A is random, B zero. alpha None: the rank. `layers`: a regular expression."""
    lora = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, RoleLinear)) and re.fullmatch(layers, name):
            out, width = module.weight.shape
            a = torch.randn(rank, width, generator=rng) * width**-0.5  # (r, in), on the CPU: the same on every device
            lora[name] = a, torch.zeros(out, rank), float(rank if alpha is None else alpha)
    return lora


def stage_of(model: nn.Module) -> Stage:
    """The network's one stage; a network without roles gets it here."""
    if not hasattr(model, "stage"):
        model.stage = Stage()
    return model.stage


def add_role(model: nn.Module, role: str, lora: LoRA) -> None:
    """Give the network another role. The tensors of `lora` become the role's parameters. ValueError: the name is taken."""
    stage = stage_of(model)
    if role in stage.roles or "." in role or hasattr(nn.ModuleDict, role):
        raise ValueError(f"role {role!r}: the name is taken, or it is one of torch's own; choose another")
    for name, (a, b, alpha) in lora.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, RoleLinear):
            layer = RoleLinear(layer, stage)
            model.set_submodule(name, layer)
        layer.adapters[role] = Adapter(a.to(layer.weight.device), b.to(layer.weight.device), alpha)
    stage.roles.add(role)


def role_lora(model: nn.Module, role: str) -> LoRA:
    """A role's own parameters, by layer: what an optimiser trains and a file keeps."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, RoleLinear)}
    own = {name: layer.adapters[role] for name, layer in layers.items() if role in layer.adapters}
    return {name: (adapter.A, adapter.B, adapter.alpha) for name, adapter in own.items()}


@contextmanager
def with_role(model: nn.Module, role: str | None) -> Iterator[None]:
    """Within, the network plays this role. None, which is also the state without this context: the weights alone."""
    stage = stage_of(model)
    if role is not None and role not in stage.roles:
        raise ValueError(f"role {role!r} is not among {sorted(stage.roles)}; add_role makes it known")
    before, stage.role = stage.role, role
    try:
        yield
    finally:
        stage.role = before


def merge(model: nn.Module, lora: LoRA, scale: float = 1.0, file: str | Path = "the LoRA") -> None:
    """Change the weights themselves by `scale` times `lora`; see merge_all."""
    merge_all(model, [(file, lora, scale)])


@torch.no_grad()
def merge_all(model: nn.Module, loras: list[tuple[str | Path, LoRA, float]]) -> None:
    """Change the weights themselves by several LoRAs: for each its file, itself, and its scale.

    Their changes are added in fp32 and the sum is rounded once. A change is small beside its weight: of one that is 1% of
    it, rounding to bf16 loses 16%. Merged one by one, four quarters of such a change would lose 55%. ValueError: a weight
    overflows.
    """
    for name in dict.fromkeys(name for _, lora, _ in loras for name in lora):
        weight = model.get_submodule(name).weight
        summed, files = weight.float(), []
        for file, lora, scale in loras:
            if name in lora:
                a, b, alpha = lora[name]
                change = b.to(weight.device).float() @ a.to(weight.device).float()  # (out, in)
                summed = summed + scale * alpha / len(a) * change
                files.append(f"{file} at scale {scale}")
        weight.copy_(summed)
        if not finite(weight):
            raise ValueError(f"{' and '.join(files)}: the changed {name} is not finite in {weight.dtype}")


@torch.no_grad()
def factorise(base: nn.Module, student: nn.Module, rank: int) -> tuple[LoRA, float]:
    """The LoRA of `rank` that is nearest to what a full student changed in its base, and how much of it that is.

    Returns the LoRA and the share of the change's squared norm that it keeps. Only matrices of linear layers have a
    place in a LoRA: changed gains of norms are lost.
    """
    lora, kept, total = {}, 0.0, 0.0
    trained = student.state_dict()
    for name, weight in base.state_dict().items():
        change = trained[name].float() - weight.float()
        total += change.square().sum().item()
        if change.ndim < 2 or not change.any():
            continue
        # The best approximation of a rank has the largest singular values. The randomised method finds only those.
        # A generator of its own makes the result repeatable.
        r = min(rank, *change.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(change, q=min(2 * r + 8, *change.shape), niter=4)  # (out, q), (q,), (in, q)
        root = s[:r].sqrt()  # each factor takes half of the size, so that neither is tiny
        lora[name.removesuffix(".weight")] = (root * v[:, :r]).T, u[:, :r] * root, float(r)
        kept += s[:r].square().sum().item()
    return lora, kept / total if total else 1.0


# ---- files -----------------------------------------------------------------------------------------------------------

# What is read: the layer's name behind any prefixes, with dots, or with underscores as kohya's programs write it; then
# lora_A, lora_down or lora.down, and their partners.
LORA_KEY = re.compile(
    r"(?:base_model\.model\.|model\.|transformer\.|diffusion_model\.|unet\.|lora_unet_|lora_transformer_)*(?P<layer>.+)"
    r"\.(?:(?P<a>lora_A|lora[._]down)|(?P<b>lora_B|lora[._]up)|(?P<alpha>alpha))(?:\.default)?(?:\.weight)?"
)


def write_lora(
    path: str | Path,
    lora: LoRA,
    sigmas: list[float] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    stochastic: bool = True,
) -> None:
    """Write one safetensors file: for every layer A (r, in), B (out, r) and alpha. A few-step student's `sigmas` stand
    in its header as `sample_sigmas`, `stochastic` (see Scheduler) as `stochastic_sampling`, and both in words as
    `description`.

    A layer has its own name, without a prefix: diffusers reads alpha there (behind `transformer.` it would refuse it),
    and ComfyUI, which fuses two of the MLP's layers, finds their halves there (behind `diffusion_model.` it would drop
    them).
    """
    tensors = {}
    for name, (a, b, alpha) in lora.items():
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


def read_lora(path: str | Path, model: nn.Module) -> tuple[LoRA, list[float] | None, bool]:
    """Read a LoRA file for `model`, in any spelling of the family's: (the LoRA, in fp32; its sample_sigmas or None;
    whether it draws by stochastic sampling).

    Without an alpha the changes are B A. ValueError or FileNotFoundError name the file and the layer: one that is not
    in `model`, is given twice or has another shape, half a pair, a tensor that belongs to no LoRA, a file that is torn.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such LoRA file")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, RoleLinear))}
    names = {name.replace(".", "_"): name for name in layers} | {name: name for name in layers}
    found: dict[str, dict[str, Tensor]] = {}
    with open_weights(path) as file:
        header = file.metadata() or {}
        for key in file.keys():
            match = LORA_KEY.fullmatch(key)
            if not match:
                raise ValueError(f"{path}: {key} is no tensor of a LoRA (A, B and alpha for linear layers)")
            if match["layer"] not in names:
                raise ValueError(f"{path}: {match['layer']} is no linear layer of the checkpoint's transformer")
            layer, part = names[match["layer"]], match.lastgroup
            if part != "alpha" and (kind := file.get_slice(key).get_dtype()) not in FLOATS:
                raise ValueError(f"{path}: {key} has the type {kind}; one of {', '.join(FLOATS)} is expected")
            tensor = file.get_tensor(key).float()
            if part == "alpha" and tensor.numel() != 1:
                raise ValueError(f"{path}: {key} has shape {list(tensor.shape)}; one number is expected")
            if not tensor.numel() or not finite(tensor):
                shape = list(tensor.shape)
                raise ValueError(f"{path}: {key} of shape {shape} is empty or holds a value that is not finite")
            if part in found.setdefault(layer, {}):
                raise ValueError(f"{path}: {key} gives the {part} of {layer} a second time")
            found[layer][part] = tensor
    alpha, sigmas, stochastic = read_header(header, path)
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
    return lora, sigmas, stochastic


def read_header(header: dict[str, str], path: Path) -> tuple[float | None, list[float] | None, bool]:
    """What a LoRA file's header says: alpha, where diffusers and peft keep it, and how a student draws."""
    try:
        said = parse_json(header.get("lora_adapter_metadata", "{}"))
        sigmas = parse_json(header.get("sample_sigmas", "null"))
        stochastic = parse_json(header.get("stochastic_sampling", "false"))
    except ValueError as error:
        raise ValueError(f"{path}: its header does not hold what a LoRA's does: {error}") from None
    alpha = said.get("transformer.lora_alpha") if isinstance(said, dict) else "no object"
    if alpha is not None and (type(alpha) not in (int, float) or not inside(alpha, "(0, 1e6]")):
        raise ValueError(f"{path}: lora_adapter_metadata has no number as transformer.lora_alpha: {short(alpha)}")
    if said.get("transformer.alpha_pattern") or said.get("transformer.use_rslora") or said.get("transformer.use_dora"):
        raise ValueError(f"{path}: its header asks for per-layer alphas, rsLoRA or DoRA, which are not read here")
    if type(stochastic) is not bool:
        raise ValueError(f"{path}: stochastic_sampling is {short(stochastic)}; true or false is expected")
    return alpha, None if sigmas is None else check_sigmas(sigmas, f"{path}: sample_sigmas"), stochastic
