"""The training loop's `Tracker`: append to the spool and return; a thread sends to MLflow.

The training thread pays for one JSON line per call. Importing MLflow, connecting, `fsync` and
every request happen in a daemon thread; when the store is away the thread keeps trying, ever more
slowly, and says so once.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from filelock import Timeout
from numpy.typing import NDArray

from raysched.tracking.client import UnreachableError, describe
from raysched.tracking.runs import clean_tags, now_ms, status_operation
from raysched.tracking.sender import Sender
from raysched.tracking.spool import OFFLINE_PREFIX, RunRecord, Spool, encode_number
from raysched.tracking.store import LOGGER, StoreHandle
from raysched.tracking.uris import redact
from raysched.training.protocols import RunStatus

_FIRST_RETRY_S = 0.5
_LONGEST_RETRY_S = 15.0
_IMAGE_PREFIX = "image:"


class MlflowTracker:
    """Records one run; fulfils `raysched.training.protocols.Tracker`.

    A tracker opened on the folder of an earlier one continues that run: what is still unsent is
    sent, and points at or below the last recorded step of their key are dropped, because a resumed
    run repeats the steps after its checkpoint.

    Args:
        handle: from `prepare_store`, in the driver.
        run_id: from `start_run`, in the driver.
        run_dir: the run's folder; the spool is `tracking/` below it.
        flush_every_s: seconds between two sendings.
    """

    def __init__(
        self, handle: StoreHandle, run_id: str, run_dir: Path, *, flush_every_s: float = 2.0
    ) -> None:
        self._spool = Spool(run_dir)
        if self._spool.load_record() is None:
            self._spool.save_record(_record_elsewhere(handle, run_id))
        self._spool.open()
        self._last_steps: dict[str, int] = {}
        ended = self._replay()
        if ended:
            self._spool.append(status_operation("running"))
        self._sender = Sender(run_dir, handle.uri)
        self._uri = redact(handle.uri)
        self._told = handle.offline
        self._flush_every_s = flush_every_s
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="raysched-tracking", daemon=True)
        self._thread.start()

    def _replay(self) -> bool:
        """Learn the last step of every key; True if the run was ended before."""
        ended = False
        for entry in self._spool.entries():
            operation = entry.operation
            if operation["op"] == "metrics":
                for key in operation["values"]:
                    self._last_steps[key] = operation["step"]
            elif operation["op"] == "image":
                self._last_steps[_IMAGE_PREFIX + operation["key"]] = operation["step"]
            elif operation["op"] == "status":
                ended = operation["status"] != "running"
        return ended

    def _is_new(self, key: str, step: int) -> bool:
        last = self._last_steps.get(key)
        if last is not None and step <= last:
            return False
        self._last_steps[key] = step
        return True

    def log_metrics(
        self, metrics: Mapping[str, float], *, step: int, forward_equivalents: float
    ) -> None:
        """Record metrics at an optimizer step and at the compute spent so far.

        Args:
            metrics: name to value; one value per name and step.
            step: optimizer step; steps rise.
            forward_equivalents: compute so far, without evaluation.
        """
        values = {
            key: encode_number(float(value))
            for key, value in metrics.items()
            if self._is_new(key, step)
        }
        if values:
            fe = float(forward_equivalents)
            line = {"op": "metrics", "time": now_ms(), "step": step, "fe": fe, "values": values}
            self._spool.append(line)

    def log_image(self, key: str, image: NDArray[np.uint8], *, step: int) -> None:
        """Record an image for MLflow's grid with its step slider.

        Args:
            key: name, the same for all runs; characters that MLflow refuses become "_".
            image: (H, W, 3) or (H, W), uint8.
            step: optimizer step.
        """
        from PIL import Image

        key = re.sub(r"[^\w\-./ ]", "_", key, flags=re.ASCII)
        if not self._is_new(_IMAGE_PREFIX + key, step):
            return
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        path = self._spool.images / f"{key.replace('/', '~')[:80]}-{step:08d}-{digest}.png"
        self._spool.images.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        Image.fromarray(np.ascontiguousarray(image)).save(temporary, format="PNG")
        temporary.replace(path)
        self._spool.append(
            {
                "op": "image",
                "time": now_ms(),
                "step": step,
                "key": key,
                "path": self._spool.relative(path),
            }
        )

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Record a file or a folder by its path; it must stay there until it is sent.

        Args:
            path: file or folder.
            folder: where in the run's artifacts; a folder keeps its name below it.
        """
        relative = self._spool.relative(path)
        self._spool.append({"op": "artifact", "path": relative, "folder": folder})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set the run's tags; credentials in URIs are left out."""
        if tags:
            self._spool.append({"op": "tags", "values": clean_tags(tags)})

    def close(self, status: RunStatus, timeout_s: float = 30.0) -> None:
        """Send what is pending, at most for `timeout_s`, and mark the run's end.

        If points remain, the user is told how many and how to send them.
        """
        if self._closing.is_set():
            return
        self._spool.append(status_operation(status))
        self._spool.sync_to_disk()
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        remaining = self._spool.num_pending()
        if remaining:
            LOGGER.warning(
                "%d points are not in MLflow (%s) yet; send them with: raysched sync %s",
                remaining,
                self._uri,
                self._spool.run_dir,
            )
        self._spool.close()

    def _run(self) -> None:
        """The sender thread: flush at intervals, retry with growing pauses, end at `close`."""
        pause, told_rejected = self._flush_every_s, 0
        while True:
            self._wake.wait(pause)
            closing = self._closing.is_set()
            try:
                self._spool.sync_to_disk()
                self._sender.send(lambda: time.monotonic() > self._deadline)
                if closing:
                    break
                pause = self._flush_every_s
            except Timeout:
                pause = _FIRST_RETRY_S  # `raysched sync` is at work on the same spool
            except Exception as error:  # noqa: BLE001 (the thread must outlive every failure)
                self._tell(error)
                pause = min(max(2 * pause, _FIRST_RETRY_S), _LONGEST_RETRY_S)
            if self._sender.num_rejected > told_rejected:
                self._tell_rejected()
                told_rejected = self._sender.num_rejected
            if closing:
                if time.monotonic() > self._deadline:
                    break
                self._wake.clear()
                pause = min(pause, 1.0)
        if self._sender.num_rejected > told_rejected:
            self._tell_rejected()

    def _tell(self, error: Exception) -> None:
        if self._told:
            return
        self._told = True
        fault = "does not answer" if isinstance(error, UnreachableError) else "fails"
        LOGGER.warning(
            "MLflow at %s %s (%s). Training goes on, the points are kept and sent when it is "
            "back, or later with: raysched sync %s",
            self._uri,
            fault,
            describe(error),
            self._spool.run_dir,
        )

    def _tell_rejected(self) -> None:
        LOGGER.warning(
            "MLflow refuses %d entries; they are kept, with the reason, in %s",
            self._sender.num_rejected,
            self._spool.rejected_path,
        )


def _record_elsewhere(handle: StoreHandle, run_id: str) -> RunRecord:
    """A record for a folder that the driver doesn't see, as on another machine."""
    offline = run_id.startswith(OFFLINE_PREFIX)
    return RunRecord(
        uri=redact(handle.uri),
        experiment=handle.experiment,
        local_id=run_id.removeprefix(OFFLINE_PREFIX),
        run_id=None if offline else run_id,
    )
