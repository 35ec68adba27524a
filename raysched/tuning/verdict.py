"""Do rollouts pay? Paired comparison with the baseline, corrected for the number compared.

The difference is q of the baseline minus q of a candidate: positive means that the candidate is
better. Its two-sided p-value comes from the paired interval (Student's t over several seeds) and
is corrected over all candidates that reached the budget (Holm 1979).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from raysched.evaluation.few_seeds import quantile, two_sided_p
from raysched.tuning.display import settings_text
from raysched.tuning.objectives import Objectives
from raysched.tuning.pareto import ranks
from raysched.tuning.records import Answer, TrialRecord, Verdict


@dataclass(frozen=True)
class Comparison:
    """A candidate against the baseline on the same noise.

    Attributes:
        number: the candidate's number.
        difference: q of the baseline minus q of the candidate.
        low: lower end of the paired interval.
        high: upper end of the paired interval.
        confidence: level of the interval.
        dof: degrees of freedom of its error, as in `raysched.evaluation.few_seeds`.
    """

    number: int
    difference: float
    low: float
    high: float
    confidence: float = 0.95
    dof: float = math.inf

    @property
    def p_value(self) -> float:
        """Two-sided, from the interval's width."""
        if self.low == self.high:
            # No width, or one of the two diverged: nothing is left to chance.
            return 1.0 if self.difference == 0 else 0.0
        error = (self.high - self.low) / (2 * quantile(self.confidence, self.dof))
        return two_sided_p(self.difference / error, self.dof)


