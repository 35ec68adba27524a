from __future__ import annotations

import math
import pickle
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raysched.config.run import TrackingConfig
from raysched.errors import ConfigError
from raysched.tracking import (
    MlflowTracker,
    finish_run,
    prepare_store,
    start_run,
    sync,
    ui_command,
)
from raysched.tracking.spool import Spool
from raysched.tracking.uris import sqlite_path
from raysched.training.protocols import RunStatus, Tracker
from tests.tracking.conftest import Store

Tracked = Callable[..., tuple[MlflowTracker, str, Path]]


def _image(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, np.uint8)


def test_points_arrive_in_order_against_steps_and_against_compute(
    store: Store, tracked: Tracked
) -> None:
    opened, run_id, _ = tracked()
    tracker: Tracker = opened
    for step in range(2500):
        tracker.log_metrics({"train/loss": 1 / (step + 1)}, step=step, forward_equivalents=0.0)
    for step in (10, 20):
        tracker.log_metrics({"quality/q": step / 7}, step=step, forward_equivalents=192.6 * step)
    tracker.close("finished")
    assert store.points(run_id, "train/loss") == [(step, 1 / (step + 1)) for step in range(2500)]
    assert store.points(run_id, "quality/q") == [(10, 10 / 7), (20, 20 / 7)]
    assert store.points(run_id, "by_fe/quality/q") == [(1926, 10 / 7), (3852, 20 / 7)]
    assert "by_fe/train/loss" not in store.client.get_run(run_id).data.metrics


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        ("finished", "FINISHED"),
        ("stopped", "KILLED"),
        ("pruned", "FINISHED"),
        ("failed", "FAILED"),
    ],
)
def test_the_end_shows_as_status_and_as_tag(
    store: Store, tracked: Tracked, status: RunStatus, shown: str
) -> None:
    tracker, run_id, _ = tracked()
    assert store.client.get_run(run_id).info.status == "RUNNING"
    tracker.close(status)
    run = store.client.get_run(run_id)
    assert (run.info.status, run.data.tags["raysched.status"]) == (shown, status)


def test_a_resumed_run_keeps_its_id_and_drops_the_steps_that_it_repeats(
    store: Store, tracked: Tracked
) -> None:
    tracker, run_id, run_dir = tracked()
    for step in range(10):
        tracker.log_metrics({"loss": step}, step=step, forward_equivalents=step)
    tracker.log_image("grid", _image(1), step=8)
    tracker.close("stopped")
    assert start_run(store.handle, "again", run_dir=run_dir) == run_id
    tracker = MlflowTracker(store.handle, run_id, run_dir, flush_every_s=0.01)
    for step in range(6, 13):
        tracker.log_metrics({"loss": step, "new": step}, step=step, forward_equivalents=step)
    tracker.log_image("grid", _image(1), step=8)
    tracker.close("finished")
    assert store.points(run_id, "loss") == [(step, step) for step in range(13)]
    assert store.points(run_id, "new") == [(step, step) for step in range(6, 13)]
    assert len(store.images(run_id)) == 2  # the picture and its small copy
    assert store.client.get_run(run_id).info.status == "FINISHED"


def test_sending_again_after_a_lost_acknowledgement_adds_nothing(
    store: Store, tracked: Tracked
) -> None:
    tracker, run_id, run_dir = tracked()
    for step in range(5):
        tracker.log_metrics({"quality/q": step}, step=step, forward_equivalents=step)
    tracker.log_image("samples/grid", _image(3), step=4)
    tracker.close("finished")
    before = (store.points(run_id, "quality/q"), store.images(run_id))
    Spool(run_dir).acknowledge(0)
    report = sync(run_dir)
    assert (report.num_sent, report.num_remaining, report.problems) == (7, 0, ())
    assert (store.points(run_id, "quality/q"), store.images(run_id)) == before


def test_non_finite_numbers_are_kept(store: Store, tracked: Tracked) -> None:
    tracker, run_id, _ = tracked()
    tracker.log_metrics({"nan": math.nan, "inf": math.inf}, step=1, forward_equivalents=1)
    tracker.close("failed")
    assert math.isnan(store.points(run_id, "nan")[0][1])
    assert store.points(run_id, "inf")[0][1] > 1e300


