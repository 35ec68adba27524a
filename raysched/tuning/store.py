"""The sweep in the tracking store: one parent run, one child per trial."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysched.config.space import LoadedSweep
from raysched.training.protocols import RunStatus
from raysched.training.run_folder import flatten
from raysched.tuning.records import SweepResult, TrialRecord
from raysched.tuning.trial import TrialPlan

if TYPE_CHECKING:
    from raysched.tracking import Courier, StoreHandle

# A store that doesn't answer must not hold up the other trials for long.
TIMEOUT_S = 10.0


@dataclass(frozen=True)
class SweepStore:
    """The store and the sweep's own run in it.

    Attributes:
        handle: the store, ready for use by all trials.
        parent: the sweep's run.
        folder: the sweep's folder.
        keys: the settings that every child shows as parameters.
        courier: sends what the trials have written down.
    """

    handle: StoreHandle
    parent: str
    folder: Path
    keys: tuple[str, ...]
    courier: Courier

    def open_run(self, record: TrialRecord, plan: TrialPlan) -> str:
        """Make a trial's run below the sweep's; the same parameters for every trial."""
        from raysched.tracking import start_run

        resolved = flatten(plan.config(record.as_trial(), plan.seeds[0]).model_dump(mode="json"))
        run_dir = Path(record.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        run_id = start_run(
            self.handle,
            f"{self.folder.name}/{record.name}",
            run_dir=run_dir,
            parent_run_id=self.parent,
            params={key: resolved.get(key) for key in self.keys},
            tags={
                "raysched.kind": "trial",
                "raysched.sweep": self.folder.name,
                "raysched.trial": record.name,
                "raysched.baseline": str(record.baseline).lower(),
            },
        )
        self.courier.watch(run_dir)
        return run_id

    def close_run(self, record: TrialRecord) -> None:
        """End the run of a trial that failed."""
        from raysched.tracking import finish_run

        run_dir = Path(record.run_dir)
        finish_run(self.handle, record.tracking_id, "failed", run_dir=run_dir, timeout_s=TIMEOUT_S)

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
    from raysched.tracking import Courier, prepare_store, start_run

    handle = prepare_store(base.tracking, Path.cwd())
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
        tags={"raysched.kind": "sweep", "raysched.sweep": folder.name},
    )
    courier = Courier(handle)
    # A sweep that was killed may have left points of its trials behind.
    for record in sorted(folder.rglob("tracking/run.json")):
        courier.watch(record.parent.parent)
    return SweepStore(handle, parent, folder, tuple(sweep.space), courier)
