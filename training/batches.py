"""Micro-batches: which samples, which noise and which times belong to which update."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import flow
from data.encode import Entry, Pool
from model import Condition
from program.ranks import rank, ranks


def generator(seed: int, step: int, number: int, purpose: str) -> torch.Generator:
    """Makes all random numbers of this file. They depend on these four alone: a resumed run and another number of
    processes get the same ones. The generator is the CPU's, so that a GPU gets the same ones, too."""
    digest = hashlib.blake2b(f"{seed}/{step}/{number}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@dataclass
class Batch:
    """A rank's samples of one task and bucket, on the device. Draws and target are fp32, conditions of the working dtype."""

    task: str
    category: str
    condition: Condition
    empty: Condition | None  # the same without words
    target: Tensor | None  # (B, 64, h, w)
    noises: Tensor  # (K, B, 64, h, w) for a student that re-noises, else (1, B, 64, h, w): where a path or walk starts
    xi: Tensor  # (B, 64, h, w): noise for x_theta
    t: Tensor  # (B,) in [0, 1]
    times: list[float]  # the same numbers, for messages: reading them from a GPU would wait for it
    k: int | None = None  # the student's step (dmd)
    fraction: float = 1.0  # of the update's samples that the micro-batch has, on all ranks together

    def where(self) -> str:
        """For errors."""
        return f"task {self.task}, k = {self.k}"


def batches(args, pool: Pool, recipe, purpose: str, update: int) -> Iterator[Batch]:
    """The micro-batches of one update, this rank's part of each. args: train.Args; recipe: recipe.Recipe, resolved.

    Each has one task, one category and one bucket, and for DMD one k. The teachers' weights depend on these, so all ranks
    run the same networks equally often. Each k and t is drawn by itself; what other draws of them are worth is measured in
    results/plane/findings.md.

    The student's updates and the fake score's (`purpose`) are counted separately. With one count for both, a ratio of 1:1
    and five fake updates for each of the student, the student would have the same task in every update. The step
    args.redraw gets other random numbers, for the same prompts. So a run goes on past a value that was not finite.
    """
    step = update // (args.fake_updates if purpose == "fake" else 1) + 1  # as the progress line and errors count
    draws = f"{purpose}, again" if step == args.redraw else purpose
    for micro, size in enumerate(args.sizes):
        task, category, n = recipe.turn(update * len(args.sizes) + micro)
        rngs = [generator(args.seed, update, micro * args.micro_batch + i, draws) for i in range(size)]
        entries = chosen(args, pool, purpose, task, category, n)[:size]
        mine = slice(rank() * size // ranks(), (rank() + 1) * size // ranks())
        length, k, wordless = max(len(e.states) for e in entries), None, False
        rng = generator(args.seed, update, micro, draws + " micro-batch")
        if args.objective == "flow":
            wordless = torch.rand((), generator=rng).item() < args.text_dropout  # all at once: one layout
        else:
            lowest = 1 if recipe.first_step_weight and args.student_steps > 1 else 0  # step 0 has a loss of its own
            k = torch.randint(lowest, args.student_steps, (), generator=rng).item()
        yield make_batch(args, entries[mine], rngs[mine], length, k, wordless, size / args.batch)


def chosen(args, pool: Pool, purpose: str, task: str, category: str, n: int) -> list[Entry]:
    """The entries of a category's n-th micro-batch (of `purpose`), args.micro_batch of them, all of one class.

    They follow from seed and n alone. In an epoch each class gives as many micro-batches as it can fill, in a shuffled
    order; what is left of it comes first in the next epoch. Within a class entries come in a shuffled order, a new one
    when all were seen. So after any number of epochs all entries were seen that often or once less. There are two
    exceptions. A class with fewer entries than a micro-batch waits for several epochs, and then comes several times at
    once. And where micro_batch does not divide the batch, the smaller micro-batch leaves some entries out.
    """
    classes, size = pool.classes[task, category], args.micro_batch
    key, entries = f"{purpose} {task} {category}", sum(map(len, classes))

    def full(epochs: int) -> list[int]:
        """The micro-batches that each class fills in so many epochs."""
        return [epochs * len(members) // size for members in classes]

    epoch = n * size // entries
    while sum(full(epoch + 1)) <= n:
        epoch += 1
    before, after = full(epoch), full(epoch + 1)
    turns = torch.tensor([c for c in range(len(classes)) for _ in range(after[c] - before[c])])
    turns = turns[torch.randperm(len(turns), generator=generator(args.seed, epoch, 0, key))].tolist()
    i = n - sum(before)  # in this epoch
    c = turns[i]
    members, first = classes[c], (before[c] + turns[:i].count(c)) * size
    found, orders = [], {}
    for place in range(first, first + size):
        round, j = divmod(place, len(members))
        if round not in orders:
            rng = generator(args.seed, round, c, f"{key} class")
            orders[round] = torch.randperm(len(members), generator=rng).tolist()
        found.append(members[orders[round][j]])
    return found


def make_batch(
    args,
    entries: list[Entry],
    rngs: list[torch.Generator],
    length: int = 0,
    k: int | None = None,
    wordless: bool = False,
    fraction: float = 1.0,
) -> Batch:
    """One micro-batch of entries of one bucket. rngs: for each entry a generator, of noises, xi and time in this order.
    Texts are padded to the longest; `length`, that of the longest on all ranks, gives the target's position."""
    device, dtype, shape, slots = args.device, getattr(torch, args.dtype), (64, *entries[0].size), entries[0].slots
    stops = args.student_steps if args.objective == "dmd" and args.sampler == "renoise" else 1
    noises = [torch.randn(stops, *shape, generator=rng) for rng in rngs]  # (K, 64, h, w) each
    noises = torch.stack(noises, dim=1).to(device)  # (K, B, 64, h, w)
    xi = torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(device)  # (B, 64, h, w)
    u = torch.stack([torch.rand((), generator=rng) for rng in rngs])  # (B,)
    shift = args.time_shift
    t = flow.logit_normal(u, math.log(shift)) if args.objective == "flow" else flow.shifted_uniform(u, shift)  # (B,)
    t = flow.network_time(t, dtype)  # (B,): the path is built at the time that the network is told
    sources = [torch.stack(column).to(device, dtype) for column in zip(*(e.sources for e in entries), strict=True)]

    def condition(states: list[Tensor]) -> Condition:
        # The micro-batch's longest text may be another rank's. Then the target still stands behind that one.
        skipped = max(0, length - max(map(len, states))) if states is words else 0
        for start, stop in slots:  # entries do not keep the states of sources' slots, nor does the network read them
            states = [torch.cat([s[:start], s.new_zeros(stop - start, s.shape[1]), s[start:]]) for s in states]
        real = pad_sequence([torch.ones(len(s), dtype=torch.bool) for s in states], batch_first=True)  # (B, L)
        padded = pad_sequence(states, batch_first=True)  # (B, L, C)
        return Condition(padded, real, sources, slots, skipped).to(device, dtype)

    words, empty = [e.states for e in entries], [e.empty for e in entries]
    told = condition(empty if wordless else words)
    return Batch(
        entries[0].task,
        entries[0].category,
        told,
        condition(empty) if empty[0] is not None else None,
        torch.stack([e.target for e in entries]).to(device).float() if entries[0].target is not None else None,
        noises,
        xi,
        t.to(device),
        t.tolist(),
        k,
        fraction,
    )
