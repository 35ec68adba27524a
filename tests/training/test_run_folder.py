"""Who may use the folder of a run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from raysched.config.run import RunConfig
from raysched.distributed import launch
from raysched.errors import StorageError
from raysched.training.checkpoint import load_latest
from raysched.training.run_folder import WRITER_LOCK, own_run_folder

HOLD = """
import sys
from pathlib import Path
from raysched.training.run_folder import own_run_folder
with own_run_folder(Path(sys.argv[1]), lock=sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(run_dir, lock=".lock"):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir), lock],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_in_use_is_refused_and_a_kill_frees_it(tmp_path):
    with hold(tmp_path) as other:
        try:
            with (
                pytest.raises(StorageError, match="another process is training there"),
                own_run_folder(tmp_path),
            ):
                raise AssertionError("two own the folder")
        finally:
            other.kill()
            other.wait(timeout=30)
    with own_run_folder(tmp_path):
        assert (tmp_path / ".lock").is_file()


def test_the_loop_does_not_write_beside_a_worker_of_a_killed_driver(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "WRITER_WAIT_S", 0.1)
    config = RunConfig.model_validate({"scaling": {"num_workers": 0}})
    with hold(tmp_path, WRITER_LOCK) as other:
        try:
            with pytest.raises(StorageError, match="another process is training there"):
                launch.run_training(config, run_dir=tmp_path, report=lambda metrics: None)
        finally:
            other.kill()
            other.wait(timeout=30)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_when_every_checkpoint_is_damaged_the_user_is_told_that_training_begins_anew(tmp_path):
    for step in (5, 10):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    warnings: list[str] = []
    assert load_latest(tmp_path, warnings.append) is None
    assert warnings[0].endswith("using the checkpoint before it")
    assert warnings[1].endswith("none is left")
    assert warnings[2].endswith("training begins anew")
