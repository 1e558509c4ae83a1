"""The networks of a run: the frozen ones, and those that learn, with masters, average and optimisers.

Network    a model under a condition, as flow.py and dmd.py see it
Trainee    a network that learns: `backward` adds the gradient of a micro-batch, `update` takes the step and has the EMA
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoint.lora import merge, new_lora, read_lora
from checkpoint.weights import finite, open_weights
from data.batches import Batch, generator
from flow import Velocity, network_time
from model import Condition, MMDiT
from program.ranks import all_gather, average_over_ranks, raise_on_all_ranks, rank, ranks
from training.muon import Muon
from training.options import TrainOptions
from training.roles import add_role, role_lora, stage_of, with_role
from training.sharding import gathered, local_rows, shard

# ---- networks --------------------------------------------------------------------------------------------------------


class Network(NamedTuple):
    """A model and a role. Several networks can be LoRAs on the same weights: roles. None: the weights alone."""

    model: MMDiT
    role: str | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """The tensors that training changes, by name: the role's LoRA, or all weights; and those of `add_parameters`."""
        if self.role is None:
            return dict(self.model.named_parameters())
        parameters = {}
        for layer, (a, b, _) in role_lora(self.model, self.role).items():
            parameters |= {f"{layer}.A": a, f"{layer}.B": b}
        for name, parameter in self.model.named_parameters():
            if name.startswith(f"added.{self.role}."):
                parameters[name] = parameter
        return parameters

    def add_parameters(self, module: nn.Module) -> None:
        """Give the network more than the published tensors, as model.added[role or "all"]: a head, an embedding.

        They are trained, saved, resumed and sharded with it, and never exported. Add them before the Trainee is made.
        Only the caller's own code reads them.
        """
        if not hasattr(self.model, "added"):
            self.model.added = nn.ModuleDict()
        self.model.added[self.role or "all"] = module

    def velocity(self, condition: Condition, calls: float = 1) -> Velocity:
        """The network under one condition, v(z, t), for flow.py and dmd.py. Valid until the weights change.

        calls: the largest number of calls without gradient to expect; math.inf if unknown. Keys and values of text and
        sources, the prefix, are the same in all of them. The first one computes them, the others reuse them, and the last
        one frees them. A call with gradient uses none, because they would be part of its graph.
        """
        prefix, done = None, 0

        def v(z: Tensor, t: Tensor) -> Tensor:
            nonlocal prefix, done
            t = network_time(t, condition.states.dtype)  # (B,)
            done += 1
            with_gradient, last = torch.is_grad_enabled(), done >= calls
            with with_role(self.model, self.role):
                if with_gradient or prefix is None and (last or not self.model.config.causal_condition):
                    result = self.model(z, t, condition)
                elif prefix is None:
                    result, prefix = self.model.with_prefix(z, t, condition)
                else:
                    result = self.model(z, t, condition, prefix)
            if with_gradient or last:
                prefix = None  # free the memory
            return result  # (B, 64, h, w)

        return v


def load(options: TrainOptions, folder: Path, dtype: torch.dtype) -> MMDiT:
    """A transformer folder on the device."""
    with raise_on_all_ranks():
        model = MMDiT.from_pretrained(folder, dtype, options.device)
    if options.compile:
        torch._dynamo.config.recompile_limit = 64  # one block has many forms: with gradient, with prefix, in each role
        for block in model.transformer_blocks:
            block.forward = torch.compile(block.forward, dynamic=True)  # not the block: FSDP's part stays outside
    if options.recompute:
        recompute(model)
    return model


def recompute(model: MMDiT) -> None:
    """Let blocks keep no activations: the backward pass computes them again. This saves memory and costs time."""

    def forward(block_forward: Callable, *arguments) -> tuple:
        if not torch.is_grad_enabled():
            return block_forward(*arguments)
        role = stage_of(model).role  # in the backward pass another role may be on

        def in_role(*arguments) -> tuple:
            with with_role(model, role):
                return block_forward(*arguments)

        return checkpoint(in_role, *arguments, use_reentrant=False, preserve_rng_state=False)

    for block in model.transformer_blocks:
        block.forward = partial(forward, block.forward)


def learner(options: TrainOptions, name: str, base: Network | None) -> Network:
    """A network to train: its own weights in fp32, or, if there is a `base`, a new LoRA on the base's weights."""
    if base is None:
        return Network(load(options, options.checkpoint / "transformer", torch.float32))
    lora = new_lora(base.model, options.lora_rank, rng=generator(options.seed, 0, 0, name))
    add_role(base.model, name, lora)
    return Network(base.model, name)


