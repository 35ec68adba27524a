"""Failures caused for real: killed and hung workers, memory that runs out, a grace that ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from raysched.config.loading import write_yaml
from raysched.distributed.failures import as_user_error
from raysched.distributed.resources import shortage
from raysched.distributed.watchdog import Watchdog
from raysched.errors import LostResourcesError, RunFailedError
from raysched.training.events import read_events
from raysched.training.heartbeat import WORKERS_FOLDER, Beat, beat_file, dump_stacks
from raysched.training.out_of_memory import halved, is_out_of_memory
from raysched.training.run_folder import open_run_folder
from tests.distributed.waiting import beats, wait_until
from tests.training.runs import small_config
from tests.training.test_resume import start, wait_for_step

ROOT = Path(__file__).resolve().parents[2]


def test_memory_that_ran_out_is_told_from_other_errors():
    allocator = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
    guess = "Worker unexpectedly exits (1) the process was killed by the OOM killer (2) ray stop"
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError(allocator))
    assert is_out_of_memory(Exception("killed: the node is running low on memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(Exception(guess))
    config = small_config(scaling__retry_out_of_memory=True, training__batch_size=12)
    twice = halved(config)
    assert twice.training.gradient_accumulation == 2
    assert halved(halved(twice)) is None
    assert halved(small_config()) is None


def test_a_lost_node_is_told_from_a_crash(tmp_path):
    class FailedError(Exception):
        def __init__(self, text: str) -> None:
            super().__init__(text)
            self.worker_failures = {0: RuntimeError(text)}

    node = "The actor died because its node has died. Node Id: 4f"
    assert type(as_user_error(FailedError(node), tmp_path)) is LostResourcesError
    assert (
        type(as_user_error(FailedError("The actor died: exit code 1"), tmp_path)) is RunFailedError
    )


def test_resources_are_counted_per_node_and_gpus_too():
    scaling = small_config(scaling__num_workers=2, scaling__cpus_per_worker=2).scaling
    assert shortage(scaling, [{"CPU": 4.0}]) is None
    assert "need 4 CPUs, the cluster has 3" in shortage(scaling, [{"CPU": 3.0}])
    apart = shortage(scaling, [{"CPU": 3.0}, {"CPU": 1.0}])
    assert "only 1 fit on the cluster's nodes (3 CPUs; 1 CPUs)" in apart
    config = small_config(scaling__num_workers=1, scaling__use_gpu=True, training__device="auto")
    assert "need 1 GPUs, the cluster has 0" in shortage(config.scaling, [{"CPU": 4.0}])


def test_the_watchdog_names_the_rank_without_life_or_the_one_behind(tmp_path):
    struck: list[tuple[int, bool]] = []
    now = [0.0]

    def strike(beat: Beat, run_dir: Path, kill: bool) -> str:
        struck.append((beat.rank, kill))
        return "sleeping"

    def show(rank: int, count: int, step: int) -> None:
        path = beat_file(tmp_path, rank)
        path.parent.mkdir(exist_ok=True)
        record = {"attempt": "a", "rank": rank, "pid": 10 + rank, "started": 1.0, "node": "n"}
        path.write_text(json.dumps({**record, "beats": count, "step": step, "work": str(step)}))

    def looks(steps: dict[int, int], living: set[int], seconds: int) -> list[str]:
        dog, said = Watchdog(tmp_path, "a", 8.0, strike, clock=lambda: now[0]), []
        for second in range(seconds):
            now[0] += 1.0
            for rank, step in steps.items():
                show(rank, second if rank in living else 0, step)
            said += [text for text in [dog.look()] if text]
        return said

    assert looks({0: 5, 1: 5}, {0, 1}, 7) == []
    (frozen,) = looks({0: 5, 1: 5}, {0}, 12)
    assert "rank 1 (last step 5" in frozen
    assert struck == [(0, False), (1, True)]
    struck.clear()
    (behind,) = looks({0: 6, 1: 5}, {0, 1}, 14)
    assert "rank 1 (last step 5" in behind
    assert struck == [(0, False), (1, True)]


def test_a_process_that_is_stuck_writes_its_stacks_and_dies(tmp_path):
    script = (
        "import sys, time; from pathlib import Path\n"
        "from raysched.training.heartbeat import Heartbeat\n"
        "heart = Heartbeat(Path(sys.argv[1]), 0, attempt='a', node='', interval_s=0.05)\n"
        "def stuck_here():\n    time.sleep(600)\n"
        "with heart.beating(lambda: (7, 'w')):\n    stuck_here()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
    try:
        wait_until(lambda: beats(tmp_path), "a sign of life", 60)
        process.send_signal(signal.SIGSTOP)
        stopped = psutil.Process(process.pid)
        wait_until(lambda: stopped.status() == psutil.STATUS_STOPPED, "the signal to arrive")
        beat = Beat(**wait_until(lambda: beats(tmp_path), "a record")[0])
        assert dump_stacks(beat, tmp_path, kill=True) == "stopped"
        assert process.wait(timeout=10) == -signal.SIGKILL
        stacks = (tmp_path / WORKERS_FOLDER / "rank-00000.stacks.txt").read_text()
        assert "stuck_here" in stacks
        assert dump_stacks(beat, tmp_path, kill=True) is None
    finally:
        process.kill()
        process.wait()


LIMITED = """
import resource, sys, threading
from pathlib import Path
import psutil, torch
from raysched.distributed.launch import run_training
from raysched.training.run_folder import open_run_folder
from tests.distributed.waiting import beats, wait_until
from tests.training.runs import small_config
retry = sys.argv[2] == "retry"
config = small_config(
    training__batch_size=4096, training__budget__steps=2, training__checkpoint_every_steps=9,
    scaling__retry_out_of_memory=retry,
)
run_dir = Path(sys.argv[1])
open_run_folder(config, run_dir, resume=False)
# Threads and code that come at first use must be there before the limit.
warm = Path(sys.argv[1] + "-warm")
open_run_folder(small_config(), warm, resume=False)
run_training(small_config(), run_dir=warm, report=lambda metrics: None)
# What is refused should be a tensor, not the stack of a thread that writes checkpoints.
threading.stack_size(256 << 10)
used = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[3]), used + int(sys.argv[3])))
try:
    result = run_training(config, run_dir=run_dir, report=lambda metrics: None)
    print("END", result.status, result.notes)
