"""Which of the encoded prompts may stand in one micro-batch."""

from dataclasses import replace

import torch

import train
from data.batches import nth_entries
from data.pool import ENOUGH


def test_rare_lengths_meet_their_neighbours(pools):
    """Of 40 prompts with a length each, a micro-batch holds neighbours, padded to the longest by a few tokens; and where
    eight have one length, these alone. Buckets never mix."""
    like = next(e for e in pools["dmd"].entries if e.task == "t2i")
    other = next(e for e in pools["dmd"].entries if e.task == "edit")
    words = [replace(like, states=torch.ones(length, 64)) for length in [*range(20, 60), *[300] * 8]]
    edits = [replace(other, category=like.category, task="t2i", states=torch.ones(30, 64))]  # another bucket
    pool = train.Pool(words + edits)
    seen = set()
    for n in range(50):
        drawn = nth_entries(pool, 0, "fake", like.task, like.category, n, size=6)
        lengths = [len(e.states) for e in drawn]
        assert len({e.bucket for e in drawn}) == 1 and max(lengths) - min(lengths) <= ENOUGH
        seen.update(map(id, drawn))
    assert seen == set(map(id, words + edits))  # each prompt is met
