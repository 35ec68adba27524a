"""The spool: what a run wants recorded, on disk before anything is sent.

Files in `<run_dir>/tracking/`:

| file | content |
|---|---|
| `run.json` | how the run is made in MLflow (`RunRecord`); `run_id` is null until it exists |
| `spool.jsonl` | one JSON object per line, appended in order, never rewritten |
| `acknowledged.json` | `{"offset": bytes of spool.jsonl that MLflow has}`; replaced atomically |
| `later.jsonl` | files that the store would not take while it took points; tried again |
| `rejected.jsonl` | entries that MLflow refused for good, with the reason |
| `images/*.png` | pictures that wait; deleted once MLflow has them |
| `sender.lock` | held while someone sends, so that two processes don't |

Lines of `spool.jsonl` (`time` is milliseconds since 1970; non-finite numbers are the strings
"nan", "inf", "-inf"; paths are relative to the run folder where they lie inside it):

    {"op": "metrics", "time": …, "step": 40, "fe": 7680.0, "values": {"train/loss": 0.5}}
    {"op": "image", "time": …, "step": 40, "key": "samples", "path": "tracking/images/….png"}
    {"op": "artifact", "path": "config.yaml", "folder": ""}
    {"op": "model", "path": "pipeline", "name": "winner"}
    {"op": "tags", "values": {"sweep": "digits"}}
    {"op": "status", "time": …, "status": "running" | "finished" | "stopped" | "pruned" | "failed"}

A line counts once its newline is there: what a killed process left half-written is ignored, and
cut off when the run goes on.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raysched.errors import StorageError

OFFLINE_PREFIX = "offline-"
# Before the names of metrics that are shown against compute.
BY_FE = "by_fe/"
_FORMAT_VERSION = 1
_READ_BYTES = 1 << 20
Operation = dict[str, Any]


@dataclass
class RunRecord:
    """What is needed to make a run in MLflow, now or later.

    Attributes:
        uri: tracking URI without credentials.
        experiment: name of the experiment.
        local_id: our own identity of the run, a tag in MLflow, so that it is made only once.
        name: shown name; empty if only the identity is known here.
        run_id: MLflow's id; None until the run exists.
        parent_run_id: MLflow's id of the parent, or its offline id.
        start_time: milliseconds since 1970.
    """

    uri: str
    experiment: str
    local_id: str
    name: str = ""
    run_id: str | None = None
    parent_run_id: str | None = None
    start_time: int = 0
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def public_id(self) -> str:
        """MLflow's run id, or the offline one as long as there is none."""
        return self.run_id or OFFLINE_PREFIX + self.local_id


@dataclass(frozen=True)
class Entry:
    """A line of the spool, and the offset in bytes where the next one begins."""

    operation: Operation
    end: int


def encode_number(value: float) -> float | str:
    """A number as JSON knows it."""
    return value if math.isfinite(value) else str(value)


