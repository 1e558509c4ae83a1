"""Which entries of the pool come when, in micro-batches of one shape."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from training_runs import job_of, recipe_for, run_options

import train
from data.batches import nth_entries
from data.pool import ENOUGH
from model import Condition, MMDiT
from training.run import fill_defaults


def test_micro_batches_are_not_padded_where_lengths_are_common(checkpoint, pools, tmp_path):
    """Padding would count in the target's rotary position: in a micro-batch each sample is as it would be alone."""
    args = fill_defaults(run_options(checkpoint, tmp_path, "flow", batch=64, micro_batch=4, text_dropout=0.5))
    recipe = recipe_for(pools["flow"])
    model, lengths = MMDiT.from_pretrained(checkpoint / "transformer"), set()
    pool = train.Pool(pools["flow"].entries * ENOUGH)
    for batch in train.draw_batches(job_of(args, pool, recipe), "teacher", 0):
        c = batch.condition
        lengths.add((batch.task, c.states.shape[1]))
        alone = Condition(c.states[1:2], c.mask[1:2], [s[1:2] for s in c.sources], c.slots)
        assert c.mask.all()
        assert all(c.states[:, a:b].abs().sum(2).all() for a, b, grid in c.pieces if grid is None)
        with torch.no_grad():
            v, one = model(batch.noises[0], batch.t, c), model(batch.noises[0, 1:2], batch.t[1:2], alone)
        torch.testing.assert_close(v[1:2], one, rtol=1e-4, atol=1e-5)
    assert len(lengths) > 4


@pytest.mark.parametrize("lengths, size", [((10,) * 50, 6), ((10,) * 50, 50), ((3,) * 5, 8), ((7,), 3)])
def test_prompts_of_one_class_are_seen_equally_often_at_any_time(pools, lengths, size):
    like = next(e for e in pools["dmd"].entries if e.task == "t2i")
    pool = train.Pool([replace(like, states=torch.ones(length, 4)) for length in lengths])
    counts = Counter({id(e): 0 for e in pool.entries})
    orders = []
    for n in range(60):
        orders.append([id(e) for e in nth_entries(pool, 3, "student", like.task, like.category, n, size)])
        counts.update(orders[-1])
        assert max(counts.values()) - min(counts.values()) <= 1 and sum(counts.values()) == (n + 1) * size
    if size == 50:  # whole epochs, each in another order
        assert len(set(map(tuple, orders))) == 60
    for seed, purpose in ((4, "student"), (3, "fake")):  # another seed, another network
        again = [
            [id(e) for e in nth_entries(pool, seed, purpose, like.task, like.category, n, size)] for n in range(60)
        ]
        assert len(lengths) == 1 or again != orders


def test_after_any_number_of_epochs_counts_differ_by_at_most_one(pools):
    """Over several lengths and buckets; a class that is smaller than a micro-batch comes as often in the long run."""
    like = next(e for e in pools["dmd"].entries if e.task == "t2i")
    sizes = {10: 23, 12: 8, 15: 40}
    entries = [replace(like, states=torch.ones(length, 4)) for length, n in sizes.items() for _ in range(n)]
    entries += [replace(like, states=torch.ones(5, 4), size=(2, 8)) for _ in range(9)]
    rare = [replace(like, states=torch.ones(5, 4), size=(8, 2)) for _ in range(2)]
    pool, size = train.Pool(entries + rare), 6
    counts, n = Counter(), 0
    for epoch in range(1, 40):
        for _ in range(
            sum(epoch * len(c) // size - (epoch - 1) * len(c) // size for c in pool.classes["t2i", like.category])
        ):
            batch = nth_entries(pool, 1, "fake", "t2i", like.category, n, size)
            assert len({(e.bucket, len(e.states)) for e in batch}) == 1
            counts.update(map(id, batch))
            n += 1
        assert {counts[id(e)] for e in entries} <= {epoch - 1, epoch}
        assert all(epoch - 3 <= counts[id(e)] <= epoch for e in rare)


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
