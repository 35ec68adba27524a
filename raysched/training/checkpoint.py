"""Checkpoints: a folder of safetensors and JSON, complete or not there at all.

`checkpoints/step-00000200/` holds the online weights, the EMA and the optimizer (whole, or the
rows of each rank), `state.json` (meter, metrics, position) and, written last, `manifest.json` with
the SHA-256 of each file; `raysched.models.checkpoint_files` describes them. The folder is written
under a temporary name and renamed; one whose manifest does not fit is skipped with a warning and
the one before is used. No pickle is ever read.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from raysched.errors import StorageError
from raysched.models.checkpoint_files import (
    GROUPS,
    MANIFEST_FILE,
    STATE_FILE,
    NewerFormatError,
    group_file,
    read_group,
    read_manifest,
    verify,
)
from raysched.models.pickles import PickleError
from raysched.models.tensor_files import sha256_of, write_tensors
from raysched.training.files import fsync_folder, storage_errors, write_json

Q = "quality/q"
# How long rank 0 waits for the other ranks' rows: they write at the same time as it does.
SHARD_WAIT_S = 600.0
SHARD_POLL_S = 0.02


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on as if it had never stopped.

    Attributes:
        step: optimizer steps done; also the position in the data.
        tensors: `model`, `ema` and `optimizer`, each name -> whole tensor.
        state: JSON types: meter, progress, position, configuration, tracking record.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor, on the CPU.

    Attributes:
        tensor: (n, D…).
        first: its first row within the whole.
        shape: (N, D…) of the whole.
    """

    tensor: Tensor
    first: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes; nothing that training goes on with changes it.

    Attributes:
        step: optimizer steps done.
        groups: `model`, `ema` and `optimizer`, name -> this rank's rows.
        state: as in `Checkpoint`.
        rank: this rank; 0 also writes the state and the manifest.
        num_shards: ranks that write; 1: this one has everything.
        token: the same for all ranks of this start, so that no rank's rows of an earlier, killed
            start are taken for those of this one.
    """

    step: int
    groups: Mapping[str, Mapping[str, Rows]]
    state: dict[str, Any]
    rank: int = 0
    num_shards: int = 1
    token: str = "only"  # noqa: S105 - no password


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-[0-9]*"))


def folder_name(step: int) -> str:
    """Name of a step's checkpoint folder."""
    return f"step-{step:08d}"


def step_of(folder: Path | str) -> int:
    """The step in a checkpoint folder's name."""
    return int(Path(folder).name.removeprefix("step-"))


def write_snapshot(run_dir: Path, snapshot: Snapshot) -> Path:
    """Write a rank's part of a checkpoint; rank 0 then makes the whole of it appear at once.

    A full disk first costs the older checkpoints (never the newest good one), then the attempt.

    Returns:
        The checkpoint's folder (on other ranks than 0 it may appear a little later).

    Raises:
        StorageError: it can't be written; those before it are untouched.
    """
    root = run_dir / "checkpoints"
    target = root / folder_name(snapshot.step)
    partial = root / f".{target.name}.{snapshot.token}.partial"
    with storage_errors(root, f"writing the checkpoint of step {snapshot.step}"):
        try:
            try:
                _write(partial, target, snapshot)
            except OSError:
                older = [folder for folder in checkpoint_folders(run_dir) if folder != target][:-1]
                if not older:
                    raise
                delete_folders(older)
                _write(partial, target, snapshot)
        except BaseException:
            _clear(partial, snapshot)
            raise
    return target


