"""The training loop's `Tracker`: append to the spool and return; a `Courier` sends to MLflow.

The training thread pays for one JSON line per call. Importing MLflow, connecting, `fsync` and
every request happen in the courier's thread, here or in the driver.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raysched.tracking.courier import Courier
from raysched.tracking.runs import clean_tags, now_ms, status_operation
from raysched.tracking.spool import OFFLINE_PREFIX, RunRecord, Spool, encode_number
from raysched.tracking.store import StoreHandle
from raysched.tracking.system import SystemMeter
from raysched.tracking.uris import redact
from raysched.training.protocols import RunStatus

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
        send: False leaves the sending to a `Courier` in the driver, which keeps MLflow out of
            this process.
        flush_every_s: seconds between two sendings.
        system_every_s: seconds between two samples of the machine; None: none are taken.
    """

    def __init__(
        self,
        handle: StoreHandle,
        run_id: str,
        run_dir: Path,
        *,
        send: bool = True,
        flush_every_s: float = 2.0,
        system_every_s: float | None = 10.0,
    ) -> None:
        self._spool = Spool(run_dir)
        if self._spool.load_record() is None:
            self._spool.save_record(_record_elsewhere(handle, run_id))
        self._spool.open()
        self._system = SystemMeter(run_dir, every_s=system_every_s) if system_every_s else None
        self._last_steps: dict[str, int] = {}
        ended = self._replay()
        if ended:
            self._spool.append(status_operation("running"))
        self._closed = False
        self._courier: Courier | None = None
        if send:
            self._courier = Courier(handle, flush_every_s=flush_every_s)
            self._courier.watch(run_dir)

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
        system = self._system.sample() if self._system is not None else {}
        values = {
            key: encode_number(float(value))
            for key, value in {**metrics, **system}.items()
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

    def log_model(self, pipeline: Path, name: str) -> None:
        """Record a pipeline folder as a model that `mlflow.pyfunc.load_model` loads.

        Args:
            pipeline: the folder; it must stay there until it is sent.
            name: of the model within the run.
        """
        self._spool.append({"op": "model", "path": self._spool.relative(pipeline), "name": name})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set the run's tags; credentials in URIs are left out."""
        if tags:
            self._spool.append({"op": "tags", "values": clean_tags(tags)})

    def close(self, status: RunStatus, timeout_s: float = 30.0) -> None:
        """Send what is pending, at most for `timeout_s`, and mark the run's end.

        If points remain, the user is told how many and how to send them. Without an own courier
        the end is written down and nothing is waited for.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._spool.append(status_operation(status))
            self._spool.sync_to_disk()
        finally:
            self._spool.close()
            if self._courier is not None:
                self._courier.close(timeout_s)


def _record_elsewhere(handle: StoreHandle, run_id: str) -> RunRecord:
    """A record for a folder that the driver doesn't see, as on another machine."""
    offline = run_id.startswith(OFFLINE_PREFIX)
    return RunRecord(
        uri=redact(handle.uri),
        experiment=handle.experiment,
        local_id=run_id.removeprefix(OFFLINE_PREFIX),
        run_id=None if offline else run_id,
    )
