"""The folder of a sweep: a unique name, what it was asked, and who may go on with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from raysched.config.loading import dump, load, write_yaml
from raysched.config.paths import user_path, work_root
from raysched.config.run import RunConfig
from raysched.config.sweep import SweepConfig
from raysched.errors import ConfigError, StorageError
from raysched.training.files import check_writable, storage_errors
from raysched.training.run_folder import default_run_dir, flatten
from raysched.tuning.journal import JOURNAL_FILE

SWEEP_FILE = "sweep.yaml"
BASE_FILE = "base.yaml"
# A resumed sweep may differ in these: more trials, other resources.
FREE_ON_RESUME = (
    *("name", "base", "overrides", "output_dir", "search.num_samples", "search.max_concurrent"),
    *(f"the run's {key}" for key in ("tracking.", "scaling.", "training.output_dir")),
    *(f"the run's {key}" for key in ("data.cache_dir", "training.checkpoint_every_steps")),
    *(f"the run's training.{key}" for key in ("keep_last", "keep_best", "storage_")),
)


def sweep_folder(sweep: SweepConfig, *, resume: bool, root: Path | None = None) -> Path:
    """The absolute folder to use.

    Args:
        sweep: names the folder, or the prefix of one under `runs/`.
        resume: without `output_dir`, the newest sweep of this name is meant.
        root: folder that holds `runs/`; default: the working directory.

    Raises:
        StorageError: there is no sweep to resume, or one where a new one should go.
    """
    root = (root or work_root()).resolve()
    if sweep.output_dir is not None:
        folder = (root / user_path(sweep.output_dir, "output_dir")).resolve()
        if holds_sweep(folder) and not resume:
            raise StorageError(
                f"output_dir: {folder} already holds a sweep: go on with it by --resume, or name "
                "another folder"
            )
        if resume and not holds_sweep(folder):
            raise StorageError(f"--resume: {folder} holds no sweep")
        return folder
    if not resume:
        return default_run_dir(sweep.name, root)
    found = [path for path in (root / "runs").glob(f"{sweep.name}-[0-9]*") if holds_sweep(path)]
    if not found:
        raise StorageError(
            f"--resume: {root / 'runs'} holds no sweep named {sweep.name}-…; name its folder by "
            "output_dir=FOLDER"
        )
    return max(found, key=lambda path: (path / SWEEP_FILE).stat().st_mtime)


def holds_sweep(folder: Path) -> bool:
    """Whether a folder already belongs to a sweep."""
    return (folder / SWEEP_FILE).exists() or (folder / JOURNAL_FILE).exists()


@contextmanager
def open_sweep_folder(folder: Path, sweep: SweepConfig, base: RunConfig) -> Iterator[None]:
    """Make the folder, or check that the sweep in it is the same; keep other drivers out.

    Raises:
        StorageError: the folder can't be written, or another process runs this sweep.
        ConfigError: the sweep in it was made with other settings.
    """
    check_writable(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StorageError(
            f"{folder}: another process is running this sweep; wait for it, or end it first"
        ) from error
    try:
        if (folder / SWEEP_FILE).exists():
            _check_same(folder, sweep, base)
        with storage_errors(folder, "writing the sweep's files"):
            (folder / "trials").mkdir(exist_ok=True)
            (folder / ".stop").unlink(missing_ok=True)
            text = yaml.safe_dump(_plain(sweep), sort_keys=False, allow_unicode=True)
            _replace(folder / SWEEP_FILE, text)
            write_yaml(base, folder / BASE_FILE)
        yield
    finally:
        lock.release()


def _check_same(folder: Path, sweep: SweepConfig, base: RunConfig) -> None:
    stored = yaml.safe_load((folder / SWEEP_FILE).read_text(encoding="utf-8"))
    old, new = flatten(stored), flatten(_plain(sweep))
    if (folder / BASE_FILE).exists():
        written = load(folder / BASE_FILE).config
        old |= {f"the run's {key}": value for key, value in flatten(dump(written)).items()}
        new |= {f"the run's {key}": value for key, value in flatten(dump(base)).items()}
    differing = [
        f"{folder}: {key}: the sweep there was made with {old.get(key)!r}, now {new.get(key)!r}: "
        "a resumed sweep keeps its settings (use another output_dir for a new one)"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(FREE_ON_RESUME)
    ]
    if differing:
        raise ConfigError(differing)


def _plain(sweep: SweepConfig) -> dict[str, Any]:
    plain: dict[str, Any] = sweep.model_dump(mode="json", exclude_none=True)
    return plain


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
