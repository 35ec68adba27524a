"""A run's place in `training.storage_path`: a folder, NFS, or an object store through pyarrow.

`<storage_path>/<run folder's name>/` holds `config.yaml`, `metrics.jsonl`, `result.json`,
`pipeline/` and `checkpoints/step-…/`. A checkpoint's manifest is written last: without it, the
checkpoint isn't there. Credentials come from the environment, and no message shows them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from raysched.config.storage_uri import is_uri, without_secrets
from raysched.errors import StorageError
from raysched.models.checkpoint_files import MANIFEST_FILE, parse_manifest

T = TypeVar("T")
# An object store may be asked for its region and for credentials first, each with retries.
ANSWER_S = 60.0
PROBE_FILE = ".raysched-can-write"
_BLOCK = 1 << 20
_SECRETS = re.compile(r"(?i)(secret|token|password|access_key)")


class Storage:
    """Reads and writes the files of one run in the store.

    Every method may raise `OSError` or another error of pyarrow's; `explain` puts it in words.

    Args:
        path: `training.storage_path`, a folder or a URI.
        run_name: name of the run's folder there.

    Raises:
        StorageError: pyarrow knows no such store.
    """

    def __init__(self, path: str, run_name: str) -> None:
        self.path, self.run_name = path, run_name
        self._fs, place = _open(path)
        self._parent = place.rstrip("/")
        self._root = f"{self._parent}/{run_name}"

    @property
    def where(self) -> str:
        """The place for messages."""
        return f"{without_secrets(self.path).rstrip('/')}: {self.run_name}"

    def probe(self) -> None:
        """Write a few bytes, so that a store that can't be written is found before training."""
        place = f"{self._parent}/{PROBE_FILE}"
        self._write(place, lambda out: out.write(b"raysched"))
        # A store that lets nothing be deleted will do: old checkpoints stay there, then.
        with contextlib.suppress(OSError):
            self._fs.delete_file(place)

    def put_file(self, local: Path, name: str) -> None:
        """Upload one file; a reader sees the old one, or the whole new one."""
        with local.open("rb") as source:
            self._write(
                f"{self._root}/{name}", lambda out: shutil.copyfileobj(source, out, _BLOCK)
            )

    def put_folder(self, local: Path, name: str, last: str) -> None:
        """Upload a folder's files, at any depth; `last` is the file that makes it whole."""
        files = sorted(path for path in local.rglob("*") if path.is_file())
        files.sort(key=lambda path: path == local / last)
        for path in files:
            self.put_file(path, f"{name}/{path.relative_to(local).as_posix()}")

    def get_file(self, name: str, local: Path) -> None:
        """Download one file."""
        local.parent.mkdir(parents=True, exist_ok=True)
        partial = local.with_name(f".{local.name}.partial")
        stream = self._fs.open_input_stream(f"{self._root}/{name}")
        with stream as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)
        partial.replace(local)

    def exists(self, name: str) -> bool:
        """Whether the run has this file in the store."""
        from pyarrow.fs import FileType

        return bool(self._fs.get_file_info(f"{self._root}/{name}").type == FileType.File)

    def files(self, name: str) -> list[str]:
        """Names of the files of a folder of the run, without its own name."""
        return [n for n, is_folder in self._children(f"{self._root}/{name}") if not is_folder]

    def steps(self) -> list[int]:
        """Steps that have a checkpoint folder, whole or not, in order."""
        names = (n for n, is_folder in self._children(f"{self._root}/checkpoints") if is_folder)
        return sorted(int(n[5:]) for n in names if re.fullmatch(r"step-\d+", n))

    def manifest(self, step: int) -> dict[str, Any] | None:
        """A checkpoint's manifest; None where it is missing or damaged: no whole checkpoint.

        Raises:
            NewerFormatError: a later version wrote it.
        """
        name = f"{checkpoint_name(step)}/{MANIFEST_FILE}"
        if not self.exists(name):
            return None
        with self._fs.open_input_stream(f"{self._root}/{name}") as source:
            text = source.read().decode("utf-8", errors="replace")
        try:
            return parse_manifest(text, f"{self.where}: {checkpoint_name(step)}")
        except ValueError:
            return None

    def newest_step(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return next((s for s in reversed(self.steps()) if self.manifest(s) is not None), None)

    def delete_checkpoint(self, step: int) -> None:
        """Delete a checkpoint: its manifest first, so that what is left never looks whole."""
        name = checkpoint_name(step)
        if self.exists(f"{name}/{MANIFEST_FILE}"):
            self._fs.delete_file(f"{self._root}/{name}/{MANIFEST_FILE}")
        if self._knows_folders:
            self._fs.delete_dir(f"{self._root}/{name}")
            return
        for file in self.files(name):
            self._fs.delete_file(f"{self._root}/{name}/{file}")

    def run_names(self, pattern: str) -> list[str]:
        """Names of the runs in the store that match a regular expression, in order."""
        names = (n for n, is_folder in self._children(self._parent) if is_folder)
        return sorted(name for name in names if re.fullmatch(pattern, name))

    def _children(self, folder: str) -> list[tuple[str, bool]]:
        """Names directly below a folder, and whether each is a folder, too."""
        from pyarrow.fs import FileSelector, FileType

        deep = not self._knows_folders
        selector = FileSelector(folder, recursive=deep, allow_not_found=True)
        found: dict[str, bool] = {}
        for info in self._fs.get_file_info(selector):
            name, below, _ = info.path.removeprefix(f"{folder}/").partition("/")
            is_folder = bool(below) or info.type == FileType.Directory
            found[name] = found.get(name, False) or is_folder
        return list(found.items())

    @property
    def _knows_folders(self) -> bool:
        """Whether folders are there without being made: not so in pyarrow's GCS."""
        return self._fs.type_name in ("local", "s3")

    def _write(self, place: str, fill: Callable[[Any], object]) -> None:
        """An object appears whole when it is closed; a file needs a name of its own first."""
        from pyarrow.fs import LocalFileSystem

        if not isinstance(self._fs, LocalFileSystem):
            with self._fs.open_output_stream(place) as out:
                fill(out)
            return
        folder, _, name = place.rpartition("/")
        self._fs.create_dir(folder, recursive=True)
        partial = f"{folder}/.{name}.{os.getpid()}.partial"
        with self._fs.open_output_stream(partial) as out:
            fill(out)
        self._fs.move(partial, place)


def checkpoint_name(step: int) -> str:
    """A checkpoint's folder within the run's."""
    return f"checkpoints/step-{step:08d}"


def answer_of(work: Callable[[], T], path: str, doing: str, limit_s: float | None = None) -> T:
    """Ask the store for something, and say clearly if it can't be had.

    Args:
        work: what to do; it goes on in a thread of its own if the store doesn't answer.
        path: the storage path, for the message.
        doing: what is being done, in words.
        limit_s: how long to wait; default: `ANSWER_S`.

    Raises:
        StorageError: the store refuses, or doesn't answer.
        UserError: what `work` raises of that kind.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:  # noqa: BLE001 - raised below, in the caller's thread
            errors.append(error)

    limit = ANSWER_S if limit_s is None else limit_s
    thread = threading.Thread(target=run, name="raysched-storage", daemon=True)
    thread.start()
    thread.join(limit)
    if errors and not is_store_error(errors[0]):
        raise errors[0]
    if not results:
        reason = explain(errors[0]) if errors else f"no answer within {limit:g} s"
        raise StorageError(
            f"training.storage_path: {without_secrets(path)}: {doing} failed: {reason}; check the "
            "path and the credentials in the environment, or leave it out"
        ) from (errors[0] if errors else None)
    return results[0]


def is_store_error(error: BaseException) -> bool:
    """Whether an error is one of pyarrow's or the system's, rather than a mistake of ours."""
    from pyarrow import ArrowException

    return isinstance(error, OSError | ArrowException)


def explain(error: BaseException) -> str:
    """An error's first line, without what the environment keeps secret."""
    if isinstance(error, OSError) and error.strerror and error.errno is not None:
        text = os.strerror(error.errno) if error.errno > 0 else error.strerror
    else:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    for name, value in os.environ.items():
        if _SECRETS.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return without_secrets(text)


def _open(path: str) -> tuple[Any, str]:
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem, LocalFileSystem

    if not is_uri(path):
        return LocalFileSystem(), str(Path(path).absolute())
    try:
        fs, place = FileSystem.from_uri(path)
    except (OSError, ArrowException) as error:
        raise StorageError(
            f"training.storage_path: {without_secrets(path)}: no such storage: {explain(error)}"
        ) from error
    return fs, place
