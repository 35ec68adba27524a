"""What a pick concludes from fresh seeds: who beats teacher forcing, and whether rollouts do.

Every candidate was trained again beside the baseline; each comparison is a paired interval over
seeds and samples, and the claims together hold at the stated confidence (Holm 1979). A winner is
named only where its gain is beyond doubt in that sense; otherwise the baseline stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raysched.evaluation.few_seeds import quantile
from raysched.tuning.display import number_text, settings_text
from raysched.tuning.records import Answer, TrialRecord, Verdict
from raysched.tuning.verdict import Comparison, holm

# With fewer the word "indicative" stands with the answer.
ENOUGH_SEEDS = 3


@dataclass(frozen=True)
class Candidate:
    """A setting that was trained again, and how it stands against the baseline.

    Attributes:
        record: its trial.
        rollouts: whether it trains with rollouts, rather than by another method.
        comparison: against the baseline, on the same noise and seeds.
    """

    record: TrialRecord
    rollouts: bool
    comparison: Comparison

    @property
    def gain(self) -> float:
        """q of the baseline minus its own."""
        return self.comparison.difference

    @property
    def worse(self) -> bool:
        """Whether its interval lies on the wrong side of zero."""
        return self.gain < 0 and self.comparison.high < 0

    @property
    def title(self) -> str:
        """What it is called in a sentence."""
        return f"trial {self.record.name} ({settings_text(self.record)})"

    def standing(self, metric: str) -> str:
        """How it stands: better or worse than teacher forcing, by how much, with the interval."""
        low, high = self.comparison.low, self.comparison.high
        if (self.gain, low, high) == (0.0, 0.0, 0.0):
            return "made the very samples of teacher forcing: its settings had no effect"
        side = "better" if self.gain >= 0 else "worse"
        low, high = (low, high) if self.gain >= 0 else (-high, -low)
        return (
            f"is {side} than teacher forcing by {abs(self.gain):.4g} in {metric} "
            f"[{low:.4g}, {high:.4g}]"
        )


@dataclass(frozen=True)
class Decision:
    """The answer, and who it is about.

    Attributes:
        verdict: the answer in words and numbers.
        winner: number of the candidate that beats the baseline; None where none does.
        p_values: after Holm's correction, by number.
        reasons: one sentence each.
    """

    verdict: Verdict
    winner: int | None
    p_values: dict[int, float]
    reasons: tuple[str, ...]


def decide_pick(candidates: Sequence[Candidate], *, num_seeds: int, metric: str) -> Decision:
    """Say who beats teacher forcing.

    Args:
        candidates: those that were trained to the end on all seeds, at least one.
        num_seeds: fresh seeds of each.
        metric: the quality's name, for the text.
    """
    p_values = holm({c.record.number: c.comparison.p_value for c in candidates})
    winners = [c for c in candidates if _beats(c, p_values[c.record.number])]
    winner = max(winners, key=lambda c: c.gain, default=None)
    text, answer, shown = _conclusion(candidates, winners, winner, metric)
    verdict = Verdict(
        text=f"{text} ({_basis(num_seeds, len(candidates))})",
        answer=answer,
        difference=shown.gain,
        low=shown.comparison.low,
        high=shown.comparison.high,
        p_value=p_values[shown.record.number],
        num_seeds=num_seeds,
        num_compared=len(candidates),
        indicative=num_seeds < ENOUGH_SEEDS,
        candidate=shown.record.number,
    )
    reasons = [
        f"{c.title} {c.standing(metric)}; p = {p_values[c.record.number]:.2g}" for c in candidates
    ]
    if winner is None:
        reasons.append(_resolution(shown, len(candidates), num_seeds, metric))
    number = winner.record.number if winner else None
    return Decision(verdict, number, p_values, tuple(reasons))


def _beats(candidate: Candidate, p_value: float) -> bool:
    level = 1 - candidate.comparison.confidence
    return candidate.gain > 0 and candidate.comparison.low > 0 and p_value < level


def _conclusion(
    candidates: Sequence[Candidate],
    winners: Sequence[Candidate],
    winner: Candidate | None,
    metric: str,
) -> tuple[str, Answer, Candidate]:
    """The answer in words and as a keyword, and the candidate that its numbers are of."""
    rollouts = [c for c in candidates if c.rollouts]
    best = max(rollouts or candidates, key=lambda c: c.gain)
    if winner is not None and (winner.rollouts or any(c.rollouts for c in winners)):
        answer: Answer = "rollouts_pay" if winner.rollouts else "other_method_pays"
        others = [c for c in winners if c is not winner and c.rollouts != winner.rollouts]
        also = f"; so does {_gain_text(max(others, key=lambda c: c.gain))}" if others else ""
        return _beating(winner, metric) + also, answer, winner
    if winner is not None and rollouts:
        text = f"rollouts do not pay here: the best of them, {best.title}, {best.standing(metric)}"
        cheaper = f"; a cheaper method does: {_beating(winner, metric)}"
        return text + cheaper, "rollouts_do_not_pay", winner
    if winner is not None:
        return _beating(winner, metric), "other_method_pays", winner
    # Where even the best is worse, that needs no correction for their number.
    if best.worse:
        tried = "rollouts" if rollouts else "the methods tried"
        text = f"{tried} do not pay here: the best of them, {best.title}, {best.standing(metric)}"
        others = [c for c in candidates if not c.rollouts]
        neither = "; no other method that was compared clearly does" if rollouts and others else ""
        return f"{text} at equal compute{neither}", "rollouts_do_not_pay", best
    best = max(candidates, key=lambda c: c.gain)
    text = f"no clear winner: the best candidate, {best.title}, {best.standing(metric)}"
    doubt = " at equal compute, which is not enough to tell them apart" if best.gain else ""
    return text + doubt, "no_clear_winner", best


def _beating(candidate: Candidate, metric: str) -> str:
    low, high = candidate.comparison.low, candidate.comparison.high
    return (
        f"{candidate.title} beats teacher forcing by {candidate.gain:.4g} in {metric} "
        f"[{low:.4g}, {high:.4g}] at equal compute"
    )


def _gain_text(candidate: Candidate) -> str:
    low, high = candidate.comparison.low, candidate.comparison.high
    return f"{candidate.title} by {candidate.gain:.4g} [{low:.4g}, {high:.4g}]"


def _basis(num_seeds: int, num_compared: int) -> str:
    seeds = f"{num_seeds} fresh seed{'s' if num_seeds > 1 else ''}"
    few = "indicative: " if num_seeds < ENOUGH_SEEDS else ""
    holm_text = f"; Holm's correction over {num_compared} candidates" if num_compared > 1 else ""
    return f"{few}{seeds}{holm_text}"


def _resolution(shown: Candidate, num_compared: int, num_seeds: int, metric: str) -> str:
    """What a gain would have had to be; a reader shall not take silence for equality."""
    c = shown.comparison
    error = (c.high - c.low) / (2 * quantile(c.confidence, c.dof))
    needed = error * quantile(1 - (1 - c.confidence) / num_compared, c.dof)
    return (
        f"with {num_seeds} seed{'s' if num_seeds > 1 else ''}, a gain below about "
        f"{number_text(needed)} in {metric} could not be shown here; more seeds "
        "(--resume --seeds N) show smaller ones"
    )
