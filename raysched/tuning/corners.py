"""The corners of a space: every range at one of its ends, every choice at one of its values."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

from raysched.config.run import RunConfig
from raysched.config.structure import Structure, value_at
from raysched.config.sweep import Dimension
from raysched.diffusion.forecast import forecast_run

Settings = dict[str, Any]
# Of larger spaces so many corners are drawn.
MAX_CORNERS = 400


def corner_structure(structure: Structure) -> Structure:
    """The space with both ends in place of every range."""
    space = {
        key: Dimension(choice=ends(dimension), when=dict(dimension.conditions) or None)
        for key, dimension in structure.space.items()
    }
    return Structure(space, structure.fixed, structure.constraints)


def ends(dimension: Dimension) -> tuple[Any, ...]:
    """Both ends of a range, or all values of a list."""
    if dimension.kind in ("choice", "grid"):
        return dimension.values
    found = (value_at(dimension, 0.0), value_at(dimension, 1.0))
    return found if found[0] != found[1] else found[:1]


def corners(structure: Structure, *, seed: int = 0) -> list[Settings]:
    """Corners that the constraints allow: all of a small space, a random draw of a large one."""
    only = corner_structure(structure)
    found = list(itertools.islice(only.every(), MAX_CORNERS + 1))
    if len(found) <= MAX_CORNERS:
        return found
    generator = random.Random(seed)  # noqa: S311 - no secret
    drawn: dict[str, Settings] = {}
    for _ in range(4 * MAX_CORNERS):
        settings = only.random(generator)
        if only.broken(settings) is None:
            drawn.setdefault(repr(settings), settings)
        if len(drawn) == MAX_CORNERS:
            break
    return list(drawn.values())


def chosen_corners(runs: Sequence[RunConfig], count: int) -> list[RunConfig]:
    """Which runs to measure: the cheapest and the dearest step of each method, and of all.

    Args:
        runs: corners that are runs, with their budget.
        count: how many at most.
    """
    price = [_fe_per_step(run) for run in runs]

    def extreme(indices: Sequence[int], best: Callable[..., int]) -> int:
        return best(indices, key=lambda i: price[i])

    everyone = range(len(runs))
    picked = [extreme(everyone, max), extreme(everyone, min)] if runs else []
    for kind in ("exposure", "sampler"):
        groups: dict[str, list[int]] = {}
        for i in everyone:
            rollout = runs[i].scheduled_sampling.sampler if runs[i].exposure != "none" else ""
            groups.setdefault(runs[i].exposure if kind == "exposure" else rollout, []).append(i)
        picked += [extreme(members, max) for members in groups.values()]
    return [runs[i] for i in list(dict.fromkeys(picked))[:count]]


def _fe_per_step(run: RunConfig) -> float:
    forecast = forecast_run(run)
    return forecast.forward_equivalents / forecast.steps
