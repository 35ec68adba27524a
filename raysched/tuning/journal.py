"""The sweep's own journal: one JSON line per event, on disk before the sweep goes on.

Ray Tune saves its state too seldom to survive a kill. The driver appends here what must not be
lost: which trial got which settings, its evaluations, its end. Reading it back gives the records
of all trials; a line that a kill tore off is dropped.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from raysched.errors import StorageError
from raysched.tuning.records import Point, TrialRecord

JOURNAL_FILE = "trials.jsonl"


class Journal:
    """Appends events to `<sweep_dir>/trials.jsonl` and keeps the records that follow from them.

    Args:
        folder: the sweep's folder, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL_FILE
        self.records: dict[int, TrialRecord] = {}
        self._drop_torn_line()
        for event in read_events(self.path):
            apply_event(self.records, event)

    def append(self, event: str, number: int, **content: Any) -> TrialRecord:
        """Write one event durably.

        Args:
            event: suggested, started, report, pruning, ended, retry or measured.
            number: the trial's number.
            content: JSON types; numbers that are not finite are allowed.

        Returns:
            The trial's record after the event.

        Raises:
            StorageError: the journal can't be written.
        """
        line = {"event": event, "number": number, "time": round(time.time(), 3), **content}
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise StorageError(
                f"{self.path}: can't write the sweep's journal: {error.strerror or error}; make "
                "room there, then go on with --resume"
            ) from error
        apply_event(self.records, line)
        return self.records[number]

    def ordered(self) -> list[TrialRecord]:
        """All records by number."""
        return [self.records[number] for number in sorted(self.records)]

    def _drop_torn_line(self) -> None:
        if not self.path.is_file():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self.path.open("r+b") as stream:
                stream.truncate(whole)


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a journal; a torn last line is left out.

    Raises:
        StorageError: a line in the middle is damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    events = []
    for index, line in enumerate(lines[:-1]):
        try:
            event = json.loads(line)
            events.append({**event, "number": int(event["number"]), "event": event["event"]})
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{path}: line {index + 1} is damaged ({error}); remove that line to go on "
                "without it"
            ) from error
    return events


def apply_event(records: dict[int, TrialRecord], event: dict[str, Any]) -> None:
    """Update the records by one event; events of unknown trials are ignored."""
    number, kind = event["number"], event["event"]
    if kind == "suggested":
        records[number] = TrialRecord(
            number=number,
            baseline=event["baseline"],
            assignments=event["assignments"],
            run_dir=event.get("run_dir", ""),
            tracking_id=event.get("tracking_id", ""),
        )
        return
    record = records.get(number)
    if record is None:
        return
    if kind == "started":
        record.status = "running"
    elif kind == "report":
        metrics = event.get("metrics") or {}
        record.add_point(Point(event["forward_equivalents"], _number(event["q"]), metrics))
        record.q_low, record.q_high = event.get("q_low"), event.get("q_high")
        record.seconds = event.get("seconds", record.seconds)
    elif kind == "pruning":
        # The decision is final: after a kill the trial is not run again only to be ended.
        record.status, record.error = "pruned", event["reason"]
    elif kind == "ended":
        _end(record, event)
    elif kind == "retry":
        # Its evaluations stay: it goes on from its last checkpoint.
        record.status, record.error = "waiting", None
        record.diverged = record.out_of_memory = False
    elif kind == "measured":
        record.objectives, record.censored = event["objectives"], event["censored"]


def _end(record: TrialRecord, event: dict[str, Any]) -> None:
    pruned = record.status == "pruned"
    if not (pruned and event["status"] == "stopped"):
        record.status = event["status"]
    # A pruned trial keeps the reason of the decision.
    record.error = event.get("error") or (record.error if record.status == "pruned" else None)
    record.diverged = event.get("diverged", False)
    record.out_of_memory = event.get("out_of_memory", False)
    record.fixed_seconds = event.get("fixed_seconds")
    record.work_seconds = event.get("work_seconds") or 0.0
    record.new_process = event.get("new_process", False)
    record.seconds = event.get("seconds") or record.seconds
    if event.get("q") is not None:
        record.q = event["q"]
        record.q_epsilon_scaled = event.get("q_epsilon_scaled")
        record.q_low, record.q_high = event.get("q_low"), event.get("q_high")
    record.metrics = event.get("metrics") or record.metrics
    record.further_curves = [
        [Point(p["forward_equivalents"], _number(p["q"]), p.get("metrics") or {}) for p in curve]
        for curve in event.get("further_curves") or []
    ]
    record.forward_equivalents = event.get("forward_equivalents") or record.forward_equivalents


def _number(value: float | None) -> float:
    return math.nan if value is None else value
