"""The encoded prompts of a run, and which of them may stand in one micro-batch."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

ENOUGH = 8  # entries that are worth a class of their own


@dataclass
class Entry:
    """One encoded prompt, in bf16 on the CPU. The toy's take about 10 KB, the 7B's 1 MB for each 100 words, half of that
    for each source of 1024 x 1024."""

    task: str
    category: str
    states: Tensor  # (L, C) of the words: no padding, and none of the sources' slots, which the MMDiT never reads
    empty: Tensor | None  # (L0, C) of an empty prompt with the same sources, for guidance and text dropout
    slots: list[tuple[int, int]]  # where the sources stand, once they are put back among states, and empty too
    sources: list[Tensor]  # (64, h_i, w_i) each
    target: Tensor | None  # (64, h, w), for the flow objective
    size: tuple[int, int]  # (h, w) of what is to be drawn
    words: str = ""  # the prompt, for whoever looks at a picture

    @property
    def bucket(self) -> tuple:
        return tuple(s.shape for s in self.sources), self.size


class Pool:
    """Entries by task and category. `Pool(a.entries + b.entries)` joins two."""

    def __init__(self, entries: list[Entry]):
        self.entries = entries
        self.places: dict[tuple[str, str], list[Entry]] = defaultdict(list)
        for entry in entries:
            self.places[entry.task, entry.category].append(entry)
        self.classes = {place: classes(found) for place, found in self.places.items()}


def classes(entries: list[Entry]) -> list[list[Entry]]:
    """One category's entries, divided into those that may come in one micro-batch: of one bucket and one text length.

    Padding is masked, but it counts: the target's rotary position is behind the batch's longest text, and a network
    trained there is asked to draw elsewhere when the prompt comes alone. So the texts of a class are equally long where
    ENOUGH entries have this length (always, in the toy). The others are put together by length, ENOUGH at a time, and
    padded to the longest: a few positions off, but no micro-batch has the same prompt many times.
    """
    buckets: dict[tuple, dict[int, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        buckets[entry.bucket][len(entry.states)].append(entry)
    found = []
    for lengths in buckets.values():
        found += [equal for equal in lengths.values() if len(equal) >= ENOUGH]
        rare = [entry for length in sorted(lengths) if len(lengths[length]) < ENOUGH for entry in lengths[length]]
        parts = max(1, len(rare) // ENOUGH)  # the last one has the rest, too
        cuts = [i * ENOUGH for i in range(parts)] + [len(rare)]
        found += [rare[start:stop] for start, stop in pairwise(cuts) if start < stop]
    return found
