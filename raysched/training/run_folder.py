"""The folder of a run: who may use it, what it holds, and its log of metrics."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raysched.config.loading import dump, load, write_yaml
from raysched.config.paths import work_root
from raysched.config.run import RunConfig
from raysched.errors import ConfigError, StorageError
from raysched.training.checkpoint import checkpoint_folders
from raysched.training.files import check_writable, storage_errors
from raysched.training.result import RESULT_FILE

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
# The newest points are within this; one takes about two thousand.
LAST_BYTES = 32_768
DRIVER_LOCK, WRITER_LOCK = ".lock", ".writer.lock"
# Written by the tracker, whose business it is; checkpoints carry it to other machines.
TRACKING_RECORD = "tracking/run.json"
# A resumed run may differ in these: they don't change what has been computed so far.
FREE_ON_RESUME = (
    "name",
    "training.output_dir",
    "training.budget.",
    "training.checkpoint_every_steps",
    "training.keep_last",
    "training.keep_best",
    "training.storage_path",
    "training.storage_timeout_s",
    "training.log_every_steps",
    "training.device",
    # Like another number of workers: the same samples and draws, summed in another order.
    "training.gradient_accumulation",
    "evaluation.",
    "tracking.",
    "scaling.",
    "data.cache_dir",
)


def default_run_dir(name: str, root: Path | None = None) -> Path:
    """`runs/<name>-<time>`, made unique by a suffix."""
    base = (root or work_root()) / "runs" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidate, number = base, 1
    while candidate.exists():
        number += 1
        candidate = base.with_name(f"{base.name}-{number}")
    return candidate


def latest_run_dir(name: str, root: Path | None = None) -> Path | None:
    """The newest `runs/<name>-<time>` that holds a run, for `--resume` without a folder."""
    runs = (root or work_root()) / "runs"
    found = [path for path in runs.glob(f"{name}-[0-9]*") if holds_run(path)]
    return max(found, key=lambda path: (path / CONFIG_FILE).stat().st_mtime, default=None)


def holds_run(run_dir: Path) -> bool:
    """Whether a folder holds a run's work; the config of a start that failed is none."""
    begun = (run_dir / RESULT_FILE).exists() or bool(read_metrics(run_dir))
    return begun or bool(checkpoint_folders(run_dir))


@contextlib.contextmanager
def own_run_folder(
    run_dir: Path, *, lock: str = DRIVER_LOCK, timeout_s: float = 0
) -> Iterator[None]:
    """Keep other processes out of a run's folder meanwhile; the system frees it after a kill.

    Args:
        run_dir: the run's folder; made if it is missing.
        lock: `DRIVER_LOCK` of the command, or `WRITER_LOCK` of the process that trains.
        timeout_s: how long to wait for another owner to end.

    Raises:
        StorageError: the folder can't be written, or another process trains there.
    """
    check_writable(run_dir)
    owned = FileLock(run_dir / lock)
    try:
        owned.acquire(timeout=timeout_s)
    except Timeout as error:
        raise StorageError(
            f"training.output_dir: {run_dir}: another process is training there; wait for it, "
            "end it, or name another folder"
        ) from error
    try:
        yield
    finally:
        owned.release()


def open_run_folder(config: RunConfig, run_dir: Path, *, resume: bool) -> None:
    """Make the folder and its config file, or check that the run in it may be resumed.

    Raises:
        StorageError: the folder can't be written, or holds a run and `resume` is off.
        ConfigError: the run in it was made with another config; every differing key is named.
    """
    if holds_run(run_dir):
        if not resume:
            raise StorageError(
                f"training.output_dir: {run_dir} already holds a run: go on with it by --resume, "
                "or name another folder"
            )
        check_same_run(config, run_dir)
    check_writable(run_dir)
    # Its result is about to be outdated; a reader must not take it for this run's.
    (run_dir / RESULT_FILE).unlink(missing_ok=True)
    with storage_errors(run_dir, "writing the config"):
        write_yaml(config, run_dir / CONFIG_FILE)


