"""The networks of a run: those that stay frozen, and those that learn, with masters, average and optimisers."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoint.files import open_weights
from checkpoint.lora import add_role, merge, new_lora, read_lora, role_lora, stage_of, with_role
from flow import Velocity, network_time
from model import Condition, MMDiT
from program.ranks import all_gather, average_over_ranks, raise_on_all_ranks, rank, ranks
from training.batches import Batch, generator
from training.muon import Muon
from training.sharding import gathered, local_rows, shard


class Network(NamedTuple):
    """A model, and its role, where several networks are LoRAs on the same weights (None: the weights alone)."""

    model: MMDiT
    role: str | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """What training changes, by name: the role's LoRA, or all weights."""
        if self.role is None:
            return dict(self.model.named_parameters())
        lora = role_lora(self.model, self.role)
        return {f"{layer}.{x}": p for layer, (a, b, _) in lora.items() for x, p in (("A", a), ("B", b))}

    def velocity(self, condition: Condition, keep: bool = False) -> Velocity:
        """The network under one condition, v(z, t), for flow.py and dmd.py. Valid until the weights change.

        keep: for several steps. The first call without gradient also gives keys and values of text and sources, and the
        next ones reuse them. A call with gradient drops them: they are part of its graph, and the graph needs the memory.
        """
        model, prefix = self.model, None
        keep = keep and model.config.causal_condition

        def call(z: Tensor, t: Tensor) -> Tensor:
            nonlocal prefix
            t = network_time(t, condition.states.dtype)  # (B,)
            with with_role(model, self.role):
                if torch.is_grad_enabled():
                    prefix = None
                if keep and prefix is None and not torch.is_grad_enabled():
                    v, prefix = model.with_prefix(z, t, condition)  # (B, 64, h, w)
                    return v
                return model(z, t, condition, prefix)  # (B, 64, h, w)

        return call


def load(args, folder: Path, dtype: torch.dtype) -> MMDiT:
    """A transformer folder on the device."""
    with raise_on_all_ranks():
        model = MMDiT.from_pretrained(folder, dtype, args.device)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # one block has many forms: with gradient, with prefix, in each role
        for block in model.transformer_blocks:
            block.forward = torch.compile(block.forward, dynamic=True)  # not the block: FSDP's part stays outside
    if args.recompute:
        recompute(model)
    return model


def recompute(model: MMDiT) -> None:
    """Let blocks keep no activations: the backward pass computes them again. That saves memory and costs time."""

    def forward(block_forward: Callable, *arguments) -> tuple:
        if not torch.is_grad_enabled():
            return block_forward(*arguments)
        role = stage_of(model).role  # another one may be on by the time of the backward pass

        def in_role(*arguments) -> tuple:
            with with_role(model, role):
                return block_forward(*arguments)

        return checkpoint(in_role, *arguments, use_reentrant=False, preserve_rng_state=False)

    for block in model.transformer_blocks:
        block.forward = partial(forward, block.forward)


def learner(args, name: str, base: Network | None) -> Network:
    """A network to train: own weights in fp32, or, with a `base`, a new LoRA on the base's weights."""
    if base is None:
        return Network(load(args, args.checkpoint / "transformer", torch.float32))
    add_role(base.model, name, new_lora(base.model, args.lora_rank, rng=generator(args.seed, 0, 0, name)))
    return Network(base.model, name)


def frozen(args, places: dict[str, Path]) -> dict[str, Network]:
    """Networks that never learn, in the working dtype: "base" and the specialised teachers by name. A teacher that is a
    LoRA file becomes a role on the base's weights."""
    dtype = getattr(torch, args.dtype)
    networks = {"base": Network(load(args, args.checkpoint / "transformer", dtype))}
    for name, place in places.items():
        if place.is_dir():
            networks[name] = Network(load(args, place, dtype))
        else:
            base = networks["base"].model
            add_role(base, name, read_lora(place, base)[0])
            networks[name] = Network(base, name)
    for model in {id(n.model): n.model for n in networks.values()}.values():
        model.requires_grad_(False).to(dtype)
        if dist.is_initialized() and not args.lora_rank:  # with LoRA every rank holds them whole
            shard(model, args)
    return networks


