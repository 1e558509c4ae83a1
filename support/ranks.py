"""One process or many: the ranks, and weights that are divided among them (FSDP2)."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

SHARED = (FloatingPointError, ValueError, OSError)  # the errors that a run expects, and that all ranks raise together


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined() -> Iterator[None]:
    """Within, the processes that torchrun started are one group. A single process needs none."""
    if outermost := "RANK" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # from here on "cuda" is this process's own
        # Two hours, because ranks wait while rank 0 writes a student. Objects are sent by gloo, tensors by nccl.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    try:
        yield
    except Exception as error:
        if outermost and not isinstance(error, SHARED):
            # The others wait in an exchange that this rank will not reach. Leaving without a goodbye ends them too:
            # their next exchange fails, and torchrun stops who still waits for a GPU.
            traceback.print_exc()
            print(f"rank {rank()}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        raise
    finally:
        if outermost:
            dist.destroy_process_group()


def everyone(mine) -> list:
    """This value of every rank, on every rank."""
    values = [mine] * ranks()
    if ranks() > 1:
        dist.all_gather_object(values, mine)
    return values


@contextmanager
def together() -> Iterator[None]:
    """All ranks leave this at the same time, and an error of one (of the kinds in SHARED) is an error of all: else the
    others would wait in their next exchange, for ever, or take an update without it."""
    error = None
    try:
        yield
    except SHARED as caught:
        error = caught
    if errors := list(filter(None, everyone(error))):
        raise error or errors[0]


def by_first(work: Callable):
    """Do the work on rank 0 alone. All ranks get its result."""
    result = None
    with together():
        result = work() if rank() == 0 else None
    return everyone(result)[0]


def shard(model: nn.Module, args) -> None:
    """FSDP2: a rank keeps its rows of every tensor. A block's tensors are gathered in the working dtype while it computes.
    The kept rows have the dtype they were loaded in, fp32 for a network that learns. Gradients are averaged in fp32."""
    from torch.distributed.device_mesh import init_device_mesh  # these take seconds to import; a laptop does not wait
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # we do not write to what it returns
    how = {
        "mesh": init_device_mesh(torch.device(args.device).type, (ranks(),)),
        # The network casts its inputs itself; z and t in bf16 would be rounded too early.
        "mp_policy": MixedPrecisionPolicy(getattr(torch, args.dtype), torch.float32, cast_forward_inputs=False),
        # For the root, too. By default it keeps what it gathered, and after a forward without backward it would be stale.
        "reshard_after_forward": True,
    }
    for block in model.transformer_blocks:
        fully_shard(block, **how)
    fully_shard(model, **how)
    register_fsdp_forward_method(model, "with_prefix")


def own(tensor: Tensor) -> Tensor:
    """A sharded tensor's rows of this rank, in the same memory; any other tensor as it is."""
    if not dist.is_initialized():
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, by all ranks at once; any other as it is."""
    return tensor if own(tensor) is tensor else tensor.full_tensor()


def say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


def average_over_ranks(tensors: list[Tensor]) -> None:
    for tensor in tensors if ranks() > 1 else ():
        dist.all_reduce(tensor)
        tensor /= ranks()
