"""What a trial is judged by, as numbers: one objective, or several for a Pareto search.

In a sweep's YAML either one of the names, or several components at once:

    objective: {name: cost_to_target, target: 0.02}
    objective: {several: [quality, diversity, nfe], target: 0.02}

- `quality_at_budget`: q at the first evaluation with FE >= F.
- `area`: the integral of min_{s<=f} q(s) over d ln f from F0 to F, over ln(F/F0). F0 is the first
  evaluation that all trials share: the interval of the evaluations. Between evaluations the best q
  so far holds, so the one at F itself has no weight.
- `cost_to_target`: the first FE with q <= target; never: F (1 + (q_best - target)/|target|),
  censored.
- `gain_over_baseline`: q of the baseline minus q at F, mean over seeds; more is better.

Components of a Pareto search: `quality` is `quality_at_budget`; `forward_equivalents` is
`cost_to_target`; `nfe` is the fewest network evaluations per sample of which the metric reaches
the target at F (never: the most, stretched as above, censored); `adherence` is the class accuracy,
`diversity` the coverage and `fidelity` the density at F (more is better); `self_consistency` the
distance between samples at N and 4N evaluations.

All of them are means over the training seeds. The searcher and the schedulers see losses: lower is
better, whatever the direction. A trial that did not reach its budget has no values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from raysched.config.run import RunConfig
from raysched.config.sweep import ObjectiveConfig
from raysched.tuning.records import Point, TrialRecord

# Evaluations are a step late of their mark, never early; this is rounding only.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Measured:
    """One number of a trial.

    Attributes:
        value: in the objective's own direction.
        censored: the target was never reached: the value is a bound stretched by the shortfall.
    """

    value: float
    censored: bool = False


@dataclass(frozen=True)
class Terms:
    """What the objectives of a sweep are reckoned with.

    Attributes:
        budget: F, forward equivalents of every trial.
        interval: forward equivalents between evaluations; F0.
        metric: name of q's metric, e.g. `kid`.
        target: q to be reached; None where no objective needs it.
    """

    budget: float
    interval: float
    metric: str
    target: float | None = None


# The evaluations of one seed, oldest first and not empty; None: they don't hold what it needs.
Measure = Callable[[Sequence[Point], Terms], Measured | None]


@dataclass(frozen=True)
class Objective:
    """One objective.

    Attributes:
        name: as in the sweep's YAML.
        direction: whether less or more is better.
        measure: its value as it stands at the last of some evaluations.
        unit: shown behind the number, may be empty.
    """

    name: str
    direction: Literal["min", "max"]
    measure: Measure
    unit: str = ""

    def loss(self, value: float) -> float:
        """The value, oriented so that lower is better."""
        return -value if self.direction == "max" else value


@dataclass(frozen=True)
class Objectives:
    """The objectives of a sweep.

    Attributes:
        each: one, or several for a Pareto search.
        terms: what they are reckoned with.
        reference: corner of the hypervolume as the user gave it, by name; may be empty.
    """

    each: tuple[Objective, ...]
    terms: Terms
    reference: dict[str, float]

    @property
    def names(self) -> tuple[str, ...]:
        """Their names, in order."""
        return tuple(objective.name for objective in self.each)

    @property
    def several(self) -> bool:
        """Whether this is a Pareto search."""
        return len(self.each) > 1

    @property
    def ranks_by_q(self) -> bool:
        """Whether the better of two trials is always the one of lower q at the budget."""
        return self.names in (("quality_at_budget",), ("gain_over_baseline",))

    def measured(
        self, record: TrialRecord, baseline: TrialRecord | None = None
    ) -> dict[str, Measured]:
        """A trial's values by name, those that it has; empty before it reached its budget.

        Args:
            record: the trial.
            baseline: the teacher-forced trial that gains are measured against.
        """
        if record.status != "finished":
            return {}
        found = {}
        for objective in self.each:
            value = self._mean(objective, record)
            if objective.name == "gain_over_baseline":
                value = _gain(value, self._mean(objective, baseline) if baseline else None)
            if value is not None:
                found[objective.name] = value
        return found

    def losses(self, record: TrialRecord) -> tuple[float, ...] | None:
        """What the searcher is told of a finished trial; None if one of them is missing.

        A gain differs from -q by the baseline's q, the same for all trials: the searcher gets q
        and needs no baseline.
        """
        if record.status != "finished":
            return None
        return self._losses([self._mean(objective, record) for objective in self.each])

    def losses_at(self, curve: Sequence[Point]) -> tuple[float, ...] | None:
        """The losses as they stand at the last of one seed's evaluations, for early stopping."""
        if not curve:
            return None
        return self._losses([o.measure(curve, self.terms) for o in self.each])

    def _losses(self, measured: Sequence[Measured | None]) -> tuple[float, ...] | None:
        pairs = zip(self.each, measured, strict=True)
        found = [objective.loss(m.value) for objective, m in pairs if m is not None]
        return tuple(found) if len(found) == len(self.each) else None

    def _mean(self, objective: Objective, record: TrialRecord) -> Measured | None:
        each = [objective.measure(curve, self.terms) for curve in seed_curves(record)]
        found = [m for m in each if m is not None]
        if not found or len(found) < len(each):
            return None
        return Measured(fmean(m.value for m in found), any(m.censored for m in found))


