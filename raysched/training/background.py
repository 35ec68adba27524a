"""One job at a time beside the training thread, whose errors come back to it."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs jobs in order; a job's error is raised by the next call of any method.

    Args:
        name: of its threads.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job once the one before it has ended.

        Raises:
            Exception: what the one before raised; this one isn't started then.
        """
        self.drain()

        def run() -> None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - raised in the training thread
                self._error = error

        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what a job has raised; doesn't wait."""
        if self._error is not None:
            self.drain()

    def drain(self) -> None:
        """Wait for the job, and raise what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
