"""Several processes that make one evaluation together: who does which job, and the exchange.

Every process knows all jobs and does its own; afterwards everybody has all results, in the jobs'
order. A job's result depends on nothing but the job, so that one process and many find the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Job(Generic[T]):
    """A piece of work.

    Attributes:
        cost: how long it takes, in any unit that all jobs of a list share.
        work: does it.
    """

    cost: float
    work: Callable[[], T]


def _alone(part: Any) -> list[Any]:
    return [part]


@dataclass(frozen=True)
class Crew:
    """The processes of an evaluation, as one of them sees them.

    Attributes:
        rank: this process's number.
        size: how many there are.
        exchange: hands this process's part to the others and returns the parts of all, by rank;
            a collective.
    """

    rank: int = 0
    size: int = 1
    exchange: Callable[[Any], list[Any]] = _alone

    def do(self, jobs: Sequence[Job[T]]) -> list[T]:
        """Results of all jobs, in their order; every process must call it with the same jobs."""
        mine = deal_jobs([job.cost for job in jobs], self.size)[self.rank]
        parts = self.exchange({number: jobs[number].work() for number in mine})
        found = {number: result for part in parts for number, result in part.items()}
        return [found[number] for number in range(len(jobs))]


ALONE = Crew()


def deal_jobs(costs: Sequence[float], size: int) -> list[list[int]]:
    """Deal jobs so that the last process ends early: the dearest left to who has least to do.

    (Graham 1969: at most a third longer than the best deal.)

    Args:
        costs: of each job.
        size: number of processes.

    Returns:
        For each process the numbers of its jobs, rising.
    """
    load = [0.0] * size
    hands: list[list[int]] = [[] for _ in range(size)]
    for number in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = min(range(size), key=lambda process: (load[process], process))
        hands[least].append(number)
        load[least] += costs[number]
    return [sorted(hand) for hand in hands]
