"""One trial, as Ray Tune runs it: train the run that the trial's settings make, once per seed.

Early stopping looks at the first seed, whose evaluations are reported as they come; the further
seeds of a trial that survives are trained to the end. A trial never raises: how it ended is its
last report, so that a failure is a result and the sweep goes on.
"""

from __future__ import annotations

import functools
import json
import math
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

from raysched.config.loading import assign, baseline_config
from raysched.config.paths import anchored
from raysched.config.run import BudgetConfig, RunConfig
from raysched.config.storage_uri import below
from raysched.errors import LostResourcesError, UserError
from raysched.tuning.records import (
    FORWARD_EQUIVALENTS,
    FURTHER_CURVES,
    METRICS,
    OBJECTIVE,
    Q_EPSILON_SCALED,
    Q_HIGH,
    Q_LOW,
    Q,
    further_metrics,
    trial_name,
)

if TYPE_CHECKING:
    from raysched.tracking import StoreHandle
    from raysched.training.result import RunResult

TrialReport = Callable[[dict[str, Any]], None]
OUTPUT_FILE = "output.txt"
# This process once it has run a trial; empty in a new one.
_processes: set[int] = set()
# In a trial's folder: the traceback that ended it.
ERROR_FILE = "error.txt"


class Train(Protocol):
    """Trains one run in its folder, from its last checkpoint if there is one."""

    def __call__(
        self,
        config: RunConfig,
        *,
        run_dir: Path,
        report: Callable[[Mapping[str, Any]], None],
        tracking: tuple[StoreHandle, str] | None,
    ) -> RunResult:
        """Call `report` once per evaluation, in order; return how it ended."""


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a sweep share; it is sent to the trial's process.

    Attributes:
        raw: the base run as it was written, which the settings change.
        folder: the sweep's folder.
        budget: forward equivalents of every trial and seed.
        seeds: training seeds.
        store: the tracking store, None without tracking.
        train: trains one run.
        root: what the data's relative paths start from; a trial works in another folder.
        written: runs that are given rather than made of settings, by the trial's number.
    """

    raw: Mapping[str, Any]
    folder: Path
    budget: float
    seeds: tuple[int, ...]
    store: StoreHandle | None
    train: Train
    root: Path = field(default_factory=Path.cwd)
    written: Mapping[int, RunConfig] = field(default_factory=dict)

    @property
    def stop_file(self) -> Path:
        """Its presence ends the sweep: no further training is begun."""
        return self.folder / ".stop"

    def trial_dir(self, trial: Mapping[str, Any]) -> Path:
        """The folder of a trial."""
        name = trial_name(trial["trial_number"], baseline=trial["baseline"])
        return self.folder / "trials" / name

    @property
    def one_run(self) -> bool:
        """Whether a trial's folder is that of its run; given runs may get more seeds later."""
        return len(self.seeds) == 1 and not self.written

    def run_dirs(self, trial: Mapping[str, Any]) -> list[Path]:
        """The folders of a trial's runs, one per seed."""
        folder = self.trial_dir(trial)
        return [folder] if self.one_run else [folder / f"seed-{s}" for s in self.seeds]

    def config(self, trial: Mapping[str, Any], seed: int) -> RunConfig:
        """The run of a trial: its settings, the common budget, a seed."""
        if trial["trial_number"] in self.written:
            changed = self.written[trial["trial_number"]]
        elif trial["baseline"]:
            changed = baseline_config(self.raw, trial.get("assignments"))
        else:
            changed = assign(self.raw, trial["assignments"])
        changed = anchored(changed, self.root)
        budget = BudgetConfig(forward_equivalents=self.budget)
        storage = changed.training.storage_path
        if storage is not None:
            # Trials of all sweeps have the same names: theirs is a place of this sweep's own.
            place = self.run_dirs(trial)[0].parent.relative_to(self.folder.parent)
            storage = below(storage, place.as_posix())
        training = {"budget": budget, "storage_path": storage}
        return changed.model_copy(
            update={
                "name": trial_name(trial["trial_number"], baseline=trial["baseline"]),
                "seed": seed,
                "training": changed.training.model_copy(update=training),
            }
        )


