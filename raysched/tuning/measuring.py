"""The objectives of a sweep's trials, journaled, and the front of a Pareto search."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from raysched.tuning.journal import Journal
from raysched.tuning.objectives import Objectives
from raysched.tuning.pareto import hypervolume, non_dominated
from raysched.tuning.records import TrialRecord, the_baseline

# Of the range of each objective, so that the worst trials still add to the volume.
MARGIN = 0.1


def measure_trials(journal: Journal, objectives: Objectives) -> None:
    """Journal the objectives of every trial that has them; gains wait for the baseline."""
    records = journal.ordered()
    forced = the_baseline(records)
    baseline = forced if forced is not None and forced.status == "finished" else None
    for record in records:
        found = objectives.measured(record, baseline)
        values = {name: measured.value for name, measured in found.items()}
        censored = [name for name, measured in found.items() if measured.censored]
        if values != record.objectives or censored != record.censored:
            journal.append("measured", record.number, objectives=values, censored=censored)


def unreported(objectives: Objectives, records: Sequence[TrialRecord]) -> str | None:
    """Why a sweep can't be judged: an objective that no trial reported; None if all were."""
    ended = [record for record in records if record.status == "finished"]
    forced = the_baseline(records)
    for name in objectives.names:
        if name == "gain_over_baseline" and (forced is None or forced.status != "finished"):
            continue  # gains come with the baseline, whoever is done before it
        if ended and not any(name in record.objectives for record in ended):
            known = sorted({metric for record in ended for metric in record.metrics})
            there = ", ".join(known) or "none beside q"
            return f"objective {name}: no trial reported it; the metrics that exist: {there}"
    return None


def pareto_summary(
    objectives: Objectives, records: Sequence[TrialRecord]
) -> dict[str, Any] | None:
    """Front and hypervolume of a search for several objectives; None for one objective.

    Returns:
        `front`: numbers of the trials that none beats in everything; `reference`: the corner, by
        name; `hypervolume`: what all trials dominate below it; `hypervolume_baseline`: what the
        baseline alone does; `directions`.
    """
    if not objectives.several:
        return None
    losses = {record.number: objectives.losses(record) for record in records}
    # One infinite value would make the corner, and so every volume, infinite.
    known = {n: row for n, row in losses.items() if row is not None and all(map(isfinite, row))}
    summary: dict[str, Any] = {
        "objectives": list(objectives.names),
        "directions": {objective.name: objective.direction for objective in objectives.each},
        "front": [],
    }
    if not known:
        return summary
    rows = list(known.values())
    on_front = non_dominated(rows)
    corner = _corner(objectives, rows)
    baseline = [known[r.number] for r in records if r.baseline and r.number in known]
    signed = zip(objectives.each, corner, strict=True)
    return {
        **summary,
        "front": [number for number, on in zip(known, on_front, strict=True) if on],
        "reference": {objective.name: objective.loss(worst) for objective, worst in signed},
        "hypervolume": hypervolume(rows, corner),
        "hypervolume_baseline": hypervolume(baseline, corner),
    }


def _corner(objectives: Objectives, rows: Sequence[Sequence[float]]) -> list[float]:
    """The hypervolume's reference as losses: the user's, or a little beyond the worst."""
    if objectives.reference:
        return [o.loss(objectives.reference[o.name]) for o in objectives.each]
    columns = list(zip(*rows, strict=True))
    return [
        max(c) + (MARGIN * (max(c) - min(c)) or MARGIN * abs(max(c)) or MARGIN) for c in columns
    ]
