"""Uploading in the background: training never waits for a store, and never fails with it.

A thread of rank 0 uploads the newest complete checkpoint; one that is overtaken while it waits is
left out. What fails is said once and tried again, ever more slowly.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from raysched.config.run import RunConfig
from raysched.models.checkpoint_files import MANIFEST_FILE, read_manifest
from raysched.training.checkpoint import newest_whole, step_of
from raysched.training.rotation import steps_to_keep
from raysched.training.storage import Storage, checkpoint_name, explain, is_store_error

log = logging.getLogger(__name__)

FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
PIPELINE = "pipeline"
# Uploaded with every checkpoint, before its manifest: the log is never behind the weights.
COMPANIONS = ("config.yaml", "metrics.jsonl")
AT_THE_END = ("metrics.jsonl", PIPELINE, "result.json")


class Uploader:
    """The thread, and what waits for it.

    Args:
        storage: the run's place in the store.
        run_dir: the run's folder.
        keep_last: newest checkpoints that stay in the store.
        keep_best: best ones that stay there, too.
        warn: told once when uploading begins to fail.
    """

    def __init__(
        self,
        storage: Storage,
        run_dir: Path,
        *,
        keep_last: int,
        keep_best: int,
        warn: Callable[[str], None],
    ) -> None:
        self._storage, self._run_dir, self._warn = storage, run_dir, warn
        self._keep_last, self._keep_best = keep_last, keep_best
        self._checkpoint: Path | None = None
        self._names: list[str] = []
        self._busy: Path | None = None
        self._problem: str | None = None
        self._quality: dict[int, float | None] | None = None
        self._closing = self._told_undeleted = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="raysched-upload", daemon=True)
        self._thread.start()

    def add(self, folder: Path) -> None:
        """Upload this checkpoint, instead of one that still waits."""
        with self._changed:
            self._checkpoint = folder
            self._changed.notify_all()

    @contextlib.contextmanager
    def spared(self) -> Iterator[set[Path]]:
        """The folders that must not be deleted inside the `with`: the one being uploaded."""
        with self._changed:
            yield {folder for folder in (self._busy, self._checkpoint) if folder is not None}

    def finish(self, timeout_s: float) -> list[str]:
        """Upload what the run leaves behind, and wait for the thread.

        Args:
            timeout_s: the longest wait.

        Returns:
            What the store has not got, empty if it has everything.
        """
        with self._changed:
            if not self._closing:
                self._names += [n for n in AT_THE_END if (self._run_dir / n).exists()]
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            left = [f for f in (self._checkpoint, self._busy) if f is not None]
            return [*dict.fromkeys(f"checkpoints/{f.name}" for f in left), *self._names]

    @property
    def problem(self) -> str | None:
        """What went wrong last, in words; None if nothing did or it was mended since."""
        return self._problem

    def _run(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                if pause:
                    self._changed.wait(min(pause, FIRST_RETRY_S) if self._closing else pause)
                while not (self._closing or self._checkpoint or self._names):
                    self._changed.wait()
                if self._closing and not (self._checkpoint or self._names):
                    return
                folder, self._checkpoint = self._checkpoint, None
                self._busy = folder
            failed = self._attempt(folder)
            with self._changed:
                self._busy = None
                if failed and folder is not None and folder.exists():
                    self._checkpoint = self._checkpoint or folder
            pause = min(max(2 * pause, FIRST_RETRY_S), LONGEST_RETRY_S) if failed else 0.0

    def _attempt(self, folder: Path | None) -> bool:
        """Upload a checkpoint, or else the next file; True if that failed."""
        try:
            if folder is not None:
                self._upload(folder)
            else:
                self._upload_next_name()
        except Exception as error:  # noqa: BLE001 - the store's failures must not end training
            self._tell(error, folder)
            return True
        if self._problem is not None:
            log.info("%s: uploading works again", self._storage.where)
        self._problem = None
        return False

    def _upload(self, folder: Path) -> None:
        for name in COMPANIONS:
            if (self._run_dir / name).exists():
                self._storage.put_file(self._run_dir / name, name)
        step = step_of(folder)
        there = self._storage.manifest(step)
        if there is None or there != read_manifest(folder):
            if there is not None:
                # Another one of the same step: never half of each behind a manifest.
                self._storage.delete_checkpoint(step)
            self._storage.put_folder(folder, checkpoint_name(step), last=MANIFEST_FILE)
        self._rotate(step)

    def _upload_next_name(self) -> None:
        name = self._names[0]
        source = self._run_dir / name
        if source.is_dir():
            self._storage.put_folder(source, name, last="model_index.json")
        elif source.exists():
            self._storage.put_file(source, name)
        with self._changed:
            self._names.remove(name)

    def _rotate(self, newest: int) -> None:
        """Delete checkpoints in the store by the same rules as in the run's folder."""
        if self._quality is None:
            self._quality = {step: self._quality_of(step) for step in self._storage.steps()}
        self._quality[newest] = self._quality_of(newest)
        kept = steps_to_keep(
            self._quality, newest, keep_last=self._keep_last, keep_best=self._keep_best
        )
        for step in sorted(self._quality.keys() - kept):
            del self._quality[step]
            try:
                self._storage.delete_checkpoint(step)
            except Exception as error:
                if not is_store_error(error):
                    raise
                if not self._told_undeleted:
                    self._told_undeleted = True
                    self._warn(
                        f"{self._storage.where}: old checkpoints can't be deleted there "
                        f"({explain(error)}) and stay"
                    )

    def _quality_of(self, step: int) -> float | None:
        manifest = self._storage.manifest(step)
        return None if manifest is None else manifest.get("quality")

    def _tell(self, error: Exception, folder: Path | None) -> None:
        if folder is not None and isinstance(error, FileNotFoundError) and not folder.exists():
            return  # a full disk took it; a newer one is on its way
        first, self._problem = self._problem is None, explain(error)
        if first:
            self._warn(
                f"{self._storage.where}: uploading failed ({self._problem}). Training goes on, "
                f"the checkpoints are in {self._run_dir}, and uploading is tried again"
            )
            if not is_store_error(error):
                log.error("a mistake of ours while uploading", exc_info=error)


