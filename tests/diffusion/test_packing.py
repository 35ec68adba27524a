"""Packing: every chain gets exactly its forwards in order, in the least number of calls."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysched.diffusion.packing import pack_chains, stack_chains

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


@given(st.lists(st.integers(0, 6), max_size=12), st.integers(0, 8))
def test_a_stack_has_every_forward_once_and_calls_that_nest(
    lengths: list[int], least_calls: int
) -> None:
    lengths.sort(reverse=True)
    stack = stack_chains(torch.tensor(lengths, dtype=torch.int64), least_calls)
    assert stack.num_calls == max(max(lengths, default=0), least_calls)
    for call in range(stack.num_calls):
        rows = slice(stack.bounds[call], stack.bounds[call + 1])
        longer = sum(length > call for length in lengths)
        assert stack.chain[rows].tolist() == list(range(longer))
        assert stack.position[rows].tolist() == [call] * longer


def test_equal_chains_within_the_capacity_stay_in_step() -> None:
    packing = pack_chains(torch.full((5,), 3), 8)
    assert packing.bounds == (0, 5, 10, 15)
    assert packing.chain.tolist() == list(range(5)) * 3
