"""Writing into a run's folder so that a reader never sees half a file."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raysched.errors import StorageError


@contextmanager
def storage_errors(
    path: Path, doing: str, *, setting: str = "training.output_dir"
) -> Iterator[None]:
    """Turn a full disk or a folder that can't be written into one clear message.

    Args:
        path: the folder.
        doing: what was being done.
        setting: what to set for another folder.

    Raises:
        StorageError: naming the folder, what was being done, and how to mend it.
    """
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: f"no space left on the device: free some, or set {setting}",
            errno.EDQUOT: f"the disk quota is used up: free some, or set {setting}",
            errno.EFBIG: "the file would exceed the allowed size (ulimit -f)",
            errno.EROFS: f"the file system is read-only: set {setting}",
            errno.EACCES: f"permission denied: set {setting} to a folder of yours",
            errno.EPERM: f"permission denied: set {setting} to a folder of yours",
            errno.ENOENT: f"no folder can be made there: set {setting}",
            errno.ENOTDIR: f"a file stands where a folder is needed: set {setting}",
            errno.EEXIST: f"a file stands where a folder is needed: set {setting}",
        }
        if error.errno not in reasons:
            raise
        raise StorageError(f"{path}: {doing} failed: {reasons[error.errno]}") from error


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file atomically and durably."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_writable(folder: Path) -> None:
    """Make a folder and write to it, so that a bad path is found before any training.

    Raises:
        StorageError: the folder can't be made or written.
    """
    with storage_errors(folder, "writing to the output folder"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