def test_a_refused_point_is_put_aside_and_does_not_block_the_others(
    store: Store, tracked: Tracked, caplog: pytest.LogCaptureFixture
) -> None:
    tracker, run_id, run_dir = tracked()
    for step in range(20):
        metrics = {"good": step, "bad#name": 7.0} if step == 11 else {"good": step}
        tracker.log_metrics(metrics, step=step, forward_equivalents=step)
    tracker.log_artifact(run_dir / "missing.txt")
    tracker.set_tags({"after": "yes"})
    tracker.close("finished")
    assert store.points(run_id, "good") == [(step, step) for step in range(20)]
    assert store.client.get_run(run_id).data.tags["after"] == "yes"
    rejected = (run_dir / "tracking" / "rejected.jsonl").read_text().splitlines()
    assert len(rejected) == 2
    assert "bad#name" in rejected[0]
    assert "missing.txt" in rejected[1]
    assert "rejected.jsonl" in caplog.text


def test_pictures_files_and_folders_reach_the_store(store: Store, tracked: Tracked) -> None:
    tracker, run_id, run_dir = tracked()
    for step in (1, 2):
        tracker.log_image("samples/nfe:5", _image(step), step=step)
    (run_dir / "figures").mkdir()
    (run_dir / "figures" / "a.txt").write_text("a")
    (run_dir / "config.yaml").write_text("name: x")
    tracker.log_artifact(run_dir / "config.yaml")
    tracker.log_artifact(run_dir / "figures", "report")
    tracker.close("finished")
    names = [name for name in store.images(run_id) if name.endswith(".png")]
    assert [name.split("+timestamp")[0] for name in sorted(names)] == [
        "images/samples~nfe_5+step+1",
        "images/samples~nfe_5+step+2",
    ]
    paths = {info.path for info in store.client.list_artifacts(run_id)}
    assert {"config.yaml", "report", "images"} <= paths
    found = store.client.list_artifacts(run_id, "report/figures")
    assert [info.path for info in found] == ["report/figures/a.txt"]
    assert not list((run_dir / "tracking" / "images").iterdir())


def test_parents_params_and_tags_are_there_without_secrets_and_within_limits(
    store: Store, tmp_path: Path
) -> None:
    parent = start_run(store.handle, "sweep", run_dir=tmp_path / "sweep")
    params = {f"p{number}": number for number in range(230)} | {"long": "x" * 9000}
    tags = {"where": "postgresql://me:hunter2@db/x"}
    child = start_run(
        store.handle,
        "trial 0",
        run_dir=tmp_path / "sweep" / "0",
        parent_run_id=parent,
        params=params,
        tags=tags,
    )
    run = store.client.get_run(child)
    assert run.info.run_name == "trial 0"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["where"] == "postgresql://***@db/x"
    assert len(run.data.params) == 231
    assert run.data.params["p229"] == "229"
    assert len(run.data.params["long"]) == 6000
    assert run.data.params["long"].endswith("[cut]")
    finish_run(store.handle, child, "failed", run_dir=tmp_path / "sweep" / "0")
    assert store.client.get_run(child).info.status == "FAILED"


def test_a_busy_database_is_waited_for(store: Store, tracked: Tracked) -> None:
    tracker, run_id, _ = tracked()
    writer = sqlite3.connect(sqlite_path(store.handle.uri), isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    tracker.log_metrics({"loss": 1.0}, step=1, forward_equivalents=1)
    release = threading.Timer(0.5, lambda: None)
    release.start()
    release.join(5)
    writer.execute("ROLLBACK")
    writer.close()
    tracker.close("finished")
    assert store.points(run_id, "loss") == [(1, 1.0)]


def test_a_handle_travels_by_pickle_and_never_shows_a_password(store: Store) -> None:
    handle = pickle.loads(pickle.dumps(store.handle))
    assert handle == store.handle
    secret = type(handle)("postgresql://me:hunter2@db/x", "1", "e")
    assert "hunter2" not in repr(secret)
    assert "hunter2" not in ui_command(secret)
    assert '"$MLFLOW_TRACKING_URI"' in ui_command(secret)
    server = type(handle)("http://me:hunter2@127.0.0.1:5000", "7", "e")
    page = "http://127.0.0.1:5000/#/experiments/7/runs?workflowType=machine_learning"
    assert ui_command(server) == page


def test_a_deleted_experiment_is_one_clear_message(store: Store) -> None:
    store.client.delete_experiment(store.handle.experiment_id)
    with pytest.raises(ConfigError, match="was deleted"):
        prepare_store(TrackingConfig(experiment=store.handle.experiment), store.root)
