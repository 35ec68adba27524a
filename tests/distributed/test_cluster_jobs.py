"""A real head with its dashboard: jobs by `ray job submit` and by `raysched submit`."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.ray, pytest.mark.slow]

RUN = """\
name: tiny
data: {source: digits}
model: {kind: unet, block_out_channels: [8, 8], layers_per_block: 1}
scheduled_sampling: {max_step_offset: 1, grid: 20, probability: 0.5}
training: {batch_size: 32, budget: {forward_equivalents: 800}}
evaluation: {nfe: [2], num_samples: 64}
scaling: {num_workers: 0}
"""
SPACE = """\
name: tiny-sweep
base: run.yaml
budget_forward_equivalents: 800
space:
  scheduled_sampling.max_step_offset: {choice: [1, 2]}
search: {algorithm: random, num_samples: 1}
early_stopping: {kind: none}
"""


def free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    for first in range(21000 + os.getpid() % 5000, 31000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + number))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise AssertionError("no free ports")


@dataclass(frozen=True)
class Head:
    folder: Path
    environment: dict[str, str]

    @property
    def rays(self) -> Path:
        """Where Ray keeps its sockets and logs."""
        return Path(f"/tmp/raysched-{os.getuid()}-{self.environment['RAYSCHED_HEAD_PORT']}")

    def local(self, verb: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(ROOT / "cluster" / "local"), verb)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=150,
        )

    def raysched(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(BIN / "raysched"), *arguments)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("h")
    (folder / "run.yaml").write_text(RUN)
    (folder / "space.yaml").write_text(SPACE)
    ports = free_ports(7)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAYSCHED_HEAD": str(folder / "s"),
        "RAYSCHED_HEAD_PORT": str(ports + 6),
        "RAYSCHED_DASHBOARD_PORT": str(ports),
        "RAYSCHED_HEAD_CPUS": "2",
        "RAYSCHED_ROOT": str(folder / "root"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "AWS_SECRET_ACCESS_KEY": "planted-secret",
    }
    before = Head(folder, environment)
    started = before.local("start")
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        settings = dict(re.findall(r"(RAY_[A-Z_]+)=(\S+)", started.stdout))
        del environment["RAYSCHED_ROOT"], environment["AWS_SECRET_ACCESS_KEY"]
        yield Head(folder, {**environment, **settings})
    finally:
        stopped = before.local("stop")
    assert stopped.stdout.strip() == "stopped"
    assert before.local("stop").stdout.strip() == "not running"
    assert processes_of(folder / "s", before.rays) == []
    shutil.rmtree(before.rays)


def processes_of(*folders: Path) -> list[str]:
    """Command lines that name one of the head's folders; waits for those that are ending."""
    until = time.monotonic() + 20
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if any(str(folder) in line for folder in folders):
                found.append(line)
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.2)


def test_starting_twice_starts_once_and_all_listens_on_loopback(head: Head) -> None:
    again = head.local("start")
    assert again.returncode == 0
    assert "already running" in again.stdout
    mode = (head.folder / "s" / "token").stat().st_mode & 0o777
    assert mode == 0o600
    ports = {f"{int(head.environment['RAYSCHED_DASHBOARD_PORT']) + n:04X}" for n in range(7)}
    addresses = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            host, port = line.split()[1].split(":")
            if port in ports and line.split()[3] == "0A":
                addresses.add(host)
    assert addresses
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F", "0" * 24 + "01000000"}


def test_without_the_token_nothing_is_told(head: Head) -> None:
    stranger = {k: v for k, v in head.environment.items() if not k.startswith("RAY_AUTH")}
    done = Head(head.folder, {**stranger, "HOME": str(head.folder)}).raysched("jobs", "list")
    assert done.returncode == 2
    assert "asks for a token" in done.stderr


def test_ray_job_submit_runs_a_sweep_whose_results_are_in_mlflow(head: Head) -> None:
    project = head.folder / "project"
    project.mkdir()
    for name in ("raysched", "cluster", "pyproject.toml"):
        (project / name).symlink_to(ROOT / name)
    for name in ("run.yaml", "space.yaml"):
        (project / name).write_text((head.folder / name).read_text())
    (project / ".env").write_text("planted-secret")
    job = ("python", "-m", "raysched", "tune", "space.yaml")
    runtime = ("--runtime-env", "cluster/runtime_env.yaml")
    done = Head(project, head.environment).run(
        str(BIN / "ray"), "job", "submit", "--working-dir", ".", *runtime, "--", *job
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "Verdict" in done.stdout
    unpacked = list(head.rays.rglob("working_dir_files/*/space.yaml"))
    assert unpacked
    assert not (unpacked[0].parent / ".env").exists()
    check_results(head, 1)


def check_results(head: Head, sweeps: int) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{head.folder / 'root' / 'runs' / 'mlflow.db'}")
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(ids)
    parents = {run.data.tags.get("mlflow.parentRunId") for run in runs} - {None}
    assert len([r for r in runs if r.info.run_id in parents]) >= sweeps
    assert any("quality/q" in run.data.metrics for run in runs)
    assert all(run.info.status == "FINISHED" for run in runs)
    assert "planted-secret" not in json.dumps([run.to_dictionary() for run in runs], default=str)


def test_submit_ends_with_the_jobs_code_and_finds_its_job_again(head: Head) -> None:
    command = ("submit", "train", "run.yaml", "tracking.enabled=false", "--json")
    first = head.raysched(*command)
    assert first.returncode == 0, first.stderr
    again = head.raysched(*command)
    one, other = json.loads(first.stdout), json.loads(again.stdout)
    assert one["submission_id"] == other["submission_id"]
    assert (one["started"], other["started"]) == (True, False)
    assert "status: finished" in again.stderr
    wrong = head.raysched("submit", "sample", "no-such-run")
    assert wrong.returncode == 2


def test_a_stopped_job_is_not_a_success_and_a_second_sweep_of_its_name_is_refused(
    head: Head,
) -> None:
    long = ("budget_forward_equivalents=500000", "output_dir=long")
    sent = head.raysched("submit", "tune", "space.yaml", *long, "--detach", "--json")
    assert sent.returncode == 0, sent.stderr
    job = json.loads(sent.stdout)["submission_id"]
    twin = head.raysched("submit", "tune", "space.yaml", "output_dir=other")
    assert twin.returncode == 2
    assert f"a sweep named tiny-sweep is running on the cluster as {job}" in twin.stderr
    journal = head.folder / "root" / "long" / "trials.jsonl"
    until = time.monotonic() + 90
    while not journal.exists():
        assert time.monotonic() < until, "no trial was begun within 90 s"
        time.sleep(0.2)
    stopped = head.raysched("jobs", "stop", job)
    assert stopped.returncode == 0
    assert "asked to stop" in stopped.stdout
    end = head.raysched("jobs", "logs", job)
    assert end.returncode == 75
    assert "STOPPED" in end.stdout
