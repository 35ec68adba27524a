"""Stopping, killing and damaging a run: the resumed one ends like the uninterrupted one."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raysched.config.loading import write_yaml
from raysched.errors import ConfigError, DataError, StorageError
from raysched.models.checkpoint_files import NewerFormatError
from raysched.training.checkpoint import checkpoint_folders, load_checkpoint
from raysched.training.costs import is_timing
from raysched.training.protocols import NullTracker
from raysched.training.run_folder import open_run_folder, read_metrics
from raysched.training.stop import request_stop
from tests.training.runs import rollout_config, run_loop, small_config

EVALUATED = {"evaluation__enabled": True}


class StopAt(NullTracker):
    """A tracker that asks for a stop when a step is logged."""

    def __init__(self, run_dir: Path, step: int, status: str = "stopped") -> None:
        self.run_dir, self.step, self.status = run_dir, step, status

    def log_metrics(self, metrics, *, step, forward_equivalents):
        if step == self.step:
            request_stop(self.run_dir, self.status, "test")


def same_end(one, other) -> None:
    assert one.status == other.status == "finished"
    assert one.weights_sha256 == other.weights_sha256
    assert one.metrics == other.metrics
    for key in ("forward_equivalents", "rollout", "training", "evaluation", "steps"):
        assert one.compute[key] == other.compute[key]


def without_times(points):
    return [
        {
            "step": point["step"],
            "metrics": {k: v for k, v in point["metrics"].items() if not is_timing(k)},
        }
        for point in points
    ]


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path, step, monkeypatch):
    monkeypatch.setattr("raysched.training.stop.POLL_S", 0.0)
    config = rollout_config(**EVALUATED, training__log_every_steps=1)
    straight = run_loop(config, tmp_path / "straight")
    run_dir = tmp_path / "stopped"
    stopped = run_loop(config, run_dir, tracker=StopAt(run_dir, step))
    assert stopped.status == "stopped"
    assert stopped.exit_code == 75
    assert stopped.compute["steps"] == step
    same_end(run_loop(config, run_dir), straight)
    points, expected = (read_metrics(tmp_path / n) for n in ("stopped", "straight"))
    assert without_times(points) == without_times(expected)


def test_a_pruned_run_says_so_and_keeps_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("raysched.training.stop.POLL_S", 0.0)
    run_dir = tmp_path / "run"
    result = run_loop(small_config(), run_dir, tracker=StopAt(run_dir, 3, "pruned"))
    assert result.status == "pruned"
    assert [f.name for f in checkpoint_folders(run_dir)] == ["step-00000003"]


def start(run_dir: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "raysched", "train", str(run_dir.parent / "config.yaml")]
    return subprocess.Popen(
        [*command, f"training.output_dir={run_dir}", "tracking.enabled=false", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=run_dir.parent,
    )


def wait_for_step(
    process: subprocess.Popen, run_dir: Path, step: int, limit_s: float = 90
) -> None:
    deadline = time.monotonic() + limit_s
    while not any(point["step"] >= step for point in read_metrics(run_dir)):
        assert process.poll() is None, f"ended before step {step}: {process.communicate()}"
        assert time.monotonic() < deadline, f"no step {step} within {limit_s} s"
        time.sleep(0.01)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGKILL", -9)])
def test_a_signal_at_any_step_costs_nothing(tmp_path, name, code):
    config = rollout_config(training__budget__steps=60, training__checkpoint_every_steps=7)
    straight = run_loop(config, tmp_path / "straight")
    write_yaml(config, tmp_path / "config.yaml")
    run_dir = tmp_path / "run"
    process = start(run_dir)
    wait_for_step(process, run_dir, 17)
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=90)
    assert process.returncode == code
    again = start(run_dir, "--resume", "--json")
    out, err = again.communicate(timeout=90)
    assert again.returncode == 0, err
    result = json.loads(out)
    assert result["weights_sha256"] == straight.weights_sha256
    assert result["metrics"] == straight.metrics


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest", "bad manifest"])
def test_a_damaged_checkpoint_costs_one_interval_and_a_warning(tmp_path, damage, caplog):
    config = rollout_config(training__budget__steps=12, training__checkpoint_every_steps=5)
    straight = run_loop(config, tmp_path / "straight")
    run_dir = tmp_path / "run"
    shutil.copytree(tmp_path / "straight", run_dir)
    *_, before, newest = checkpoint_folders(run_dir)
    if damage == "truncated":
        data = (newest / "model.safetensors").read_bytes()
        (newest / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif damage == "missing":
        (newest / "optimizer.safetensors").unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text("{")
    with pytest.raises(StorageError, match=newest.name):
        load_checkpoint(newest)
    same_end(run_loop(config, run_dir), straight)
    assert newest.name in caplog.text
    assert load_checkpoint(before).step == 10


def test_a_checkpoint_of_a_later_version_is_refused_and_nothing_is_passed_over(tmp_path):
    run_loop(small_config(training__budget__steps=8), tmp_path)
    newest = checkpoint_folders(tmp_path)[-1]
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    points = read_metrics(tmp_path)
    with pytest.raises(NewerFormatError, match="newer raysched"):
        run_loop(small_config(training__budget__steps=9), tmp_path)
    assert read_metrics(tmp_path) == points


def test_a_start_that_failed_before_any_work_leaves_the_folder_free(tmp_path):
    broken = small_config(data__source="image_folder", data__path=str(tmp_path / "none"))
    with pytest.raises(DataError):
        run_loop(broken, tmp_path / "run")
    open_run_folder(small_config(), tmp_path / "run", resume=False)


def test_old_checkpoints_are_rotated_and_nothing_half_written_stays(tmp_path):
    config = small_config(training__checkpoint_every_steps=2, training__keep_last=3)
    run_loop(config, tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000008", "step-00000010", "step-00000012"]


def test_a_folder_with_a_run_is_refused_without_resume(tmp_path):
    run_loop(small_config(), tmp_path)
    with pytest.raises(StorageError, match="--resume"):
        open_run_folder(small_config(), tmp_path, resume=False)


def test_resuming_with_other_settings_names_every_difference(tmp_path):
    run_loop(small_config(), tmp_path)
    other = small_config(optimizer__learning_rate=0.5, seed=3, training__budget__steps=99)
    with pytest.raises(ConfigError) as caught:
        open_run_folder(other, tmp_path, resume=True)
    text = str(caught.value)
    assert "optimizer.learning_rate" in text
    assert "seed" in text
    assert "budget" not in text


def test_a_run_with_more_budget_goes_on(tmp_path):
    run_loop(small_config(training__budget__steps=4), tmp_path)
    result = run_loop(small_config(training__budget__steps=6), tmp_path)
    assert result.compute["steps"] == 6


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    config = small_config(
        optimizer__learning_rate=1e18,
        optimizer__max_grad_norm=None,
        optimizer__warmup_fraction=0.5,
        training__budget__steps=40,
        training__checkpoint_every_steps=1,
    )
    result = run_loop(config, tmp_path)
    assert result.status == "failed"
    assert (result.exit_code, result.diverged) == (1, True)
    step = int(result.compute["steps"])
    assert f"step {step + 1}" in result.error
    assert "learning_rate" in result.error
    assert load_checkpoint(checkpoint_folders(tmp_path)[-1]).step == step


LIMITED = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.training.runs import small_config, run_loop
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from raysched.training.setup import build_run
config = small_config(training__budget__steps=12)
run_loop(config, Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
config = small_config(training__budget__steps=20)
from raysched.errors import StorageError
try:
    run_loop(config, Path(sys.argv[1]))
except StorageError as error:
    print("StorageError:", error)
"""


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path):
    """The file-size limit makes the kernel refuse the write, as a full disk does."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    tests = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "run"), tests],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("StorageError:"), done.stdout
    assert load_checkpoint(checkpoint_folders(tmp_path / "run")[-1]).step == 12
    leftovers = [p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name[0] == "."]
    assert leftovers == []


FULL = """
import subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", str(disk)], check=True)
from tests.training.runs import small_config, run_loop
from raysched.errors import StorageError
from raysched.models.checkpoint_files import NewerFormatError
from raysched.training.checkpoint import checkpoint_folders, load_checkpoint
config = small_config(
    training__budget__steps=9, training__checkpoint_every_steps=3, training__keep_last=9
)
try:
    run_loop(config, disk / "run")
except StorageError as error:
    print("StorageError:", error)
kept = checkpoint_folders(disk / "run")
print(len(kept), load_checkpoint(kept[-1]).step)
"""


def test_a_full_disk_costs_older_checkpoints_first_and_never_the_newest(tmp_path):
    """A file system of 1.4 MB, mounted in a name space of its own that ends with the process."""
    tests = str(Path(__file__).parents[2])
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", sys.executable, "-c", FULL, tmp_path, tests],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    message, kept = done.stdout.splitlines()
    assert message.startswith("StorageError:")
    assert "no space left" in message
    number, step = map(int, kept.split())
    assert number == 1
    assert step >= 3


def test_an_output_folder_that_is_a_file_is_one_clear_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"training\.output_dir"):
        open_run_folder(small_config(), tmp_path / "file" / "run", resume=False)
