"""The sweep in the tracking store: one parent run, a child per trial, below it one per seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from raysched.config.paths import work_root
from raysched.config.space import LoadedSweep
from raysched.training.evaluate_step import PIPELINE_FOLDER
from raysched.training.protocols import RunStatus
from raysched.training.result import read_result
from raysched.training.run_folder import flatten, read_metrics
from raysched.tuning.compare import run_folders
from raysched.tuning.records import QUALITY, Q, SweepResult, TrialRecord
from raysched.tuning.trial import ERROR_FILE, OUTPUT_FILE, TrialPlan

if TYPE_CHECKING:
    from raysched.tracking import Courier, StoreHandle


@dataclass(frozen=True)
class SweepStore:
    """The store and the sweep's own run in it.

    Attributes:
        handle: the store, ready for use by all trials.
        parent: the sweep's run.
        folder: the sweep's folder.
        keys: the settings that every child shows as parameters.
        courier: sends what the trials have written down.
        context: tags that all runs share: version, commit, Ray job.
    """

    handle: StoreHandle
    parent: str
    folder: Path
    keys: tuple[str, ...]
    courier: Courier
    context: dict[str, str]

    def open_run(self, record: TrialRecord, plan: TrialPlan) -> str:
        """Make a trial's run below the sweep's; the same parameters for every trial.

        With a folder per seed, each has a run of its own below the trial's.
        """
        config = plan.config(record.as_trial(), plan.seeds[0])
        resolved = flatten(config.model_dump(mode="json"))
        params = {key: resolved.get(key) for key in self.keys}
        tags = {
            "raysched.sweep": self.folder.name,
            "raysched.trial": record.name,
            "raysched.baseline": str(record.baseline).lower(),
            "raysched.exposure": config.exposure,
            **self.context,
        }
        # The trial's name first: MLflow's lists cut long names at their end.
        run_dir, name = Path(record.run_dir), f"{record.name} {self.folder.name}"
        run_id = self._start(
            run_dir, name, self.parent, params, {"raysched.kind": "trial", **tags}
        )
        if not plan.one_run:
            for seed, folder in zip(plan.seeds, plan.run_dirs(record.as_trial()), strict=True):
                own = {"raysched.kind": "seed", "raysched.seed": str(seed), **tags}
                self._start(folder, f"seed-{seed} {name}", run_id, {**params, "seed": seed}, own)
        return run_id

    def _start(
        self, run_dir: Path, name: str, parent: str, params: dict[str, Any], tags: dict[str, str]
    ) -> str:
        from raysched.tracking import start_run

        run_dir.mkdir(parents=True, exist_ok=True)
        run_id = start_run(
            self.handle, name, run_dir=run_dir, parent_run_id=parent, params=params, tags=tags
        )
        self.courier.watch(run_dir)
        return run_id

    def close_run(self, record: TrialRecord) -> None:
        """Record a trial's final objectives, and its end where its process could not."""
        from raysched.tracking import note

        assert record.status in ("finished", "pruned", "failed"), record.status
        run_dir = Path(record.run_dir)
        seeds = sorted(run_dir.glob("seed-*/tracking"))
        failed = record.status == "failed"
        for step, spent, means in seed_means([folder.parent for folder in seeds]):
            note(run_dir, metrics=means, step=step, forward_equivalents=spent)
        logs = [run_dir / name for name in (ERROR_FILE, OUTPUT_FILE)]
        note(
            run_dir,
            metrics=final_metrics(record),
            files=[path for path in logs if path.is_file()],
            tags={"raysched.reason": record.error} if record.error else None,
            status=record.status if seeds or failed else None,
        )
        for folder in seeds:
            if read_result(folder.parent) is None:
                note(folder.parent, status="failed" if failed else "stopped")

    def mark_trials(self, result: SweepResult) -> None:
        """Tag every trial with its place in the sweep: winner, member of the Pareto front."""
        from raysched.tracking import note

        front = pareto_front(result.trials, result.budget)
        for record in result.trials:
            if record.tracking_id:
                tags = {
                    "raysched.pareto": str(record.number in front).lower(),
                    "raysched.winner": str(record is result.winner).lower(),
                }
                note(Path(record.run_dir), tags=tags)

    def finish(self, result: SweepResult) -> None:
        """Record the verdict and the report's files, and end the sweep's run."""
        from raysched.tracking import MlflowTracker

        tracker = MlflowTracker(self.handle, self.parent, self.folder, send=False)
        if result.verdict is not None:
            tracker.set_tags(
                {"verdict": result.verdict.text, "verdict.answer": result.verdict.answer}
            )
        if result.winner is not None:
            tracker.set_tags({"winner": result.winner.name})
            pipeline = run_folders(result.winner)[0] / PIPELINE_FOLDER
            if pipeline.is_dir():
                tracker.log_model(pipeline, "winner")
        if result.status != "stopped":
            self.mark_trials(result)
        for path in map(Path, result.files.values()):
            if path.is_file() and path.is_relative_to(self.folder):
                folder = "" if path.parent == self.folder else path.parent.name
                tracker.log_artifact(path, folder)
        status: RunStatus = result.status
        tracker.close(status)
        self.close()

    def close(self) -> None:
        """Send what the trials still have, and stop sending."""
        self.courier.close()

    def ui_command(self) -> str:
        """The line that opens the store's page."""
        from raysched.tracking import ui_command

        return ui_command(self.handle)


