"""Checkpoints: a folder of safetensors and JSON, complete or not there at all.

`checkpoints/step-00000200/` holds `model.safetensors` (online weights), `ema.safetensors`,
`optimizer.safetensors`, `state.json` (step, compute meter, history) and, written last,
`manifest.json` with the SHA-256 of each file. The folder is written under a temporary name and
renamed; a folder whose manifest does not fit is skipped with a warning and the one before is used.
No pickle is ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from raysched.errors import StorageError, UserError
from raysched.training.files import fsync_folder, storage_errors, write_json

FORMAT_VERSION = 1
TENSOR_FILES = ("model", "ema", "optimizer")


class NewerFormatError(UserError):
    """A checkpoint of a later version: whole, but not for this one to read."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on as if it had never stopped.

    Attributes:
        step: optimizer steps done; also the position in the data.
        tensors: `model`, `ema` and `optimizer`, each name -> tensor.
        state: JSON types: meter, history, configuration's digest, tracking ids.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-[0-9]*"))


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint, *, keep_last: int) -> Path:
    """Write a checkpoint atomically, then delete the oldest beyond `keep_last`.

    A full disk first costs the older checkpoints (never the newest good one), then the attempt.

    Raises:
        StorageError: the checkpoint can't be written; those before it are untouched.
    """
    root = run_dir / "checkpoints"
    target = root / f"step-{checkpoint.step:08d}"
    with storage_errors(root, f"writing the checkpoint of step {checkpoint.step}"):
        try:
            _write(root, target, checkpoint)
        except OSError:
            older = [folder for folder in checkpoint_folders(run_dir) if folder != target][:-1]
            if not older:
                raise
            _delete(older)
            _write(root, target, checkpoint)
    _delete(checkpoint_folders(run_dir)[:-keep_last])
    return target


def load_latest(run_dir: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest complete checkpoint of a run, None if there is none.

    Args:
        run_dir: the run's folder.
        warn: told about each damaged checkpoint that is passed over.

    Raises:
        NewerFormatError: the newest whole one is a later version's; nothing is passed over then.
    """
    folders = checkpoint_folders(run_dir)
    for folder in reversed(folders):
        try:
            return load_checkpoint(folder)
        except NewerFormatError:
            raise
        except StorageError as error:
            rest = "using the checkpoint before it" if folder != folders[0] else "none is left"
            warn(f"{error}; {rest}")
    if folders:
        warn(f"{run_dir}: no checkpoint can be used: training begins anew")
    return None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint folder after checking every file against the manifest.

    Raises:
        StorageError: a file is missing or damaged.
        NewerFormatError: the format is newer than this version's.
    """
    manifest = _read_manifest(folder)
    for name, digest in manifest["sha256"].items():
        path = folder / name
        if not path.is_file():
            raise StorageError(f"{folder}: half-written checkpoint: {name} is missing")
        if _sha256(path) != digest:
            raise StorageError(f"{folder}: damaged checkpoint: {name} fails its checksum")
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    tensors = {name: load_file(folder / f"{name}.safetensors") for name in TENSOR_FILES}
    return Checkpoint(step=state["step"], tensors=tensors, state=state)


def _write(root: Path, target: Path, checkpoint: Checkpoint) -> None:
    temporary = root / f".{target.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name in TENSOR_FILES:
            tensors = {
                k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors[name].items()
            }
            _save_tensors(tensors, temporary / f"{name}.safetensors")
        write_json(temporary / "state.json", {**checkpoint.state, "step": checkpoint.step})
        digests = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        write_json(
            temporary / "manifest.json", {"format_version": FORMAT_VERSION, "sha256": digests}
        )
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        fsync_folder(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors reports a full disk as its own error type, without an errno.
    try:
        save_file(tensors, path)
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    except OSError:
        raise
    except Exception as error:
        free = shutil.disk_usage(path.parent).free
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if "No space left" in str(error) or "os error 28" in str(error) or free < size:
            raise OSError(28, "No space left on device", str(path)) from error
        if "os error 27" in str(error):
            raise OSError(27, "File too large", str(path)) from error
        raise


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise StorageError(f"{folder}: half-written checkpoint: manifest.json is missing")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, _ = int(manifest["format_version"]), manifest["sha256"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{folder}: damaged checkpoint: manifest.json: {error}") from error
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{folder}: format {version} was written by a newer raysched; this one reads up to "
            f"{FORMAT_VERSION}: upgrade raysched"
        )
    return manifest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _delete(folders: list[Path]) -> None:
    for folder in folders:
        # Renamed first: a kill in the middle must not leave a folder that looks whole.
        doomed = folder.with_name(f".{folder.name}.deleted")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
