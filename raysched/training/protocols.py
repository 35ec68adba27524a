"""What the training loop is given from outside: where to report, where to track."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from raysched.errors import StorageError

RunStatus = Literal["finished", "stopped", "pruned", "failed"]
# Whoever interrupts, or kills after the grace period, does not wait for a store.
INTERRUPTED_FLUSH_S = 2.0


# Called on every rank after each evaluation, with the metrics of rank 0 there.
Report = Callable[[Mapping[str, float]], None]


@dataclass(frozen=True)
class EvaluationEnd:
    """How an evaluation beside the training ended.

    Attributes:
        error: why it failed, in one line; None if there is a result.
    """

    error: str | None = None


class Evaluator(Protocol):
    """Evaluates snapshots of the EMA weights beside the training, one at a time."""

    def start(self, folder: Path) -> None:
        """Begin with a snapshot; returns at once."""

    def poll(self, timeout_s: float) -> EvaluationEnd | None:
        """How it ended; None while it runs, after at most `timeout_s`."""

    def close(self) -> None:
        """Stop whatever runs; it may be started again."""


class Tracker(Protocol):
    """Where a run is recorded; only rank 0 has one that does something."""

    def log_metrics(
        self, metrics: Mapping[str, float], *, step: int, forward_equivalents: float
    ) -> None:
        """Record metrics at an optimizer step and at the compute spent so far."""

    def log_image(self, key: str, image: NDArray[np.uint8], *, step: int) -> None:
        """Record an image (H, W, 3) under a key that is the same for all runs."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Record a file or a folder."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set the run's tags."""

    def close(self, status: RunStatus, timeout_s: float = 30.0) -> None:
        """Send what is pending, at most for `timeout_s`, and mark the run's end."""


class NullTracker:
    """Records nothing: other ranks, unit tests, `tracking.enabled: false`."""

    def log_metrics(
        self, metrics: Mapping[str, float], *, step: int, forward_equivalents: float
    ) -> None:
        """Do nothing."""

    def log_image(self, key: str, image: NDArray[np.uint8], *, step: int) -> None:
        """Do nothing."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Do nothing."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Do nothing."""

    def close(self, status: RunStatus, timeout_s: float = 30.0) -> None:
        """Do nothing."""


@contextlib.contextmanager
def closed_at_errors(tracker: Tracker) -> Iterator[None]:
    """Let the block close its tracker; where an error ends it, send what is there and say so."""
    try:
        yield
    except BaseException as error:
        # A full disk has no room for this either; the error itself is on its way.
        with contextlib.suppress(StorageError):
            if isinstance(error, Exception):
                tracker.close("failed")
            else:
                tracker.close("stopped", timeout_s=INTERRUPTED_FLUSH_S)
        raise
