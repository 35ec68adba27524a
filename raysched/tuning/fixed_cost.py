"""What a trial costs beside its training: its process, imports, data, network, Ray Tune.

Measured from the moment a trial is proposed, which is when a place for it is free, to the moment
its end is journaled, less training, evaluation and checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from raysched.tuning.records import TrialRecord


def fixed_cost(trials: Sequence[TrialRecord]) -> dict[str, Any] | None:
    """Seconds per trial, apart for those that had to wait for a new process.

    Returns:
        `new_process_s` and `later_s` (medians, None without such trials), `num_later`, and
        `work_s`, the median of training, evaluation and checkpoints; None without a measurement.
    """
    measured = [(t.fixed_seconds, t) for t in trials if t.fixed_seconds is not None]
    if not measured:
        return None
    new = [seconds for seconds, trial in measured if trial.new_process]
    later = [seconds for seconds, trial in measured if not trial.new_process]
    return {
        "new_process_s": median(new) if new else None,
        "later_s": median(later) if later else None,
        "num_later": len(later),
        "work_s": median(trial.work_seconds for _, trial in measured),
    }


def fixed_cost_text(cost: dict[str, Any]) -> str:
    """The measurement in a sentence."""
    parts = []
    if cost["new_process_s"] is not None:
        parts.append(f"{cost['new_process_s']:.1f} s in a new process")
    if cost["later_s"] is not None:
        parts.append(f"{cost['later_s']:.1f} s in one that was taken over")
    work = f"{cost['work_s']:.1f} s of training and evaluation"
    return f"fixed cost per trial: {', '.join(parts)}; beside {work} (medians)"
