"""Where the store is: tracking URIs made absolute, checked, probed and stripped of secrets.

A tracking URI is SQLite on this machine, an MLflow server (`http`, `https`), or a database server
that MLflow opens itself. Nothing here imports MLflow.
"""

from __future__ import annotations

import os
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from raysched.config.paths import work_root
from raysched.errors import ConfigError, StorageError

TRACKING_URI_VARIABLE = "MLFLOW_TRACKING_URI"
PROBE_TIMEOUT_S = 3.0
_SQLITE_PREFIX = "sqlite:///"
_SQLITE_MAGIC = b"SQLite format 3\x00"
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
# The user part is greedy so that an `@` inside a password doesn't leave its tail behind.
_USER_PART = re.compile(r"://[^\s/'\"]+@")
_SECRET_QUERY = re.compile(r"(?i)([?&][\w.-]*(?:password|passwd|token|secret)[\w.-]*=)[^&\s'\"]+")


def redact(text: str) -> str:
    """The same text without user names, passwords and tokens inside its URIs."""
    return _SECRET_QUERY.sub(r"\1***", _USER_PART.sub("://***@", text))


def has_credentials(uri: str) -> bool:
    """True if the URI carries something that must not be written down, or did once."""
    return redact(uri) != uri or "***" in uri


def is_sqlite(uri: str) -> bool:
    """True for a SQLite store."""
    return uri.startswith("sqlite:")


def is_server(uri: str) -> bool:
    """True for an MLflow server that is spoken to over HTTP."""
    return uri.startswith(("http://", "https://"))


def resolve_uri(uri: str | None, root: Path) -> str:
    """The absolute tracking URI: the given one, else $MLFLOW_TRACKING_URI, else SQLite in `root`.

    Args:
        uri: `tracking.uri` of the configuration.
        root: folder that holds `runs/`; the default store is `runs/mlflow.db` below it.

    Raises:
        ConfigError: MLflow can't keep its store there.
    """
    source, given = "tracking.uri", uri
    if not given:
        source, given = f"${TRACKING_URI_VARIABLE}", os.environ.get(TRACKING_URI_VARIABLE)
    if not given:
        return f"{_SQLITE_PREFIX}{root.resolve() / 'runs' / 'mlflow.db'}"
    if is_sqlite(given):
        return _absolute_sqlite(given, source)
    scheme = urlsplit(given).scheme.split("+")[0]
    if is_server(given) or scheme in _DATABASE_PORTS:
        if not _host_and_port(given)[0]:
            raise ConfigError(f"{source}: a host is missing in {redact(given)!r}")
        return given.rstrip("/") if is_server(given) else given
    if scheme == "databricks":
        return given
    raise ConfigError(
        f"{source}: MLflow keeps no runs in plain folders any more, got {redact(given)!r}; use "
        f"sqlite:///{Path('runs/mlflow.db').absolute()}, http://HOST:PORT or postgresql://..."
    )


def _absolute_sqlite(uri: str, source: str) -> str:
    path, mark, query = uri.removeprefix(_SQLITE_PREFIX).partition("?")
    if not uri.startswith(_SQLITE_PREFIX) or path in ("", ":memory:"):
        raise ConfigError(
            f"{source}: an SQLite store needs a file, sqlite:///PATH/mlflow.db, got {uri!r}"
        )
    return f"{_SQLITE_PREFIX}{work_root() / path}{mark}{query}"


def sqlite_path(uri: str) -> Path:
    """The file of a SQLite store."""
    return Path(uri.removeprefix(_SQLITE_PREFIX).partition("?")[0])


def check_sqlite_file(path: Path) -> None:
    """Make the folder and see that the file can be written and is a database.

    Raises:
        StorageError: the folder or the file can't be used.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        with path.open("rb") as file:
            head = file.read(len(_SQLITE_MAGIC))
    except OSError as error:
        raise StorageError(
            f"tracking.uri: can't write the MLflow store {path}: {error.strerror or error}; "
            "choose another with tracking.uri=sqlite:///PATH/mlflow.db, "
            "or turn tracking off with tracking.enabled=false"
        ) from error
    if head and head != _SQLITE_MAGIC:
        raise StorageError(
            f"tracking.uri: {path} is not an SQLite database; move it away or choose another file"
        )


def _host_and_port(uri: str) -> tuple[str | None, int | None]:
    parts = urlsplit(uri)
    try:
        port = parts.port
    except ValueError:
        raise ConfigError(f"tracking.uri: the port is not a number in {redact(uri)!r}") from None
    return parts.hostname, port or _DATABASE_PORTS.get(parts.scheme.split("+")[0])


def unreachable_reason(uri: str, timeout_s: float = PROBE_TIMEOUT_S) -> str | None:
    """Ask the store's host for a sign of life.

    Args:
        uri: an absolute tracking URI.
        timeout_s: seconds to wait for an answer.

    Returns:
        None if something answers there (or the store is local), else what went wrong.
    """
    if is_server(uri):
        # /health needs no login, and urllib can't read a user part.
        url = _USER_PART.sub("://", uri).split("?")[0].rstrip("/") + "/health"
        try:
            with urllib.request.urlopen(url, timeout=timeout_s):  # noqa: S310 (http only, above)
                return None
        except urllib.error.HTTPError as error:
            error.close()
            return None if error.code < 500 else f"it answers {error.code} {error.reason}"
        except urllib.error.URLError as error:
            return redact(str(error.reason))
        except (OSError, ValueError) as error:
            return redact(str(error) or type(error).__name__)
    host, port = _host_and_port(uri)
    if is_sqlite(uri) or host is None or port is None:
        return None
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            return None
    except OSError as error:
        return redact(str(error))
