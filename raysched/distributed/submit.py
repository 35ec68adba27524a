"""`raysched submit`: a command, its files and a few variables, sent to a cluster as one job.

The submission id is the idempotency key: by default it is made of the job's name and of the digest
of everything that is sent, so that the same submission finds the job that it started before.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from raysched.config.parsing import is_space
from raysched.distributed.job_server import JobServer
from raysched.distributed.joining import VERSION_KEY
from raysched.distributed.package import Package, collect, holds_password
from raysched.errors import ConfigError

# Sent without being asked for, where they are set: what is no secret and holds anywhere.
DEFAULT_VARIABLES = (
    *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_S3_ENDPOINT_URL"),
    *("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"),
    *("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"),
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
)
JOB_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # A stopped job writes a checkpoint first; Ray's own patience is 3 s.
    "RAY_JOB_STOP_WAIT_TIME_S": "150",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
PLAIN_TEXT = (
    "Ray keeps variables and the command line in plain text: whoever reaches the cluster's "
    "dashboard or control store can read them"
)
SUBMISSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_NAME = re.compile(r"(?i)(token|secret|password|passwd|credential|(^|_)key($|_))")
LIVE = ("PENDING", "RUNNING")


@dataclass(frozen=True)
class Job:
    """A job that can be sent.

    Attributes:
        command: raysched's command, `tune`.
        name: the run's or sweep's name.
        entrypoint: the shell command.
        package: its files.
        variables: names and values of the environment; values are never shown.
        submission_id: its idempotency key.
        given_id: whether the user chose the id.
        notes: lines for the user.
    """

    command: str
    name: str
    entrypoint: str
    package: Package
    variables: dict[str, str]
    submission_id: str
    given_id: bool
    notes: tuple[str, ...]

    @property
    def metadata(self) -> dict[str, str]:
        """What the cluster lists beside the job."""
        plain = {"raysched_command": self.command, "raysched_name": self.name}
        sent = {} if self.package.from_checkout else {VERSION_KEY: version("raysched")}
        return {**plain, **sent}

    def as_json(self) -> dict[str, Any]:
        """What would be sent, without any variable's value."""
        return {
            "submission_id": self.submission_id,
            "entrypoint": self.entrypoint,
            "files": self.package.sizes,
            "bytes": sum(self.package.sizes.values()),
            "env": sorted(self.variables),
            "source_sent": self.package.from_checkout,
            "notes": list(self.notes),
        }

    def as_text(self) -> str:
        """The same for a person."""
        sizes = self.package.sizes
        lines = [f"submission id: {self.submission_id}", f"entrypoint: {self.entrypoint}"]
        lines.append(f"files: {len(sizes)}, {sum(sizes.values()) / 1024:,.1f} KiB")
        lines += [f"  {size:>10,}  {name}" for name, size in sorted(sizes.items())]
        lines.append(f"variables (names; values are not shown): {', '.join(self.variables)}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class Extras:
    """What a user adds to a submission.

    Attributes:
        variables: further names of the environment.
        include: further files or folders.
        root: folder on the cluster that holds `runs/`.
    """

    variables: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    root: str | None = None


def prepare(
    tokens: Sequence[str],
    config: str | None,
    overrides: Sequence[str],
    extras: Extras | None = None,
    submission_id: str | None = None,
) -> Job:
    """Check a command line and collect what its job needs; nothing is sent.

    Args:
        tokens: raysched's command and what follows it, values joined to their keys.
        config: the config or space file among them.
        overrides: the settings among them.
        extras: what the user adds.
        submission_id: the idempotency key; default: name and digest.

    Raises:
        ConfigError: all mistakes that can be found here.
    """
    if submission_id is not None and not SUBMISSION_ID.fullmatch(submission_id):
        raise ConfigError(
            "--submission-id: must be letters, digits, dots, dashes and underscores, at most 100"
            f", got {submission_id!r}"
        )
    command, rest = tokens[0], tokens[1:]
    if any(holds_password(token.encode()) for token in rest):
        raise ConfigError(
            f"command line: holds a URL with a password, which the job would show. {PLAIN_TEXT}; "
            "give the job MLFLOW_TRACKING_URI in the cluster's environment"
        )
    configs, name = _configs(command, rest, config, overrides)
    extras = extras or Extras()
    package = collect(configs, extras.include)
    environment, notes = choose_variables(extras.variables, os.environ)
    if extras.root is not None:
        environment["RAYSCHED_ROOT"] = extras.root
    moved = [package.renamed.get(token, token) for token in rest]
    entrypoint = shlex.join(["python", "-m", "raysched", command, *moved])
    key = hashlib.sha256(
        "\n".join([entrypoint, package.digest(), *sorted(environment), extras.root or ""]).encode()
    ).hexdigest()
    return Job(
        command=command,
        name=name,
        entrypoint=entrypoint,
        package=package,
        variables=environment,
        submission_id=submission_id or f"{name[:60]}-{key[:12]}",
        given_id=submission_id is not None,
        notes=tuple(notes),
    )


def _configs(
    command: str, rest: Sequence[str], path: str | None, overrides: Sequence[str]
) -> tuple[list[str], str]:
    """The config files that a command reads, with their bases, and the name of what it does."""
    if command == "tune" or (command == "plan" and path is not None and is_space(path)):
        from raysched.config.space import load_sweep

        if path is None:
            raise ConfigError("a SPACE is needed, such as tune_spaces/digits_rollout.yaml")
        loaded = load_sweep(path, overrides)
        base = loaded.base.source
        return [path, *([base] if Path(base).is_file() else [])], loaded.sweep.name
    if command in ("train", "plan", "verify-resume"):
        from raysched.config.loading import load

        config = load(path, overrides).config
        return ([path] if path else []), config.name
    # Folders and other paths of these commands are the cluster's.
    local = [t for t in rest if Path(t).suffix in (".yaml", ".yml") and Path(t).is_file()]
    return local, command


def choose_variables(
    asked: Sequence[str], environment: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """The variables of a job, and notes on those that stay here.

    Args:
        asked: names given by `--env`.
        environment: where the values are.

    Raises:
        ConfigError: a name is not set, or none.
    """
    chosen, notes = dict(JOB_VARIABLES), []
    wrong = [name for name in asked if not _VARIABLE.fullmatch(name)]
    if wrong:
        raise ConfigError(
            [f"--env: takes names, not values, got {w.partition('=')[0]}" for w in wrong]
        )
    missing = [name for name in asked if name not in environment]
    if missing:
        raise ConfigError([f"--env: {name} is not set here" for name in missing])
    for name in DEFAULT_VARIABLES:
        value = environment.get(name)
        if value is None or name in asked:
            continue
        if holds_password(value.encode()):
            notes.append(f"{name} holds a password and stays here; --env {name} sends it")
        elif name == "MLFLOW_TRACKING_URI" and value.startswith(("sqlite:", "file:", "/", ".")):
            notes.append(f"{name} is a file of this machine and stays here")
        else:
            chosen[name] = value
    chosen |= {name: environment[name] for name in asked}
    secret = [
        n for n in asked if _SECRET_NAME.search(n) or holds_password(environment[n].encode())
    ]
    if secret:
        notes.append(
            f"{', '.join(secret)}: {PLAIN_TEXT}; better: set them in the cluster's own "
            "environment (a Kubernetes secret)"
        )
    return chosen, notes


def check_versions(cluster: Mapping[str, str]) -> list[str]:
    """How the cluster's Ray and Python differ from those here, one line each."""
    here = {"ray": version("ray"), "python": platform.python_version()}
    return [
        f"{name.capitalize()} {cluster[name]} on the cluster, {here[name]} here"
        for name in ("ray", "python")
        if cluster.get(name) and cluster[name].split(".")[:2] != here[name].split(".")[:2]
    ]


def send(server: JobServer, job: Job) -> tuple[str, bool]:
    """Start the job, or find the one that the same submission started before.

    Returns:
        Its submission id, and whether it was started now.

    Raises:
        ConfigError: a job of this id ended badly, or another job of this name is running.
    """
    submission_id = job.submission_id
    number = 1
    while (found := server.job(submission_id)) is not None:
        if found["status"] in (*LIVE, "SUCCEEDED"):
            return submission_id, False
        if job.given_id:
            raise ConfigError(
                f"--submission-id: {submission_id} has ended, {found['status']}; give another id "
                "(`--resume` goes on with what it left)"
            )
        number += 1
        submission_id = f"{job.submission_id}-{number}"
    _refuse_twin(server, job)
    data = job.package.archive()
    package = f"_ray_pkg_{hashlib.sha256(data).hexdigest()[:16]}.zip"
    if not server.has_package(package):
        server.upload(package, data)
    server.submit(
        {
            "entrypoint": job.entrypoint,
            "submission_id": submission_id,
            "runtime_env": {"working_dir": f"gcs://{package}", "env_vars": job.variables},
            "metadata": job.metadata,
        }
    )
    return submission_id, True


def _refuse_twin(server: JobServer, job: Job) -> None:
    if job.command != "tune":
        return
    for other in server.jobs():
        about = other.get("metadata") or {}
        same = about.get("raysched_name") == job.name and about.get("raysched_command") == "tune"
        if same and other["status"] in LIVE:
            raise ConfigError(
                f"a sweep named {job.name} is running on the cluster as {other['submission_id']}: "
                f"follow it with `raysched jobs logs {other['submission_id']}`, go on with it "
                "by --resume once it has ended, or give this one a new name (name=NEW)"
            )
