"""The door to MLflow: a quiet client, and which of its errors are worth another try.

MLflow is imported inside `connect` (1.3-2.2 s): by the driver when it prepares the store, by a
trial in its sender thread.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from raysched.config.paths import user_path
from raysched.tracking.uris import is_sqlite, redact, unreachable_reason

# Our own retries keep order and are told to the user; MLflow's would block for minutes.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
# The database module logs a traceback for each lock that it meets; those are retried here.
_LOGGERS = {
    "mlflow": logging.ERROR,
    "mlflow.store.db.utils": logging.CRITICAL,
    "alembic": logging.ERROR,
    "urllib3.connectionpool": logging.ERROR,
}
_LATER = {401, 403, 404, 408, 425, 429}
# MLflow calls every database error a bad request; only these are the entry's own fault.
_DATABASE_REFUSALS = {"DataError", "IntegrityError", "StatementError"}


class UnreachableError(Exception):
    """Nothing answers at the tracking URI; the points stay in the spool."""


def connect(uri: str) -> Any:
    """A client of the store at `uri`.

    Args:
        uri: an absolute tracking URI.

    Returns:
        An `mlflow.MlflowClient` that prints nothing.

    Raises:
        UnreachableError: nothing answers there. Asked first, because MLflow would wait for
            minutes before it says so.
    """
    reason = unreachable_reason(uri)
    if reason is not None:
        raise UnreachableError(reason)
    user_path("~", "HOME")  # MLflow asks for it when it is imported
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    for name, level in _LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    return MlflowClient(tracking_uri=uri, registry_uri=uri if is_sqlite(uri) else None)


def describe(error: BaseException) -> str:
    """One line for the user, without secrets."""
    text = redact(str(error)).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def status_code(error: BaseException) -> int | None:
    """The HTTP status that MLflow gave, or would give, for this error; None for other errors."""
    read = getattr(error, "get_http_status_code", None)
    return int(read()) if callable(read) else None


def is_locked(error: BaseException) -> bool:
    """True if SQLite was busy with another writer."""
    text = str(error)
    return "database is locked" in text or "database table is locked" in text


def is_refused(error: BaseException) -> bool:
    """True if this very entry is at fault, so that sending it again can't help.

    Missing rights, a missing run and all failures of the connection are worth another try later;
    a point with a bad name is not.
    """
    if is_locked(error):
        return False
    if isinstance(error, TypeError | ValueError | FileNotFoundError):
        return True
    cause = type(error.__cause__)
    if cause.__module__.startswith("sqlalchemy") and cause.__name__ not in _DATABASE_REFUSALS:
        return False
    code = status_code(error)
    return code is not None and 400 <= code < 500 and code not in _LATER
