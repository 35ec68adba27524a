"""The driver's ears: what trials report goes into the journal, to the sampler and to the screen."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.stopper import Stopper

from raysched.training.stop import request_stop
from raysched.tuning.journal import Journal
from raysched.tuning.proposals import Proposals
from raysched.tuning.records import FORWARD_EQUIVALENTS, OBJECTIVE, Q_HIGH, Q_LOW, TrialRecord

# While the sweep is stopping, the request is repeated: a run may open its folder after the first.
REPEAT_S = 1.0


class Monitor(Callback):  # type: ignore[misc]
    """Journals starts, evaluations and ends, and passes them on.

    Args:
        journal: the sweep's journal.
        proposals: told how a trial ended.
        show: called with a record after each event.
        close_run: ends a trial's run in the tracking store whose process died.
    """

    def __init__(
        self,
        journal: Journal,
        proposals: Proposals,
        *,
        show: Callable[[str, TrialRecord], None],
        close_run: Callable[[TrialRecord], None] = lambda _: None,
    ) -> None:
        self._journal = journal
        self._proposals = proposals
        self._show = show
        self._close_run = close_run

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
            )
            self._show("report", record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's process died or Ray gave it up."""
        number = trial.config["trial_number"]
        reason = str(trial.get_error() or "its process died").strip().splitlines()[-1]
        self._end(number, {"status": "failed", "error": reason})
        self._close_run(self._journal.records[number])

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
            forward_equivalents=result.get(FORWARD_EQUIVALENTS),
            seconds=result.get("seconds"),
        )
        if record.ended:
            self._proposals.tell(record)
        self._show("ended", record)


class SweepStopper(Stopper):  # type: ignore[misc]
    """Ends the sweep on request: every running trial saves its state and ends itself.

    Args:
        stop_file: made on request, so that no further training is begun.
        folders: the folders of the runs that may be training now.
        patience_s: after so long Tune ends what is still running (checkpoints stay).
    """

    def __init__(
        self, stop_file: Path, folders: Callable[[], list[Path]], *, patience_s: float
    ) -> None:
        self._stop_file = stop_file
        self._folders = folders
        self._patience_s = patience_s
        self._deadline = 0.0
        self._next = 0.0
        self.reason = ""

    @property
    def stopping(self) -> bool:
        """Whether the end was asked for."""
        return bool(self.reason)

    def request(self, reason: str) -> None:
        """Ask for the end; safe in a signal handler."""
        self.reason = self.reason or reason
        self._deadline = self._deadline or time.monotonic() + self._patience_s

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never ends a single trial."""
        return False

    def stop_all(self) -> bool:
        """Tune asks after every event; True only when patience has run out."""
        now = time.monotonic()
        if not self.stopping:
            return False
        if now >= self._next:
            self._next = now + REPEAT_S
            self._stop_file.touch()
            for folder in self._folders():
                if folder.is_dir():
                    request_stop(folder, "stopped", self.reason)
        return now >= self._deadline
