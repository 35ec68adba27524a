from __future__ import annotations

import socket
from pathlib import Path

import pytest

from raysched.config.run import TrackingConfig
from raysched.errors import ConfigError, StorageError
from raysched.tracking import prepare_store
from raysched.tracking.uris import redact, resolve_uri, sqlite_path, unreachable_reason


@pytest.fixture(autouse=True)
def _no_uri_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_the_default_store_is_an_absolute_sqlite_file_below_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_uri(None, Path()) == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_the_environment_gives_the_uri_when_the_config_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000/")
    assert resolve_uri(None, tmp_path) == "http://127.0.0.1:5000"
    assert resolve_uri("http://other:1", tmp_path) == "http://other:1"


def test_a_relative_sqlite_uri_becomes_absolute_and_keeps_its_query(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = resolve_uri("sqlite:///sub/my runs.db?timeout=9", Path("/elsewhere"))
    assert uri == f"sqlite:///{tmp_path}/sub/my runs.db?timeout=9"
    assert sqlite_path(uri) == tmp_path / "sub" / "my runs.db"


@pytest.mark.parametrize(
    ("uri", "word"),
    [
        ("./mlruns", "plain folders"),
        ("file:///tmp/mlruns", "plain folders"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("http://", "host is missing"),
        ("http://host:port", "not a number"),
    ],
)
def test_a_uri_that_mlflow_cannot_use_is_one_clear_message(uri: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        resolve_uri(uri, Path("/tmp"))
    assert "tracking.uri" in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "https://me:hunter2@host/x",
        "postgresql+psycopg2://me:hun@ter2@db:5432/mlflow",
        "https://hunter2@host",
        "https://host/x?api_token=hunter2&a=1",
    ],
)
def test_credentials_are_redacted_inside_any_text(uri: str) -> None:
    shown = redact(f"failed at {uri} because of 'user@example.org'")
    assert "hunter2" not in shown
    assert "ter2" not in shown
    assert "user@example.org" in shown


def test_a_closed_port_is_unreachable_and_a_listening_database_port_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert unreachable_reason(f"postgresql://u:p@127.0.0.1:{port}/db") is None
    assert unreachable_reason(f"http://127.0.0.1:{port}") is not None
    assert unreachable_reason(f"postgresql://u:p@127.0.0.1:{port}/db") is not None


def test_a_server_that_never_answers_is_given_up_after_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert "timed out" in str(unreachable_reason(uri, timeout_s=0.1))


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("this is a diary, not a database")
    with pytest.raises(StorageError, match="not an SQLite database"):
        prepare_store(TrackingConfig(uri=f"sqlite:///{path}"), tmp_path)
    assert path.read_text().startswith("this is a diary")


def test_a_store_below_a_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(StorageError, match=r"tracking\.enabled=false"):
        prepare_store(TrackingConfig(), tmp_path)