def count_points(operation: Operation) -> int:
    """How many points a line holds: its metrics, else one."""
    return len(operation["values"]) if operation["op"] == "metrics" else 1


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class Spool:
    """The files of one run; appending, reading and acknowledging may happen in any process."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir.absolute()
        self.folder = self.run_dir / "tracking"
        self.path = self.folder / "spool.jsonl"
        self.record_path = self.folder / "run.json"
        self.later_path = self.folder / "later.jsonl"
        self.rejected_path = self.folder / "rejected.jsonl"
        self.images = self.folder / "images"
        self.lock_path = self.folder / "sender.lock"
        self._acknowledged_path = self.folder / "acknowledged.json"
        self._descriptor: int | None = None
        self._mutex = threading.Lock()

    def load_record(self) -> RunRecord | None:
        """The run's record, or None if the run was never started.

        Raises:
            StorageError: the file can't be read.
        """
        if not self.record_path.exists():
            return None
        try:
            content = json.loads(self.record_path.read_text(encoding="utf-8"))
            content.pop("version")
            return RunRecord(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{self.record_path}: unreadable record of the tracked run ({error}); "
                "delete the file to begin a new MLflow run"
            ) from error

    def save_record(self, record: RunRecord) -> None:
        """Write the run's record atomically."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            content = {"version": _FORMAT_VERSION, **asdict(record)}
            _replace(self.record_path, json.dumps(content, indent=1, ensure_ascii=False))
        except OSError as error:
            raise self._unwritable(error) from error

    def open(self) -> None:
        """Make ready for appending; cut off a half-written last line."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            self._descriptor = os.open(self.path, flags, 0o644)
            size = os.fstat(self._descriptor).st_size
            complete = self._complete_size(size)
            if complete < size:
                os.ftruncate(self._descriptor, complete)
        except OSError as error:
            raise self._unwritable(error) from error

    def _complete_size(self, size: int) -> int:
        """Bytes up to and with the last newline."""
        with self.path.open("rb") as file:
            end = size
            while end > 0:
                begin = max(0, end - _READ_BYTES)
                file.seek(begin)
                newline = file.read(end - begin).rfind(b"\n")
                if newline >= 0:
                    return begin + newline + 1
                end = begin
        return 0

    def append(self, operation: Operation) -> None:
        """Add one line; it outlives the process from here on.

        Raises:
            StorageError: the disk is full or gone.
        """
        line = (json.dumps(operation, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with self._mutex:
            if self._descriptor is None:
                self.open()
            assert self._descriptor is not None
            try:
                written = os.write(self._descriptor, line)
            except OSError as error:
                raise self._unwritable(error) from error
            if written < len(line):
                size = os.fstat(self._descriptor).st_size
                os.ftruncate(self._descriptor, size - written)
                raise self._unwritable(OSError(28, "No space left on device"))

    def _unwritable(self, error: OSError) -> StorageError:
        return StorageError(f"{self.folder}: can't keep the tracked points: {error.strerror}")

    def sync_to_disk(self) -> None:
        """Make what was appended, by any process, outlive the machine as well."""
        if not self.path.exists():
            return
        # A descriptor of its own: appending must not wait for the disk.
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        with self._mutex:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def entries(self, offset: int = 0) -> Iterator[Entry]:
        """The complete lines from a byte offset on."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield Entry(json.loads(line), offset)

    def acknowledged(self) -> int:
        """Bytes that MLflow has; 0 if nothing, or if the file is damaged (resending is safe)."""
        try:
            offset = int(json.loads(self._acknowledged_path.read_text())["offset"])
            return offset if offset <= self.path.stat().st_size else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def acknowledge(self, offset: int) -> None:
        """Remember that MLflow has everything before `offset`."""
        _replace(self._acknowledged_path, json.dumps({"offset": offset}))

    def num_pending(self) -> int:
        """Points that MLflow doesn't have yet."""
        unsent = sum(count_points(entry.operation) for entry in self.entries(self.acknowledged()))
        return unsent + len(self.put_off())

    def put_off(self) -> list[Operation]:
        """Files that wait beside the spool, each with the `reason`."""
        if not self.later_path.exists():
            return []
        lines = self.later_path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def keep_for_later(self, operations: list[Operation]) -> None:
        """Replace what `put_off` returns; nobody else may be sending."""
        if not operations:
            self.later_path.unlink(missing_ok=True)
            return
        lines = [json.dumps(operation, ensure_ascii=False) + "\n" for operation in operations]
        _replace(self.later_path, "".join(lines))

    def reject(self, operation: Operation, reason: str) -> None:
        """Put aside what MLflow refuses for good."""
        line = json.dumps({**operation, "reason": reason}, ensure_ascii=False)
        with self.rejected_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def relative(self, path: Path) -> str:
        """How a path is written in the spool, so that a moved run folder still works."""
        absolute = path.absolute()
        inside = absolute.is_relative_to(self.run_dir)
        return str(absolute.relative_to(self.run_dir) if inside else absolute)

    def resolve(self, path: str) -> Path:
        """The inverse of `relative`."""
        return self.run_dir / path