def rolls_out(config: RunConfig) -> bool:
    """Whether a run trains with rollouts, rather than by another method or by none."""
    rolls = config.scheduled_sampling.max_step_offset > 0
    return config.exposure == "scheduled_sampling" and rolls


def run_trial(trial: dict[str, Any], plan: TrialPlan) -> None:
    """The function that Ray Tune calls; `trial` is what the searcher suggested.

    What the trial's process prints goes to `output.txt` in the trial's folder, and what happened
    to the trial to `log.txt`.
    """
    from ray import tune

    from raysched.training.events import note_event
    from raysched.training.output import captured

    folder = plan.trial_dir(trial)
    folder.mkdir(parents=True, exist_ok=True)
    new_process = not _processes
    _processes.add(os.getpid())
    note_event(folder, f"started in process {os.getpid()}: {describe(trial)}")
    with captured(folder / OUTPUT_FILE):
        end = train_trial(trial, plan, tune.report)
    note_event(folder, f"{end['status']}{': ' + end['error'] if end['error'] else ''}")
    tune.report({**end, "new_process": new_process})


def describe(trial: Mapping[str, Any]) -> str:
    """A trial's settings for its log."""
    settings = json.dumps(trial["assignments"])
    return f"baseline {settings}" if trial["baseline"] else settings


def train_trial(trial: Mapping[str, Any], plan: TrialPlan, report: TrialReport) -> dict[str, Any]:
    """Train a trial on all seeds.

    Args:
        trial: trial_number, baseline, assignments, tracking_id.
        plan: what all trials share.
        report: told the evaluations of the first seed.

    Returns:
        The last report: status, q with interval, compute, seconds, error; `again` where it lost
        its place in the cluster and is to be begun again.
    """
    results: list[RunResult] = []
    try:
        for index, (seed, run_dir) in enumerate(
            zip(plan.seeds, plan.run_dirs(trial), strict=True)
        ):
            if plan.stop_file.exists():
                return _ended("stopped", results)
            first = index == 0
            results.append(_train_seed(trial, plan, seed, run_dir, report if first else None))
            if results[-1].status != "finished":
                break
    except LostResourcesError as error:
        # No fault of its settings: it goes on from its last checkpoint.
        return {**_ended("stopped", results, error=str(error)), "again": True}
    except UserError as error:
        return _failed(results, error, str(error))
    except Exception as error:  # noqa: BLE001 - a trial's failure is a result of the sweep
        log = plan.trial_dir(trial) / ERROR_FILE
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc(), encoding="utf-8")
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return _failed(results, error, f"{reason} (all of it in {log})")
    return _ended(results[-1].status, results, error=results[-1].error)


def _failed(results: Sequence[RunResult], error: Exception, text: str) -> dict[str, Any]:
    from raysched.training.out_of_memory import is_out_of_memory

    return {**_ended("failed", results, error=text), "out_of_memory": is_out_of_memory(error)}


def _train_seed(
    trial: Mapping[str, Any], plan: TrialPlan, seed: int, run_dir: Path, report: TrialReport | None
) -> RunResult:
    from raysched.training.result import read_result

    done = read_result(run_dir)
    if done is not None and done.status == "finished":
        return done

    def relay(metrics: Mapping[str, Any]) -> None:
        if report is not None and Q in metrics:
            report(_evaluation(metrics, run_dir))

    return plan.train(
        plan.config(trial, seed),
        run_dir=run_dir,
        report=relay,
        tracking=(plan.store, _tracked_run(trial, plan, run_dir)) if plan.store else None,
    )


