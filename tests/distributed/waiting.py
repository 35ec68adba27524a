"""Waiting for what a run does, with a limit."""

from __future__ import annotations

import json
import time
from pathlib import Path

from raysched.training.heartbeat import WORKERS_FOLDER


def wait_until(condition, what: str, limit_s: float = 90.0):
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {limit_s} s"
        time.sleep(0.02)
    return found


def beats(run_dir: Path) -> list[dict]:
    found = []
    for path in sorted((run_dir / WORKERS_FOLDER).glob("rank-*.json")):
        try:
            found.append(json.loads(path.read_text()))
        except json.JSONDecodeError:
            return []
    return found
