from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from raysched.config.run import TrackingConfig
from raysched.errors import ConfigError, StorageError
from raysched.tracking import MlflowTracker, finish_run, prepare_store, start_run, sync
from raysched.tracking.spool import Spool
from tests.tracking.conftest import Store


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_without_a_server_everything_waits_and_is_sent_later_exactly_once(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrackingConfig(
        uri=f"http://me:hunter2@127.0.0.1:{_closed_port()}", experiment=store.handle.experiment
    )
    handle = prepare_store(config, tmp_path)
    assert handle.offline
    sweep, trial = tmp_path / "sweep", tmp_path / "sweep" / "trial-0"
    parent = start_run(handle, "sweep", run_dir=sweep)
    child = start_run(handle, "trial 0", run_dir=trial, parent_run_id=parent, params={"k": 5})
    tracker = MlflowTracker(handle, child, trial, flush_every_s=0.01, system_every_s=None)
    for step in range(30):
        tracker.log_metrics({"quality/q": step}, step=step, forward_equivalents=3 * step)
    tracker.log_image("grid", np.zeros((8, 8, 3), np.uint8), step=3)
    tracker.close("stopped", timeout_s=0.2)
    finish_run(handle, parent, "finished", run_dir=sweep)

    assert caplog.text.count("does not answer") == 1
    assert "32 points" in caplog.text
    assert f"raysched sync {trial}" in caplog.text
    assert "hunter2" not in caplog.text
    on_disk = [path for path in sweep.rglob("*") if path.is_file()]
    assert all(b"hunter2" not in path.read_bytes() for path in on_disk)

    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        sync(sweep)
    first = sync(trial, uri=store.handle.uri)  # the child makes its parent's place
    again = sync(sweep, uri=store.handle.uri)
    assert (first.num_remaining, again.num_remaining, again.problems) == (0, 0, ())
    runs = store.client.search_runs([store.handle.experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    assert sorted(by_name) == ["sweep", "trial 0"]
    made = by_name["trial 0"]
    assert made.data.tags["mlflow.parentRunId"] == by_name["sweep"].info.run_id
    assert made.data.params == {"k": "5"}
    assert (made.info.status, by_name["sweep"].info.status) == ("KILLED", "FINISHED")
    points = store.points(made.info.run_id, "by_fe/quality/q")
    assert points == [(3 * step, step) for step in range(30)]
    assert len(store.images(made.info.run_id)) == 2


def test_a_run_that_is_made_but_not_noted_is_found_again(store: Store, tmp_path: Path) -> None:
    run_id = start_run(store.handle, "trial", run_dir=tmp_path)
    spool = Spool(tmp_path)
    record = spool.load_record()
    assert record is not None
    record.run_id = None
    spool.save_record(record)
    spool.append({"op": "tags", "values": {"here": "yes"}})
    sync(tmp_path)
    assert store.client.get_run(run_id).data.tags["here"] == "yes"
    assert len(store.client.search_runs([store.handle.experiment_id])) == 1


def test_a_folder_without_a_tracked_run_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no tracked run here"):
        sync(tmp_path)


def test_a_run_resumed_in_another_store_begins_anew_and_keeps_the_old_points(
    store: Store, tmp_path: Path
) -> None:
    offline = prepare_store(TrackingConfig(uri=f"http://127.0.0.1:{_closed_port()}"), tmp_path)
    start_run(offline, "trial", run_dir=tmp_path / "run")
    run_id = start_run(store.handle, "trial", run_dir=tmp_path / "run")
    assert store.client.get_run(run_id).info.status == "RUNNING"
    assert (tmp_path / "run" / "tracking-1" / "run.json").exists()


_QUIET = """
import sys
from pathlib import Path
import numpy as np
from raysched.config.run import TrackingConfig
from raysched.tracking import MlflowTracker, finish_run, prepare_store, start_run, sync
assert "mlflow" not in sys.modules
root = Path(sys.argv[1])
handle = prepare_store(TrackingConfig(), root)
run_id = start_run(handle, "quiet", run_dir=root / "run", params={"a": 1})
tracker = MlflowTracker(handle, run_id, root / "run")
tracker.log_metrics({"loss": 1.0}, step=1, forward_equivalents=1.0)
tracker.log_image("grid", np.zeros((8, 8, 3), np.uint8), step=1)
tracker.close("finished")
finish_run(handle, run_id, "finished", run_dir=root / "run")
assert sync(root).num_remaining == 0
"""


def _environment() -> dict[str, str]:
    dropped = ("MLFLOW_", "PYTHONWARNINGS")
    return {key: value for key, value in os.environ.items() if not key.startswith(dropped)}


def test_the_first_use_of_a_cold_store_prints_nothing_at_all(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _QUIET, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=_environment(),
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "runs" / "mlflow.db").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "runs"]


_KILLED = """
import json, sys, threading
from pathlib import Path
from raysched.tracking import MlflowTracker, StoreHandle
from raysched.tracking.spool import Spool
uri, experiment_id, experiment, run_id, folder = json.loads(sys.argv[1])
handle = StoreHandle(uri, experiment_id, experiment)
tracker = MlflowTracker(handle, run_id, Path(folder), flush_every_s=1.0)
for step in range(5000):
    if step == 1500:
        while Spool(Path(folder)).acknowledged() == 0:
            threading.Event().wait(0.02)
    tracker.log_metrics({"loss": step / 3}, step=step, forward_equivalents=step)
    if step >= 3000:
        print(step, flush=True)
threading.Event().wait(60)
"""


def test_what_a_killed_process_logged_is_sent_by_sync_exactly_once(
    store: Store, tmp_path: Path
) -> None:
    run_id = start_run(store.handle, "killed", run_dir=tmp_path)
    handle = store.handle
    argument = json.dumps(
        [handle.uri, handle.experiment_id, handle.experiment, run_id, str(tmp_path)]
    )
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, argument],
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(),
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "3000\n"  # the first half was acknowledged
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
    steps = [entry.operation["step"] for entry in Spool(tmp_path).entries()]
    assert steps == list(range(len(steps)))
    assert Spool(tmp_path).num_pending() > 0
    assert sync(tmp_path).num_remaining == 0
    assert store.points(run_id, "loss") == [(step, step / 3) for step in steps]
