"""The driver's ears: trials' reports go into the journal, to the sampler and to the screen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Callback

from raysched.distributed.failures import node_lost
from raysched.training.files import storage_errors
from raysched.training.out_of_memory import KILLER_WORDS
from raysched.tuning.journal import Journal
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
from raysched.tuning.trial import ERROR_FILE


class Monitor(Callback):  # type: ignore[misc]
    """Journals starts, evaluations and ends, and passes them on.

    Args:
        journal: the sweep's journal.
        tell: the sampler, told how a trial ended.
        show: called with a record after each event.
        close_run: ends a trial's run in the tracking store.
        measure: journals the objectives of trials that reached the budget.
        fixed_seconds: trial's number, seconds of its work -> what it cost beside them.
        requeue: takes a trial whose node was lost, to be begun again.
        look: called all the time, also while nothing is reported.
        check: called after every end, to stop a sweep that can't be judged any more.
    """

    def __init__(
        self,
        journal: Journal,
        tell: Callable[[TrialRecord], None],
        *,
        show: Callable[[str, TrialRecord], None],
        close_run: Callable[[TrialRecord], None] = lambda _: None,
        measure: Callable[[], None] = lambda: None,
        fixed_seconds: Callable[[int, float], float | None] = lambda *_: None,
        requeue: Callable[[TrialRecord], None] = lambda _: None,
        look: Callable[[], None] = lambda: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._journal = journal
        self._tell = tell
        self._show = show
        self._close_run = close_run
        self._measure = measure
        self._fixed_seconds = fixed_seconds
        self._requeue = requeue
        self._look, self._check = look, check

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles what it was given; its snapshots are never read, the journal is.
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune's loop goes round, at least every few seconds."""
        self._look()

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
            if result.get("again"):
                self._requeue(self._journal.records[number])
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
        log = Path(self._journal.records[number].run_dir) / ERROR_FILE
        with storage_errors(log, "writing why the trial failed"):
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(details + "\n", encoding="utf-8")
        if node_lost(details):
            # No fault of its settings: it goes on from its last checkpoint.
            self._end(number, {"status": "stopped", "error": "its node was lost"})
            self._requeue(self._journal.records[number])
            return
        killed = any(words in details.lower() for words in KILLER_WORDS)
        error = f"{_reason(details, killed=killed)} (all of it in {log})"
        self._end(number, {"status": "failed", "error": error, "out_of_memory": killed})

    def _end(self, number: int, result: dict[str, Any]) -> None:
        work = result.get("work_seconds") or 0.0
        record = self._journal.append(
            "ended",
            number,
            status=result["status"],
            error=result.get("error"),
            diverged=bool(result.get("diverged")),
            out_of_memory=bool(result.get("out_of_memory")),
            fixed_seconds=self._fixed_seconds(number, work),
            work_seconds=work,
            new_process=bool(result.get("new_process")),
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
            self._tell(record)
            self._close_run(record)
        self._show("ended", record)
        self._check()


def _reason(details: str, *, killed: bool) -> str:
    if killed:
        return "out of memory: Ray ended its process, because its node ran low on memory"
    if "died" in details:
        return "its process died: killed, out of memory, or a crash"
    return details.strip().splitlines()[-1] if details.strip() else "for an unknown reason"
