"""What a run was made with: commit, versions, machine and Ray job, as tags and as a text."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMIT_TAG = "mlflow.source.git.commit"
JOB_TAG = "raysched.ray_job"
# Ray tells a submitted job's driver of itself in this variable.
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_GIT_TIMEOUT_S = 5.0
_NAME = re.compile(r"^[A-Za-z0-9._-]+")


def context_tags(folder: Path) -> dict[str, str]:
    """Tags of a run: version, the commit of the folder's checkout, the Ray job.

    Args:
        folder: the working directory of the user.

    Returns:
        Only what is known: outside a checkout there is no commit, outside a job no job.
    """
    known = {
        "raysched.version": importlib.metadata.version("raysched"),
        COMMIT_TAG: commit_of(folder),
        JOB_TAG: ray_job(os.environ),
    }
    return {key: value for key, value in known.items() if value}


def commit_of(folder: Path) -> str:
    """The checkout's commit, "-dirty" behind it where tracked files differ; else empty."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return ""
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def ray_job(environment: Mapping[str, str]) -> str:
    """The submission id of the Ray job that this process drives, else empty."""
    try:
        settings: Any = json.loads(environment.get(_JOB_VARIABLE, ""))
        return str(settings["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return ""


@functools.cache
def package_versions() -> str:
    """Python, the platform, raysched and what it needs directly, one `name==version` per line."""
    names = {"raysched"}
    for requirement in importlib.metadata.requires("raysched") or ():
        matched = _NAME.match(requirement)
        if matched:
            names.add(matched.group())
    lines = [f"python=={platform.python_version()}", f"# {platform.platform()}"]
    for name in sorted(names):
        try:
            lines.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that isn't installed
    return "\n".join(lines) + "\n"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
