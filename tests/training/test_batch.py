"""Dealing a global batch to ranks: everything once, equal counts, equal work."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from raysched.training.batch import deal


@given(
    world_size=st.integers(1, 5),
    rows=st.integers(1, 8),
    seed=st.integers(0, 10_000),
    longest=st.integers(0, 10),
)
def test_work_differs_by_at_most_one_lane(world_size, rows, seed, longest):
    generator = torch.Generator().manual_seed(seed)
    k = torch.randint(0, longest + 1, (world_size * rows,), generator=generator)
    hands = deal(k, world_size)
    assert torch.equal(torch.cat(hands).sort().values, torch.arange(len(k)))
    assert {len(hand) for hand in hands} == {rows}
    work = [int(k[hand].sum()) for hand in hands]
    assert max(work) - min(work) <= int(k.max())


def test_one_rank_keeps_the_order():
    assert deal(torch.tensor([3, 0, 2]), 1)[0].tolist() == [0, 1, 2]
