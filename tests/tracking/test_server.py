"""A real MLflow server over HTTP, and several processes that write to one SQLite store."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from raysched.config.run import TrackingConfig
from raysched.tracking import MlflowTracker, StoreHandle, prepare_store, start_run, sync
from raysched.tracking.client import connect
from raysched.tracking.spool import Spool
from tests.tracking.conftest import Store
from tests.tracking.servers import Postgres, Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def _wait_until_sent(run_dir: Path, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while Spool(run_dir).num_pending():
        assert time.monotonic() < deadline, f"{Spool(run_dir).num_pending()} points left"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_a_server_that_is_killed_and_started_again_has_every_point_once(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handle = prepare_store(TrackingConfig(uri=server.uri, experiment="http"), tmp_path)
    assert not handle.offline
    run_dir = tmp_path / "run"
    run_id = start_run(handle, "trial", run_dir=run_dir, params={"k": 3})
    tracker = MlflowTracker(handle, run_id, run_dir, flush_every_s=0.05)

    def log(begin: int, end: int) -> None:
        for step in range(begin, end):
            values = {"train/loss": step / 3, "quality/q": step / 7}
            tracker.log_metrics(values, step=step, forward_equivalents=10 * step)
        tracker.log_image("grid", np.full((8, 8, 3), begin % 256, np.uint8), step=end)

    log(0, 2000)
    _wait_until_sent(run_dir)
    server.kill()
    log(2000, 4000)
    deadline = time.monotonic() + 30
    while "sent when it is back" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.start()
    log(4000, 5000)
    tracker.log_artifact(run_dir / "tracking" / "run.json")
    tracker.close("finished", timeout_s=180)

    assert caplog.text.count("Training goes on") == 1
    client = connect(server.uri)
    for key, divisor, scale in (
        ("train/loss", 3, 1),
        ("quality/q", 7, 1),
        ("by_fe/quality/q", 7, 10),
    ):
        history = client.get_metric_history(run_id, key)
        points = sorted((metric.step, metric.value) for metric in history)
        assert points == [(scale * step, step / divisor) for step in range(5000)]
    run = client.get_run(run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"k": "3"})
    assert len(client.list_artifacts(run_id, "images")) == 6
    assert "run.json" in {info.path for info in client.list_artifacts(run_id)}


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_a_server_that_comes_up_during_the_run_gets_it_whole(tmp_path: Path) -> None:
    server = Server(tmp_path)
    handle = prepare_store(TrackingConfig(uri=server.uri, experiment="late"), tmp_path)
    assert handle.offline
    parent = start_run(handle, "sweep", run_dir=tmp_path / "sweep")
    run_dir = tmp_path / "sweep" / "0"
    run_id = start_run(handle, "trial", run_dir=run_dir, parent_run_id=parent)
    tracker = MlflowTracker(handle, run_id, run_dir, flush_every_s=0.05)
    tracker.log_metrics({"loss": 1.0}, step=1, forward_equivalents=1)
    try:
        server.start()
        tracker.log_metrics({"loss": 2.0}, step=2, forward_equivalents=2)
        tracker.close("finished", timeout_s=180)
        report = sync(tmp_path / "sweep")
        assert (report.num_remaining, report.problems) == (0, ())
        client = connect(server.uri)
        record = Spool(run_dir).load_record()
        assert record is not None
        history = client.get_metric_history(record.run_id, "loss")
        assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 2.0)]
        tags = client.get_run(record.run_id).data.tags
        assert client.get_run(tags["mlflow.parentRunId"]).info.run_name == "sweep"
    finally:
        server.kill()


_WRITER = """
import json, sys
from pathlib import Path
from raysched.tracking import MlflowTracker, StoreHandle
uri, experiment_id, experiment, run_id, folder, number = json.loads(sys.argv[1])
handle = StoreHandle(uri, experiment_id, experiment)
tracker = MlflowTracker(handle, run_id, Path(folder), flush_every_s=0.02)
for step in range(2000):
    tracker.log_metrics({"loss": number + step}, step=step, forward_equivalents=step)
tracker.close("finished", timeout_s=90)
"""


def _write_at_once(handle: StoreHandle, tmp_path: Path) -> list[str]:
    """Four processes write 2,000 points each; returns their runs."""
    processes, run_ids = [], []
    for number in range(4):
        folder = tmp_path / str(number)
        run_ids.append(start_run(handle, f"trial {number}", run_dir=folder))
        argument = [handle.uri, handle.experiment_id, handle.experiment, run_ids[-1]]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", _WRITER, json.dumps([*argument, str(folder), number])],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert (process.returncode, output) == (0, "")
    return run_ids


@pytest.mark.slow
def test_trials_that_write_to_one_sqlite_store_at_once_lose_nothing(
    store: Store, tmp_path: Path
) -> None:
    for number, run_id in enumerate(_write_at_once(store.handle, tmp_path)):
        assert store.points(run_id, "loss") == [(step, number + step) for step in range(2000)]
        assert store.client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_trials_that_write_to_a_server_on_postgresql_at_once_lose_nothing(tmp_path: Path) -> None:
    postgres = Postgres()
    server = Server(tmp_path, postgres.uri)
    try:
        postgres.start()
        server.start()
        handle = prepare_store(TrackingConfig(uri=server.uri, experiment="postgres"), tmp_path)
        assert not handle.offline
        run_ids = _write_at_once(handle, tmp_path)
        client = connect(server.uri)
        for number, run_id in enumerate(run_ids):
            history = client.get_metric_history(run_id, "loss")
            points = [(metric.step, metric.value) for metric in history]
            assert points == [(step, number + step) for step in range(2000)]
            assert client.get_run(run_id).info.status == "FINISHED"
    finally:
        server.kill()
        postgres.stop()
