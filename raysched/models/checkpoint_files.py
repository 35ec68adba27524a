"""The files of a checkpoint folder: what its manifest promises, and whole tensors out of them.

A folder holds the groups `model` (online weights), `ema` and `optimizer`, `state.json`, and
`manifest.json`:

| key | content |
|---|---|
| `format_version` | 1: a file per group; 2: a file per group and rank |
| `step` | optimizer steps done |
| `quality` | `quality/q` of the newest evaluation before it, null if there was none |
| `sha256` | file name -> digest |
| `num_shards` | format 2: how many ranks wrote |
| `tensors` | format 2: group -> name -> `{"shape": [N, …], "pieces": [[rank, first row], …]}` |

Whoever wrote a checkpoint, and on however many ranks, `read_group` returns whole tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from raysched.errors import StorageError, UserError
from raysched.models.pickles import refuse_pickled_folder
from raysched.models.tensor_files import read_tensors, sha256_of

NEWEST_FORMAT = 2
GROUPS = ("model", "ema", "optimizer")
MANIFEST_FILE, STATE_FILE = "manifest.json", "state.json"


class NewerFormatError(UserError):
    """A checkpoint of a later version: whole, but not for this one to read."""


def group_file(group: str, rank: int = 0, num_shards: int = 1) -> str:
    """Name of a group's file: the only one, or that of a rank."""
    return f"{group}{'' if num_shards == 1 else f'-{rank:05d}-of-{num_shards:05d}'}.safetensors"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint's manifest says.

    Raises:
        StorageError: it is missing or damaged.
        PickleError: there are pickles instead.
        NewerFormatError: a later version wrote it.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        if folder.is_dir():
            refuse_pickled_folder(folder)
        raise StorageError(f"{folder}: half-written checkpoint: {MANIFEST_FILE} is missing")
    try:
        return parse_manifest(path.read_text(encoding="utf-8"), str(folder))
    except ValueError as error:
        raise StorageError(f"{folder}: damaged checkpoint: {MANIFEST_FILE}: {error}") from error


def parse_manifest(text: str, where: str) -> dict[str, Any]:
    """A manifest from its JSON.

    Raises:
        ValueError: it is no manifest.
        NewerFormatError: a later version wrote it.
    """
    try:
        manifest: dict[str, Any] = json.loads(text)
        version, _ = int(manifest["format_version"]), manifest["sha256"].items()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no manifest: {error}") from error
    if version > NEWEST_FORMAT:
        raise NewerFormatError(
            f"{where}: format {version} was written by a newer raysched; this one reads up to "
            f"{NEWEST_FORMAT}: upgrade raysched"
        )
    return manifest


def verify(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """Compare files with their checksums.

    Args:
        folder: the checkpoint's.
        manifest: its content.
        names: of the files to look at.

    Raises:
        StorageError: a file is missing or damaged.
    """
    for name in names:
        path = folder / name
        if not path.is_file():
            raise StorageError(f"{folder}: half-written checkpoint: {name} is missing")
        if sha256_of(path) != manifest["sha256"].get(name):
            raise StorageError(f"{folder}: damaged checkpoint: {name} fails its checksum")


def read_verified_group(folder: Path, group: str) -> dict[str, Tensor]:
    """One group's whole tensors, after checking the manifest and the group's own files.

    Raises:
        StorageError: a file is missing or damaged.
        NewerFormatError, PickleError: nothing for this version, or for anybody, to read.
    """
    manifest = read_manifest(folder)
    num_shards = manifest.get("num_shards", 1)
    verify(folder, manifest, [group_file(group, r, num_shards) for r in range(num_shards)])
    return read_group(folder, manifest, group)


def read_group(folder: Path, manifest: dict[str, Any], group: str) -> dict[str, Tensor]:
    """One group's whole tensors, on the CPU; the files' checksums are the caller's business.

    Raises:
        StorageError: a file can't be read, or rows of a tensor are missing.
    """
    num_shards = manifest.get("num_shards", 1)
    files = [read_tensors(folder / group_file(group, r, num_shards)) for r in range(num_shards)]
    if num_shards == 1:
        return files[0]
    whole = {}
    for name, entry in manifest["tensors"][group].items():
        parts = [(files[rank][name], first) for rank, first in entry["pieces"]]
        tensor = parts[0][0].new_empty(entry["shape"])
        # A tensor without rows of its own (a count) is one piece.
        rows = sum(len(part) if part.dim() else 1 for part, _ in parts)
        if rows != (entry["shape"][0] if entry["shape"] else 1):
            raise StorageError(
                f"{folder}: damaged checkpoint: {group}: rows of {name} are missing"
            )
        for part, first in parts:
            if part.dim():
                tensor[first : first + len(part)] = part
            else:
                tensor = part
        whole[name] = tensor
    return whole
