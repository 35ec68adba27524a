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

# Evaluations are a step late of their mark, never early; this is rounding only.
ROUNDING = 1e-9


@dataclass(frozen=True)
class _Named:
    """A trial under a name that outlives Ray's: rules are refilled when a sweep is resumed."""

    trial_id: str


class Rule(Protocol):
    """Judges trials by their evaluations."""

    def stops(self, number: int, spent: float, values: tuple[float, ...]) -> bool:
        """Take up an evaluation; whether the trial shall end. Values: lower is better."""

    def take_up(self, number: int, spent: float, values: tuple[float, ...]) -> None:
        """Take up an evaluation of an earlier session, in which the trial was judged."""


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

    def take_up(self, number: int, spent: float, values: tuple[float, ...]) -> None:
        """See `Rule`: it enters the rungs that it had entered."""
        self.stops(number, spent, values)

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

    It compares what is known of all trials at the same compute. Evaluations come up to a step late
    of their mark, and steps differ in cost, so the mark is what counts.

    Args:
        config: grace period, fewest trials to compare with.
        budget: F.
        interval: forward equivalents between the marks of evaluations; None: they are not late.
    """

    def __init__(
        self, config: EarlyStoppingConfig, budget: float, interval: float | None = None
    ) -> None:
        self._interval = interval
        self._ray = MedianStoppingRule(
            time_attr=FORWARD_EQUIVALENTS,
            metric=OBJECTIVE,
            mode="min",
            # Less what rounding may take off a mark.
            grace_period=config.grace_fraction * budget * (1 - ROUNDING),
            min_samples_required=config.min_trials,
            # Never pause: a trial is a process that trains.
            min_time_slice=math.inf,
        )
        self._stopped: set[int] = set()

    def stops(self, number: int, spent: float, values: tuple[float, ...]) -> bool:
        """See `Rule`."""
        if number in self._stopped:
            return False
        stops = _asked(self._ray, number, self._mark(spent), values)
        if stops:
            self._stopped.add(number)
        return stops

    def take_up(self, number: int, spent: float, values: tuple[float, ...]) -> None:
        """See `Rule`: others may be compared with it, and it is not judged by who came later."""
        self._ray._results[_Named(f"{number}")].append(_result(self._mark(spent), values))

    def _mark(self, spent: float) -> float:
        """Where the evaluation fell due."""
        if self._interval is None:
            return spent
        return math.floor(spent / self._interval + ROUNDING) * self._interval


def _asked(rule: Any, number: int, spent: float, values: tuple[float, ...]) -> bool:
    decision = rule.on_trial_result(None, _Named(f"{number}"), _result(spent, values))
    return bool(decision == TrialScheduler.STOP)


def _result(spent: float, values: tuple[float, ...]) -> dict[str, float]:
    (value,) = values
    return {FORWARD_EQUIVALENTS: spent, OBJECTIVE: value}


def make_rule(
    config: EarlyStoppingConfig, budget: float, *, interval: float | None = None
) -> Rule:
    """The rule that a sweep asks for.

    Args:
        config: its kind and settings.
        budget: F.
        interval: forward equivalents between the marks of evaluations; None: they are not late.
    """
    if config.kind == "median":
        return Median(config, budget, interval)
    if config.kind == "mo_asha":
        grace = config.grace_fraction * budget
        return ParetoHalving(grace=grace, budget=budget, factor=config.reduction_factor)
    return Halving(config, budget, brackets=config.brackets if config.kind == "hyperband" else 1)
