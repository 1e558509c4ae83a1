"""Weights that are divided among the ranks (FSDP2)."""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from program.ranks import ranks
from training.options import TrainOptions


def shard(model: nn.Module, options: TrainOptions) -> None:
    """FSDP2: a rank keeps its rows of every tensor. A block's tensors are gathered in the working dtype while it computes.
    The kept rows have the dtype they were loaded in, fp32 for a network that learns. Gradients are averaged in fp32."""
    from torch.distributed.device_mesh import init_device_mesh  # these take seconds to import; a laptop does not wait
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # we do not write to what it returns
    how = {
        "mesh": init_device_mesh(torch.device(options.device).type, (ranks(),)),
        # The network casts its inputs itself; z and t in bf16 would be rounded too early.
        "mp_policy": MixedPrecisionPolicy(getattr(torch, options.dtype), torch.float32, cast_forward_inputs=False),
        # For the root, too. By default it keeps what it gathered, and after a forward without backward it would be stale.
        "reshard_after_forward": True,
    }
    for block in model.transformer_blocks:
        fully_shard(block, **how)
    fully_shard(model, **how)
    register_fsdp_forward_method(model, "with_prefix")


def local_rows(tensor: Tensor) -> Tensor:
    """A sharded tensor's rows of this rank, in the same memory; any other tensor as it is."""
    if not dist.is_initialized():
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, by all ranks at once; any other as it is."""
    return tensor if local_rows(tensor) is tensor else tensor.full_tensor()
