"""Packing: every chain gets exactly its forwards in order, in the least number of calls."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysched.diffusion.packing import pack_chains

LENGTHS = st.lists(st.integers(min_value=0, max_value=12), min_size=0, max_size=40)


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, capacity=st.integers(min_value=1, max_value=50))
def test_every_chain_runs_completely_and_in_order(lengths: list[int], capacity: int) -> None:
    packing = pack_chains(torch.tensor(lengths, dtype=torch.int64), capacity)
    seen = [0] * len(lengths)
    for begin, end in zip(packing.bounds[:-1], packing.bounds[1:], strict=True):
        assert 0 < end - begin <= capacity
        members = packing.chain[begin:end].tolist()
        assert len(set(members)) == len(members)
        for chain, position in zip(members, packing.position[begin:end].tolist(), strict=True):
            assert position == seen[chain]
            seen[chain] += 1
    assert seen == lengths


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, capacity=st.integers(min_value=1, max_value=50))
def test_no_schedule_needs_fewer_calls_and_calls_are_balanced(
    lengths: list[int], capacity: int
) -> None:
    packing = pack_chains(torch.tensor(lengths, dtype=torch.int64), capacity)
    total = sum(lengths)
    assert packing.num_calls == max(max(lengths, default=0), -(-total // capacity))
    sizes = [b - a for a, b in zip(packing.bounds[:-1], packing.bounds[1:], strict=True)]
    assert sum(sizes) == total
    if sizes:
        assert max(sizes) - min(sizes) <= 1


def test_equal_chains_within_the_capacity_stay_in_step() -> None:
    packing = pack_chains(torch.full((5,), 3), 8)
    assert packing.bounds == (0, 5, 10, 15)
    assert packing.chain.tolist() == list(range(5)) * 3
