"""Early stopping on compute that kills no trial: ASHA, Hyperband, median rule, MO-ASHA.

A rule decides (`raysched.tuning.rules`); its stop becomes a request in the trial's folder, after
which the loop saves a checkpoint and ends itself. So nothing is lost, and the workers' placement
group is freed by the trainer that made it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from raysched.config.sweep import EarlyStoppingConfig
from raysched.tuning.records import FORWARD_EQUIVALENTS, METRICS, OBJECTIVE, Point, TrialRecord
from raysched.tuning.rules import make_rule

# A trial's losses as they stand at the last of its evaluations; None: not known yet.
Losses = Callable[[Sequence[Point]], tuple[float, ...] | None]


def last_quality(curve: Sequence[Point]) -> tuple[float, ...]:
    """q at the last evaluation."""
    return (curve[-1].q,)


class ComputeHalving(FIFOScheduler):  # type: ignore[misc]
    """Early stopping whose time axis is forward equivalents.

    The baseline is neither stopped nor a competitor; the rung at the budget itself decides
    nothing.

    Args:
        config: kind, grace period and the rest.
        budget: F, forward equivalents of every trial.
        prune: called with the trial's number, the run folder of its last report and the reason.
        losses: what trials are compared by; several need `mo_asha`.
        interval: forward equivalents between the marks of evaluations, which come up to a step
            late; None: they are not late.
        by: the name of that, where it is not q.
    """

    def __init__(
        self,
        config: EarlyStoppingConfig,
        *,
        budget: float,
        prune: Callable[[int, str, str], None],
        losses: Losses = last_quality,
        interval: float | None = None,
        by: str = "",
    ) -> None:
        super().__init__()
        self._config = config
        self._budget = budget
        self._prune = prune
        self._losses = losses
        self._by = f" by {by}" if by else ""
        self._rule = make_rule(config, budget, interval=interval)
        self._curves: dict[int, list[Point]] = {}
        self._pruned: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles what it was given; its snapshots are never read, the journal is.
        return {}

    def replay(self, records: Iterable[TrialRecord]) -> None:
        """Take up the evaluations of an earlier session, in the order of the trials."""
        for record in records:
            if record.baseline:
                continue
            if record.status == "pruned":
                self._pruned.add(record.number)
            for point in record.curve:
                values = self._worth(record.number, point)
                if values is not None:
                    self._rule.take_up(record.number, point.forward_equivalents, values)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Let the trial go on; if the rule says stop, ask its loop to end."""
        number = trial.config["trial_number"]
        if trial.config["baseline"] or result.get("ended") or number in self._pruned:
            return str(TrialScheduler.CONTINUE)
        spent, q = result.get(FORWARD_EQUIVALENTS), result.get(OBJECTIVE)
        if spent is None or q is None:
            return str(TrialScheduler.CONTINUE)
        point = Point(spent, q, result.get(METRICS) or {})
        values = self._worth(number, point)
        if values is not None and self._rule.stops(number, spent, values):
            self._pruned.add(number)
            self._prune(number, str(result.get("run_dir", "")), self._reason(point))
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(
        self, tune_controller: Any, trial: Any, result: Mapping[str, Any]
    ) -> None:
        """Nothing: the last report repeats an evaluation that has been seen."""

    def _worth(self, number: int, point: Point) -> tuple[float, ...] | None:
        """What an evaluation is compared by; None for one that nobody is judged at."""
        spent = point.forward_equivalents
        if spent >= self._budget:
            return None
        # A resumed trial may repeat its last evaluations.
        kept = [p for p in self._curves.get(number, []) if p.forward_equivalents < spent]
        self._curves[number] = [*kept, point]
        values = self._losses(self._curves[number])
        if values is None or not all(map(math.isfinite, values)):
            return None
        return values

    def _reason(self, point: Point) -> str:
        share = round(100 * point.forward_equivalents / self._budget)
        factor = f"{self._config.reduction_factor:g}"
        if self._config.kind == "median":
            return f"at {share} % of the budget: worse than the median{self._by}, q {point.q:.4g}"
        if self._config.kind == "mo_asha":
            place = f"not in the best 1/{factor} by non-dominated rank"
            return f"rung at {share} % of the budget: {place}, q {point.q:.4g}"
        best = f"was not in the best 1/{factor}{self._by}"
        return f"rung at {share} % of the budget: q {point.q:.4g} {best}"
