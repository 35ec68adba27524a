from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raysched.tracking import Courier, MlflowTracker, start_run
from raysched.tracking import courier as courier_module
from raysched.tracking.sender import Sender
from tests.tracking.conftest import Store

_TRIAL = """
import json, sys
from pathlib import Path
from raysched.tracking import MlflowTracker, StoreHandle
uri, experiment_id, experiment, run_id, folder = json.loads(sys.argv[1])
handle = StoreHandle(uri, experiment_id, experiment)
tracker = MlflowTracker(handle, run_id, Path(folder), send=False)
for step in range(50):
    tracker.log_metrics({"loss": step}, step=step, forward_equivalents=step)
tracker.close("pruned")
assert "mlflow" not in sys.modules
"""


def test_the_driver_sends_for_trials_that_never_load_mlflow(store: Store, tmp_path: Path) -> None:
    handle = store.handle
    courier = Courier(handle, flush_every_s=0.05)
    run_ids = {}
    for name in ("a", "b"):
        folder = tmp_path / name
        run_ids[name] = start_run(handle, name, run_dir=folder)
        courier.watch(folder)
    argument = [handle.uri, handle.experiment_id, handle.experiment, run_ids["a"]]
    subprocess.run(
        [sys.executable, "-c", _TRIAL, json.dumps([*argument, str(tmp_path / "a")])],
        check=True,
        timeout=60,
        env=dict(os.environ),
    )
    own = MlflowTracker(handle, run_ids["b"], tmp_path / "b", send=False)
    own.log_metrics({"loss": 0.5}, step=1, forward_equivalents=1)
    own.close("finished")
    courier.close()
    assert store.points(run_ids["a"], "loss") == [(step, step) for step in range(50)]
    assert store.points(run_ids["b"], "loss") == [(1, 0.5)]
    run = store.client.get_run(run_ids["a"])
    assert run.data.tags["raysched.status"] == "pruned"


def test_a_store_that_is_back_at_the_end_gets_the_whole_time(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier_module, "_PATIENCE_AWAY_S", 0.0)
    run_id = start_run(store.handle, "run", run_dir=tmp_path)
    away = Courier(dataclasses.replace(store.handle, offline=True), flush_every_s=60.0)
    away.watch(tmp_path)
    tracker = MlflowTracker(store.handle, run_id, tmp_path, send=False)
    seen = []
    send = Sender.send

    def answering(self: Sender, should_stop: Callable[[], bool]) -> int:
        seen.extend([away._is_late(), should_stop()])
        return send(self, should_stop)

    monkeypatch.setattr(Sender, "send", answering)
    tracker.log_metrics({"loss": 0.5}, step=1, forward_equivalents=1)
    tracker.close("finished")
    away.close()
    away._thread.join(60.0)
    # With the store away its time is over at once; a batch that it takes brings the rest back.
    assert seen[:2] == [True, False]
    assert store.points(run_id, "loss") == [(1, 0.5)]