def sweep_objectives(config: ObjectiveConfig, base: RunConfig, budget: float) -> Objectives:
    """The objectives that a sweep asks for.

    Args:
        config: names and target.
        base: the base run; its evaluation is that of all trials.
        budget: F.
    """
    # It imports torch, which the searcher's tests don't need.
    from raysched.training.budget import DEFAULT_EVALUATIONS

    evaluation = base.evaluation
    interval = evaluation.every_forward_equivalents or budget / DEFAULT_EVALUATIONS
    terms = Terms(budget, interval, evaluation.metric, config.target)
    each = tuple(COMPONENTS[name] for name in config.several) or (SINGLE[config.name],)
    return Objectives(each, terms, dict(config.reference))


def seed_curves(record: TrialRecord) -> list[list[Point]]:
    """The evaluations of each training seed, oldest first."""
    last = (
        [] if record.q is None else [Point(record.forward_equivalents, record.q, record.metrics)]
    )
    first = record.curve or last
    return [curve for curve in (first, *record.further_curves) if curve]


def _gain(own: Measured | None, baseline: Measured | None) -> Measured | None:
    # Both hold -q of the same seeds: the mean of the differences is that of the means.
    return Measured(own.value - baseline.value) if own and baseline else None


def _minus_quality(curve: Sequence[Point], terms: Terms) -> Measured:
    return Measured(-_at_budget(curve, terms).q)


def _quality(curve: Sequence[Point], terms: Terms) -> Measured:
    return Measured(_at_budget(curve, terms).q)


def _at_budget(curve: Sequence[Point], terms: Terms) -> Point:
    """The first evaluation at the budget; the last one of a curve that isn't there yet."""
    late = (p for p in curve if p.forward_equivalents >= terms.budget * (1 - ROUNDING))
    return next(late, curve[-1])


def _area(curve: Sequence[Point], terms: Terms) -> Measured:
    """The best q so far holds from the mark of its evaluation to the next one's."""
    best, area, mark = _number(curve[0].q), 0.0, terms.interval
    for point in curve:
        reached = min(_mark(point, terms), terms.budget)
        if reached > mark:
            area += best * math.log(reached / mark)
            mark = reached
        best = min(best, _number(point.q))
    width = math.log(mark / terms.interval)
    return Measured(area / width if width else best)


def _number(q: float) -> float:
    return math.inf if math.isnan(q) else q


def _mark(point: Point, terms: Terms) -> float:
    """The multiple of the interval that an evaluation was made for: it comes a step late."""
    return math.floor(point.forward_equivalents / terms.interval + ROUNDING) * terms.interval


def _cost_to_target(curve: Sequence[Point], terms: Terms) -> Measured:
    assert terms.target is not None, "the sweep's rules ask for it"
    for point in curve:
        if point.q <= terms.target:
            return Measured(point.forward_equivalents)
    best = min((p.q for p in curve if math.isfinite(p.q)), default=math.inf)
    return Measured(_stretched(terms.budget, best, terms.target), censored=True)


def _nfe(curve: Sequence[Point], terms: Terms) -> Measured | None:
    assert terms.target is not None, "the sweep's rules ask for it"
    prefix = f"{terms.metric}/nfe_"
    metrics = _at_budget(curve, terms).metrics
    by_nfe = {
        int(name.removeprefix(prefix)): q for name, q in metrics.items() if name.startswith(prefix)
    }
    if not by_nfe:
        return None
    enough = [nfe for nfe, q in by_nfe.items() if q <= terms.target]
    if enough:
        return Measured(float(min(enough)))
    best = min((q for q in by_nfe.values() if math.isfinite(q)), default=math.inf)
    return Measured(_stretched(float(max(by_nfe)), best, terms.target), censored=True)


def _stretched(limit: float, best: float, target: float) -> float:
    """Beyond the limit by the relative shortfall, so that nearer misses still rank better."""
    return limit * (1 + (best - target) / abs(target))


def _metric(name: str) -> Measure:
    def measure(curve: Sequence[Point], terms: Terms) -> Measured | None:
        value = _at_budget(curve, terms).metrics.get(name)
        return None if value is None else Measured(value)

    return measure


SINGLE: dict[str, Objective] = {
    "quality_at_budget": Objective("quality_at_budget", "min", _quality),
    "area": Objective("area", "min", _area),
    "cost_to_target": Objective("cost_to_target", "min", _cost_to_target, "FE"),
    # Minus q until the baseline's is known, see `Objectives.measured`.
    "gain_over_baseline": Objective("gain_over_baseline", "max", _minus_quality),
}
COMPONENTS: dict[str, Objective] = {
    "quality": Objective("quality", "min", _quality),
    "forward_equivalents": Objective("forward_equivalents", "min", _cost_to_target, "FE"),
    "nfe": Objective("nfe", "min", _nfe),
    "adherence": Objective("adherence", "max", _metric("class_accuracy")),
    "diversity": Objective("diversity", "max", _metric("coverage")),
    "fidelity": Objective("fidelity", "max", _metric("density")),
    "self_consistency": Objective("self_consistency", "min", _metric("self_consistency")),
}
