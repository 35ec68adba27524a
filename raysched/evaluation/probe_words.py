"""What a probe's numbers say, in sentences: where a model drifts, and which of two drifts less.

Places are named from intervals that hold for the whole path at once, because the largest of many
noisy numbers is always large. Differences between runs are paired: the same noise and images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from raysched.evaluation.bootstrap import Interval
from raysched.evaluation.probe import Key, Measured
from raysched.evaluation.probe_sources import ProbedRun, same_path
from raysched.evaluation.probe_statistics import interval, simultaneous

Verdict = Literal["less", "more", "not distinguishable"]
# States are fp32: below this, a statistic that is above 0 shows rounding.
ROUNDING = 1e-6
COMPARED = {
    "energy": "mean energy distance along the path",
    "rollout_energy": "mean energy distance of rollouts",
    "drift": "mean RMS drift of rollouts",
    "q": "mean q",
}


@dataclass(frozen=True)
class Peak:
    """Where a statistic is largest, with an interval that holds for all places at once.

    Args:
        statistic: its name.
        t: path time.
        k: rollout steps, where there are any.
        value: the estimate.
        low: lower end.
        high: upper end.
        clear: whether it is above 0 beyond chance.
        begins_t: the noisiest t at which the statistic is above 0 beyond chance.
    """

    statistic: str
    t: float
    k: int | None
    value: float
    low: float
    high: float
    clear: bool
    begins_t: float | None


@dataclass(frozen=True)
class Comparison:
    """One run against another; negative differences: the first drifts less.

    Args:
        run: name of the first, rollout-trained where one of them is.
        baseline: name of the other.
        verdict: by the energy distance along the path.
        differences: statistic -> difference with its paired interval.
        sentence: the same in words.
    """

    run: str
    baseline: str
    verdict: Verdict
    differences: dict[str, Interval]
    sentence: str

    def as_json(self) -> dict[str, Any]:
        """The same in JSON types."""
        return asdict(self)


def find_peak(measured: Measured, statistic: str, k: int | None = None) -> Peak:
    """Where a statistic is largest.

    Args:
        measured: of one run.
        statistic: its name.
        k: of one rollout length only; default: all.
    """
    rows = measured.select(statistic, k)
    keys = list(rows)
    ends = simultaneous(torch.stack([rows[key] for key in keys]), measured.confidence)
    top = max(range(len(keys)), key=lambda row: ends[row].value)
    above = [
        key.t
        for key, end in zip(keys, ends, strict=True)
        if end.low > ROUNDING and key.t is not None
    ]
    key, end = keys[top], ends[top]
    assert key.t is not None, "peaks are sought along the path"
    return Peak(
        statistic,
        key.t,
        key.k,
        *_ends(end),
        clear=end.low > ROUNDING,
        begins_t=max(above, default=None),
    )


def describe(label: str, measured: Measured, solver: str) -> list[str]:
    """Where on the path a model drifts.

    Args:
        label: the run's name.
        measured: what the probe found.
        solver: of the walk from noise.
    """
    # A schedule of few indices has no room for all steps that were asked for.
    n = sum(key.statistic == "energy" for key in measured.replicates) - 1
    walk = find_peak(measured, "energy")
    how = f"states sampled from noise in {n} {solver} steps"
    if walk.clear:
        first = (
            f"{how} leave the law of forward states from t = {walk.begins_t:.3g} down and are "
            f"furthest from it at t = {walk.t:.3g}: energy distance {_show(walk)}."
        )
    else:
        first = (
            f"{how} are not distinguishable from forward states anywhere on the path (largest "
            f"energy distance {_show(walk)} at t = {walk.t:.3g})."
        )
    step = find_peak(measured, "rollout_energy", k=1)
    if step.clear:
        second = (
            f"single steps of 1/{n} of the path from true forward states drift most on arriving "
            f"at t = {step.t:.3g}: energy distance {_show(step)}."
        )
    else:
        second = (
            f"single steps of 1/{n} of the path from true forward states show no drift that is "
            f"distinguishable from chance (largest energy distance {_show(step)} at "
            f"t = {step.t:.3g})."
        )
    return [f"{label}: {line}" for line in (first, second, _beyond_floor(measured))]


def _beyond_floor(measured: Measured) -> str:
    peak = find_peak(measured, "drift_excess")
    if not peak.clear:
        return (
            "rollouts drift nowhere beyond the closed-form denoiser's floor (largest RMS excess "
            f"{_show(peak)} at t = {peak.t:.3g}, k = {peak.k})."
        )
    floor = float(measured.replicates[Key("drift_floor", peak.t, peak.k)][0])
    return (
        f"rollouts drift furthest beyond the closed-form denoiser's floor on arriving at "
        f"t = {peak.t:.3g} after k = {peak.k}: RMS excess {_show(peak)} over a floor of "
        f"{floor:.3g}."
    )


def compare_runs(
    runs: Sequence[ProbedRun], found: Sequence[Measured]
) -> tuple[list[Comparison], list[str]]:
    """Every other run against each plain one; without a plain one, all against the first.

    Args:
        runs: of the probe.
        found: what was measured, run by run.

    Returns:
        The comparisons, and notes on runs that can't be compared.
    """
    numbered = list(enumerate(runs))
    plain = [i for i, run in numbered if run.training == "plain"]
    others = [i for i, _ in numbered if i not in plain]
    pairs = [(a, b) for a in others for b in plain] or [(i, 0) for i, _ in numbered[1:]]
    comparisons, notes = [], []
    for a, b in pairs:
        if same_path(runs[a], runs[b]):
            comparisons.append(compare(runs[a].label, found[a], runs[b].label, found[b]))
        else:
            notes.append(
                f"{runs[a].name} and {runs[b].name} have different noise schedules: their states "
                "at equal t are not comparable, so their drift is not compared."
            )
    return comparisons, notes


def compare(name: str, ours: Measured, baseline: str, theirs: Measured) -> Comparison:
    """Whether a run drifts less than another, by paired differences.

    Args:
        name: of the run.
        ours: what was found of it.
        baseline: name of the other run.
        theirs: what was found of that, with the same bootstrap weights.
    """
    differences = {
        statistic: interval(_mean(ours, statistic) - _mean(theirs, statistic), ours.confidence)
        for statistic in COMPARED
    }
    verdict = _verdict(differences["energy"])
    head = {
        "less": f"{name} drifts less than {baseline}",
        "more": f"{name} drifts more than {baseline}",
        "not distinguishable": f"the drift of {name} is not distinguishable from {baseline}'s",
    }[verdict]
    adverb = {"less": "lower", "more": "higher", "not distinguishable": "not distinguishable"}
    details = "; ".join(
        f"{COMPARED[statistic]} {_signed(end)}, {adverb[_verdict(end)]}"
        for statistic, end in differences.items()
    )
    return Comparison(
        name,
        baseline,
        verdict,
        differences,
        f"{head} (differences: {details}). Indicative: one trained model each, and the intervals "
        "are over noise and images, not over training seeds.",
    )


def _mean(measured: Measured, statistic: str) -> Tensor:
    """Mean over all places of a statistic, (R + 1,)."""
    return torch.stack(list(measured.select(statistic).values())).mean(0)


def _verdict(end: Interval) -> Verdict:
    if end.low <= 0 <= end.high:
        return "not distinguishable"
    return "less" if end.high < 0 else "more"


def _ends(end: Interval) -> tuple[float, float, float]:
    return end.value, end.low, end.high


def _show(peak: Peak) -> str:
    return f"{peak.value:.3g} [{peak.low:.3g}, {peak.high:.3g}]"


def _signed(end: Interval) -> str:
    return f"{end.value:+.3g} [{end.low:+.3g}, {end.high:+.3g}]"
