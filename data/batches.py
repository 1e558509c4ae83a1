"""Micro-batches: which entries of the pool come when, and their tensors. train.py has the draws that go with them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data.pool import Entry, Pool
from model import Condition


def generator(seed: int, update: int, number: int, purpose: str) -> torch.Generator:
    """A generator whose numbers depend on these four alone, so a resumed run or another number of processes gets the
    same ones. It is the CPU's, so that a GPU gets the same ones, too."""
    digest = hashlib.blake2b(f"{seed}/{update}/{number}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@dataclass
class Batch:
    """A rank's part of a micro-batch: B samples of one task and layout, on the device.

    Draws and target are fp32. The conditions have the working dtype.
    """

    task: str
    category: str
    fraction: float  # of the update's samples that are in this micro-batch, over all ranks
    condition: Condition
    empty: Condition | None  # the same sources without words
    target: Tensor | None  # (B, 64, h, w), for the flow objective
    k: int | None  # the student's step; None with the flow objective
    noises: Tensor  # (K, B, 64, h, w) for a student that re-noises; else (1, B, 64, h, w), the start of a path or walk
    xi: Tensor  # (B, 64, h, w): noise for x_theta
    t: Tensor  # (B,) in [0, 1]
    times: list[float]  # the same numbers, for messages: reading them from a GPU would wait for it
    fresh: Callable[[str, tuple[int, ...]], Tensor]  # fresh(name, shape) -> (B, *shape): more noise, for experiments

    @property
    def where(self) -> str:
        """Names the batch in errors."""
        return f"task {self.task}, k = {self.k}, t = {self.times}"


def nth_entries(pool: Pool, seed: int, purpose: str, task: str, category: str, n: int, size: int) -> list[Entry]:
    """The entries of a category's n-th micro-batch (of `purpose`), `size` of them, all of one class (data/pool.py).

    They depend on seed and n alone. In an epoch each class gives as many micro-batches as it can fill, in a shuffled
    order. Its remaining entries come first in the next epoch. Within a class, entries are shuffled, and shuffled anew
    when all were used. So after any number of epochs all entries were used equally often, or once less. One
    exception: a class with fewer entries than a micro-batch waits for several epochs, and then each entry comes
    several times at once.

    Example: classes of 5 and 3 entries, micro-batches of 2. Epoch 0 has 2 + 1 micro-batches, n = 0 to 2, and leaves one
    entry of each class. Epoch 1 begins with these and has 3 + 2, n = 3 to 7: all entries were then used twice.
    """
    classes = pool.classes[task, category]
    entries = sum(len(members) for members in classes)
    key = f"{purpose} {task} {category}"

    def filled(epochs: int) -> list[int]:
        """How many micro-batches each class fills in this many epochs."""
        return [epochs * len(members) // size for members in classes]

    epoch = n * size // entries  # a lower bound: where sizes do not divide, an epoch fills fewer
    while sum(filled(epoch + 1)) <= n:
        epoch += 1
    before, after = filled(epoch), filled(epoch + 1)
    turns = torch.tensor([c for c in range(len(classes)) for _ in range(after[c] - before[c])])
    order = torch.randperm(len(turns), generator=generator(seed, epoch, 0, key))
    turns = turns[order].tolist()  # the class of each micro-batch of this epoch
    place = n - sum(before)  # of this micro-batch in its epoch
    class_number = turns[place]

    members = classes[class_number]
    used = (before[class_number] + turns[:place].count(class_number)) * size  # entries of this class that came before
    chosen, orders = [], {}
    for position in range(used, used + size):
        shuffle, i = divmod(position, len(members))
        if shuffle not in orders:  # all were used: a new order
            rng = generator(seed, shuffle, class_number, f"{key} class")
            orders[shuffle] = torch.randperm(len(members), generator=rng).tolist()
        chosen.append(members[orders[shuffle][i]])
    return chosen


def condition_of(
    entries: list[Entry], device: str, dtype: torch.dtype, empty: bool = False, length: int = 0
) -> Condition:
    """The condition of B entries of one layout. empty: without their words.

    Texts are padded to the longest, and at least to `length`. The target's position follows the longest text, which
    may be another rank's.
    """
    texts = [entry.empty if empty else entry.states for entry in entries]  # (L_i, C) each
    slots = entries[0].slots
    for start, stop in slots:  # entries have no states of sources' slots, because the network never reads them
        zeros = texts[0].new_zeros(stop - start, texts[0].shape[1])
        texts = [torch.cat([text[:start], zeros, text[start:]]) for text in texts]
        length += stop - start
    length = max(length, *(len(text) for text in texts))
    states = torch.stack([F.pad(text, (0, 0, 0, length - len(text))) for text in texts])  # (B, L, C)
    mask = torch.stack([torch.arange(length) < len(text) for text in texts])  # (B, L)
    columns = zip(*(entry.sources for entry in entries), strict=True)
    sources = [torch.stack(column) for column in columns]  # (B, 64, h_i, w_i) each
    return Condition(states, mask, sources, slots).to(device, dtype)
