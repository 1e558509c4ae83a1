"""LoRA roles: teacher, student and fake score as LoRAs on one copy of the weights.

role    the name of a LoRA that a network carries; None is the shared weights alone

add_role(model, "student", new_lora(model, rank=32))
with with_role(model, "student"):
    v = model(z, t, condition)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint.lora import LoRA


@dataclass
class Stage:
    """The roles of a network, and the one that is on. All layers share this object, so that they cannot disagree."""

    roles: set[str] = field(default_factory=set)
    role: str | None = None


class Adapter(nn.Module):
    """What a role adds to a layer's output y (B, n, out): alpha / r B A x."""

    def __init__(self, a: Tensor, b: Tensor, alpha: float):
        super().__init__()
        self.A, self.B, self.alpha = nn.Parameter(a), nn.Parameter(b), alpha

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # The factors stay in fp32 on weights in bf16. So they need no masters.
        x = F.linear(x, self.A.to(x.dtype)).flatten(0, -2)  # (B n, r)
        changed = torch.addmm(y.flatten(0, -2), x, self.B.to(x.dtype).mT, alpha=self.alpha / len(self.A))  # (B n, out)
        return changed.view_as(y)  # (B, n, out)


class RoleLinear(nn.Module):
    """A linear layer with an adapter for each role. The weight keeps its name in the state dict."""

    def __init__(self, linear: nn.Linear, stage: Stage):
        super().__init__()
        self.weight, self.stage, self.adapters = linear.weight, stage, nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)  # (B, n, out)
        role = self.stage.role
        return self.adapters[role](x, y) if role in self.adapters else y  # (B, n, out)


def stage_of(model: nn.Module) -> Stage:
    """The network's stage, made here if it has none."""
    if not hasattr(model, "stage"):
        model.stage = Stage()
    return model.stage


def add_role(model: nn.Module, role: str, lora: LoRA) -> None:
    """Give the network another role, whose parameters are the tensors of `lora`. ValueError: the name is taken."""
    stage = stage_of(model)
    if role in stage.roles or "." in role or hasattr(nn.ModuleDict, role):
        raise ValueError(f"role {role!r}: the name is taken, or it is one of torch's own; choose another")
    for name, (a, b, alpha) in lora.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, (nn.Linear, RoleLinear)):
            raise ValueError(f"role {role!r} changes the gains of {name}; only a LoRA of linear layers can be a role")
        if not isinstance(layer, RoleLinear):
            layer = RoleLinear(layer, stage)
            model.set_submodule(name, layer)
        layer.adapters[role] = Adapter(a.to(layer.weight.device), b.to(layer.weight.device), alpha)
    stage.roles.add(role)


def role_lora(model: nn.Module, role: str) -> LoRA:
    """A role's own parameters, by layer: what an optimiser trains and a file keeps."""
    lora = {}
    for name, layer in model.named_modules():
        if isinstance(layer, RoleLinear) and role in layer.adapters:
            adapter = layer.adapters[role]
            lora[name] = adapter.A, adapter.B, adapter.alpha
    return lora


@contextmanager
def with_role(model: nn.Module, role: str | None) -> Iterator[None]:
    """Within, the network plays this role. None: the weights alone, as without this context."""
    stage = stage_of(model)
    if role is not None and role not in stage.roles:
        raise ValueError(f"role {role!r} is not among {sorted(stage.roles)}; add_role makes it known")
    before, stage.role = stage.role, role
    try:
        yield
    finally:
        stage.role = before
