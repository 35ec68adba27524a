"""What a sweep will cost, before it is started: real steps at the corners of its space.

Compute follows from the budget, the number of trials and a replay of the early stopping; seconds,
memory and disk from steps that are really made, at the corners of the space and for the baseline.
The range goes from the cheapest corner with much stopped early to the dearest with little.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from raysched.config.loading import assign
from raysched.config.run import RunConfig
from raysched.config.space import LoadedSweep
from raysched.errors import ConfigError, RunFailedError
from raysched.training.budget import DEFAULT_EVALUATIONS
from raysched.training.out_of_memory import is_out_of_memory
from raysched.training.plan import Plan, plan_run
from raysched.tuning.corners import chosen_corners, corners
from raysched.tuning.replay import Saving, expected_saving
from raysched.tuning.search import max_concurrent
from raysched.tuning.trial import TrialPlan, train_run

# Per corner; the first steps of a process are slow, so less says little.
SECONDS_PER_CORNER = 2.0
# Beside training, see `raysched.tuning.fixed_cost`; what a small machine took.
FIXED_SECONDS = {"in process": 1.5, "nested": 10.0}


@dataclass(frozen=True)
class Range:
    """A forecast with its range."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True)
class SweepPlan:
    """The forecast of a sweep.

    Attributes:
        num_trials: candidates.
        num_baselines: teacher-forced trials; as many where they are tuned, too.
        num_seeds: trainings per trial that is not stopped early.
        concurrent: trials at once on this machine.
        budget_forward_equivalents: F.
        forward_equivalents: of the whole sweep, baseline included.
        hours: wall time of the whole sweep on this machine, evaluations included.
        trial_seconds: one whole training with its evaluations.
        peak_memory_bytes: of all trials that run at once.
        disk_bytes: what they leave behind, at most.
        money: hours times the price, None without one.
        early_stopping_share: of the candidates' compute, what early stopping leaves to be spent.
        expected_survivors: candidates that reach the budget.
        num_corners: corners that were looked at.
        num_refused: of them, those that the run model refuses.
        num_measured: corners whose steps were made.
        num_infeasible: of them, those that ran out of memory or whose loss was no number.
        infeasible_share: of the corners, by both.
        measured: seconds per 1,000 FE at each measured corner, by what it is.
        measuring_seconds: what this forecast took.
        notes: what it leaves out.
    """

    num_trials: int
    num_baselines: int
    num_seeds: int
    concurrent: int
    budget_forward_equivalents: float
    forward_equivalents: Range
    hours: Range
    trial_seconds: Range
    peak_memory_bytes: int
    disk_bytes: int
    money: Range | None
    early_stopping_share: Range
    expected_survivors: float
    num_corners: int
    num_refused: int
    num_measured: int
    num_infeasible: int
    infeasible_share: float
    measured: dict[str, float]
    measuring_seconds: float
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return {**asdict(self), "notes": list(self.notes)}


@dataclass(frozen=True)
class Measured:
    """Corners by what came out of them."""

    baseline: Plan
    corners: dict[str, Plan]
    num_corners: int
    num_refused: int
    problems: tuple[str, ...]

    @property
    def infeasible_share(self) -> float:
        """Refused by the run model, or failed when they were measured."""
        refused = self.num_refused / self.num_corners if self.num_corners else 0.0
        tried = len(self.corners) + len(self.problems)
        return refused + (1 - refused) * (len(self.problems) / tried if tried else 0.0)


def plan_sweep(
    loaded: LoadedSweep, *, price_per_hour: float | None = None, max_corners: int = 8
) -> SweepPlan:
    """Forecast a sweep's compute, time, memory, disk and money.

    Args:
        loaded: the checked sweep.
        price_per_hour: of the machine or cluster, in any currency.
        max_corners: corners whose steps are made.

    Raises:
        ConfigError: no trial fits this machine, or the baseline itself can't be measured.
    """
    began = time.monotonic()
    config, search = loaded.base.config, loaded.sweep.search
    here = {"CPU": _num_cpus(), "GPU": float(torch.cuda.device_count())}
    concurrent = max_concurrent(config, [here], search.max_concurrent)
    measured = measure_corners(loaded, max_corners)
    saving = expected_saving(
        loaded.sweep.early_stopping,
        num_trials=search.num_samples,
        num_losses=max(1, len(loaded.sweep.objective.several)),
        evaluations=_num_evaluations(loaded),
        concurrent=concurrent,
    )
    num_baselines = search.num_samples if loaded.tunes_baseline else 1
    trainings = _trainings(saving, search.num_samples, num_baselines, len(loaded.sweep.seeds))
    seconds = _trial_seconds(measured)
    hours = _hours(trainings, seconds, loaded, concurrent)
    plans = [measured.baseline, *measured.corners.values()]
    budget = loaded.budget
    kept = max(p.disk_bytes + p.pipeline_bytes for p in plans)
    return SweepPlan(
        num_trials=search.num_samples,
        num_baselines=num_baselines,
        num_seeds=len(loaded.sweep.seeds),
        concurrent=concurrent,
        budget_forward_equivalents=budget,
        forward_equivalents=Range(*(budget * t for t in trainings)),
        hours=hours,
        trial_seconds=seconds,
        peak_memory_bytes=concurrent
        * max(config.scaling.num_workers, 1)
        * max(p.peak_memory_bytes for p in plans),
        disk_bytes=int(kept * (search.num_samples + num_baselines) * len(loaded.sweep.seeds)),
        money=_money(hours, price_per_hour),
        early_stopping_share=Range(saving.low, saving.mean, saving.high),
        expected_survivors=saving.survivors * search.num_samples,
        num_corners=measured.num_corners,
        num_refused=measured.num_refused,
        num_measured=len(measured.corners) + len(measured.problems),
        num_infeasible=len(measured.problems),
        infeasible_share=measured.infeasible_share,
        measured={
            "baseline": 1000 * measured.baseline.seconds_per_forward_equivalent,
            **{n: 1000 * p.seconds_per_forward_equivalent for n, p in measured.corners.items()},
        },
        measuring_seconds=time.monotonic() - began,
        notes=(*_notes(loaded, price_per_hour), *measured.problems),
    )