def _tracked_run(trial: Mapping[str, Any], plan: TrialPlan, run_dir: Path) -> str:
    """The seed's run in the store: the trial's own, or the one below it that the driver made."""
    from raysched.tracking import recorded_run

    return str(
        trial["tracking_id"] if plan.one_run else recorded_run(run_dir) or trial["tracking_id"]
    )


def _evaluation(metrics: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    return {
        OBJECTIVE: float(metrics[Q]),
        Q_LOW: metrics.get(Q_LOW),
        Q_HIGH: metrics.get(Q_HIGH),
        FORWARD_EQUIVALENTS: float(metrics[FORWARD_EQUIVALENTS]),
        METRICS: further_metrics(metrics),
        "run_dir": str(run_dir),
        "ended": False,
    }


def _ended(
    status: str, results: Sequence[RunResult], *, error: str | None = None
) -> dict[str, Any]:
    """The last report: means over the seeds that were trained."""
    metrics = [result.metrics for result in results]
    beside = [further_metrics(entry) for entry in metrics]
    compute = [result.compute for result in results]
    return {
        "ended": True,
        "status": status,
        "error": error,
        "diverged": status == "failed" and _diverged(results),
        "out_of_memory": False,
        "again": False,
        "work_seconds": sum(entry.get("wall_seconds", 0.0) for entry in compute),
        OBJECTIVE: _mean(metrics, Q),
        Q_LOW: _mean(metrics, Q_LOW),
        Q_HIGH: _mean(metrics, Q_HIGH),
        Q_EPSILON_SCALED: _mean(metrics, Q_EPSILON_SCALED),
        FORWARD_EQUIVALENTS: _mean(compute, "forward_equivalents"),
        "seconds": sum(entry.get("seconds", 0.0) for entry in compute),
        FURTHER_CURVES: [_curve(Path(result.output_dir)) for result in results[1:]],
        METRICS: {name: _mean(beside, name) for name in (beside[0] if beside else {})},
    }


def _mean(entries: Sequence[Mapping[str, float]], key: str) -> float | None:
    # The ends of intervals are averaged too: the seeds share noise and reference.
    values = [entry[key] for entry in entries if entry.get(key) is not None]
    return fmean(values) if values else None


def _curve(run_dir: Path) -> list[dict[str, Any]]:
    """A run's evaluations from its own log: those of the first seed only are reported."""
    from raysched.training.run_folder import read_metrics

    return [
        {
            "forward_equivalents": float(point["forward_equivalents"]),
            "q": float(point["metrics"][Q]),
            "metrics": further_metrics(point["metrics"]),
        }
        for point in read_metrics(run_dir)
        if point["metrics"].get(Q) is not None
    ]


def _diverged(results: Sequence[RunResult]) -> bool:
    last = results[-1] if results else None
    if last is None:
        return False
    return last.diverged or any(not math.isfinite(value) for value in last.metrics.values())


def train_run(
    config: RunConfig,
    *,
    run_dir: Path,
    report: Callable[[Mapping[str, Any]], None],
    tracking: tuple[StoreHandle, str] | None,
) -> RunResult:
    """Train one run by the launcher, tracked under the run that the driver made for it."""
    from raysched.distributed.launch import run_training
    from raysched.distributed.train import make_tracker
    from raysched.training.run_folder import holds_run, open_run_folder
    from raysched.training.stop import clear_stop

    open_run_folder(config, run_dir, resume=holds_run(run_dir))
    clear_stop(run_dir)
    # The sweep's driver carries the points of all trials.
    make = functools.partial(make_tracker, *tracking, run_dir, send=False) if tracking else None
    # Its trials wait for room as long as they take: one that gave up would say nothing about its
    # settings.
    scaling = config.scaling.model_copy(update={"resource_timeout_s": None})
    patient = config.model_copy(update={"scaling": scaling})
    return run_training(patient, run_dir=run_dir, report=report, make_tracker=make)
