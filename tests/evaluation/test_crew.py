"""Sharing an evaluation: a fair deal of the jobs, and the numbers of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from raysched.diffusion.compute import ComputeMeter
from raysched.evaluation.crew import Crew, deal_jobs
from tests.evaluation.test_evaluate import config_of, run


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_job_is_dealt_once_and_nobody_gets_much_more(size):
    costs = [5.0, 1.0, 10.0, 1.0, 3.0, 3.0, 8.0]
    hands = deal_jobs(costs, size)
    assert sorted(number for hand in hands for number in hand) == list(range(len(costs)))
    loads = [sum(costs[number] for number in hand) for hand in hands]
    assert max(loads) <= 4 / 3 * max(sum(costs) / size, max(costs))


def as_crew(size: int, work: Callable[[Crew], Any]) -> list[Any]:
    """Do the work in so many threads that exchange their parts."""
    meeting, parts = threading.Barrier(size, timeout=30.0), [None] * size

    def member(rank: int) -> Any:
        def exchange(part: Any) -> list[Any]:
            parts[rank] = part
            meeting.wait()
            found = list(parts)
            meeting.wait()
            return found

        return work(Crew(rank, size, exchange))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(member, range(size)))


@pytest.mark.parametrize("size", [2, 3])
def test_a_crew_finds_bit_for_bit_what_one_process_does(size):
    config, counts = config_of(), [ComputeMeter() for _ in range(size)]
    alone_count = ComputeMeter()
    alone = run(config=config, meter=alone_count)
    shared = as_crew(size, lambda crew: run(config=config, crew=crew, meter=counts[crew.rank]))
    for found in shared:
        assert found.metrics == alone.metrics
        assert all(torch.equal(found.samples[n], alone.samples[n]) for n in alone.samples)
        assert found.notes == alone.notes
    assert {meter.evaluation for meter in counts} == {alone_count.evaluation}


def still(*, sample, timestep, class_labels):
    return torch.zeros_like(sample)


def test_where_batches_are_cut_does_not_change_the_noise_of_a_sample():
    few, all_at_once = (run(still, config_of(batch_size=n)).samples[2] for n in (16, 40))
    assert torch.equal(few, all_at_once)
    assert len(few.flatten(1).unique(dim=0)) == 40