def measure_corners(loaded: LoadedSweep, max_corners: int) -> Measured:
    """Make steps of the baseline and at corners of the space."""
    plan = TrialPlan(
        loaded.base.raw, Path(), loaded.budget, loaded.sweep.seeds, store=None, train=train_run
    )
    found = corners(loaded.structure)
    runs: dict[int, RunConfig] = {}
    for number, settings in enumerate(found):
        trial = {"trial_number": number + 1, "baseline": False, "assignments": settings}
        try:
            assign(loaded.base.raw, settings)
        except ConfigError:
            continue
        runs[number] = plan.config(trial, loaded.sweep.seeds[0])
    baseline = plan_run(
        plan.config({"trial_number": 0, "baseline": True}, loaded.sweep.seeds[0]),
        max_seconds=SECONDS_PER_CORNER,
    )
    same_model = not any(key.startswith("model.") for key in loaded.sweep.space)
    done: dict[str, Plan] = {}
    problems = []
    for run in chosen_corners(list(runs.values()), max_corners):
        name = _name(run, found[int(run.name) - 1])
        try:
            done[name] = plan_run(
                run, max_seconds=SECONDS_PER_CORNER, with_evaluation=not same_model
            )
        except (RunFailedError, RuntimeError, MemoryError) as error:
            if not isinstance(error, RunFailedError) and not is_out_of_memory(error):
                raise
            problems.append(f"infeasible corner: {name}: {str(error).splitlines()[0]}")
    return Measured(baseline, done, len(found), len(found) - len(runs), tuple(problems))


def _name(run: RunConfig, settings: dict[str, Any]) -> str:
    pairs = (f"{key.rsplit('.', 1)[-1]}={_short(value)}" for key, value in settings.items())
    return ", ".join(pairs) or run.exposure


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower()


def _trainings(
    saving: Saving, num_trials: int, num_baselines: int, num_seeds: int
) -> tuple[float, float, float]:
    """Whole trainings' worth: baselines on all seeds, further seeds of survivors only."""
    further = (num_seeds - 1) * saving.survivors
    plain = num_seeds * num_baselines
    return (
        plain + num_trials * (saving.low + further),
        plain + num_trials * (saving.mean + further),
        plain + num_trials * (saving.high + further),
    )


def _trial_seconds(measured: Measured) -> Range:
    evaluation = measured.baseline.evaluation_seconds
    plans = [measured.baseline, *measured.corners.values()]
    whole = [p.seconds + (p.evaluation_seconds or evaluation) for p in plans]
    return Range(min(whole), median(whole), max(whole))


def _hours(
    trainings: Sequence[float], seconds: Range, loaded: LoadedSweep, concurrent: int
) -> Range:
    nested = loaded.base.config.scaling.num_workers > 0
    fixed = FIXED_SECONDS["nested" if nested else "in process"]
    num = loaded.sweep.search.num_samples
    begun = (num + (num if loaded.tunes_baseline else 1)) * fixed
    low, mean, high = trainings
    pairs = ((low, seconds.low), (mean, seconds.expected), (high, seconds.high))
    # The last trials don't fill all places; one training can't be shared out.
    return Range(*(max((n * s + begun) / concurrent, s + fixed) / 3600 for n, s in pairs))


def _money(hours: Range, price: float | None) -> Range | None:
    if price is None:
        return None
    return Range(hours.low * price, hours.expected * price, hours.high * price)


def _num_evaluations(loaded: LoadedSweep) -> int:
    every = loaded.base.config.evaluation.every_forward_equivalents
    return DEFAULT_EVALUATIONS if every is None else max(1, round(loaded.budget / every))


def _num_cpus() -> float:
    return float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)


def _notes(loaded: LoadedSweep, price: float | None) -> tuple[str, ...]:
    notes = [
        "Early stopping is replayed on trials whose order is drawn at random: where the settings "
        "matter from early on, it saves as much or more.",
    ]
    if os.environ.get("RAY_ADDRESS"):
        notes.append(
            "Measured on this machine and its CPUs, not on the cluster at RAY_ADDRESS: with "
            "search.max_concurrent=N the hours are those of N trials at once."
        )
    if loaded.base.config.scaling.num_workers > 1:
        notes.append("Summing gradients between workers is not included.")
    if price is None:
        notes.append("--price-per-hour gives the money.")
    return tuple(notes)
