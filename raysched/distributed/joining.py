"""Joining a cluster that somebody else started, with one clear message where that can't work.

Ray itself waits for minutes, or ends the process, where nothing answers; its messages about
versions and runtime environments are long, and the latter show the values of variables.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
from importlib.metadata import version
from typing import Any

from raysched.errors import ConfigError

CONNECT_TIMEOUT_S = 5.0
# Ray's name for what a submitted job's driver is told: its metadata and runtime environment.
JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# Metadata of `raysched submit`: the version that the job was submitted from.
VERSION_KEY = "raysched_version"


def private_environment() -> dict[str, str]:
    """Variables for a cluster of this process alone: on loopback, closed by a token of its own.

    With Ray's own defaults the control store and the workers listen on all interfaces.
    """
    closed = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    if "RAY_AUTH_MODE" not in os.environ:
        closed["RAY_AUTH_MODE"] = "token"
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            closed["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return {key: os.environ.get(key, value) for key, value in closed.items()}


def join_cluster(ray: Any, address: str, **settings: Any) -> None:
    """Connect to the cluster at RAY_ADDRESS.

    Args:
        ray: the imported module.
        address: what RAY_ADDRESS holds.
        **settings: for `ray.init`.

    Raises:
        ConfigError: nothing answers there, the token or a version doesn't fit.
    """
    check_submitted_version()
    _check_address(address)
    # A job's own environment has the same variables, with the same values.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    try:
        ray.init(**settings)
    except ray.exceptions.AuthenticationError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"RAY_ADDRESS: {address} refuses this process: {reason}; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to the file with the cluster's token"
        ) from error
    except ConnectionError as error:
        raise ConfigError(_absent(address, str(error).strip().splitlines()[0])) from error
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise ConfigError(f"RAY_ADDRESS: {address}: {_mismatch(str(error))}") from error


def check_submitted_version() -> None:
    """Refuse a submitted job whose raysched here is another than its sender's.

    Raises:
        ConfigError: names both versions.
    """
    sent, here = job_metadata().get(VERSION_KEY), version("raysched")
    if sent is not None and sent != here:
        raise ConfigError(
            f"raysched {here} is installed on the cluster, the job was submitted from {sent}: "
            "install the same version on both sides"
        )


def job_metadata() -> dict[str, str]:
    """What the submitter of this job told about it; empty outside a submitted job."""
    text = os.environ.get(JOB_CONFIG_VARIABLE)
    metadata = json.loads(text).get("metadata") if text else None
    return metadata if isinstance(metadata, dict) else {}


def _check_address(address: str) -> None:
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS: {address} is a job server: send the job there with `raysched submit "
            "…`, or name the cluster's head as HOST:6379"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S):
            return
    except (OSError, OverflowError) as error:
        raise ConfigError(_absent(address, str(error))) from error


def _absent(address: str, reason: str) -> str:
    return (
        f"RAY_ADDRESS: no cluster answers at {address} ({reason}): start one (cluster/local "
        "start), correct the address, or unset RAY_ADDRESS"
    )


def _mismatch(message: str) -> str:
    """`Ray 2.60.0 there, 2.55.0 here; Python …` from Ray's two lists of versions."""
    found = {name: re.findall(rf"{name}: ([\w.+-]+)", message)[:2] for name in ("Ray", "Python")}
    differing = [
        f"{name} {versions[0]} on the cluster, {versions[1]} here"
        for name, versions in found.items()
        if len(versions) == 2 and versions[0] != versions[1]
    ]
    said = "; ".join(differing) or " ".join(message.split())
    return f"versions differ: {said}; install the same on both sides, or use `raysched submit`"
