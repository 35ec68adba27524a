"""One SQLite store for the whole room; every test has an experiment and folders of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raysched.config.run import TrackingConfig
from raysched.tracking import MlflowTracker, StoreHandle, prepare_store, start_run
from raysched.tracking.client import connect


def pytest_configure(config: pytest.Config) -> None:
    # MLflow's own use of SQLAlchemy.
    config.addinivalue_line("filterwarnings", "ignore:The ``noload`` loader strategy")


@dataclass
class Store:
    """A prepared store and what a test asks of it."""

    handle: StoreHandle
    client: Any
    root: Path

    def points(self, run_id: str, key: str) -> list[tuple[int, float]]:
        history = self.client.get_metric_history(run_id, key)
        return [(metric.step, metric.value) for metric in history]

    def images(self, run_id: str) -> list[str]:
        return [info.path for info in self.client.list_artifacts(run_id, "images")]


@pytest.fixture(scope="session")
def store_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def store(
    store_root: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Store:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    handle = prepare_store(TrackingConfig(experiment=request.node.name), store_root)
    return Store(handle, connect(handle.uri), store_root)


@pytest.fixture
def tracked(store: Store, tmp_path: Path) -> Callable[..., tuple[MlflowTracker, str, Path]]:
    """Start a run in a fresh folder and open its tracker."""

    def begin(name: str = "trial", **options: Any) -> tuple[MlflowTracker, str, Path]:
        run_dir = tmp_path / name
        run_id = start_run(store.handle, name, run_dir=run_dir, **options)
        return MlflowTracker(store.handle, run_id, run_dir, flush_every_s=0.05), run_id, run_dir

    return begin
