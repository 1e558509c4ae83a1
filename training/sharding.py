"""Weights that are sharded: divided among the ranks (FSDP2)."""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from program.ranks import ranks
from training.options import TrainOptions


def shard(model: nn.Module, options: TrainOptions) -> None:
    """Let this rank keep only its rows of every tensor, in the dtype they were loaded in: fp32 for a network that learns.
    A block's tensors are gathered in the working dtype while it computes. Gradients are averaged in fp32."""
    from torch.distributed.device_mesh import init_device_mesh  # these take seconds to import; a laptop does not wait
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # we do not write to what it returns
    mesh = init_device_mesh(torch.device(options.device).type, (ranks(),))
    # The network casts its inputs itself; z and t in bf16 would be rounded too early.
    precision = MixedPrecisionPolicy(getattr(torch, options.dtype), torch.float32, cast_forward_inputs=False)
    # The blocks, then the rest. By default the rest stays gathered, and would be stale after a forward without backward.
    for module in (*model.transformer_blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    register_fsdp_forward_method(model, "with_prefix")


def local_rows(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, in the same memory; any other tensor as it is."""
    if not dist.is_initialized():
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; all ranks must call this together. Any other tensor as it is."""
    return tensor if local_rows(tensor) is tensor else tensor.full_tensor()
