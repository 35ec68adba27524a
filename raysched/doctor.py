"""`raysched doctor`: what is wrong with this machine for raysched, and what to do about it.

Each check looks at one thing, takes seconds at most, and leaves nothing behind.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from raysched.errors import UserError

Status = Literal["ok", "warn", "problem"]
GIB = 2**30
MIN_DISK, LOW_DISK = 1 * GIB, 5 * GIB
MIN_MEMORY, LOW_MEMORY = 2 * GIB, 4 * GIB
LOW_SHM = GIB // 4


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: ok; warn, it works but not well; problem, something will fail.
        found: what was found.
        advice: what to do; empty where all is well.
    """

    name: str
    status: Status
    found: str
    advice: str = ""

    def as_json(self) -> dict[str, str]:
        """All fields."""
        return asdict(self)

    def as_line(self) -> str:
        """The line for a person."""
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.status:<8} {self.name:<16} {self.found}{advice}"


def examine(root: Path | None = None) -> list[Check]:
    """Look at everything.

    Args:
        root: the folder that holds `runs/`; default: the current one.
    """
    folder = Path.cwd() if root is None else root
    checks: list[Callable[[], Check]] = [
        check_python,
        check_packages,
        check_torch,
        check_ray,
        lambda: check_store(folder),
        lambda: check_disk(folder),
        check_shared_memory,
        check_memory,
        lambda: check_folder("output folder", folder / "runs", "set training.output_dir"),
        check_cache,
    ]
    return [_guarded(check) for check in checks]


def _guarded(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - one broken check must not hide the others
        name = getattr(check, "__name__", "check").removeprefix("check_")
        return Check(name, "problem", f"{type(error).__name__}: {error}", "install it again")


def check_python() -> Check:
    """The interpreter's version."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    if (3, 11) <= sys.version_info < (3, 14):
        return Check("python", "ok", version)
    return Check("python", "problem", version, "use Python 3.11, 3.12 or 3.13")


def check_packages() -> Check:
    """The installed versions against the ranges that the package declares."""
    from packaging.requirements import Requirement

    wrong: list[str] = []
    needed = [Requirement(text) for text in importlib.metadata.requires("raysched") or []]
    needed = [item for item in needed if item.marker is None or item.marker.evaluate()]
    for item in needed:
        try:
            version = importlib.metadata.version(item.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{item.name} is missing")
            continue
        if not item.specifier.contains(version, prereleases=True):
            wrong.append(f"{item.name} {version} is not {item.specifier}")
    if wrong:
        advice = "make install, or pip install -c constraints.txt -e ."
        return Check("packages", "problem", "; ".join(wrong), advice)
    return Check("packages", "ok", f"{len(needed)} in their ranges")


def check_torch() -> Check:
    """The device that `training.device: auto` takes, and the threads."""
    import torch

    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    found = f"{torch.__version__}, {threads} threads on {cores} cores"
    if not bool(torch.isfinite(torch.ones(8, 8) @ torch.ones(8, 8)).all()):
        return Check("torch", "problem", f"{found}, wrong arithmetic", "install torch again")
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Check("torch", "ok", f"{found}, {torch.cuda.device_count()} x {', '.join(names)}")
    if torch.version.cuda is not None:
        advice = "look at `nvidia-smi`; without a GPU the CPU build is smaller (TORCH=..., README)"
        return Check("torch", "warn", f"{found}, CUDA build but no usable GPU", advice)
    if threads > cores:
        return Check("torch", "warn", found, f"set OMP_NUM_THREADS to {cores} or less")
    return Check("torch", "ok", f"{found}, CPU build")


def check_ray() -> Check:
    """Ray's version, and the cluster if one is named."""
    from raysched.distributed.health import cluster_problem, ray_version

    version = ray_version()
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return Check("ray", "ok", f"{version}; RAY_ADDRESS is not set: one is started per run")
    problem = cluster_problem(address)
    if problem is None:
        return Check("ray", "ok", f"{version}, cluster at {address} answers")
    advice = "start it (`ray start --head`), correct RAY_ADDRESS, or unset it"
    return Check("ray", "problem", f"{version}, cluster at {address}: {problem}", advice)


def check_store(root: Path) -> Check:
    """The MLflow store of `root`; where there is none yet, whether one can be made."""
    from raysched.tracking.uris import redact, resolve_uri

    uri = resolve_uri(None, root)
    is_new = uri.startswith("sqlite:") and not (root / "runs" / "mlflow.db").exists()
    if is_new and "MLFLOW_TRACKING_URI" not in os.environ:
        with tempfile.TemporaryDirectory(prefix="raysched-doctor-") as folder:
            return _prepared(Path(folder), f"none yet, will be {redact(uri)}")
    return _prepared(root, redact(uri))


def _prepared(root: Path, found: str) -> Check:
    from raysched.config.run import TrackingConfig
    from raysched.tracking.store import LOGGER, prepare_store

    level = LOGGER.level
    LOGGER.setLevel(logging.ERROR)
    try:
        handle = prepare_store(TrackingConfig(), root)
    except UserError as error:
        return Check(
            "mlflow store", "problem", str(error), "runs go on with tracking.enabled=false"
        )
    finally:
        LOGGER.setLevel(level)
    if handle.offline:
        advice = "start the server; until then points are kept, send them with `raysched sync`"
        return Check("mlflow store", "warn", f"{found} does not answer", advice)
    return Check("mlflow store", "ok", found)


def check_disk(root: Path) -> Check:
    """Free space where runs are written."""
    free = shutil.disk_usage(_existing(root)).free
    found = f"{free / GIB:.1f} GiB free at {root}"
    if free < LOW_DISK:
        advice = "free some, or set training.output_dir to another disk"
        return Check("disk", "problem" if free < MIN_DISK else "warn", found, advice)
    return Check("disk", "ok", found)


def check_shared_memory() -> Check:
    """Shared memory, in which Ray keeps its objects."""
    path = Path("/dev/shm")  # noqa: S108 - looked at, not written
    if not path.is_dir():
        return Check("shared memory", "ok", f"no {path} on this system")
    total = shutil.disk_usage(path).total
    found = f"{total / GIB:.2f} GiB at {path}"
    if total < LOW_SHM:
        advice = "Ray falls back to slower files; in a container: --shm-size=1g"
        return Check("shared memory", "warn", found, advice)
    return Check("shared memory", "ok", found)


def check_memory() -> Check:
    """Memory that is free for runs, the container's limit included."""
    available = _available_memory()
    if available is None:
        return Check("memory", "warn", "can't be read here", "a sweep needs about 4 GiB")
    found = f"{available / GIB:.1f} GiB available"
    if available < LOW_MEMORY:
        advice = "close other programs, or lower search.max_concurrent and scaling.num_workers"
        return Check("memory", "problem" if available < MIN_MEMORY else "warn", found, advice)
    return Check("memory", "ok", found)


def _available_memory() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def check_cache() -> Check:
    """The folder of the decoded images."""
    from raysched.config.run import DataConfig
    from raysched.data.cache import cache_folder

    folder = cache_folder(DataConfig())
    return check_folder("data cache", folder, "set data.cache_dir or RAYSCHED_CACHE")


def check_folder(name: str, folder: Path, advice: str) -> Check:
    """Whether a folder, or the one it would be made in, can be written."""
    place = _existing(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".raysched-doctor-") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        return Check(name, "problem", f"{place} can't be written: {error.strerror}", advice)
    return Check(name, "ok", f"{folder} can be written")


def _existing(path: Path) -> Path:
    """The path, or the nearest parent that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())
