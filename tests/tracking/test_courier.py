from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from raysched.tracking import Courier, MlflowTracker, start_run
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
