"""What a submission sends, what stays here, and how its job's end becomes an exit code."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from raysched.cli import main
from raysched.config.paths import work_root
from raysched.distributed import package as packages
from raysched.distributed.job_server import JobServer, server_address
from raysched.distributed.jobs import LogPrinter, exit_code, follow
from raysched.distributed.joining import join_cluster, private_environment
from raysched.distributed.package import collect
from raysched.distributed.submit import Extras, check_versions, choose_variables, prepare
from raysched.errors import ConfigError

SECRET = "s3cr3t-value"
PLANTED = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a sweep, its base, and everything that must not leave it."""
    for folder in ("configs", "tune_spaces", "runs", ".venv", ".git", "data"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "secret.txt").write_text(SECRET)
    for name in (".env", "key.pem", "credentials", "model.safetensors"):
        (tmp_path / name).write_text(SECRET)
    (tmp_path / "configs" / "run.yaml").write_text("name: mine\n")
    (tmp_path / "tune_spaces" / "space.yaml").write_text(
        "name: mine\nbase: ../configs/run.yaml\n"
        "space:\n  scheduled_sampling.max_step_offset: {choice: [1, 2]}\n"
    )
    for name in PLANTED:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{SECRET}@host:5000")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sweep_job(path="tune_spaces/space.yaml", extras=None):
    return prepare(["tune", str(path)], str(path), [], extras)


def test_only_the_source_and_the_config_files_are_sent(project):
    job = sweep_job()
    names = set(job.package.files)
    assert {"tune_spaces/space.yaml", "configs/run.yaml", "raysched/cli.py"} <= names
    assert {"raysched/data/sources.py", "pyproject.toml"} <= names
    other = {n for n in names if not n.startswith("raysched/")}
    assert other == {"tune_spaces/space.yaml", "configs/run.yaml", "pyproject.toml"}


def test_no_secret_is_in_the_package_the_request_or_the_output(project, capfd):
    job = sweep_job()
    with zipfile.ZipFile(io.BytesIO(job.package.archive())) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
        assert not any(name.startswith(("/", "..")) for name in archive.namelist())
    assert SECRET.encode() not in content
    assert not set(PLANTED) & job.variables.keys()
    assert SECRET not in json.dumps([job.variables, job.entrypoint, job.metadata])
    assert (
        main(["submit", "tune", "tune_spaces/space.yaml", "--dry-run", "--env", "HF_TOKEN"]) == 0
    )
    printed = capfd.readouterr()
    assert "HF_TOKEN" in printed.out
    assert "plain text" in printed.out
    assert SECRET not in printed.out + printed.err


def test_an_uri_with_a_password_is_refused(project, capfd):
    uri = f"tracking.uri=http://user:{SECRET}@host"
    assert main(["submit", "train", "configs/run.yaml", uri, "--dry-run"]) == 2
    printed = capfd.readouterr()
    assert "password" in printed.err
    assert SECRET not in printed.out + printed.err
    (project / "bad.yaml").write_text(f"tracking: {{uri: 'http://user:{SECRET}@host'}}\n")
    with pytest.raises(ConfigError, match="holds a URL with a password"):
        collect(["bad.yaml"])


