"""Non-dominated points and their hypervolume, exact in any number of objectives.

Every objective is oriented so that lower is better; a point dominates another if it is nowhere
worse and somewhere better.

Legend: n points, m objectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether point a is nowhere worse than b and somewhere better."""
    pairs = list(zip(a, b, strict=True))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other one dominates; equal points are all on the front.

    Args:
        points: (n, m), lower is better.

    Returns:
        (n,) mask.
    """
    rows = _rows(points)
    if rows.shape[1] == 2 and len(rows):
        return _non_dominated_pairs(rows)
    no_worse = (rows[:, None, :] <= rows[None, :, :]).all(2)
    better = (rows[:, None, :] < rows[None, :, :]).any(2)
    return np.asarray(~(no_worse & better).any(0), dtype=np.bool_)


def _non_dominated_pairs(rows: Points) -> NDArray[np.bool_]:
    """The same for two objectives in the time of a sort."""
    values, group = np.unique(rows[:, 0], return_inverse=True)
    lowest = np.full(len(values), np.inf)
    np.minimum.at(lowest, group, rows[:, 1])
    # The lowest second objective among those whose first one is smaller.
    before = np.concatenate([[np.inf], np.minimum.accumulate(lowest)[:-1]])
    has_smaller = group > 0  # an infinite value is beaten by those before it, not by the start
    beaten = (has_smaller & (before[group] <= rows[:, 1])) | (lowest[group] < rows[:, 1])
    return np.asarray(~beaten, dtype=np.bool_)


def ranks(points: ArrayLike) -> list[int]:
    """Non-dominated rank of every point: 0 on the front, 1 on the front of the rest, …"""
    rows = _rows(points)
    found = np.full(len(rows), -1)
    rank = 0
    while (left := np.flatnonzero(found < 0)).size:
        found[left[non_dominated(rows[left])]] = rank
        rank += 1
    return [int(r) for r in found]


def hypervolume(points: ArrayLike, reference: Sequence[float]) -> float:
    """Volume that the points dominate below a reference point (While et al. 2012, WFG).

    Args:
        points: (n, m), lower is better; those that don't beat the reference in every objective
            add nothing.
        reference: (m,), the worst corner.

    Returns:
        The volume, 0 without points.
    """
    corner = np.asarray(reference, dtype=float)
    rows = np.asarray(points, dtype=float).reshape(-1, len(corner))
    inside = rows[(rows < corner).all(1)]
    return _volume(_front(inside), corner)


def _volume(front: Points, corner: Points) -> float:
    """Each point's own box, less what the points after it dominate of that box."""
    if len(corner) == 1:
        return float((corner - front.min(0)).item()) if len(front) else 0.0
    if len(corner) == 2 and len(front):
        # Sorted by the first objective the second one falls: a staircase of boxes.
        above = np.concatenate([corner[1:], front[:-1, 1]])
        return float(((corner[0] - front[:, 0]) * (above - front[:, 1])).sum())
    total = 0.0
    for index, point in enumerate(front):
        shared = _front(np.maximum(front[index + 1 :], point))
        total += float(np.prod(corner - point)) - _volume(shared, corner)
    return total


def _front(rows: Points) -> Points:
    """The non-dominated points once each; sorted, so that many boxes overlap few others."""
    if not len(rows):
        return rows
    unique: Points = np.unique(rows, axis=0)
    return unique[non_dominated(unique)]


def _rows(points: ArrayLike) -> Points:
    rows = np.asarray(points, dtype=float)
    return rows.reshape(len(rows), -1) if len(rows) else rows.reshape(0, 1)
