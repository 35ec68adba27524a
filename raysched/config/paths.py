"""Paths that a user wrote, with `~` for the home folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from raysched.config.run import RunConfig
from raysched.config.storage_uri import is_uri
from raysched.errors import ConfigError

ROOT_VARIABLE = "RAYSCHED_ROOT"
# Ray unpacks a submitted job's files into a folder of this name, and deletes it after the job.
_JOB_FOLDER = "working_dir_files"


def work_root() -> Path:
    """The folder that holds `runs/`, and that relative output folders start from.

    $RAYSCHED_ROOT, else the working directory; in a submitted Ray job, whose working directory is
    deleted after it, `~/raysched`. On several nodes it must be on storage that they share.

    Raises:
        ConfigError: a submitted job has neither RAYSCHED_ROOT nor a home folder.
    """
    given = os.environ.get(ROOT_VARIABLE)
    if given:
        return user_path(given, ROOT_VARIABLE).absolute()
    here = Path.cwd()
    if _JOB_FOLDER not in here.parts:
        return here
    return user_path("~/raysched", f"{ROOT_VARIABLE} is not set")


def user_path(text: str, key: str) -> Path:
    """A path with its `~` or `~name` replaced.

    Args:
        text: the path as written.
        key: the setting that names it, for the message.

    Raises:
        ConfigError: there is no such home folder (in containers, HOME is often unset).
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{key}: {text}: the home folder that ~ stands for is unknown; write the whole path, "
            "or set HOME"
        ) from error


def anchored(config: RunConfig, root: Path) -> RunConfig:
    """The run with the paths of its data and of its storage made absolute.

    Workers and trials have working directories of their own.

    Args:
        config: the run as it was loaded.
        root: what relative paths start from, the working directory of the command.
    """
    data = config.data
    absolute = {
        name: str(root / user_path(text, f"data.{name}"))
        for name, text in (("path", data.path), ("cache_dir", data.cache_dir))
        if text is not None
    }
    update: dict[str, Any] = {"data": data.model_copy(update=absolute)}
    if config.init_from is not None:
        update["init_from"] = str(root / user_path(config.init_from, "init_from"))
    storage = config.training.storage_path
    if storage is not None and not is_uri(storage):
        path = str(root / user_path(storage, "training.storage_path"))
        update["training"] = config.training.model_copy(update={"storage_path": path})
    return config.model_copy(update=update)