@pytest.mark.parametrize(
    ("line", "entrypoint"),
    [
        ("tune SPACE --resume", "tune SPACE --resume"),
        ("tune --retry-failed SPACE --resume seed=3", "tune --retry-failed SPACE --resume seed=3"),
        ("train configs/run.yaml --resume --seed 3", "train configs/run.yaml --resume --seed=3"),
        ("verify-resume configs/run.yaml --kills 2", "verify-resume configs/run.yaml --kills=2"),
        ("plan SPACE --price-per-hour 2.5", "plan SPACE --price-per-hour=2.5"),
        ("plan --corners 2 SPACE", "plan --corners=2 SPACE"),
        ("pick runs/x --top 2 --resume", "pick runs/x --top 2 --resume"),
    ],
)
def test_a_command_is_sent_with_its_own_options(project, capfd, line, entrypoint):
    path = "tune_spaces/space.yaml"
    assert main(["submit", *line.replace("SPACE", path).split(), "--dry-run", "--json"]) == 0
    sent = json.loads(capfd.readouterr().out)
    assert sent["entrypoint"] == f"python -m raysched {entrypoint.replace('SPACE', path)}"
    if "SPACE" in line:
        assert {path, "configs/run.yaml"} <= sent["files"].keys()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "verify-resume configs/run.yaml --kills none",
            "'--kills': Input should be",
        ),
        ("tune tune_spaces/space.yaml --resum", "did you mean --resume?"),
        ("pick --top 2", "Missing argument 'SWEEP'"),
    ],
)
def test_a_mistake_in_a_commands_options_is_told_before_anything_is_sent(
    project, capfd, line, message
):
    assert main(["submit", *line.split(), "--dry-run"]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("name", [".env", "key.pem", "credentials", "model.safetensors"])
def test_secrets_and_checkpoints_are_not_sent_even_if_named(project, name):
    with pytest.raises(ConfigError, match="is not sent"):
        prepare(["train"], None, [], Extras(include=(name,)))


def test_a_folder_that_is_included_goes_without_its_hidden_and_secret_files(project):
    (project / "extra").mkdir()
    for name in ("labels.csv", ".env", "my.key"):
        (project / "extra" / name).write_text("x")
    (project / "extra" / "link.csv").symlink_to(project / ".env")
    found = collect([], ["extra"], source=project)
    assert set(found.files) == {"extra/labels.csv"}


def test_a_password_in_an_included_folder_is_refused(project):
    (project / "extra").mkdir()
    (project / "extra" / "store.toml").write_text(f"uri = 'http://user:{SECRET}@host'\n")
    with pytest.raises(ConfigError, match=r"extra/store\.toml: holds a URL with a password"):
        collect([], ["extra"], source=project)


def test_files_from_elsewhere_keep_their_places_and_stay_inside(project, monkeypatch):
    (project / "here").mkdir()
    monkeypatch.chdir(project / "here")
    job = sweep_job("../tune_spaces/space.yaml")
    assert {"job/tune_spaces/space.yaml", "job/configs/run.yaml"} <= set(job.package.files)
    assert job.entrypoint == "python -m raysched tune job/tune_spaces/space.yaml"


def test_too_much_is_refused_with_the_largest_files(project, monkeypatch):
    monkeypatch.setattr(packages, "MAX_BYTES", 1000)
    (project / "big.csv").write_bytes(b"0" * 5_000_000)
    with pytest.raises(ConfigError, match=r"at most .* the largest: big.csv \(4.8 MiB\)"):
        collect([], ["big.csv"], source=project)


def test_the_same_submission_has_the_same_id(project):
    first, again = sweep_job(), sweep_job()
    assert first.submission_id == again.submission_id
    assert first.submission_id.startswith("mine-")
    assert first.package.archive() == again.package.archive()
    (project / "configs" / "run.yaml").write_text("name: mine\nseed: 3\n")
    assert sweep_job().submission_id != first.submission_id


def test_variables_are_sent_by_name():
    environment = {"MLFLOW_EXPERIMENT_NAME": "e", "HF_TOKEN": SECRET, "OTHER": "1"}
    chosen, notes = choose_variables(["OTHER"], environment)
    assert chosen["MLFLOW_EXPERIMENT_NAME"] == "e"
    assert chosen["OTHER"] == "1"
    assert "HF_TOKEN" not in chosen
    assert notes == []
    with pytest.raises(ConfigError, match="NOPE is not set here"):
        choose_variables(["NOPE"], environment)
    with pytest.raises(ConfigError, match=r"takes names, not values, got HF_TOKEN$"):
        choose_variables([f"HF_TOKEN={SECRET}"], environment)


def test_a_store_on_this_machine_stays_here():
    chosen, notes = choose_variables([], {"MLFLOW_TRACKING_URI": "sqlite:////srv/mlflow.db"})
    assert "MLFLOW_TRACKING_URI" not in chosen
    assert "file of this machine" in notes[0]


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 75, 75),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 75),
        ("STOPPED", 0, 75),
    ],
)
def test_a_jobs_end_is_an_exit_code(status, code, expected):
    assert exit_code({"status": status, "driver_exit_code": code}) == expected


def test_versions_that_differ_are_named():
    assert check_versions({"ray": "1.2.3", "python": "2.7.1"}) != []
    (ray, python) = check_versions({"ray": "1.2.3", "python": "2.7.1"})
    assert ray.startswith("Ray 1.2.3 on the cluster")
    assert python.startswith("Python 2.7.1 on the cluster")


@pytest.mark.parametrize("address", ["head:6379", "ray://head:10001", "ftp://x", "http://"])
def test_an_address_that_is_no_url_is_refused(address):
    with pytest.raises(ConfigError, match="must be the job server's URL"):
        server_address(address)


def test_no_server_is_one_message(capfd):
    assert main(["jobs", "list", "--address", "http://127.0.0.1:1"]) == 2
    assert "no job server answers at http://127.0.0.1:1" in capfd.readouterr().err


class Flaky(BaseHTTPRequestHandler):
    """A job server that drops connections; each look at the job finds one more line."""

    requests = looks = 0
    lines = ("one\n", "two\n", "three\n")

    def do_GET(self) -> None:
        kind = type(self)
        kind.requests += 1
        if kind.requests in (1, 4, 7):
            self.connection.close()
            return
        body: dict[str, object] = {"logs": "".join(self.lines[: kind.looks])}
        if not self.path.endswith("/logs"):
            kind.looks += 1
            body = {"status": "SUCCEEDED" if kind.looks >= len(self.lines) else "RUNNING"}
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""


def test_logs_come_whole_and_once_over_lost_connections(capsys):
    server = HTTPServer(("127.0.0.1", 0), Flaky)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    out = io.StringIO()
    address = f"http://127.0.0.1:{server.server_port}"
    job = follow(JobServer(address), "x", LogPrinter(out), sleep=lambda _: None)
    server.shutdown()
    server.server_close()
    assert job["status"] == "SUCCEEDED"
    assert out.getvalue() == "one\ntwo\nthree\n"
    assert "the job goes on, trying again" in capsys.readouterr().err