def read_config(run_dir: Path) -> RunConfig:
    """The config that a run was started with."""
    return load(run_dir / CONFIG_FILE).config


def check_same_run(config: RunConfig, run_dir: Path) -> None:
    """Compare a config with that of the run in a folder.

    Raises:
        ConfigError: a key differs that a resumed run keeps; every one is named.
    """
    if (run_dir / CONFIG_FILE).exists():
        _compare(read_config(run_dir), config, str(run_dir))


def check_same_config(made_with: Mapping[str, Any] | None, config: RunConfig, where: str) -> None:
    """Compare a config with the one that a checkpoint holds, which may come from elsewhere.

    Args:
        made_with: what the checkpoint holds.
        config: what the run is now.
        where: the checkpoint's folder.

    Raises:
        ConfigError: a key differs that a resumed run keeps; every one is named.
    """
    if made_with is None:
        return
    try:
        old = RunConfig.model_validate(made_with)
    except ValueError as error:
        first = str(error).splitlines()
        raise ConfigError(
            f"{where}: it was made with a config that this raysched doesn't know: "
            f"{' '.join(first[1:3]) or first[0]}"
        ) from error
    _compare(old, config, where)


def _compare(made_with: RunConfig, config: RunConfig, where: str) -> None:
    old, new = (flatten(dump(c)) for c in (made_with, config))
    differing = [
        f"{where}: {key}: the run there was made with {old.get(key)!r}, now {new.get(key)!r}: "
        "a resumed run keeps its settings (use another training.output_dir for a new run)"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(FREE_ON_RESUME)
    ]
    if differing:
        raise ConfigError(differing)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dict of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class MetricsLog:
    """`metrics.jsonl`: one line per logged point, also without any tracking server."""

    def __init__(self, run_dir: Path, *, last_step: int, again: Collection[int] = ()) -> None:
        """Open the log; points after `last_step` are of work that was lost, and are dropped.

        Args:
            run_dir: the run's folder.
            last_step: the step that the run goes on from.
            again: steps whose evaluation is recorded anew.
        """
        self._path = run_dir / METRICS_FILE
        kept = [
            point
            for point in read_metrics(run_dir)
            if point["step"] <= last_step
            and not (point["step"] in again and "quality/q" in point["metrics"])
        ]
        with storage_errors(self._path, "writing metrics"):
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(p) + "\n" for p in kept), encoding="utf-8")
            temporary.replace(self._path)

    def append(
        self,
        metrics: Mapping[str, float],
        *,
        step: int,
        forward_equivalents: float,
        seconds: float,
    ) -> None:
        """Add a point; one write, so that a kill leaves at most one torn line."""
        point = {
            "step": step,
            "forward_equivalents": forward_equivalents,
            "seconds": seconds,
            "metrics": dict(metrics),
        }
        with storage_errors(self._path, "writing metrics"), self._path.open("a") as stream:
            stream.write(json.dumps(point) + "\n")


def read_last_point(run_dir: Path) -> dict[str, Any] | None:
    """The newest logged point of a run's training, without reading all of the log."""
    path = run_dir / METRICS_FILE
    try:
        with path.open("rb") as stream:
            stream.seek(max(path.stat().st_size - LAST_BYTES, 0))
            lines = stream.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        if '"train/loss"' not in line:
            continue
        with contextlib.suppress(json.JSONDecodeError):
            point: dict[str, Any] = json.loads(line)
            return point
    return None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All complete points of a run's log, in the order of their steps.

    In the file an evaluation that was made beside the training follows the points of later steps.
    """
    path = run_dir / METRICS_FILE
    if not path.is_file():
        return []
    points = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            points.append(json.loads(line))
        except json.JSONDecodeError:
            # A kill tore this line; it can only be the last one before a resume.
            continue
    return sorted(points, key=lambda point: int(point["step"]))
