"""However a run ends, MLflow says so: also where its tracker had no chance to."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from raysched.config.run import TrackingConfig
from raysched.distributed import train as train_module
from raysched.distributed.grace import GraceOver
from raysched.errors import DataError, RunFailedError, StorageError
from raysched.tracking import prepare_store
from raysched.tracking.client import connect
from raysched.tracking.spool import Spool
from tests.training.runs import small_config


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One store for the module: a cold one costs seconds."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    prepare_store(TrackingConfig(uri=uri), folder)
    return uri


def ended(store, tmp_path, raises=None, **changes):
    """Train; the status in MLflow and as the tag."""
    run_dir = tmp_path / "run"
    config = small_config(
        training__output_dir=str(run_dir), tracking__enabled=True, tracking__uri=store, **changes
    )
    console = Console(file=io.StringIO())
    if raises is None:
        train_module.train(config, resume=False, console=console)
    else:
        with pytest.raises(raises):
            train_module.train(config, resume=False, console=console)
    spool = Spool(run_dir)
    assert spool.num_pending() == 0
    record = spool.load_record()
    run = connect(store).get_run(record.run_id)
    return run.info.status, run.data.tags["raysched.status"]


@pytest.mark.parametrize(
    ("error", "raised", "expected"),
    [
        (RunFailedError("a worker was lost"), RunFailedError, ("FAILED", "failed")),
        (KeyboardInterrupt(), KeyboardInterrupt, ("KILLED", "stopped")),
        (GraceOver(), None, ("KILLED", "stopped")),
    ],
)
def test_a_run_whose_workers_could_not_say_how_it_ended(
    store, tmp_path, monkeypatch, error, raised, expected
):
    def lost(*_args, **_options):
        raise error

    monkeypatch.setattr(train_module, "run_training", lost)
    assert ended(store, tmp_path, raised, scaling__num_workers=1) == expected


def test_a_users_mistake_found_by_the_loop(store, tmp_path):
    missing = {"data__source": "image_folder", "data__path": str(tmp_path / "none")}
    assert ended(store, tmp_path, DataError, **missing) == ("FAILED", "failed")


def test_a_disk_that_is_full(store, tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise StorageError("no space left on device")

    monkeypatch.setattr("raysched.training.loop.train_loop", full)
    assert ended(store, tmp_path) == ("FAILED", "failed")


def test_a_run_that_ends_by_itself_says_so_once(store, tmp_path):
    assert ended(store, tmp_path, training__budget__steps=2) == ("FINISHED", "finished")
    ends = [
        e.operation for e in Spool(tmp_path / "run").entries() if e.operation["op"] == "status"
    ]
    assert [operation["status"] for operation in ends] == ["finished"]
