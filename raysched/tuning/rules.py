"""When a trial is not worth more compute: Ray's rules by name, on forward equivalents.

Ray's synchronous HyperBand pauses trials until their bracket is full, which our trials, processes
of their own, can't; `hyperband` is therefore asynchronous halving in several brackets, of which
the first is the strictest. A trial's bracket follows from its number, so that a resumed sweep puts
it in the same one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from raysched.config.sweep import EarlyStoppingConfig
from raysched.tuning.mo_asha import ParetoHalving
from raysched.tuning.records import FORWARD_EQUIVALENTS, OBJECTIVE


@dataclass(frozen=True)
class _Named:
    """A trial under a name that outlives Ray's: rules are refilled when a sweep is resumed."""

    trial_id: str


class Rule(Protocol):
    """Judges trials by their evaluations."""

    def stops(self, number: int, spent: float, values: tuple[float, ...]) -> bool:
        """Take up an evaluation; whether the trial shall end. Values: lower is better."""


class Halving:
    """ASHA (Li et al. 2018, arXiv 1810.05934), in one bracket or several (Hyperband).

    Args:
        config: grace period, factor, brackets.
        budget: F.
        brackets: how many; bracket s begins s rungs later, one without rungs stops nobody.
    """

    def __init__(self, config: EarlyStoppingConfig, budget: float, *, brackets: int) -> None:
        self._ray = AsyncHyperBandScheduler(
            time_attr=FORWARD_EQUIVALENTS,
            metric=OBJECTIVE,
            mode="min",
            max_t=budget,
            grace_period=config.grace_fraction * budget,
            reduction_factor=config.reduction_factor,
            brackets=brackets,
            stop_last_trials=False,
        )

    def stops(self, number: int, spent: float, values: tuple[float, ...]) -> bool:
        """See `Rule`."""
        self._enter(number)
        return _asked(self._ray, number, spent, values)

    def bracket_of(self, number: int) -> int:
        """The bracket of a trial: Ray's shares, drawn by the trial's number."""
        sizes = np.array([len(bracket._rungs) for bracket in self._ray._brackets], dtype=float)
        shares = np.exp(sizes - sizes.max())
        drawn = np.random.default_rng([7919, number]).choice(len(sizes), p=shares / shares.sum())
        return int(drawn)

    def _enter(self, number: int) -> None:
        info: dict[str, Any] = self._ray._trial_info
        if f"{number}" not in info:
            info[f"{number}"] = self._ray._brackets[self.bracket_of(number)]


class Median:
    """The median rule (Golovin et al. 2017): worse at best than the others' median average.

    Args:
        config: grace period, fewest trials to compare with.
        budget: F.
    """

    def __init__(self, config: EarlyStoppingConfig, budget: float) -> None:
        self._ray = MedianStoppingRule(
            time_attr=FORWARD_EQUIVALENTS,
            metric=OBJECTIVE,
            mode="min",
            grace_period=config.grace_fraction * budget,
            min_samples_required=config.min_trials,
            # Never pause: a trial is a process that trains.
            min_time_slice=math.inf,
        )
        self._stopped: set[int] = set()

    def stops(self, number: int, spent: float, values: tuple[float, ...]) -> bool:
        """See `Rule`."""
        if number in self._stopped:
            return False
        stops = _asked(self._ray, number, spent, values)
        if stops:
            self._stopped.add(number)
        return stops


def _asked(rule: Any, number: int, spent: float, values: tuple[float, ...]) -> bool:
    (value,) = values
    result = {FORWARD_EQUIVALENTS: spent, OBJECTIVE: value}
    return bool(rule.on_trial_result(None, _Named(f"{number}"), result) == TrialScheduler.STOP)


def make_rule(config: EarlyStoppingConfig, budget: float) -> Rule:
    """The rule that a sweep asks for."""
    if config.kind == "median":
        return Median(config, budget)
    if config.kind == "mo_asha":
        grace = config.grace_fraction * budget
        return ParetoHalving(grace=grace, budget=budget, factor=config.reduction_factor)
    return Halving(config, budget, brackets=config.brackets if config.kind == "hyperband" else 1)