def load_latest(run_dir: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest complete checkpoint of a run, None if there is none.

    Args:
        run_dir: the run's folder.
        warn: told about each damaged checkpoint that is passed over.

    Raises:
        NewerFormatError: the newest whole one is a later version's; nothing is passed over then.
        PickleError: somebody put a pickle there; it isn't passed over in silence either.
    """
    folders = checkpoint_folders(run_dir)
    for folder in reversed(folders):
        try:
            return load_checkpoint(folder)
        except StorageError as error:
            rest = "using the checkpoint before it" if folder != folders[0] else "none is left"
            warn(f"{error}; {rest}")
    if folders:
        warn(f"{run_dir}: no checkpoint can be used: training begins anew")
    return None


def newest_whole(run_dir: Path) -> Path | None:
    """The newest checkpoint folder whose files fit their checksums; None if there is none.

    One that this version may not read at all counts: whoever loads it says why.
    """
    for folder in reversed(checkpoint_folders(run_dir)):
        try:
            manifest = read_manifest(folder)
            verify(folder, manifest, manifest["sha256"])
        except StorageError:
            continue  # load_latest tells
        except (NewerFormatError, PickleError):
            return folder
        return folder
    return None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint folder after checking every file against the manifest.

    Raises:
        StorageError: a file is missing or damaged.
        NewerFormatError: the format is newer than this version's.
        PickleError: a file is a pickle.
    """
    manifest = read_manifest(folder)
    verify(folder, manifest, manifest["sha256"])
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    tensors = {group: read_group(folder, manifest, group) for group in GROUPS}
    return Checkpoint(step=state["step"], tensors=tensors, state=state)


def delete_folders(folders: list[Path]) -> None:
    """Delete checkpoints; a kill in the middle leaves none that looks whole."""
    for folder in folders:
        doomed = folder.with_name(f".{folder.name}.deleted")
        try:
            folder.rename(doomed)
        except FileNotFoundError:
            continue  # another rank made room at the same moment
        shutil.rmtree(doomed, ignore_errors=True)


def delete_leftovers(run_dir: Path) -> None:
    """Delete what a kill left half-written or half-deleted."""
    for pattern in (".step-*.partial", ".step-*.deleted"):
        for folder in (run_dir / "checkpoints").glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def _write(partial: Path, target: Path, snapshot: Snapshot) -> None:
    partial.mkdir(parents=True, exist_ok=True)
    digests, places = {}, {}
    for group in GROUPS:
        rows = snapshot.groups[group]
        name = group_file(group, snapshot.rank, snapshot.num_shards)
        digests[name] = write_tensors(partial / name, {k: r.tensor for k, r in rows.items()})
        places[group] = {k: {"shape": list(r.shape), "first": r.first} for k, r in rows.items()}
    if snapshot.rank:
        write_json(_part_file(partial, snapshot.rank), {"sha256": digests, "places": places})
        return
    others = [_part_of(partial, rank) for rank in range(1, snapshot.num_shards)]
    manifest = _manifest(snapshot, [{"sha256": digests, "places": places}, *others])
    write_json(partial / STATE_FILE, {**snapshot.state, "step": snapshot.step})
    manifest["sha256"][STATE_FILE] = sha256_of(partial / STATE_FILE)
    write_json(partial / MANIFEST_FILE, manifest)
    for rank in range(1, snapshot.num_shards):
        _part_file(partial, rank).unlink()
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    fsync_folder(target.parent)


def _clear(partial: Path, snapshot: Snapshot) -> None:
    """Delete what this rank has written; the folder itself is rank 0's."""
    if snapshot.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    for group in GROUPS:
        (partial / group_file(group, snapshot.rank, snapshot.num_shards)).unlink(missing_ok=True)


def _manifest(snapshot: Snapshot, parts: list[dict[str, Any]]) -> dict[str, Any]:
    manifest: dict[str, Any] = {
        "format_version": 1 if snapshot.num_shards == 1 else 2,
        "step": snapshot.step,
        "quality": snapshot.state.get("progress", {}).get("metrics", {}).get(Q),
        "sha256": {name: digest for part in parts for name, digest in part["sha256"].items()},
    }
    if snapshot.num_shards == 1:
        return manifest
    whole: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for rank, part in enumerate(parts):
        for group, tensors in part["places"].items():
            for name, place in tensors.items():
                entry = whole[group].setdefault(name, {"shape": place["shape"], "pieces": []})
                entry["pieces"].append([rank, place["first"]])
    return {**manifest, "num_shards": snapshot.num_shards, "tensors": whole}


def _part_file(partial: Path, rank: int) -> Path:
    return partial / f"rank-{rank:05d}.json"


def _part_of(partial: Path, rank: int) -> dict[str, Any]:
    """What another rank has written; it comes through the folder, which all ranks share."""
    path, deadline = _part_file(partial, rank), time.monotonic() + SHARD_WAIT_S
    while not path.is_file():
        if time.monotonic() > deadline:
            raise StorageError(
                f"{partial.parent}: rank {rank} wrote no part of {partial.name} within "
                f"{SHARD_WAIT_S:g} s; training.output_dir must be on storage that all workers "
                "share"
            )
        time.sleep(SHARD_POLL_S)
    part: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return part