def holm(p_values: Mapping[int, float]) -> dict[int, float]:
    """Adjusted p-values that hold the chance of any false claim (Holm 1979)."""
    ordered = sorted(p_values, key=lambda number: p_values[number])
    adjusted, largest = {}, 0.0
    for rank, number in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def eligible(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that reached the budget with a finite q: only they compete."""
    return [t for t in trials if t.status == "finished" and t.q is not None and math.isfinite(t.q)]


def ranked(
    trials: Sequence[TrialRecord], objectives: Objectives | None = None
) -> list[TrialRecord]:
    """The eligible trials, best first: by their loss, then by q; the baseline wins a tie.

    Of several objectives those on the front come first, then those on the front of the rest.

    Args:
        trials: of a sweep.
        objectives: what it searched for; default: q.
    """
    able = eligible(trials)
    q = {t.number: math.inf if t.q is None else t.q for t in able}
    place = _places(able, objectives) if objectives else {}
    last = len(able)
    return sorted(able, key=lambda t: (place.get(t.number, last), q[t.number], not t.baseline))


def _places(trials: Sequence[TrialRecord], objectives: Objectives) -> dict[int, int]:
    """Rank by number, 0 for the best, of the trials whose losses are all finite numbers."""
    losses = {trial.number: objectives.losses(trial) for trial in trials}
    known = {n: row for n, row in losses.items() if row and all(map(math.isfinite, row))}
    return dict(zip(known, ranks(list(known.values())), strict=True))


def best(
    trials: Sequence[TrialRecord], objectives: Objectives | None = None
) -> TrialRecord | None:
    """The first of the ranked trials."""
    return next(iter(ranked(trials, objectives)), None)


def decide(
    trials: Sequence[TrialRecord],
    comparisons: Sequence[Comparison],
    *,
    num_seeds: int,
    metric: str,
    rolls_out: Callable[[TrialRecord], bool] = lambda _: True,
    objectives: Objectives | None = None,
) -> Verdict:
    """Say whether rollouts pay: whether the best candidate beats the baseline in q.

    Args:
        trials: all trials of the sweep.
        comparisons: one per candidate that reached the budget.
        num_seeds: training seeds per trial.
        metric: the quality's name, for the text.
        rolls_out: whether a candidate trains with rollouts, rather than by another method.
        objectives: what the candidates are ranked by; default: q.

    Returns:
        The verdict. The seeds are those that the winner was chosen on, so it is indicative.
    """
    hint = _hint(num_seeds)
    by_number = {comparison.number: comparison for comparison in comparisons}
    able = [t for t in trials if t.number in by_number and not t.baseline]
    candidate, lowest = best(able, objectives), best(able)
    if candidate is None or lowest is None:
        return Verdict(
            "no clear winner: no candidate reached the budget, so nothing can be said about "
            f"rollouts at equal compute {hint}",
            "no_clear_winner",
            num_seeds=num_seeds,
        )
    p_values = holm({c.number: c.p_value for c in comparisons})
    answer = _answer(
        by_number[candidate.number], p_values[candidate.number], by_number[lowest.number]
    )
    if answer == "rollouts_do_not_pay":
        candidate = lowest  # even that one is worse
    comparison = by_number[candidate.number]
    by = "" if candidate is lowest or objectives is None else " and ".join(objectives.names)
    text = _text(answer, candidate, comparison, metric, by)
    return Verdict(
        text=f"{text} {hint}{_corrected(comparisons)}",
        answer="other_method_pays" if _other(answer, candidate, rolls_out) else answer,
        difference=comparison.difference,
        low=comparison.low,
        high=comparison.high,
        p_value=p_values[candidate.number],
        num_seeds=num_seeds,
        num_compared=len(comparisons),
        candidate=candidate.number,
    )


def _answer(comparison: Comparison, p_value: float, lowest: Comparison) -> Answer:
    level = 1 - comparison.confidence
    if comparison.difference > 0 and comparison.low > 0 and p_value < level:
        return "rollouts_pay"
    # Here even that of lowest q is worse: that claim needs no correction for their number.
    if lowest.difference < 0 and lowest.high < 0:
        return "rollouts_do_not_pay"
    return "no_clear_winner"


def _other(answer: Answer, winner: TrialRecord, rolls_out: Callable[[TrialRecord], bool]) -> bool:
    return answer == "rollouts_pay" and not rolls_out(winner)


def _text(
    answer: Answer, candidate: TrialRecord, comparison: Comparison, metric: str, by: str
) -> str:
    """The answer in words; `by` names the objectives where another candidate has the lowest q."""
    name = f"trial {candidate.name} ({settings_text(candidate)}{by and f'; best by {by}'})"
    low, high = comparison.low, comparison.high
    if answer == "rollouts_pay":
        return (
            f"{name} beats teacher forcing by {comparison.difference:.4g} in {metric} "
            f"[{low:.4g}, {high:.4g}] at equal compute"
        )
    if answer == "rollouts_do_not_pay":
        tried = "the methods tried" if "exposure" in candidate.assignments else "rollouts"
        return (
            f"{tried} do not pay here: the best of them, {name}, is worse than teacher forcing "
            f"by {-comparison.difference:.4g} in {metric} [{-high:.4g}, {-low:.4g}] at equal "
            "compute"
        )
    if (comparison.difference, low, high) == (0.0, 0.0, 0.0):
        return (
            f"no clear winner: the best candidate, {name}, made the very samples of teacher "
            "forcing: its settings had no effect"
        )
    side = "better" if comparison.difference >= 0 else "worse"
    shown = (low, high) if comparison.difference >= 0 else (-high, -low)
    found = (
        f"no clear winner: the best candidate, {name}, is {side} than teacher forcing by "
        f"{abs(comparison.difference):.4g} in {metric} [{shown[0]:.4g}, {shown[1]:.4g}] at equal "
        "compute"
    )
    if comparison.high < 0:
        return f"{found}, while another candidate has a lower q"
    return f"{found}, which is not enough to tell them apart"


def _hint(num_seeds: int) -> str:
    if num_seeds == 1:
        return "(indicative: 1 seed, the one that chose the candidate)"
    return f"(indicative: {num_seeds} seeds, the ones that chose the candidate)"


def _corrected(comparisons: Sequence[Comparison]) -> str:
    if len(comparisons) == 1:
        return ""
    return f"; Holm's correction over {len(comparisons)} candidates"
