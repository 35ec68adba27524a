"""Before training starts: is the store writable, and does it hold work to go on with?

`--resume` where the run's folder is gone (another machine, a lost disk) fetches config, metrics
and the newest whole checkpoint; so it does where the store has got further than the folder, or
where the folder's newest one is damaged.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from raysched.config.run import RunConfig
from raysched.config.storage_uri import without_secrets
from raysched.errors import StorageError
from raysched.training.checkpoint import (
    delete_folders,
    folder_name,
    load_checkpoint,
    newest_whole,
    step_of,
)
from raysched.training.files import storage_errors, write_json
from raysched.training.run_folder import (
    CONFIG_FILE,
    METRICS_FILE,
    TRACKING_RECORD,
    check_same_run,
)
from raysched.training.storage import Storage, answer_of, checkpoint_name

# Downloads take as long as they take; only silence before the first byte is limited elsewhere.
DOWNLOAD_S = 24 * 3600.0


def check_storage(config: RunConfig) -> None:
    """Write a few bytes to `training.storage_path`, if there is one.

    Raises:
        StorageError: it can't be written; says why.
    """
    path = config.training.storage_path
    if path is not None:
        answer_of(lambda: Storage(path, config.name).probe(), path, "writing to the storage")


def prepare_storage(
    config: RunConfig, run_dir: Path, *, resume: bool, say: Callable[[str], None]
) -> None:
    """Fetch the run from the store where that helps, or see that there is none of its name.

    Args:
        config: the resolved run.
        run_dir: its folder.
        resume: whether to go on with what there is.
        say: told what was fetched, and which checkpoint in the store is damaged.

    Raises:
        StorageError: the store can't be read, or holds a run of this name and `resume` is off.
        ConfigError: the run in the store was made with another config.
    """
    path = config.training.storage_path
    if path is None:
        return
    storage = Storage(path, run_dir.name)
    newest = answer_of(storage.newest_step, path, "looking for the run's checkpoints")
    if newest is None:
        return
    if not resume:
        raise StorageError(
            f"training.storage_path: {without_secrets(path)} already holds a run "
            f"{run_dir.name}: go on with it by --resume, or name another training.output_dir"
        )
    _fetch(config, storage, run_dir, say)


def stored_run_name(config: RunConfig) -> str | None:
    """Name of the newest run `<name>-<time>` in the store, for `--resume` without a folder."""
    path = config.training.storage_path
    if path is None:
        return None
    pattern = re.escape(config.name) + r"-\d{8}-\d{6}(-\d+)?"

    def newest() -> str | None:
        names = Storage(path, config.name).run_names(pattern)
        whole = (n for n in reversed(names) if Storage(path, n).newest_step() is not None)
        return next(whole, None)

    return answer_of(newest, path, "looking for runs")


def _fetch(config: RunConfig, storage: Storage, run_dir: Path, say: Callable[[str], None]) -> None:
    """Fetch the newest whole checkpoint that is newer than the folder's newest whole one."""
    path, here = storage.path, newest_whole(run_dir)
    local = -1 if here is None else step_of(here)
    steps = answer_of(storage.steps, path, "looking for the run's checkpoints")
    newer = [step for step in reversed(steps) if step > local]
    if newer and not (run_dir / CONFIG_FILE).exists():
        _download(storage, CONFIG_FILE, run_dir / CONFIG_FILE)
    check_same_run(config, run_dir)
    for step in newer:
        manifest = answer_of(partial(storage.manifest, step), path, "reading a manifest")
        if manifest is None:
            continue  # its upload was cut short: it doesn't count
        try:
            state = _fetch_checkpoint(storage, step, run_dir)
        except StorageError as error:
            say(f"{error}; trying the one before it")
            continue
        if answer_of(lambda: storage.exists(METRICS_FILE), path, "looking for metrics"):
            _download(storage, METRICS_FILE, run_dir / METRICS_FILE)
        record = state.get("tracking")
        if record is not None and not (run_dir / TRACKING_RECORD).exists():
            (run_dir / TRACKING_RECORD).parent.mkdir(parents=True, exist_ok=True)
            write_json(run_dir / TRACKING_RECORD, record)
        say(f"fetched step {step} of {run_dir.name} from {without_secrets(path)}")
        return


def _fetch_checkpoint(storage: Storage, step: int, run_dir: Path) -> dict[str, object]:
    """Download a checkpoint, verify it, and let it appear in the folder; returns its state."""
    root = run_dir / "checkpoints"
    arriving = root / f".{folder_name(step)}.fetched.partial"
    shutil.rmtree(arriving, ignore_errors=True)
    name = checkpoint_name(step)
    try:
        for file in answer_of(lambda: storage.files(name), storage.path, "listing a checkpoint"):
            _download(storage, f"{name}/{file}", arriving / file)
        load_checkpoint(arriving)
        state: dict[str, object] = json.loads((arriving / "state.json").read_text("utf-8"))
        with storage_errors(root, "keeping the fetched checkpoint"):
            delete_folders([root / folder_name(step)])  # a damaged one of this step
            arriving.rename(root / folder_name(step))
    finally:
        shutil.rmtree(arriving, ignore_errors=True)
    return state


def _download(storage: Storage, name: str, local: Path) -> None:
    with storage_errors(local.parent, f"fetching {name}"):
        answer_of(
            lambda: storage.get_file(name, local), storage.path, f"fetching {name}", DOWNLOAD_S
        )
