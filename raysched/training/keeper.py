"""Saving and restoring a run: snapshots in the training thread, files and uploads beside it.

A save copies the rank's state and goes on training; a thread of the rank writes the copy. What
goes wrong there is raised at the next step or save, and the end of a run waits for the last
checkpoint to be on the disk. Under FSDP every rank saves its own rows.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raysched.errors import ConfigError, StorageError
from raysched.training.background import Background
from raysched.training.budget import learning_rate_at
from raysched.training.checkpoint import (
    Checkpoint,
    Rows,
    Snapshot,
    delete_leftovers,
    folder_name,
    load_checkpoint,
    load_latest,
    write_snapshot,
)
from raysched.training.events import note_event
from raysched.training.files import storage_errors
from raysched.training.protocols import RunStatus
from raysched.training.rotation import rotate
from raysched.training.run_folder import TRACKING_RECORD, check_same_config
from raysched.training.setup import Run
from raysched.training.upload import Uploader, start_uploads, what_is_missing
from raysched.training.wrapping import is_sharded, load_state, local_state

log = logging.getLogger(__name__)


class Keeper:
    """One rank's part in the checkpoints of a run.

    Args:
        run: this rank's run.
        run_dir: the run's folder.

    Attributes:
        saved_step: step of the newest checkpoint that was handed over; -1 before the first one.
    """

    def __init__(self, run: Run, run_dir: Path) -> None:
        self._run, self._run_dir = run, run_dir
        self.saved_step = -1
        self._sharded = is_sharded(run)
        self._writer = Background("raysched-checkpoint")
        self._token = _shared_token(run)
        self._uploader: Uploader | None = None

    def restore(self) -> Checkpoint | None:
        """Put the newest complete checkpoint into the run; all ranks take rank 0's choice.

        Returns:
            The checkpoint, for what the loop itself remembers; None if there is none.

        Raises:
            ConfigError: it was made with another config; every differing key is named.
            NewerFormatError, PickleError: it is not for this version, or for anybody, to read.
        """
        run = self._run
        checkpoint = None
        if run.rank == 0:
            delete_leftovers(self._run_dir)
            checkpoint = load_latest(self._run_dir, self._warn)
        step = _from_rank_0(run, -1 if checkpoint is None else checkpoint.step)
        if step >= 0:
            if checkpoint is None:
                checkpoint = load_checkpoint(self._run_dir / "checkpoints" / folder_name(step))
            self._load(checkpoint)
        if run.rank == 0:
            used = None if step < 0 else self._run_dir / "checkpoints" / folder_name(step)
            self._uploader = start_uploads(run.config, self._run_dir, self._warn, used)
        return checkpoint

    def save(self, progress: Mapping[str, Any]) -> None:
        """Save this step, unless it is saved already; returns before the files are written.

        Args:
            progress: what the loop remembers, JSON types; copied.

        Raises:
            StorageError: the checkpoint before this one could not be written.
        """
        run = self._run
        if self.saved_step == run.step:
            return
        if run.rank == 0 or self._sharded:
            with run.meter.timed("checkpoint"):
                # Not before the one before it is written: one copy in memory, and in order.
                self._writer.drain()
                snapshot = self._snapshot(progress)
                self._writer.submit(lambda: self._write(snapshot))
        self.saved_step = run.step

    def check(self) -> None:
        """Raise what went wrong while writing; costs nothing."""
        self._writer.check()

    def on_disk(self, *, failed: bool = False) -> None:
        """Wait until every checkpoint is written.

        Args:
            failed: the run has failed already; a checkpoint that can't be written is told, then,
                but hides nothing.

        Raises:
            StorageError: one can't be written.
        """
        with self._run.meter.timed("checkpoint"):
            try:
                self._writer.drain()
            except StorageError as error:
                if not failed:
                    raise
                self._warn(str(error))

    def close(self, status: RunStatus = "failed") -> list[str]:
        """Wait for the uploads, at most for `training.storage_timeout_s`.

        Args:
            status: how the run ended. A stopped one may have to be gone within `scaling.grace_s`
                of the signal, and its checkpoint took some of that: it waits for half of it.

        Returns:
            What the user should know, in whole sentences.
        """
        if self._uploader is None:
            return []
        config = self._run.config
        limit_s, grace_s = config.training.storage_timeout_s, config.scaling.grace_s
        if status == "stopped" and grace_s is not None:
            limit_s = min(limit_s, grace_s / 2)
        missing = what_is_missing(self._uploader, limit_s)
        if missing is None:
            return []
        self._warn(missing)
        return [missing]

    def _write(self, snapshot: Snapshot) -> None:
        folder = write_snapshot(self._run_dir, snapshot)
        if snapshot.rank:
            return
        training = self._run.config.training
        spared: contextlib.AbstractContextManager[set[Path]] = contextlib.nullcontext(set())
        if self._uploader is not None:
            self._uploader.add(folder)
            spared = self._uploader.spared()
        with spared as spare, storage_errors(self._run_dir, "deleting old checkpoints"):
            rotate(
                self._run_dir,
                snapshot.step,
                keep_last=training.keep_last,
                keep_best=training.keep_best,
                spare=spare,
            )

    def _snapshot(self, progress: Mapping[str, Any]) -> Snapshot:
        run, groups = self._run, {}
        for group, pieces in local_state(run).items():
            groups[group] = {
                name: Rows(
                    piece.tensor.detach().to("cpu", copy=True), piece.offset, tuple(piece.shape)
                )
                for name, piece in pieces.items()
                if run.rank == 0 or _has_own_rows(piece.tensor.shape, piece.shape)
            }
        return Snapshot(
            step=run.step,
            groups=groups,
            state=_state(run, self._run_dir, progress) if run.rank == 0 else {},
            rank=run.rank,
            num_shards=run.world_size if self._sharded else 1,
            token=self._token,
        )

    def _load(self, checkpoint: Checkpoint) -> None:
        run, state = self._run, checkpoint.state
        where = f"{self._run_dir}/checkpoints/{folder_name(checkpoint.step)}"
        check_same_config(state.get("config"), run.config, where)
        try:
            load_state(run, checkpoint.tensors)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, KeyError) as error:
            problem = " ".join(str(error).split())
            raise ConfigError(
                f"{where}: its weights are not those of this config's network (model.* and the "
                f"images and classes of data.*): {problem[:500]}"
            ) from error
        run.meter.load_state_dict(state["meter"])
        scaler = getattr(run.accelerator, "scaler", None)
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        run.step = self.saved_step = checkpoint.step

    def _warn(self, text: str) -> None:
        log.warning(text)
        note_event(self._run_dir, text)


def _state(run: Run, run_dir: Path, progress: Mapping[str, Any]) -> dict[str, Any]:
    """All that is no tensor. Most positions are functions of the step; they are written out."""
    scaler = getattr(run.accelerator, "scaler", None)
    return {
        "meter": run.meter.state_dict(),
        "progress": copy.deepcopy(dict(progress)),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "position": {
            "budget_fraction": run.fraction,
            "learning_rate": learning_rate_at(run.config.optimizer, run.fraction),
            "next_sample": run.step * run.config.training.batch_size,
            "curriculum_step": run.step,
            "random_streams": "counter-based: a draw is a function of seed, purpose, step and "
            "sample index, so the step is their whole state",
            "seed": run.config.seed,
            "num_workers": run.world_size,
        },
        "tracking": _tracking_record(run_dir),
        "config": run.config.model_dump(mode="json"),
    }


def _tracking_record(run_dir: Path) -> Any:
    """What the tracker wrote down to go on with the same run, such as MLflow's run id."""
    path = run_dir / TRACKING_RECORD
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def _has_own_rows(local: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether rows are this rank's alone: neither none, nor what every rank has."""
    return tuple(local) != tuple(whole) and 0 not in local


def _shared_token(run: Run) -> str:
    """The same word on all ranks, another one at every start."""
    return f"{_from_rank_0(run, uuid.uuid4().int >> 66):016x}"


def _from_rank_0(run: Run, number: int) -> int:
    if run.world_size == 1:
        return number
    value = torch.tensor([number], dtype=torch.int64, device=run.device)
    torch.distributed.broadcast(value, src=0)
    return int(value.item())