def frozen(options: TrainOptions, places: dict[str, Path]) -> dict[str, Network]:
    """The networks that never learn, in the working dtype: "base", and the specialised teachers by name. A teacher from a
    LoRA file becomes a role on the base's weights."""
    dtype = getattr(torch, options.dtype)
    networks = {"base": Network(load(options, options.checkpoint / "transformer", dtype))}
    for name, place in places.items():
        if place.is_dir():
            networks[name] = Network(load(options, place, dtype))
        else:
            base = networks["base"].model
            add_role(base, name, read_lora(place, base)[0])
            networks[name] = Network(base, name)
    models = {id(network.model): network.model for network in networks.values()}  # each once
    for model in models.values():
        model.requires_grad_(False).to(dtype)
        if dist.is_initialized() and not options.lora_rank:  # with LoRA every rank holds them whole
            shard(model, options)
    return networks


# ---- a network that learns -------------------------------------------------------------------------------------------

MOMENTS = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}  # the state of each optimiser


@dataclass
class Record:
    """What the log says of one micro-batch."""

    task: str
    category: str
    k: int | None
    times: list[float]
    losses: Tensor  # (B,)


class Trainee:
    """A network in training: `weights` compute in the working dtype, fp32 `masters` learn, `average` is their EMA.

    Masters are needed because bf16 has 8 bits: most updates are below 1/512 of their weight and would be rounded away.
    An fp32 network, the factors of a LoRA and the rows of a rank under FSDP are fp32 already, and so are their own
    masters. Muon trains the matrices of the blocks (but not of a LoRA), AdamW the rest. `records` are the micro-batches
    since the last line of the log, `grad_norm` is that of the last update.
    """

    def __init__(self, title: str, network: Network, options: TrainOptions, muon_lr: float, lr: float, ema: float):
        self.title, self.network = title, network  # the title is for messages
        self.clip, self.ema, self.updates = options.clip, ema, 0
        self.sharded = dist.is_initialized() and network.role is None
        if self.sharded:
            shard(network.model, options)
        self.names, self.weights = (list(column) for column in zip(*network.parameters().items(), strict=True))
        self.masters = self.weights
        if not self.sharded and network.role is None and options.dtype != "float32":
            self.masters = [w.detach() for w in self.weights]  # hold the fp32 storage when the model is cast
            network.model.to(getattr(torch, options.dtype))
        self.average = [m.detach().clone() for m in self.masters] if ema else []

        by_muon, by_adamw = [], []
        for name, master in zip(self.names, self.masters, strict=True):
            matrix = master.ndim == 2 and name.startswith("transformer_blocks.")
            if matrix and muon_lr and network.role is None:
                by_muon.append(master)
            else:
                by_adamw.append(master)
        betas = (options.beta1, 0.999)
        self.optimizers = [torch.optim.AdamW(by_adamw, lr=lr, betas=betas, weight_decay=0.0, fused=True)]
        if by_muon:
            self.optimizers.append(Muon(by_muon, muon_lr, getattr(torch, options.dtype)))
        self.lrs = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.contents: list[str] = []  # of the gradient, for an error
        self.records: list[Record] = []
        self.grad_norm = math.nan

    def backward(self, losses: Tensor, batch: Batch, seen: dict[str, Tensor]) -> None:
        """Add the gradient of the mean of losses (B,), weighted by the batch's fraction of the update. Gradients are
        summed in fp32.

        FloatingPointError on all ranks: a loss is not finite on one of them. `seen`: what it was made from, (B, ...)
        each, to name in this error what is not finite.
        """
        with raise_on_all_ranks():
            if not finite(losses):
                culprits = [name for name, values in seen.items() if not finite(values)]
                because = f", because of {' and '.join(culprits)}" if culprits else ""
                raise FloatingPointError(f"{batch.where}: the {self.title}'s loss is not finite{because}")
        (batch.fraction * losses.mean()).backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            if master is not weight and weight.grad is not None:
                master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                weight.grad = None
        self.contents.append(batch.where)
        self.records.append(Record(batch.task, batch.category, batch.k, batch.times, losses.detach()))

    def update(self, lr_factor: float) -> None:
        """Clip the gradient, take a step at `lr_factor` times the learning rates, update the average."""
        if not self.sharded:  # those of sharded weights were averaged in the backward pass
            average_over_ranks([master.grad for master in self.masters if master.grad is not None])
        norm = gathered(nn.utils.clip_grad_norm_(self.masters, self.clip, foreach=True)).item()
        if not math.isfinite(norm):  # on all ranks, because it is the norm of their mean
            of_all_ranks = sum(all_gather(self.contents), [])
            raise FloatingPointError(f"the {self.title}'s gradient has norm {norm} after {'; '.join(of_all_ranks)}")
        self.grad_norm = norm  # before clipping
        for optimizer, lr in zip(self.optimizers, self.lrs, strict=True):
            optimizer.param_groups[0]["lr"] = lr_factor * lr
            optimizer.step()
        self.updates += 1
        self.clear_gradients()
        with torch.no_grad():
            self.refresh()
            if self.ema:  # the decay starts smaller: else a short run would export mostly its initial weights
                decay = min(self.ema, (1 + self.updates) / (10 + self.updates))
                average = [local_rows(tensor) for tensor in self.average]
                masters = [local_rows(tensor) for tensor in self.masters]
                torch._foreach_lerp_(average, masters, 1 - decay)

    def clear_gradients(self) -> None:
        """Drop all gradients, including what the loss of another network left here."""
        for tensor in (*self.masters, *self.weights):
            tensor.grad = None
        self.contents.clear()

    def refresh(self) -> None:
        """Copy the masters into the weights that compute, rounded to their dtype."""
        if self.masters is not self.weights:
            torch._foreach_copy_(self.weights, self.masters)

    @contextmanager
    def averaged(self) -> Iterator[Network]:
        """Within, the network has its averaged weights. Masters and average are swapped, which needs no memory."""
        self.swap()
        try:
            yield self.network
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        if not self.ema:
            return
        for average, master in zip(self.average, self.masters, strict=True):
            kept = local_rows(master).clone()
            local_rows(master).copy_(local_rows(average))
            local_rows(average).copy_(kept)
        self.refresh()

    # ---- export, save and restore ------------------------------------------------------------------------------------

    def export(self) -> MMDiT | None:
        """The network on the CPU in bf16, a LoRA merged. Only rank 0 gets it; the others help to gather it."""
        model = self.network.model
        tensors = {}
        if self.network.role is None:
            for name, weight in zip(self.names, self.weights, strict=True):
                tensor = gathered(weight.detach())
                tensors[name] = tensor.to("cpu", torch.bfloat16) if rank() == 0 else None
        elif rank() == 0:  # always copies, because `merge` will change them
            for name, tensor in model.state_dict().items():
                tensors[name] = tensor.to("cpu", torch.bfloat16, copy=True)
        if rank() > 0:
            return None
        with torch.device("meta"):
            alone = MMDiT(model.config)
        published = alone.state_dict().keys()  # neither LoRAs nor added parameters
        alone.load_state_dict({name: tensors[name] for name in published}, assign=True)
        if self.network.role is not None:
            merge(alone, [("the LoRA", role_lora(model, self.network.role), 1.0)])
        return alone

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that the next update depends on, by name. Not copied."""
        tensors = {"updates": torch.tensor(self.updates)}
        for name, master in zip(self.names, self.masters, strict=True):
            tensors[f"master {name}"] = master
            for optimizer in self.optimizers:
                for moment, tensor in optimizer.state.get(master, {}).items():
                    tensors[f"{moment} {name}"] = tensor
        if self.ema:
            for name, average in zip(self.names, self.average, strict=True):
                tensors[f"average {name}"] = average
        return tensors

    def state(self) -> dict[str, Tensor]:
        """A copy of these tensors on the CPU; of sharded ones this rank's rows."""
        return {name: local_rows(t.detach()).to("cpu").contiguous() for name, t in self.tensors().items()}

    @torch.no_grad()
    def restore(self, files: list[Path], updates: int) -> None:
        """Take over what any number of ranks wrote from `state` after so many updates.

        Joined, the rows in the files make whole tensors, of which this rank takes its rows. If there are as many files as
        ranks, this rank's own file has just these. ValueError unless names, shapes, types and the number of updates are
        exactly those of `state`, and all values are finite.
        """
        own_file = self.sharded and len(files) == ranks()
        if own_file:
            files = [files[rank()]]
        self.init_moments()
        self.updates = updates
        expected = self.tensors()
        with ExitStack() as stack:
            opened = [stack.enter_context(open_weights(file)) for file in files]
            for path, file in zip(files, opened, strict=True):
                wrong = set(file.keys()) ^ expected.keys()
                if wrong:
                    which = "is missing" if min(wrong) in expected else "does not belong there"
                    raise ValueError(f"{path}: {min(wrong)!r} {which} ({len(wrong)} such tensors)")
            for name, target in expected.items():
                rows = [file.get_tensor(name) for file in opened]
                tensor = torch.cat(rows) if target.ndim and len(rows) > 1 else rows[0]
                like = local_rows(target) if own_file else target
                if (tensor.shape, tensor.dtype) != (like.shape, like.dtype) or not finite(tensor):
                    raise ValueError(f"{files[0]}: {name!r} has another shape or type than here, or is not finite")
                if name == "updates" and tensor != target:
                    raise ValueError(f"{files[0]}: after {tensor} updates; {updates} are expected")
                is_sharded = local_rows(target) is not target
                if is_sharded and not own_file:  # as FSDP2 divides: the last ranks may have fewer rows, or none
                    chunks = tensor.chunk(ranks())
                    tensor = chunks[rank()] if rank() < len(chunks) else tensor[:0]
                local_rows(target).copy_(tensor)
        self.refresh()

    def init_moments(self) -> None:
        """The state of the optimisers as their first step makes it."""
        for optimizer in self.optimizers:
            for master in optimizer.param_groups[0]["params"]:
                optimizer.state[master] = {kind: torch.zeros_like(master) for kind in MOMENTS[type(optimizer)]}
                if isinstance(optimizer, torch.optim.AdamW):
                    optimizer.state[master]["step"] = torch.zeros((), device=master.device)
