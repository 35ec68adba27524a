"""Whether Ray, and the cluster that RAY_ADDRESS names, can be used; for `raysched doctor`."""

from __future__ import annotations

import subprocess
import sys

STATUS_TIMEOUT_S = 8.0


def ray_version() -> str:
    """The version of the Ray that is imported."""
    import ray

    return str(ray.__version__)


def cluster_problem(address: str, timeout_s: float = STATUS_TIMEOUT_S) -> str | None:
    """Why a cluster can't be reached; None if it answers.

    Asked in a process of its own, because Ray's client may wait for minutes and end its process.

    Args:
        address: as in RAY_ADDRESS.
        timeout_s: seconds after which the cluster counts as away.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:.0f} s"
    if done.returncode == 0:
        return None
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1] if lines else f"`ray status` failed with code {done.returncode}"
