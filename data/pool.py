"""The encoded prompts of a run, and which of them may share a micro-batch."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

ENOUGH = 8  # entries of one text length, from which on they are a class of their own


@dataclass
class Entry:
    """One encoded prompt, in bf16 on the CPU. The toy's take about 10 KB. The 7B's take about 1 MB for 100 words, and
    0.5 MB for each source of 1024 x 1024."""

    task: str
    category: str
    states: Tensor  # (L, C) of the words, without padding and without sources' slots, which the MMDiT never reads
    empty: Tensor | None  # (L0, C) of an empty prompt with the same sources, for guidance and text dropout
    slots: list[tuple[int, int]]  # [start, stop) of each source, once slots are put back into `states` or `empty`
    sources: list[Tensor]  # (64, h_i, w_i) each
    target: Tensor | None  # (64, h, w), for the flow objective
    size: tuple[int, int]  # (h, w) of what is to be drawn
    words: str = ""  # the prompt, for whoever looks at a picture

    @property
    def bucket(self) -> tuple:
        """Entries of one micro-batch have the same one: the sources' shapes and the size to draw."""
        return tuple(source.shape for source in self.sources), self.size


class Pool:
    """Entries by task and category. `Pool(a.entries + b.entries)` joins two."""

    def __init__(self, entries: list[Entry]):
        self.entries = entries
        self.places: dict[tuple[str, str], list[Entry]] = defaultdict(list)
        for entry in entries:
            self.places[entry.task, entry.category].append(entry)
        self.classes = {place: classes(members) for place, members in self.places.items()}


def classes(entries: list[Entry]) -> list[list[Entry]]:
    """One category's entries in classes that may share a micro-batch: of one bucket and, if possible, one text length.

    Padding is masked, but it moves the target: its rotary position follows the batch's longest text. A network that was
    trained there draws elsewhere when the prompt comes alone. So the texts of a class have equal length where ENOUGH
    entries have this length (always, in the toy). The others are sorted by length and grouped, ENOUGH at a time. They
    are padded to the longest, so they are a few positions off, but no micro-batch repeats the same prompt many times.
    """
    buckets: dict[tuple, dict[int, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        buckets[entry.bucket][len(entry.states)].append(entry)
    result = []
    for lengths in buckets.values():
        result += [equal for equal in lengths.values() if len(equal) >= ENOUGH]
        rare = []
        for length in sorted(lengths):
            equal = lengths[length]
            if len(equal) < ENOUGH:
                rare += equal
        groups = max(1, len(rare) // ENOUGH)  # the last one also has the rest
        cuts = [i * ENOUGH for i in range(groups)] + [len(rare)]
        result += [rare[start:stop] for start, stop in pairwise(cuts) if start < stop]
    return result