MOMENTS = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}  # what each optimiser remembers


class Trainee:
    """A network in training: `weights` compute in the working dtype, fp32 `masters` learn, `average` is their EMA.

    Masters are needed because bf16 has 8 bits: most updates are below 1/512 of their weight and would be rounded away.
    An fp32 network, a LoRA's factors and a rank's rows under FSDP are fp32 already; they are their own masters. Muon
    trains the matrices of the blocks (but not a LoRA's), AdamW the rest.
    """

    def __init__(self, name: str, network: Network, args, muon_lr: float, lr: float, ema: float):
        self.name, self.network, self.clip, self.ema, self.updates = name, network, args.clip, ema, 0
        self.sharded = dist.is_initialized() and network.role is None
        if self.sharded:
            shard(network.model, args)
        self.names, self.weights = (list(column) for column in zip(*network.parameters().items(), strict=True))
        self.masters = self.weights
        if not self.sharded and network.role is None and args.dtype != "float32":
            self.masters = [w.detach() for w in self.weights]  # hold the fp32 storage when the model is cast
            network.model.to(getattr(torch, args.dtype))
        self.average = [m.detach().clone() for m in self.masters] if ema else []
        matrices = muon_lr and network.role is None
        muon, rest = [], []
        for n, m in zip(self.names, self.masters, strict=True):
            (muon if matrices and m.ndim == 2 and n.startswith("transformer_blocks.") else rest).append(m)
        self.optimizers = [torch.optim.AdamW(rest, lr=lr, betas=(args.beta1, 0.999), weight_decay=0.0, fused=True)]
        if muon:
            self.optimizers.append(Muon(muon, muon_lr, getattr(torch, args.dtype)))
        self.lrs = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.contents: list[str] = []  # of the gradient, for an error: task, k and t

    def backward(self, losses: Tensor, batch: Batch) -> None:
        """Add the gradient of the mean of losses, (B,) or (), weighted by the batch's fraction of the update. Between
        micro-batches the gradient is kept in fp32."""
        with raise_on_all_ranks():
            if not losses.isfinite().all():
                finite = losses.isfinite().expand(len(batch.times)).tolist()
                bad = [t for t, ok in zip(batch.times, finite, strict=True) if not ok]
                raise FloatingPointError(f"{batch.where()}: the {self.name}'s loss is not finite at t = {bad}")
        (batch.fraction * losses.mean()).backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            if master is not weight:
                master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                weight.grad = None
        self.contents.append(f"{batch.where()}, t = {batch.times}")

    def update(self, lr_factor: float) -> float:
        """Clip the gradient, take a step at `lr_factor` times the learning rates, update the average. Returns
        the gradient's norm before clipping."""
        if not self.sharded:  # sharded ones are averaged in the backward pass
            average_over_ranks([m.grad for m in self.masters])
        norm = gathered(nn.utils.clip_grad_norm_(self.masters, self.clip, foreach=True)).item()
        if not math.isfinite(norm):  # on all ranks, for it is the norm of the mean over them
            contents = "; ".join(sum(all_gather(self.contents), []))
            raise FloatingPointError(f"the {self.name}'s gradient has norm {norm} after {contents}")
        for optimizer, full in zip(self.optimizers, self.lrs, strict=True):
            optimizer.param_groups[0]["lr"] = lr_factor * full
            optimizer.step()
            optimizer.zero_grad()
        self.updates += 1
        self.contents.clear()
        with torch.no_grad():
            self.refresh()
            if self.ema:  # at first the decay is smaller: else a short run would export mostly its initial weights
                decay = min(self.ema, (1 + self.updates) / (10 + self.updates))
                torch._foreach_lerp_(
                    list(map(local_rows, self.average)), list(map(local_rows, self.masters)), 1 - decay
                )
        return norm

    def refresh(self) -> None:
        if self.masters is not self.weights:
            torch._foreach_copy_(self.weights, self.masters)

    @contextmanager
    def averaged(self) -> Iterator[Network]:
        """Within, the network has its averaged weights. Masters and average are swapped, which takes no memory."""
        self.swap()
        try:
            yield self.network
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for average, master in zip(self.average, self.masters, strict=True) if self.ema else ():
            kept = local_rows(master).clone()
            local_rows(master).copy_(local_rows(average))
            local_rows(average).copy_(kept)
        self.refresh()

    def export(self) -> MMDiT | None:
        """The network on the CPU in bf16, a LoRA merged. Only rank 0 gets it; the others help to gather it."""
        model = self.network.model
        if self.network.role is None:
            tensors = {}
            for name, weight in zip(self.names, self.weights, strict=True):
                tensor = gathered(weight.detach())
                tensors[name] = tensor.to("cpu", torch.bfloat16) if rank() == 0 else None
        elif rank() == 0:  # no copies where they are on the CPU in bf16 already, so `merge` must not see these
            weights = model.state_dict().items()
            tensors = {n: w.to("cpu", torch.bfloat16, copy=True) for n, w in weights if ".adapters." not in n}
        if rank() > 0:
            return None
        with torch.device("meta"):
            alone = MMDiT(model.config)
        alone.load_state_dict(tensors, assign=True)
        if self.network.role is not None:
            merge(alone, role_lora(model, self.network.role))
        return alone

    def tensors(self) -> dict[str, Tensor]:
        """All that the next update depends on, by name, but for the number of updates. Not copied."""
        found = {}
        for kind, tensors in (("master", self.masters), ("average", self.average)):
            found |= {f"{kind} {n}": t for n, t in zip(self.names, tensors, strict=False)}
        for n, master in zip(self.names, self.masters, strict=True):
            for optimizer in self.optimizers:
                found |= {f"{kind} {n}": t for kind, t in optimizer.state.get(master, {}).items()}
        return found

    def state(self) -> dict[str, Tensor]:
        """A copy of these tensors on the CPU, and the number of updates; of sharded tensors this rank's rows."""
        found = {"updates": torch.tensor(self.updates)} | self.tensors()
        return {name: local_rows(t.detach()).to("cpu").contiguous() for name, t in found.items()}

    @torch.no_grad()
    def restore(self, files: list[Path], updates: int) -> None:
        """Take over the files that any number of ranks wrote from `state` after so many updates: joined, their rows are
        the whole, of which this rank takes its own. Of as many files as ranks it reads its own alone, which holds just
        these. ValueError unless names, shapes, types and the number of updates are exactly those of `state` here, and all
        values are finite."""
        alone = self.sharded and len(files) == ranks()
        files = files[rank() : rank() + 1] if alone else files
        for optimizer in self.optimizers:  # as its first step would begin
            for master in optimizer.param_groups[0]["params"]:
                optimizer.state[master] = {kind: torch.zeros_like(master) for kind in MOMENTS[type(optimizer)]}
                if isinstance(optimizer, torch.optim.AdamW):
                    optimizer.state[master]["step"] = torch.zeros((), device=master.device)
        self.updates = updates
        expected = {"updates": torch.tensor(updates)} | self.tensors()
        with ExitStack() as stack:
            opened = [stack.enter_context(open_weights(file)) for file in files]
            for path, file in zip(files, opened, strict=True):
                if wrong := set(file.keys()) ^ expected.keys():
                    which = "is missing" if min(wrong) in expected else "does not belong there"
                    raise ValueError(f"{path}: {min(wrong)!r} {which} ({len(wrong)} such tensors)")
            for name, target in expected.items():
                parts = [file.get_tensor(name) for file in opened]
                tensor = torch.cat(parts) if target.ndim and len(parts) > 1 else parts[0]
                like = local_rows(target) if alone else target
                if (tensor.shape, tensor.dtype) != (like.shape, like.dtype) or not tensor.isfinite().all():
                    raise ValueError(f"{files[0]}: {name!r} has another shape or type than here, or is not finite")
                if name == "updates" and tensor != target:
                    raise ValueError(f"{files[0]}: after {tensor} updates; {updates} are expected")
                # As FSDP2 divides: the last ranks may have fewer rows, or none.
                if local_rows(target) is not target and not alone:
                    tensor = [*tensor.chunk(ranks()), *[tensor[:0]] * ranks()][rank()]
                local_rows(target).copy_(tensor)
        self.refresh()
