"""The store that all runs of a sweep share: prepared once by the driver, then handed on.

A cold SQLite store breaks when several processes use it first, and racing `create_experiment`
calls scatter runs; so the driver calls `prepare_store` once, makes the runs (`runs.start_run`)
and gives trials nothing but a `StoreHandle` and a run id.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raysched.config.run import TrackingConfig
from raysched.errors import ConfigError, StorageError
from raysched.tracking.client import UnreachableError, connect, describe, status_code
from raysched.tracking.uris import (
    TRACKING_URI_VARIABLE,
    check_sqlite_file,
    has_credentials,
    is_server,
    is_sqlite,
    redact,
    resolve_uri,
    sqlite_path,
)

LOGGER = logging.getLogger("raysched.tracking")
_LOCK_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class StoreHandle:
    """Where runs go; small and picklable.

    Attributes:
        uri: absolute tracking URI, which may carry credentials (never shown).
        experiment_id: MLflow's id; empty while offline.
        experiment: the experiment's name.
        offline: nothing answered when the store was prepared; runs are made when it is back.
    """

    uri: str
    experiment_id: str
    experiment: str
    offline: bool = False

    def __repr__(self) -> str:
        return (
            f"StoreHandle(uri={redact(self.uri)!r}, experiment_id={self.experiment_id!r}, "
            f"experiment={self.experiment!r}, offline={self.offline})"
        )


def prepare_store(config: TrackingConfig, root: Path) -> StoreHandle:
    """Make the schema and the experiment; call it once, in the driver.

    Args:
        config: the run's tracking section.
        root: folder that holds `runs/`.

    Returns:
        The handle. If a server can't be reached the handle is offline: a warning is given,
        training goes on, and the points wait on disk.

    Raises:
        ConfigError: a URI that MLflow can't use, missing rights, a deleted experiment.
        StorageError: the SQLite file can't be written or is not a database.
    """
    uri = resolve_uri(config.uri, root)
    try:
        if is_sqlite(uri):
            experiment_id = _prepare_sqlite(uri, config.experiment)
        else:
            artifacts = artifact_root(uri, root.resolve() / "runs")
            experiment_id = ensure_experiment(connect(uri), config.experiment, artifacts)
    except UnreachableError as error:
        LOGGER.warning(
            "MLflow at %s does not answer (%s). Training goes on and the points are kept in the "
            "run folder; send them later with: raysched sync RUN_FOLDER",
            redact(uri),
            error,
        )
        return StoreHandle(uri, "", config.experiment, offline=True)
    return StoreHandle(uri, experiment_id, config.experiment)


def _prepare_sqlite(uri: str, experiment: str) -> str:
    path = sqlite_path(uri)
    check_sqlite_file(path)
    try:
        with FileLock(path.with_name(path.name + ".lock"), timeout=_LOCK_TIMEOUT_S):
            return ensure_experiment(connect(uri), experiment, artifact_root(uri, path.parent))
    except Timeout as error:
        raise StorageError(
            f"{error.lock_file}: another process has been preparing the MLflow store for "
            f"{_LOCK_TIMEOUT_S:.0f} s; end it, or choose another file with tracking.uri"
        ) from error


def artifact_root(uri: str, otherwise: Path) -> Path | None:
    """Where a new experiment's artifacts go: beside SQLite, the server's choice, else `otherwise`.

    MLflow's own default is relative to the working directory, which Ray changes.
    """
    if is_server(uri):
        return None
    return (sqlite_path(uri).parent if is_sqlite(uri) else otherwise) / "mlartifacts"


def ensure_experiment(client: Any, name: str, artifacts: Path | None) -> str:
    """The experiment's id; the experiment is made if it doesn't exist.

    Args:
        client: an MLflow client.
        name: the experiment's name.
        artifacts: folder of the artifacts; None lets the server choose.

    Raises:
        ConfigError: the store refuses.
        UnreachableError: the server failed.
    """
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_experiment_by_name(name)
        if found is None:
            location = None if artifacts is None else artifacts.as_uri()
            try:
                return str(client.create_experiment(name, artifact_location=location))
            except MlflowException as error:
                # Another process was faster.
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise error
    except MlflowException as error:
        raise _explained(error) from error
    if found.lifecycle_stage == "deleted":
        raise ConfigError(
            f"tracking.experiment: {name!r} was deleted in this store; restore it "
            f"(mlflow experiments restore -x {found.experiment_id}) or choose another name"
        )
    return str(found.experiment_id)


def _explained(error: Exception) -> Exception:
    code = status_code(error)
    if code in (401, 403):
        return ConfigError(
            f"tracking.uri: MLflow refuses access ({describe(error)}); give "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN, and "
            "start the server with this host among its --allowed-hosts"
        )
    if "out-of-date database schema" in str(error):
        return ConfigError(
            "tracking.uri: the store was made by an older MLflow; back it up, then run "
            "`mlflow db upgrade URI`, or choose another store"
        )
    if code is not None and 400 <= code < 500:
        return ConfigError(f"tracking: MLflow refuses: {describe(error)}")
    return UnreachableError(describe(error))


def ui_command(handle: StoreHandle) -> str:
    """The line that opens MLflow's UI on this store when pasted into a shell.

    A server has a UI of its own: then it is the URL of the experiment. A password is never shown:
    the line reads it from the environment instead.
    """
    if is_server(handle.uri) or "://" not in handle.uri:
        page = experiment_place(handle.experiment_id) if handle.experiment_id else ""
        return redact(handle.uri).replace("***@", "") + page
    hidden = has_credentials(handle.uri)
    uri = f'"${TRACKING_URI_VARIABLE}"' if hidden else shlex.quote(handle.uri)
    return f"{_mlflow_command()} ui --backend-store-uri {uri} --host 127.0.0.1 --port 5000"


def experiment_place(experiment_id: str) -> str:
    """An experiment's list of runs on MLflow's pages, which else open as for language models."""
    return f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning"


def _mlflow_command() -> str:
    found = shutil.which("mlflow")
    beside = Path(sys.executable).with_name("mlflow")
    if found is not None and Path(found).absolute() == beside.absolute():
        return "mlflow"
    interpreter = Path(sys.executable).absolute()
    if interpreter.is_relative_to(Path.cwd()):
        return f"{shlex.quote(os.path.relpath(interpreter))} -m mlflow"
    return f"{shlex.quote(str(interpreter))} -m mlflow"
