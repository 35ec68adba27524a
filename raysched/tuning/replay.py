"""Early stopping played over known curves: who goes on, and what compute is spent.

The rule that a sweep uses judges the curves in the order in which a cluster would show them: a
number of trials at once, whose clock is compute.

Legend: a curve is a trial's evaluations as pairs of forward equivalents and losses.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from raysched.config.sweep import EarlyStoppingConfig
from raysched.tuning.rules import make_rule

Curve = Sequence[tuple[float, tuple[float, ...]]]
NUM_REPLAYS = 40


def replay(
    curves: Mapping[int, Curve], early: EarlyStoppingConfig, budget: float, *, concurrent: int
) -> tuple[dict[int, float], list[int]]:
    """Let the rule judge.

    Args:
        curves: by number, in the order of their proposal; the last evaluation is at the budget.
        early: the rule's settings.
        budget: F.
        concurrent: trials at once.

    Returns:
        What every trial spent, and who reached the budget.
    """
    rule = None if early.kind == "none" else make_rule(early, budget)
    waiting: Iterator[int] = iter(curves)
    spent: dict[int, float] = {}
    survivors: list[int] = []
    order = itertools.count()
    # When, a tie-break, trial, index of the evaluation that is reached then.
    running: list[tuple[float, int, int, int]] = []

    def begin(now: float) -> None:
        number = next(waiting, None)
        if number is not None:
            heapq.heappush(running, (now + curves[number][0][0], next(order), number, 0))

    for _ in range(concurrent):
        begin(0.0)
    while running:
        now, _, number, index = heapq.heappop(running)
        curve = curves[number]
        fe, losses = curve[index]
        ended = index + 1 == len(curve)
        if not ended and (rule is None or not rule.stops(number, fe, losses)):
            later = now + curve[index + 1][0] - fe
            heapq.heappush(running, (later, next(order), number, index + 1))
            continue
        spent[number] = fe
        survivors += [number] if ended else []
        begin(now)
    return spent, survivors


@dataclass(frozen=True)
class Saving:
    """Share of the candidates' compute that early stopping leaves to be spent, first seed.

    Attributes:
        low: 5th percentile.
        mean: mean over the replays.
        high: 95th percentile.
        survivors: mean share of the candidates that reach the budget.
    """

    low: float
    mean: float
    high: float
    survivors: float


def expected_saving(
    early: EarlyStoppingConfig,
    *,
    num_trials: int,
    num_losses: int,
    evaluations: int,
    concurrent: int,
    seed: int = 0,
) -> Saving:
    """What a rule spends on trials of which nothing is known: their order is drawn at random.

    In half of the replays a trial keeps its place from the first evaluation to the last, in the
    other half every evaluation draws it anew: real curves lie between.

    Args:
        early: the rule's settings.
        num_trials: candidates.
        num_losses: objectives.
        evaluations: of a trial, evenly spaced, the last at the budget.
        concurrent: trials at once.
        seed: of the draws.
    """
    if early.kind == "none":
        return Saving(1.0, 1.0, 1.0, 1.0)
    generator = random.Random(seed)  # noqa: S311 - no secret
    shares, survived = [], []
    for number in range(NUM_REPLAYS):
        curves = {
            trial: _drawn(generator, num_losses, evaluations, steady=number % 2 == 0)
            for trial in range(1, num_trials + 1)
        }
        spent, survivors = replay(curves, early, 1.0, concurrent=concurrent)
        shares.append(sum(spent.values()) / num_trials)
        survived.append(len(survivors) / num_trials)
    shares.sort()
    return Saving(
        shares[NUM_REPLAYS // 20],
        sum(shares) / NUM_REPLAYS,
        shares[-1 - NUM_REPLAYS // 20],
        sum(survived) / NUM_REPLAYS,
    )


def _drawn(
    generator: random.Random, num_losses: int, evaluations: int, *, steady: bool
) -> list[tuple[float, tuple[float, ...]]]:
    def place() -> tuple[float, ...]:
        return tuple(generator.random() for _ in range(num_losses))

    first = place()
    return [
        # Evaluations come a step late of their mark, never early.
        ((i + 1) / evaluations * (1 + 1e-6), first if steady else place())
        for i in range(evaluations)
    ]