def open_store(loaded: LoadedSweep, folder: Path, *, budget: float) -> SweepStore | None:
    """Prepare the store once, in the driver, and make the sweep's run; None without tracking."""
    base, sweep = loaded.base.config, loaded.sweep
    if not base.tracking.enabled:
        return None
    from raysched.tracking import Courier, context_tags, describe_run, prepare_store, start_run

    handle = prepare_store(base.tracking, work_root())
    context = context_tags(Path.cwd())
    params: dict[str, Any] = {
        "algorithm": sweep.search.algorithm,
        "num_samples": sweep.search.num_samples,
        "budget_forward_equivalents": budget,
        "seeds": ",".join(map(str, sweep.seeds)),
    }
    parent = start_run(
        handle,
        folder.name,
        run_dir=folder,
        params=params,
        tags={"raysched.kind": "sweep", "raysched.sweep": folder.name, **context},
    )
    describe_run(folder)
    courier = Courier(handle)
    # A sweep that was killed may have left points of its trials behind.
    for record in sorted(folder.rglob("tracking/run.json")):
        courier.watch(record.parent.parent)
    return SweepStore(handle, parent, folder, tuple(sweep.space), courier, context)


def final_metrics(record: TrialRecord) -> dict[str, float | None]:
    """A trial's end under names that are the same for every trial and sweep."""
    return {
        "objective/q": record.q,
        "objective/q_low": record.q_low,
        "objective/q_high": record.q_high,
        "objective/q_epsilon_scaled": record.q_epsilon_scaled,
        "objective/forward_equivalents": record.forward_equivalents,
        "objective/seconds": record.seconds,
        **{f"objective/{name}": value for name, value in record.objectives.items()},
    }


def seed_means(run_dirs: Sequence[Path]) -> Iterator[tuple[int, float, dict[str, float]]]:
    """A trial's curves over its seeds: the means at the evaluations that all of them made.

    Args:
        run_dirs: of the seeds.

    Yields:
        Optimizer step, forward equivalents and metrics, each the mean over the seeds.
    """
    curves = [[p for p in read_metrics(folder) if Q in p["metrics"]] for folder in run_dirs]
    for points in zip(*curves, strict=False):
        metrics = [point["metrics"] for point in points]
        shared = set.intersection(*map(set, metrics))
        means = {
            key: fmean(values)
            for key in sorted(shared)
            if key.startswith(QUALITY) and None not in (values := [m[key] for m in metrics])
        }
        step = round(fmean(point["step"] for point in points))
        yield step, fmean(point["forward_equivalents"] for point in points), means


def pareto_front(trials: Sequence[TrialRecord], budget: float = math.inf) -> set[int]:
    """Numbers of the trials that no other one beats in both quality and compute."""
    points = [
        # What the last, whole step spent past the budget is no difference.
        (min(t.forward_equivalents, budget), t.q, t.number)
        for t in trials
        if t.status in ("finished", "pruned") and t.q is not None and isfinite(t.q)
    ]
    return {
        number
        for spent, q, number in points
        if not any(
            other <= spent and better <= q and (other, better) != (spent, q)
            for other, better, _ in points
        )
    }
