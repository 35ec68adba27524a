"""Real servers for tests, on loopback: MLflow over HTTP, and PostgreSQL from Debian's packages."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from raysched.tracking.uris import unreachable_reason

# Debian keeps the programs of each version apart and none of them on the PATH.
DEBIAN = Path("/usr/lib/postgresql")


class Server:
    """An MLflow server on loopback that can be killed and started again at the same place."""

    def __init__(self, folder: Path, backend: str | None = None) -> None:
        self._backend = backend or f"sqlite:///{folder}/server.db"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--artifacts-destination", f"{self._folder}/artifacts"]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                start_new_session=True,
                env={
                    **os.environ,
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                    "MLFLOW_BACKEND_STORE_URI": self._backend,
                },
            )
        deadline = time.monotonic() + 90
        while unreachable_reason(self.uri, timeout_s=1.0) is not None:
            assert time.monotonic() < deadline, (self._folder / "server.log").read_text()
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None


class Postgres:
    """A cluster of its own in a temporary folder, gone after `stop`.

    PostgreSQL refuses to run as root, so there its own user runs it.
    """

    def __init__(self) -> None:
        self._binaries = _postgres_binaries()
        self._folder = Path(tempfile.mkdtemp(prefix="raysched-pg-"))
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user is not None:
            os.chown(self._folder, pwd.getpwnam(self._user).pw_uid, -1)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        self.uri = f"postgresql+psycopg://mlflow@127.0.0.1:{self.port}/postgres"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        data = self._folder / "data"
        self._run("initdb", "-D", str(data), "-U", "mlflow", "--auth=trust", "--no-sync")
        options = ["-h", "127.0.0.1", "-p", str(self.port), "-k", str(self._folder)]
        self._process = subprocess.Popen(
            [str(self._binaries / "postgres"), "-D", str(data), *options, "-c", "fsync=off"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self._folder,
            user=self._user,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while not self._is_ready():
            assert time.monotonic() < deadline, "PostgreSQL does not answer after 60 s"
            assert self._process.poll() is None, "PostgreSQL ended by itself"
            time.sleep(0.1)

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # its fast shutdown
            self._process.wait(30)
            self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _is_ready(self) -> bool:
        command = [str(self._binaries / "pg_isready"), "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._binaries / program), *arguments],
            check=True,
            capture_output=True,
            timeout=60,
            cwd=self._folder,
            user=self._user,
        )


def _postgres_binaries() -> Path:
    versions = sorted(DEBIAN.glob("*/bin/postgres"))
    found = str(versions[-1]) if versions else shutil.which("postgres")
    assert found, "PostgreSQL is missing; Debian: apt-get install postgresql"
    return Path(found).parent
