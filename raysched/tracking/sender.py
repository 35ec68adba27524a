"""Sending a spool: in order, in batches, exactly once as far as the store can show it.

After each batch the acknowledged offset is written. A batch whose answer got lost is sent again:
MLflow's stores keep one copy of a point with the same key, step, time and value; an artifact
replaces itself; a picture is looked for before it is sent a second time. Files that the store does
not take while it takes points (no rights, artifact storage that is away) are put off, so that they
hold up nothing, and tried again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from raysched.tracking.client import connect, describe, is_locked, is_refused, status_code
from raysched.tracking.logged_model import log_pipeline
from raysched.tracking.runs import find_run, make_run, renew_run, set_status
from raysched.tracking.spool import (
    BY_FE,
    OFFLINE_PREFIX,
    Entry,
    Operation,
    RunRecord,
    Spool,
)
from raysched.tracking.store import artifact_root, ensure_experiment

MAX_METRICS_PER_CALL = 1000
# Shown against compute as well, under `by_fe/...` with round(FE) as step.
EVALUATION_PREFIXES = ("quality/", "exposure/")
FILE_OPERATIONS = ("image", "artifact", "model")
# After so many failed files in a row the others wait untried, for so long.
_FILE_FAILURES = 2
_FILES_AGAIN_S = 30.0


class Sender:
    """Sends one run's spool; used by the tracker's thread and by `raysched sync`.

    Args:
        run_dir: the run's folder.
        uri: absolute tracking URI with credentials, if any.
    """

    def __init__(self, run_dir: Path, uri: str) -> None:
        self.spool = Spool(run_dir)
        self.num_rejected = 0
        self.put_off_reason = ""
        self._uri = uri
        self._client: Any = None
        self._run_id = ""
        self._unsure = True
        self._file_failures = 0
        self._later_at = 0.0

    def hurry(self) -> None:
        """Try the files that were put off at the next sending, not only after a while."""
        self._later_at = 0.0

    def send(self, should_stop: Callable[[], bool] = lambda: False) -> int:
        """Send what is pending.

        Args:
            should_stop: asked between batches.

        Returns:
            Spool lines sent or put aside.

        Raises:
            Exception: the store failed; nothing is lost, call it again later.
            filelock.Timeout: another process is sending this spool.
        """
        with FileLock(self.spool.lock_path, timeout=0):
            try:
                return self._send_pending(should_stop)
            except Exception as error:
                self._unsure = True
                if not self._renewed(error):
                    raise
                return self._send_pending(should_stop)

    def _send_pending(self, should_stop: Callable[[], bool]) -> int:
        offset = self.spool.acknowledged()
        is_later_due = time.monotonic() >= self._later_at and self.spool.later_path.exists()
        is_idle = next(self.spool.entries(offset), None) is None and not is_later_due
        if is_idle and self._is_made():
            return 0
        self.spool.sync_to_disk()
        self._connect()
        num_sent = 0
        batch: list[Entry] = []
        for entry in self.spool.entries(offset):
            if batch and not _fits(batch, entry):
                num_sent += self._send_batch(batch)
                batch = []
                if should_stop():
                    return num_sent
            batch.append(entry)
        num_sent += self._send_batch(batch) if batch else 0
        return num_sent + (self._send_put_off(should_stop) if is_later_due else 0)

    def _is_made(self) -> bool:
        if not self._run_id:
            record = self.spool.load_record()
            assert record is not None, "start_run comes before sending"
            self._run_id = record.run_id or ""
        return bool(self._run_id)

    def _connect(self) -> None:
        if self._client is None:
            self._client = connect(self._uri)
        if not self._is_made():
            self._make()

    def _make(self) -> None:
        record = self.spool.load_record()
        assert record is not None
        self._run_id = make_run(self._client, record, self._experiment(record), look_first=True)
        self.spool.save_record(record)

    def _experiment(self, record: RunRecord) -> str:
        artifacts = artifact_root(self._uri, self.spool.run_dir.parent)
        return ensure_experiment(self._client, record.experiment, artifacts)

    def _renewed(self, error: Exception) -> bool:
        """True if the error came of a run that the store has lost, which is made anew now."""
        if not self._run_id or status_code(error) != 404:
            return False
        if find_run(self._client, self._run_id) is not None:
            return False
        record = self.spool.load_record()
        assert record is not None
        above = (Spool(folder).load_record() for folder in self.spool.run_dir.parents)
        parent = next((found for found in above if found is not None), None)
        if record.parent_run_id is not None and parent is not None:
            # The parent may be lost as well: whichever is sent first makes its place.
            record.parent_run_id = OFFLINE_PREFIX + parent.local_id
        self._run_id = renew_run(self._client, self.spool, record, self._experiment(record))
        return True

    def _send_batch(self, batch: list[Entry]) -> int:
        operation = batch[0].operation
        if operation["op"] == "metrics":
            points = [point for entry in batch for point in expand_metrics(entry.operation)]
            for start in range(0, len(points), MAX_METRICS_PER_CALL):
                self._send_points(points[start : start + MAX_METRICS_PER_CALL])
        elif self._must_wait(operation) or not self._send_single(operation):
            # Before it counts as acknowledged: a file may be sent twice, but not lost.
            put_off = {**operation, "reason": self.put_off_reason}
            self.spool.keep_for_later([*self.spool.put_off(), put_off])
        self.spool.acknowledge(batch[-1].end)
        self._unsure = False
        return len(batch)

    def _send_put_off(self, should_stop: Callable[[], bool]) -> int:
        """Try what was put off; returns how many entries are done with."""
        waiting, failed = self.spool.put_off(), []
        num_waiting, self._file_failures = len(waiting), 0
        self._unsure = True  # pictures are looked for first
        while waiting and self._file_failures < _FILE_FAILURES and not should_stop():
            operation = waiting.pop(0)
            if not self._send_single(operation):
                failed.append({**operation, "reason": self.put_off_reason})
            self.spool.keep_for_later([*waiting, *failed])
        self._unsure = False
        if not (waiting or failed):
            self.put_off_reason = ""
        return num_waiting - len(waiting) - len(failed)

    def _must_wait(self, operation: Operation) -> bool:
        """Whether the last files failed and their next try is not due, so that points go first."""
        is_file = operation["op"] in FILE_OPERATIONS
        is_early = time.monotonic() < self._later_at
        return is_file and is_early and self._file_failures >= _FILE_FAILURES

    def _send_points(self, points: list[Operation]) -> None:
        """Send metrics; halve a refused batch until only the bad point is left out."""
        from mlflow.entities import Metric

        metrics = [Metric(p["key"], float(p["value"]), p["time"], p["step"]) for p in points]
        try:
            self._client.log_batch(self._run_id, metrics=metrics)
        except Exception as error:
            if not is_refused(error):
                raise
            if len(points) == 1:
                self._reject({"op": "point", **points[0]}, error)
                return
            middle = len(points) // 2
            self._send_points(points[:middle])
            self._send_points(points[middle:])

    def _send_single(self, operation: Operation) -> bool:
        """Send an entry or reject it; False if it is a file that must wait."""
        try:
            self._perform(operation)
        except Exception as error:
            if is_refused(error):
                self._reject(operation, error)
                return True
            is_file = operation["op"] in FILE_OPERATIONS and not is_locked(error)
            if not is_file or not self._store_answers():
                raise
            self.put_off_reason = describe(error)
            self._file_failures += 1
            self._later_at = time.monotonic() + _FILES_AGAIN_S
            return False
        if operation["op"] in FILE_OPERATIONS:
            self._file_failures = 0
        if operation["op"] == "image":
            self.spool.resolve(operation["path"]).unlink(missing_ok=True)
        return True

    def _store_answers(self) -> bool:
        self._client.get_run(self._run_id)
        return True

    def _perform(self, operation: Operation) -> None:
        kind, run_id = operation["op"], self._run_id
        if kind == "image":
            self._send_image(operation)
        elif kind == "artifact":
            path, folder = self.spool.resolve(operation["path"]), operation["folder"]
            if path.is_dir():
                inside = f"{folder}/{path.name}" if folder else path.name
                self._client.log_artifacts(run_id, str(path), inside)
            else:
                path.stat()  # a missing file is the entry's fault, not the store's
                self._client.log_artifact(run_id, str(path), folder or None)
        elif kind == "model":
            pipeline = self.spool.resolve(operation["path"])
            log_pipeline(self._client, run_id, pipeline, operation["name"])
        elif kind == "tags":
            from mlflow.entities import RunTag

            tags = [RunTag(key, value) for key, value in operation["values"].items()]
            self._client.log_batch(run_id, tags=tags)
        else:
            assert kind == "status", kind
            set_status(self._client, run_id, operation["status"], operation["time"])

    def _send_image(self, operation: Operation) -> None:
        from PIL import Image

        key, step = operation["key"], operation["step"]
        if self._unsure:
            begin = f"{key.replace('/', '~')}+step+{step}+"
            files = (info.path for info in self._client.list_artifacts(self._run_id, "images"))
            names = [path.rpartition("/")[2] for path in files]
            if any(name.startswith(begin) and name.endswith("+compressed.webp") for name in names):
                return
        path = self.spool.resolve(operation["path"])
        if not path.exists():
            return  # deleted when it was sent, to a run that the store has lost since
        with Image.open(path) as image:
            image.load()
            self._client.log_image(
                self._run_id,
                image,
                key=key,
                step=step,
                timestamp=operation["time"],
                synchronous=True,
            )

    def _reject(self, operation: Operation, error: Exception) -> None:
        self.spool.reject(operation, describe(error))
        self.num_rejected += 1


def _fits(batch: list[Entry], entry: Entry) -> bool:
    """True if the next line may travel with the batch: metrics with metrics, up to the limit."""
    kinds = {batch[0].operation["op"], entry.operation["op"]}
    if kinds != {"metrics"}:
        return False
    # An evaluation's points count twice: against steps and against compute.
    size = sum(2 * len(line.operation["values"]) for line in [*batch, entry])
    return size <= MAX_METRICS_PER_CALL


def expand_metrics(operation: Operation) -> list[Operation]:
    """The points of a spool line, those against compute included."""
    points = []
    for key, value in operation["values"].items():
        point = {"key": key, "value": value, "time": operation["time"], "step": operation["step"]}
        points.append(point)
        if key.startswith(EVALUATION_PREFIXES):
            points.append({**point, "key": BY_FE + key, "step": round(operation["fe"])})
    return points