except Exception as error:
    print("ERROR", type(error).__name__, error)
"""


def limited(run_dir: Path, retry: str, megabytes: int) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(run_dir), retry, str(megabytes << 20)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_memory_that_runs_out_in_a_step_is_one_message_or_half_the_micro_batch(tmp_path):
    """The kernel refuses address space beyond a limit, as it refuses memory that is not there."""
    refused = limited(tmp_path / "refused", "no", 500)
    assert refused.startswith("ERROR StepMemoryError step ")
    assert "scaling.retry_out_of_memory: true" in refused
    retried = limited(tmp_path / "retried", "retry", 500)
    assert retried.startswith("END finished ['step "), retried
    assert "went on at 2048 (training.gradient_accumulation 2" in retried
    assert "went on at 2048" in read_events(tmp_path / "retried")[0]


@pytest.mark.slow
def test_a_checkpoint_that_takes_longer_than_the_grace_is_given_up(tmp_path):
    """A step of many seconds lies between the signal and the next checkpoint."""
    config = small_config(
        training__batch_size=4000,
        training__budget__steps=50,
        training__log_every_steps=1,
        model__block_out_channels=[32, 64],
        scaling__grace_s=0.2,
    )
    write_yaml(config, tmp_path / "config.yaml")
    run_dir = tmp_path / "run"
    process = start(run_dir, "--json")
    wait_for_step(process, run_dir, 1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert json.loads(out)["status"] == "stopped"
    assert "within 0.2 s of SIGTERM (scaling.grace_s); the newest is none" in err
    assert "Traceback" not in err


POISON = """
import json, sys
import torch
from pathlib import Path
import raysched.training.loop as loop
from raysched.training.protocols import NullTracker
from tests.distributed.waiting import beats, wait_until
from tests.training.runs import small_config, ignore_report

build = loop.build_run

def build_poisoned(config):
    run = build(config)
    images_at = run.dataset.images_at
    def poisoned(rows):
        images = images_at(rows).clone()
        # The last rank's first image of the second step.
        poisoned.calls += 1
        if run.rank == run.world_size - 1 and poisoned.calls == 2:
            images[0, 0, 0, 0] = torch.nan
        return images
    poisoned.calls = 0
    object.__setattr__(run.dataset, "images_at", poisoned)
    return run

loop.build_run = build_poisoned
config = small_config(training__budget__steps=5)
result = loop.train_loop(
    config, run_dir=Path(sys.argv[1]), report=ignore_report, tracker=NullTracker()
)
print(json.dumps([result.status, result.error]))
"""


@pytest.mark.slow
def test_a_number_that_is_none_on_one_rank_ends_all_ranks_with_its_sample_named(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    open_run_folder(small_config(training__budget__steps=5), tmp_path, resume=False)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", POISON, str(tmp_path)],
            env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    ends = [json.loads(rank.communicate(timeout=120)[0].splitlines()[-1]) for rank in ranks]
    assert [status for status, _ in ends] == ["failed", "failed"]
    assert ends[0] == ends[1]
    named = re.search(r"step 2: the loss of 1 samples is nan \((\d+)\)", ends[0][1])
    assert named, ends[0][1]
    assert 8 <= int(named[1]) < 16


FULL = """
import subprocess, sys
from pathlib import Path
disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)], check=True)
done = subprocess.run([
    sys.executable, "-m", "raysched", "train", sys.argv[2], "--json",
    f"training.output_dir={disk / 'run'}", "tracking.enabled=false",
])
print(done.returncode, sorted(p.name for p in (disk / "run" / "checkpoints").iterdir()))
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_fails_the_run_and_leaves_a_checkpoint(tmp_path):
    """A small file system, mounted in a name space of its own that ends with the process."""
    (tmp_path / "disk").mkdir()
    config = small_config(
        training__budget__steps=9, training__checkpoint_every_steps=3, training__keep_last=9
    )
    write_yaml(config, tmp_path / "config.yaml")
    command = ["unshare", "--mount", "--map-root-user", sys.executable, "-c", FULL]
    done = subprocess.run(
        [*command, str(tmp_path / "disk"), str(tmp_path / "config.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    answer, end = done.stdout.splitlines()
    assert json.loads(answer)["status"] == "failed", done.stderr
    assert "no space left" in json.loads(answer)["error"]
    assert end.startswith("1 ['step-"), end
    assert "Traceback" not in done.stderr
