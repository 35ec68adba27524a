"""The driver's ears: trials' reports go into the journal, to the sampler and to the screen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Callback

from raysched.training.files import storage_errors
from raysched.tuning.journal import Journal
from raysched.tuning.proposals import Proposals
from raysched.tuning.records import (
    FORWARD_EQUIVALENTS,
    FURTHER_CURVES,
    METRICS,
    OBJECTIVE,
    Q_EPSILON_SCALED,
    Q_HIGH,
    Q_LOW,
    TrialRecord,
)


class Monitor(Callback):  # type: ignore[misc]
    """Journals starts, evaluations and ends, and passes them on.

    Args:
        journal: the sweep's journal.
        proposals: told how a trial ended.
        show: called with a record after each event.
        close_run: ends a trial's run in the tracking store.
        measure: journals the objectives of trials that reached the budget.
    """

    def __init__(
        self,
        journal: Journal,
        proposals: Proposals,
        *,
        show: Callable[[str, TrialRecord], None],
        close_run: Callable[[TrialRecord], None] = lambda _: None,
        measure: Callable[[], None] = lambda: None,
    ) -> None:
        self._journal = journal
        self._proposals = proposals
        self._show = show
        self._close_run = close_run
        self._measure = measure

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles what it was given; its snapshots are never read, the journal is.
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has got its resources."""
        record = self._journal.append("started", trial.config["trial_number"])
        self._show("started", record)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An evaluation, or the trial's last report."""
        number = trial.config["trial_number"]
        if result.get("ended"):
            self._end(number, result)
        elif OBJECTIVE in result:
            record = self._journal.append(
                "report",
                number,
                q=result[OBJECTIVE],
                q_low=result.get(Q_LOW),
                q_high=result.get(Q_HIGH),
                forward_equivalents=result[FORWARD_EQUIVALENTS],
                metrics=result.get(METRICS) or {},
            )
            self._show("report", record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's process died or Ray gave it up."""
        number = trial.config["trial_number"]
        # Tune copies this file to the trial's storage only later.
        written = Path(trial.error_file or "")
        details = written.read_text(encoding="utf-8") if written.is_file() else ""
        reason = details.strip().splitlines()[-1] if details.strip() else "for an unknown reason"
        if "died" in details:
            reason = "its process died: killed, out of memory, or a crash"
        log = Path(self._journal.records[number].run_dir) / "error.txt"
        with storage_errors(log, "writing why the trial failed"):
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(details + "\n", encoding="utf-8")
        self._end(number, {"status": "failed", "error": f"{reason} (all of it in {log})"})

    def _end(self, number: int, result: dict[str, Any]) -> None:
        record = self._journal.append(
            "ended",
            number,
            status=result["status"],
            error=result.get("error"),
            diverged=bool(result.get("diverged")),
            q=result.get(OBJECTIVE),
            q_low=result.get(Q_LOW),
            q_high=result.get(Q_HIGH),
            q_epsilon_scaled=result.get(Q_EPSILON_SCALED),
            forward_equivalents=result.get(FORWARD_EQUIVALENTS),
            seconds=result.get("seconds"),
            metrics=result.get(METRICS) or {},
            further_curves=result.get(FURTHER_CURVES) or [],
        )
        if record.ended:
            self._measure()
            self._proposals.tell(record)
            self._close_run(record)
        self._show("ended", record)