def start_uploads(
    config: RunConfig, run_dir: Path, warn: Callable[[str], None], newest: Path | None
) -> Uploader | None:
    """The thread for a run's storage, None without one.

    Args:
        config: the run's.
        run_dir: its folder.
        newest: the newest whole checkpoint there; uploaded unless the store has it: an earlier
            start may have ended before that.
        warn: told once when uploading begins to fail.
    """
    training = config.training
    if training.storage_path is None:
        return None
    uploader = Uploader(
        Storage(training.storage_path, run_dir.name),
        run_dir,
        keep_last=training.keep_last,
        keep_best=training.keep_best,
        warn=warn,
    )
    if newest is not None:
        uploader.add(newest)
    return uploader


def upload_finished(config: RunConfig, run_dir: Path, warn: Callable[[str], None]) -> None:
    """Upload what the store has not got of a run that has ended; says what is still missing."""
    uploader = start_uploads(config, run_dir, warn, newest_whole(run_dir))
    missing = uploader and what_is_missing(uploader, config.training.storage_timeout_s)
    if missing:
        warn(missing)


def what_is_missing(uploader: Uploader, timeout_s: float) -> str | None:
    """Wait for the uploads at a run's end.

    Args:
        uploader: the thread.
        timeout_s: the longest wait.

    Returns:
        What the store has not got, in a sentence; None if it has everything.
    """
    left = uploader.finish(timeout_s)
    if not left:
        return None
    reason = f": {uploader.problem}" if uploader.problem else ""
    return (
        f"not uploaded to training.storage_path within {timeout_s:g} s{reason}: "
        f"{', '.join(left)}; all of it is in the run's folder (training.storage_timeout_s says "
        "how long to wait)"
    )
