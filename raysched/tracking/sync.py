"""`raysched sync`: send what a killed or disconnected run left in its spool; end a run."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from filelock import Timeout

from raysched.errors import ConfigError, StorageError
from raysched.tracking.client import describe, is_locked
from raysched.tracking.context import package_versions
from raysched.tracking.runs import clean_tags, now_ms, status_operation
from raysched.tracking.sender import Sender
from raysched.tracking.spool import RunRecord, Spool
from raysched.tracking.store import LOGGER, StoreHandle
from raysched.tracking.uris import TRACKING_URI_VARIABLE, has_credentials, redact
from raysched.training.protocols import RunStatus

PACKAGES_FILE = "packages.txt"
_RETRY_S = 0.2


@dataclass(frozen=True)
class SyncReport:
    """What `sync` did.

    Attributes:
        num_runs: run folders with a spool.
        num_sent: spool lines that were sent now.
        num_remaining: points that still wait.
        num_rejected: entries that MLflow refused now.
        problems: one line per run that couldn't be sent.
    """

    num_runs: int
    num_sent: int
    num_remaining: int
    num_rejected: int
    problems: tuple[str, ...]


def sync(run_dir: Path, *, uri: str | None = None, timeout_s: float = 600.0) -> SyncReport:
    """Send everything that MLflow doesn't have yet, of a run or of a sweep and all its trials.

    Args:
        run_dir: folder of a run or a sweep.
        uri: tracking URI with credentials, where the run was tracked in a store that needs them
            in the URI; default: the run's own.
        timeout_s: seconds in all.

    Raises:
        StorageError: nothing was tracked in this folder.
        ConfigError: the URI's credentials are needed.
    """
    folders = sorted(path.parent.parent for path in run_dir.rglob("tracking/run.json"))
    if not folders:
        raise StorageError(f"{run_dir}: no tracked run here (tracking/run.json is missing)")
    folders.sort(key=lambda folder: len(folder.parts))  # parents first
    deadline = time.monotonic() + timeout_s
    problems, num_sent, num_remaining, num_rejected = [], 0, 0, 0
    for folder in folders:
        record = Spool(folder).load_record()
        assert record is not None
        sender = Sender(folder, _full_uri(record, uri))
        num_lines, problem = _send_until(sender, deadline)
        if problem:
            problems.append(f"{folder}: {redact(record.uri)}: {problem}")
        num_sent += num_lines
        num_remaining += sender.spool.num_pending()
        num_rejected += sender.num_rejected
    return SyncReport(len(folders), num_sent, num_remaining, num_rejected, tuple(problems))


def _full_uri(record: RunRecord, uri: str | None) -> str:
    """The run's URI; credentials are never on disk, so they come from outside."""
    if uri is not None:
        return uri
    if not has_credentials(record.uri):
        return record.uri
    given = os.environ.get(TRACKING_URI_VARIABLE, "")
    if redact(given).rstrip("/") == record.uri.rstrip("/"):
        return given
    raise ConfigError(
        f"the run was tracked at {record.uri}, and passwords are never stored: set "
        f"{TRACKING_URI_VARIABLE} to the full URI and run the command again"
    )


def _send_until(sender: Sender, deadline: float) -> tuple[int, str]:
    """Send one spool; locks are waited for, other failures end the attempt."""
    while True:
        try:
            num_sent = sender.send(lambda: time.monotonic() > deadline)
            return num_sent, sender.put_off_reason
        except Exception as error:  # noqa: BLE001 (the other runs are sent all the same)
            waiting = isinstance(error, Timeout) or is_locked(error)
            if not waiting or time.monotonic() > deadline:
                return 0, describe(error)
            time.sleep(_RETRY_S)


def note(
    run_dir: Path,
    *,
    metrics: Mapping[str, float | None] | None = None,
    step: int = 0,
    forward_equivalents: float = 0.0,
    tags: Mapping[str, str] | None = None,
    files: Sequence[Path] = (),
    status: RunStatus | None = None,
) -> None:
    """Add to a run from outside, such as from the sweep's driver; a courier or `sync` sends it.

    Args:
        run_dir: the run's folder; `start_run` was called for it, and nobody else writes there.
        metrics: values; None and what is not finite is left out.
        step: of the metrics; 0 for final values.
        forward_equivalents: where the metrics stand against compute.
        tags: labels.
        files: recorded as artifacts; they stay where they are until they are sent.
        status: how the run ended.
    """
    spool = Spool(run_dir)
    finite = {k: float(v) for k, v in (metrics or {}).items() if v is not None and isfinite(v)}
    if finite:
        point = {"time": now_ms(), "step": step, "fe": forward_equivalents, "values": finite}
        spool.append({"op": "metrics", **point})
    if tags:
        spool.append({"op": "tags", "values": clean_tags(tags)})
    for path in files:
        spool.append({"op": "artifact", "path": spool.relative(path), "folder": ""})
    if status is not None:
        spool.append(status_operation(status))
    spool.sync_to_disk()
    spool.close()


def note_end(run_dir: Path, status: RunStatus) -> None:
    """Note how a run ended, unless its tracker has done so; a courier or `sync` sends it."""
    lines = (entry.operation for entry in Spool(run_dir).entries())
    last = "running"
    for operation in lines:
        if operation["op"] == "status":
            last = operation["status"]
    if last != "running":
        return
    try:
        note(run_dir, status=status)
    except StorageError as error:
        LOGGER.warning("%s", error)  # how the run ended is told beside it


def describe_run(run_dir: Path) -> None:
    """Note the versions of all packages as a file of the run; once."""
    path = Spool(run_dir).folder / PACKAGES_FILE
    versions = package_versions()
    if path.is_file() and path.read_text(encoding="utf-8") == versions:
        return
    path.write_text(versions, encoding="utf-8")
    note(run_dir, files=[path])


def recorded_run(run_dir: Path) -> str | None:
    """The id of the run that `start_run` made for a folder; None if there is none."""
    record = Spool(run_dir).load_record()
    return None if record is None else record.public_id


def finish_run(
    handle: StoreHandle,
    run_id: str,
    status: RunStatus,
    *,
    run_dir: Path,
    timeout_s: float = 30.0,
) -> None:
    """End a run that has no tracker of its own (a sweep, or a trial that died).

    What the run's spool still holds is sent first. If the store doesn't answer, the end waits in
    the spool like everything else, and the user is told.

    Args:
        handle: from `prepare_store`.
        run_id: from `start_run`.
        status: how it ended.
        run_dir: the run's folder.
        timeout_s: seconds to try.
    """
    spool = Spool(run_dir)
    if spool.load_record() is None:
        raise StorageError(f"{run_dir}: run {run_id} was not started here")
    note(run_dir, status=status)
    _, problem = _send_until(Sender(run_dir, handle.uri), time.monotonic() + timeout_s)
    remaining = spool.num_pending()
    if remaining and not handle.offline:
        LOGGER.warning(
            "%d points are not in MLflow yet (%s); send them with: raysched sync %s",
            remaining,
            problem,
            run_dir,
        )