class Headless(BaseHTTPRequestHandler):
    """Ray's job server where the node of the job's driver can't be asked: logs are a 500."""

    looks = 0
    failures = 3

    def do_GET(self) -> None:
        kind = type(self)
        kind.looks += 1
        is_log = self.path.endswith("/logs")
        is_lost = is_log and kind.looks < kind.failures
        status = "SUCCEEDED" if kind.looks >= 5 else "RUNNING"
        answer = {"logs": "one\n"} if is_log else {"status": status}
        data = b"Traceback\nConnectionError: no agent" if is_lost else json.dumps(answer).encode()
        self.send_response(500 if is_lost else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""


@pytest.mark.parametrize(("failures", "shown"), [(3, "one\n"), (10**6, "")])
def test_a_job_whose_logs_can_not_be_had_is_followed_to_its_end(capsys, failures, shown):
    Headless.looks, Headless.failures = 0, failures
    server = HTTPServer(("127.0.0.1", 0), Headless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    out = io.StringIO()
    job_server = JobServer(f"http://127.0.0.1:{server.server_port}")
    job = follow(job_server, "x", LogPrinter(out), patience_s=0.5, sleep=lambda _: None)
    server.shutdown()
    server.server_close()
    assert job["status"] == "SUCCEEDED"
    assert out.getvalue() == shown
    told = capsys.readouterr().err
    assert "answers 500: ConnectionError: no agent" in told
    assert ("last lines are lost" in told) == (shown == "")


class Endless(BaseHTTPRequestHandler):
    """A job server whose one job goes on until it is asked to stop."""

    stopped = False

    def do_GET(self) -> None:
        ended = type(self).stopped
        if self.path.endswith("/logs"):
            answer: object = {"logs": "begun\n" + ("saved\n" if ended else "")}
        elif self.path.endswith("/version"):
            answer = {"ray_version": "2"}
        else:
            answer = {"status": "STOPPED" if ended else "RUNNING"}
        self.answer(answer)

    def do_POST(self) -> None:
        assert self.path.endswith("/api/jobs/x/stop")
        type(self).stopped = True
        self.answer({"stopped": True})

    def answer(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""


def read_until(terminal: int, text: str) -> str:
    """What a terminal shows up to and with a text."""
    shown = ""
    while text not in shown:
        assert select.select([terminal], [], [], 30)[0], f"no {text!r} within 30 s in {shown!r}"
        shown += os.read(terminal, 4096).decode()
    return shown


@pytest.mark.parametrize(("answer", "code"), [("s", 75), ("l", 130)])
def test_ctrl_c_asks_whether_to_stop_the_job_and_prints_nothing_twice(answer, code):
    Endless.stopped = False
    server = HTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    terminal, inside = pty.openpty()
    address = f"http://127.0.0.1:{server.server_port}"
    command = [sys.executable, "-m", "raysched", "jobs", "logs", "x", "--address", address]
    process = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside)
    try:
        shown = read_until(terminal, "begun")
        process.send_signal(signal.SIGINT)
        shown += read_until(terminal, "stop x, or leave it running? [s/L]")
        os.write(terminal, f"{answer}\n".encode())
        shown += read_until(terminal, "STOPPED" if answer == "s" else "jobs stop x")
        assert process.wait(30) == code
    finally:
        process.kill()
        server.shutdown()
        server.server_close()
        os.close(terminal)
        os.close(inside)
    assert shown.count("begun") == 1
    assert Endless.stopped is (answer == "s")
    if answer == "s":
        assert shown.index("asked to stop") < shown.index("saved") < shown.index("job x: STOPPED")


def test_joining_where_nothing_answers_is_one_message():
    import ray

    with pytest.raises(ConfigError, match=r"no cluster answers at 127\.0\.0\.1:1"):
        join_cluster(ray, "127.0.0.1:1")
    with pytest.raises(ConfigError, match="is a job server"):
        join_cluster(ray, "http://127.0.0.1:8265")


def test_a_cluster_of_ones_own_is_closed(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    one, other = private_environment(), private_environment()
    assert one["RAY_AUTH_MODE"] == "token"
    assert len(one["RAY_AUTH_TOKEN"]) == 64
    assert one["RAY_AUTH_TOKEN"] != other["RAY_AUTH_TOKEN"]


def test_a_submitted_job_keeps_its_runs(tmp_path, monkeypatch):
    folder = tmp_path / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(folder)
    assert work_root() == tmp_path / "home" / "raysched"
    monkeypatch.setenv("RAYSCHED_ROOT", str(tmp_path / "shared"))
    assert work_root() == tmp_path / "shared"
    monkeypatch.delenv("RAYSCHED_ROOT")
    monkeypatch.chdir(tmp_path)
    assert work_root() == Path.cwd()
