"""`raysched ui`: MLflow's pages on the store where the runs are, on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from raysched.config.run import TrackingConfig
from raysched.errors import ConfigError, RunFailedError, UserError
from raysched.tracking.spool import RunRecord, Spool
from raysched.tracking.store import LOGGER, experiment_place, prepare_store
from raysched.tracking.uris import (
    TRACKING_URI_VARIABLE,
    has_credentials,
    is_server,
    redact,
    resolve_uri,
    unreachable_reason,
)

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.1
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Page:
    """What to open.

    Attributes:
        uri: the store, credentials included where the user gave them.
        experiment: name of the experiment to show.
        run_id: of the run that was named, empty without one.
        sweep: name of the sweep that was named, whose runs alone are shown; empty without one.
    """

    uri: str
    experiment: str = TrackingConfig().experiment
    run_id: str = ""
    sweep: str = ""


def find_page(folder: Path | None, uri: str | None, root: Path) -> Page:
    """The store of a run or sweep, or the one that a run started here would use.

    Args:
        folder: a run's or sweep's folder.
        uri: a store given by the user; wins.
        root: the folder that holds `runs/`.

    Raises:
        UserError: the folder holds no tracked run.
        ConfigError: a password is needed that is not stored.
    """
    if folder is None:
        return Page(resolve_uri(uri, root))
    record = Spool(folder).load_record()
    if record is None:
        raise UserError(
            f"{folder}: no run was tracked here (tracking/run.json is missing); name the folder "
            "of a run or sweep, or give the store with --uri"
        )
    sweep = record.tags.get("raysched.sweep", "")
    return Page(_uri_of(record, uri), record.experiment, record.run_id or "", sweep)


def _uri_of(record: RunRecord, uri: str | None) -> str:
    given = uri or os.environ.get(TRACKING_URI_VARIABLE)
    if uri or not has_credentials(record.uri):
        return uri or record.uri
    if given and redact(given) == record.uri:
        return given
    raise ConfigError(
        f"the run was tracked at {record.uri}, and passwords are never stored: set "
        f"{TRACKING_URI_VARIABLE} to the full URI"
    )


def serve(
    page: Page,
    *,
    host: str,
    port: int,
    ready: Callable[[str], None],
    asked_to_stop: Callable[[], bool],
) -> str:
    """Run MLflow's server on the store until asked to stop; a server's own pages need none.

    Args:
        page: from `find_page`.
        host: address to listen on.
        port: 0 takes a free one.
        ready: called with the URL once the pages answer.
        asked_to_stop: looked at often.

    Returns:
        The URL.

    Raises:
        ConfigError: the port is taken.
        RunFailedError: the server ended by itself.
    """
    store = prepare_store(TrackingConfig(uri=page.uri, experiment=page.experiment), Path.cwd())
    place = _place(page, store.experiment_id)
    if is_server(page.uri):
        url = redact(page.uri).replace("***@", "") + place
        ready(url)
        return url
    if host not in LOOPBACK:
        LOGGER.warning(
            "--host %s: whoever reaches it can read and delete the runs; put a proxy that asks "
            "for a password in front, or keep to 127.0.0.1 and `ssh -L`",
            host,
        )
    port = _free_port(host, port)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    process = _start(page.uri, host, port)
    try:
        _wait_until_it_answers(process, url, asked_to_stop)
        url += place
        ready(url)
        while not asked_to_stop():
            try:
                code = process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                continue
            raise RunFailedError(f"MLflow's server on {url} ended by itself (exit code {code})")
    finally:
        _stop(process)
    return url


def _place(page: Page, experiment_id: str) -> str:
    """What follows the server's address: the sweep's runs, the run, or all runs."""
    if not experiment_id:
        return ""
    if page.run_id and not page.sweep:
        return f"/#/experiments/{experiment_id}/runs/{page.run_id}"
    place = experiment_place(experiment_id)
    if not page.sweep:
        return place
    condition = f"tags.`raysched.sweep` = '{page.sweep}'"
    return f"{place}&searchFilter={quote(condition)}"


def _free_port(host: str, port: int) -> int:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"--port {port}: can't listen on {host}: {error.strerror}; another server may be "
            "there: open it, or choose another port (--port 0 finds a free one)"
        ) from error


def _start(uri: str, host: str, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)]
    # One worker serves one person, starts faster, and SQLite has one writer anyway.
    command += ["--workers", "1"]
    environment = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Ten processes for the judging of language models, which nobody asks for here.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    # In the environment, not among the arguments: those are shown to every user of the machine.
    environment["MLFLOW_BACKEND_STORE_URI"] = uri
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A group of its own, so that Ctrl-C reaches it through `_stop` only, workers included.
        start_new_session=True,
    )


def _wait_until_it_answers(
    process: subprocess.Popen[bytes], url: str, asked_to_stop: Callable[[], bool]
) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while unreachable_reason(url, timeout_s=1.0) is not None:
        if process.poll() is not None:
            raise RunFailedError(
                f"MLflow's server could not start (exit code {process.returncode}); see why with: "
                f"{Path(sys.executable).name} -m mlflow server"
            )
        if time.monotonic() > deadline:
            raise RunFailedError(f"MLflow's server does not answer after {START_TIMEOUT_S:.0f} s")
        if asked_to_stop():
            return
        time.sleep(POLL_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            continue
        break
    process.wait(STOP_TIMEOUT_S)
