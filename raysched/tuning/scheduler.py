"""Successive halving on compute (ASHA, Li et al. 2018, arXiv 1810.05934) that kills no trial.

Ray's scheduler decides; its STOP becomes a request in the trial's folder, after which the loop
saves a checkpoint and ends itself. So nothing is lost, and the workers' placement group is freed
by the trainer that made it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from raysched.config.sweep import EarlyStoppingConfig
from raysched.tuning.records import FORWARD_EQUIVALENTS, OBJECTIVE, TrialRecord


@dataclass(frozen=True)
class _Named:
    """A trial under a name that outlives Ray's: rungs are refilled when a sweep is resumed."""

    trial_id: str


class ComputeHalving(AsyncHyperBandScheduler):  # type: ignore[misc]
    """Halving whose time axis is forward equivalents.

    The baseline is neither stopped nor a competitor at the rungs; the rung at the budget itself
    decides nothing.

    Args:
        config: grace period and factor.
        budget: F, forward equivalents of every trial.
        prune: called with the trial's number, the run folder of its last report and the reason.
    """

    def __init__(
        self,
        config: EarlyStoppingConfig,
        *,
        budget: float,
        prune: Callable[[int, str, str], None],
    ) -> None:
        super().__init__(
            time_attr=FORWARD_EQUIVALENTS,
            metric=OBJECTIVE,
            mode="min",
            max_t=budget,
            grace_period=config.grace_fraction * budget,
            reduction_factor=config.reduction_factor,
            stop_last_trials=False,
        )
        self._config = config
        self._budget = budget
        self._prune = prune
        self._pruned: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles what it was given; its snapshots are never read, the journal is.
        return {}

    def replay(self, records: Iterable[TrialRecord]) -> None:
        """Refill the rungs with the evaluations of an earlier session."""
        for record in records:
            if record.baseline:
                continue
            self._add(record.number)
            if record.status == "pruned":
                self._pruned.add(record.number)
            for point in record.curve:
                self._decide(record.number, point.forward_equivalents, point.q)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Enter a trial under its number."""
        self._add(trial.config["trial_number"])

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Let the trial go on; if its rung says stop, ask its loop to end."""
        number = trial.config["trial_number"]
        if trial.config["baseline"] or result.get("ended") or number in self._pruned:
            return str(TrialScheduler.CONTINUE)
        spent, q = result.get(FORWARD_EQUIVALENTS), result.get(OBJECTIVE)
        if spent is not None and q is not None and self._decide(number, spent, q):
            self._pruned.add(number)
            self._prune(number, str(result.get("run_dir", "")), self._reason(spent, q))
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(
        self, tune_controller: Any, trial: Any, result: Mapping[str, Any]
    ) -> None:
        """Nothing: the last report repeats an evaluation that has been seen."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Nothing: what a trial reached stays a competitor."""

    def _add(self, number: int) -> None:
        if f"{number}" not in self._trial_info:
            super().on_trial_add(None, _Named(f"{number}"))

    def _decide(self, number: int, spent: float, q: float) -> bool:
        if spent >= self._budget or not math.isfinite(q):
            return False
        result = {FORWARD_EQUIVALENTS: spent, OBJECTIVE: q}
        decision = super().on_trial_result(None, _Named(f"{number}"), result)
        return bool(decision == TrialScheduler.STOP)

    def _reason(self, spent: float, q: float) -> str:
        share = round(100 * spent / self._budget)
        factor = f"{self._config.reduction_factor:g}"
        return f"rung at {share} % of the budget: q {q:.4g} was not in the best 1/{factor}"
