"""`log.txt` of a run's folder: what happened to it beside training, one dated line each.

Lost workers, hung ones, memory that ran out: what a person asks for when a run took longer than
it should have. Metrics are in `metrics.jsonl`.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

LOG_FILE = "log.txt"

log = logging.getLogger(__name__)


def note_event(run_dir: Path, text: str) -> None:
    """Add a line to the run's log; a full disk must not make things worse than they are."""
    line = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}\n"
    try:
        with (run_dir / LOG_FILE).open("a", encoding="utf-8") as stream:
            stream.write(line)
    except OSError as error:
        log.warning("%s: can't be written (%s): %s", run_dir / LOG_FILE, error.strerror, text)


def read_events(run_dir: Path) -> list[str]:
    """The lines of a run's log, without their dates."""
    path = run_dir / LOG_FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.partition(" ")[2] for line in lines]
