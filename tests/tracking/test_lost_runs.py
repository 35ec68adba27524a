"""Runs that MLflow has lost, and run folders that have lost their spool."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raysched.tracking import MlflowTracker, start_run, sync
from raysched.tracking.spool import Spool
from tests.tracking.conftest import Store

Tracked = Callable[..., tuple[MlflowTracker, str, Path]]
IMAGE = np.zeros((8, 8, 3), np.uint8)


def lose_run(run_dir: Path) -> None:
    """As after the store's file was deleted: it has no run of the id that is on record."""
    spool = Spool(run_dir)
    record = spool.load_record()
    assert record is not None
    record.run_id = "0" * 32
    record.local_id += "lost"
    spool.save_record(record)


def test_a_resumed_run_that_the_store_has_lost_is_made_anew_with_all_its_points(
    store: Store, tracked: Tracked, caplog: pytest.LogCaptureFixture
) -> None:
    tracker, first, run_dir = tracked(params={"k": 5})
    for step in range(3):
        tracker.log_metrics({"quality/q": step}, step=step, forward_equivalents=10 * step)
    tracker.log_image("grid", IMAGE, step=2)
    tracker.close("stopped")
    lose_run(run_dir)
    run_id = start_run(store.handle, "trial", run_dir=run_dir)
    assert run_id not in (first, "0" * 32)
    tracker = MlflowTracker(store.handle, run_id, run_dir, flush_every_s=0.05)
    tracker.log_metrics({"quality/q": 3}, step=3, forward_equivalents=30)
    tracker.close("finished")
    assert store.points(run_id, "quality/q") == [(step, step) for step in range(4)]
    assert store.points(run_id, "by_fe/quality/q") == [(10 * step, step) for step in range(4)]
    run = store.client.get_run(run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"k": "5"})
    assert "is made anew" in caplog.text
    assert "refuses" not in caplog.text  # the picture was sent before, and is gone
    assert start_run(store.handle, "trial", run_dir=run_dir) == run_id


def test_a_run_that_was_deleted_in_mlflow_is_made_anew(store: Store, tracked: Tracked) -> None:
    tracker, first, run_dir = tracked()
    tracker.log_metrics({"loss": 1.0}, step=1, forward_equivalents=1)
    tracker.close("stopped")
    store.client.delete_run(first)
    run_id = start_run(store.handle, "trial", run_dir=run_dir)
    assert run_id != first
    assert sync(run_dir).problems == ()
    assert store.points(run_id, "loss") == [(1, 1.0)]


def test_sync_makes_lost_runs_anew_below_their_parents(store: Store, tmp_path: Path) -> None:
    sweep, trial = tmp_path / "sweep", tmp_path / "sweep" / "trials" / "trial-0"
    parent = start_run(store.handle, "sweep", run_dir=sweep)
    child = start_run(store.handle, "trial 0", run_dir=trial, parent_run_id=parent)
    tracker = MlflowTracker(store.handle, child, trial, send=False)
    tracker.log_metrics({"loss": 0.5}, step=1, forward_equivalents=1)
    tracker.close("finished")
    for folder in (sweep, trial):
        lose_run(folder)
    report = sync(trial)  # before its parent
    assert (report.num_remaining, report.problems) == (0, ())
    assert sync(sweep).problems == ()
    record, above = Spool(trial).load_record(), Spool(sweep).load_record()
    assert record is not None
    assert above is not None
    assert store.points(str(record.run_id), "loss") == [(1, 0.5)]
    place = store.client.get_run(record.run_id).data.tags["mlflow.parentRunId"]
    assert store.client.get_run(place).data.tags["raysched.local_id"] == above.local_id


def test_a_run_fetched_without_its_spool_records_no_step_twice(
    store: Store, tracked: Tracked, tmp_path: Path
) -> None:
    tracker, run_id, run_dir = tracked()
    for step in range(10):
        tracker.log_metrics({"quality/q": step}, step=step, forward_equivalents=7 * step)
    tracker.log_image("samples/grid", IMAGE, step=8)
    tracker.close("stopped")
    fetched = tmp_path / "fetched"
    (fetched / "tracking").mkdir(parents=True)
    shutil.copy(run_dir / "tracking" / "run.json", fetched / "tracking")
    assert start_run(store.handle, "trial", run_dir=fetched) == run_id
    assert Spool(fetched).num_pending() == 0
    tracker = MlflowTracker(store.handle, run_id, fetched, flush_every_s=0.05)
    statuses = [e.operation["status"] for e in Spool(fetched).entries() if "status" in e.operation]
    assert statuses == ["stopped", "running"]
    for step in range(6, 13):
        tracker.log_metrics({"quality/q": step}, step=step, forward_equivalents=7 * step)
    tracker.log_image("samples/grid", IMAGE, step=8)
    tracker.close("finished")
    assert store.points(run_id, "quality/q") == [(step, step) for step in range(13)]
    assert store.points(run_id, "by_fe/quality/q") == [(7 * step, step) for step in range(13)]
    assert len(store.images(run_id)) == 2  # the picture and its small copy
    Spool(fetched).acknowledge(0)
    assert sync(fetched).num_rejected == 0
    assert len(store.points(run_id, "quality/q")) == 13
