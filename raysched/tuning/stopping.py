"""Ending a sweep before its time: every running trial saves its state, nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.tune.stopper import Stopper

from raysched.signals import STOP
from raysched.training.stop import request_stop

# The request is repeated: a run may open its folder after the first one.
REPEAT_S = 1.0


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

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles what it was given; its snapshots are never read, the journal is.
        return {}

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


@contextmanager
def stop_on_signals(stopper: SweepStopper) -> Iterator[None]:
    """While it lasts, the process's first SIGTERM or SIGINT asks for the sweep's end."""

    def request(signal_name: str) -> None:
        stopper.request(f"the sweep got {signal_name}")

    # Ray has put handlers of its own in place by now.
    STOP.restore()
    STOP.register(request)
    try:
        yield
    finally:
        STOP.unregister(request)
