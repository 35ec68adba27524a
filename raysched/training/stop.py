"""How a running loop is asked to end: a small file in the run's folder.

SIGTERM reaches a driver, not its workers, and a sweep prunes a trial that runs elsewhere; both
write `<run_dir>/.stop`, and the loop saves a checkpoint and ends with the status it finds there.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raysched.training.files import write_json

STOP_FILE = ".stop"
# The folder may be on a network file system: it is not asked more often than this.
POLL_S = 0.2


@dataclass(frozen=True)
class StopOrder:
    """What the stop file says."""

    status: Literal["stopped", "pruned"]
    reason: str


def request_stop(run_dir: Path, status: Literal["stopped", "pruned"], reason: str) -> None:
    """Ask the loop that runs in `run_dir` to save its state and end."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / STOP_FILE, {"status": status, "reason": reason})


def clear_stop(run_dir: Path) -> None:
    """Forget an earlier request, so that a resumed run goes on."""
    (run_dir / STOP_FILE).unlink(missing_ok=True)


class StopWatch:
    """Looks for the stop file, at most every `POLL_S` seconds."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / STOP_FILE
        self._next = 0.0

    def requested(self, *, at_once: bool = False) -> StopOrder | None:
        """The request, or None; `at_once` looks however short the last look is ago."""
        now = time.monotonic()
        if now < self._next and not at_once:
            return None
        self._next = now + POLL_S
        if not self._path.is_file():
            return None
        content = json.loads(self._path.read_text(encoding="utf-8"))
        return StopOrder(status=content["status"], reason=content["reason"])
