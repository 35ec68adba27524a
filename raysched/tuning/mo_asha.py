"""Successive halving with several objectives (MO-ASHA, Schmucker et al. 2021, arXiv 2106.12639).

At a rung, everyone who has reached it is ranked: first by non-dominated fronts, then, within a
front, by an epsilon-net, which takes the point that is farthest from those taken so far, so that
the front is covered rather than one end of it. Who is not in the best 1/factor when it arrives is
stopped. All objectives are oriented so that lower is better.

Legend: n trials at a rung, m objectives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from raysched.tuning.pareto import non_dominated, ranks


class ParetoHalving:
    """The rungs of asynchronous halving on non-dominated rank.

    Args:
        grace: forward equivalents of the first rung.
        budget: F; there is no rung at the budget itself.
        factor: the best 1/factor of a rung go on, rounded up.
    """

    def __init__(self, *, grace: float, budget: float, factor: float) -> None:
        self._factor = factor
        self._rungs: list[tuple[float, dict[int, tuple[float, ...]]]] = []
        milestone = grace
        while milestone < budget * (1 - 1e-9):
            self._rungs.append((milestone, {}))
            milestone *= factor

    @property
    def milestones(self) -> list[float]:
        """Forward equivalents of the rungs."""
        return [milestone for milestone, _ in self._rungs]

    def stops(self, number: int, spent: float, values: Sequence[float]) -> bool:
        """Enter a trial at the highest rung that it has reached, once, and judge it there.

        Args:
            number: the trial.
            spent: its forward equivalents.
            values: (m,) its objectives there, all finite.
        """
        reached = [entered for milestone, entered in self._rungs if spent >= milestone]
        if not reached or number in reached[-1]:
            return False
        entered = reached[-1]
        entered[number] = tuple(values)
        return place_of_last(list(entered.values())) >= math.ceil(len(entered) / self._factor)

    def take_up(self, number: int, spent: float, values: Sequence[float]) -> None:
        """Enter a trial of an earlier session, in which it was judged."""
        self.stops(number, spent, values)


def place_of_last(points: Sequence[Sequence[float]]) -> int:
    """Where the last point stands in `best_first`, without the order of what is behind it."""
    rows = np.asarray(points, dtype=float)
    left, ahead = np.arange(len(rows)), 0
    while True:
        on_front = non_dominated(rows[left])
        if on_front[-1]:
            members = left[on_front]
            return ahead + epsilon_net(rows[members]).index(len(members) - 1)
        ahead += int(on_front.sum())
        left = left[~on_front]


def best_first(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points by front, and within a front by the epsilon-net.

    Args:
        points: n times (m,), lower is better.
    """
    rows = np.asarray(points, dtype=float)
    fronts = np.asarray(ranks(rows))
    order: list[int] = []
    for front in range(int(fronts.max()) + 1):
        members = np.flatnonzero(fronts == front)
        order += [int(members[i]) for i in epsilon_net(rows[members])]
    return order


def epsilon_net(rows: np.ndarray) -> list[int]:
    """The order in which a front is covered: best balanced first, then always the farthest.

    Args:
        rows: (n, m); every objective is scaled to its range on this front.

    Returns:
        Indices; of equal ones the earlier comes first.
    """
    low, high = rows.min(0), rows.max(0)
    scaled = (rows - low) / np.where(high > low, high - low, 1.0)
    order = [int((scaled**2).sum(1).argmin())]
    distance = ((scaled - scaled[order[0]]) ** 2).sum(1)
    distance[order[0]] = -1.0
    while len(order) < len(rows):
        farthest = int(distance.argmax())
        order.append(farthest)
        distance = np.minimum(distance, ((scaled - scaled[farthest]) ** 2).sum(1))
        distance[order] = -1.0
    return order
