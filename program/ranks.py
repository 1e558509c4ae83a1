"""One process or many: the ranks, and what they tell each other."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

SHARED = (FloatingPointError, ValueError, OSError)  # the expected errors, which all ranks raise together


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined() -> Iterator[None]:
    """Within, the processes that torchrun started are one group. A single process needs none."""
    outermost = "RANK" in os.environ and not dist.is_initialized()
    if outermost:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # from here on "cuda" is this process's own
        # Two hours, because ranks wait while rank 0 writes a student. Objects are sent by gloo, tensors by nccl.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    try:
        yield
    except Exception as error:
        if outermost and not isinstance(error, SHARED):
            # The others wait in an exchange that this rank will not reach. An abrupt exit ends them, too: their exchange
            # fails, and torchrun stops those that still wait for a GPU.
            traceback.print_exc()
            print(f"rank {rank()}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        raise
    finally:
        if outermost:
            dist.destroy_process_group()


def all_gather(mine) -> list:
    """The values of all ranks, in their order, on every rank."""
    values = [mine] * ranks()
    if ranks() > 1:
        dist.all_gather_object(values, mine)
    return values


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """All ranks leave this together, and a SHARED error of one is raised on all. Otherwise the others would wait for it in
    their next exchange for ever, or take an update without it."""
    error = None
    try:
        yield
    except SHARED as caught:
        error = caught
    errors = [other for other in all_gather(error) if other]
    if errors:
        raise error or errors[0]


def on_rank0(work: Callable):
    """Do the work on rank 0 alone. All ranks get its result."""
    result = None
    with raise_on_all_ranks():
        result = work() if rank() == 0 else None
    return all_gather(result)[0]


def say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


def average_over_ranks(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks."""
    if ranks() == 1:
        return
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor /= ranks()
