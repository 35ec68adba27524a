"""A store that takes points but not files, as with artifact storage that is away."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from raysched.tracking import MlflowTracker, sync
from raysched.tracking import sender as sender_module
from raysched.tracking.spool import Spool
from tests.tracking.conftest import Store

Tracked = Callable[..., tuple[MlflowTracker, str, Path]]


def record(tracker: MlflowTracker, run_dir: Path, num_images: int = 4) -> None:
    (run_dir / "config.yaml").write_text("name: x")
    tracker.log_artifact(run_dir / "config.yaml")
    for step in range(num_images):
        tracker.log_image("grid", np.full((8, 8, 3), step, np.uint8), step=step)
        tracker.log_metrics({"loss": step}, step=step, forward_equivalents=step)


def refuse_files(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[str]:
    """Let every file fail; returns the names of the calls."""
    calls: list[str] = []
    for name in ("log_artifact", "log_image"):

        def fail(*_args: Any, name: str = name, **_options: Any) -> None:
            calls.append(name)
            raise error

        monkeypatch.setattr(MlflowClient, name, fail)
    return calls


def pictures(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "tracking" / "images").iterdir())


def test_files_wait_while_points_arrive_and_sync_sends_them(
    store: Store, tracked: Tracked, caplog: pytest.LogCaptureFixture
) -> None:
    tracker, run_id, run_dir = tracked()
    with pytest.MonkeyPatch.context() as patch:
        calls = refuse_files(patch, OSError("the bucket is away"))
        record(tracker, run_dir)
        tracker.close("finished")
        still = sync(run_dir)
    assert store.points(run_id, "loss") == [(step, step) for step in range(4)]
    assert store.client.get_run(run_id).info.status == "FINISHED"
    assert len(calls) <= 8  # not one by one: a bucket that hangs would hold up the points
    assert len(pictures(run_dir)) == 4
    assert not (run_dir / "tracking" / "rejected.jsonl").exists()
    assert caplog.text.count("takes points but not files (the bucket is away)") == 1
    assert "5 points are not in MLflow" in caplog.text
    assert (still.num_sent, still.num_remaining, still.num_rejected) == (0, 5, 0)
    assert "the bucket is away" in still.problems[0]

    sent = sync(run_dir)
    assert (sent.num_sent, sent.num_remaining, sent.problems) == (5, 0, ())
    assert len(store.images(run_id)) == 8  # each picture has a small copy
    assert "config.yaml" in {info.path for info in store.client.list_artifacts(run_id)}
    assert pictures(run_dir) == []
    assert not Spool(run_dir).later_path.exists()
    assert sync(run_dir).num_sent == 0


def test_files_are_tried_again_while_the_run_goes_on(
    store: Store, tracked: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender_module, "_FILES_AGAIN_S", 0.1)
    tracker, run_id, run_dir = tracked()
    with pytest.MonkeyPatch.context() as patch:
        calls = refuse_files(patch, OSError("the bucket is away"))
        record(tracker, run_dir)
        deadline = time.monotonic() + 60
        while len(calls) < 6:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    while Spool(run_dir).num_pending():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(store.images(run_id)) == 8
    tracker.close("finished")
    assert pictures(run_dir) == []


def test_one_bad_file_does_not_hold_up_the_others(store: Store, tracked: Tracked) -> None:
    tracker, run_id, run_dir = tracked()
    (run_dir / "torn.png").write_bytes(b"no picture")
    torn = {"op": "image", "time": 0, "step": 0, "key": "torn", "path": "torn.png"}
    Spool(run_dir).append(torn)
    record(tracker, run_dir)
    tracker.close("finished")
    assert len(store.images(run_id)) == 8
    waiting = Spool(run_dir).put_off()
    assert [(line["key"], "cannot identify" in line["reason"]) for line in waiting] == [
        ("torn", True)
    ]


def test_a_picture_that_is_refused_is_kept(
    store: Store, tracked: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_files(monkeypatch, ValueError("no such key"))
    tracker, run_id, run_dir = tracked()
    record(tracker, run_dir, num_images=1)
    tracker.close("finished")
    lines = (run_dir / "tracking" / "rejected.jsonl").read_text().splitlines()
    rejected = [json.loads(line) for line in lines]
    assert [(line["op"], line["reason"]) for line in rejected] == [
        ("artifact", "no such key"),
        ("image", "no such key"),
    ]
    assert [run_dir / rejected[1]["path"]] == pictures(run_dir)
    assert store.points(run_id, "loss") == [(0, 0)]
