"""One thread, a quiet environment and a cache of their own for all tests; Ray once per session."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from raysched.distributed.runtime import QUIET_ENVIRONMENT

# Before anything imports torch, ray or mlflow; processes that the tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(QUIET_ENVIRONMENT)
os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", RAY_AUTH_MODE="disabled")
for _name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAYSCHED_DEBUG"):
    os.environ.pop(_name, None)
# Started in the background (`nohup … &`) they would be ignored here and in all processes below.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
_CACHE = tempfile.mkdtemp(prefix="raysched-test-cache-")
os.environ["RAYSCHED_CACHE"] = _CACHE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in two processes a file stays in one, and Ray in one of them."""
    for item in items:
        name = "ray" if item.get_closest_marker("ray") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(name))


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    """Ray with two CPUs on loopback, started at first use and shared by the whole session."""
    from raysched.distributed.runtime import ensure_ray, stop_ray

    yield ensure_ray(num_cpus=2)
    stop_ray()


@pytest.fixture
def fresh_signals() -> Iterator[None]:
    """The signal handlers and the process's stop request as they were, after the test."""
    from raysched.signals import STOP

    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    STOP.signal_name = None
