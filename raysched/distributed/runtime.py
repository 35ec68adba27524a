"""Starting Ray, or joining a cluster, without banners and with settings that are safe."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

from raysched.distributed.joining import join_cluster, private_environment
from raysched.errors import RunFailedError
from raysched.signals import STOP

QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # ray.train.report is throttled to one per interval, and evaluations come more often than
    # every 2 s; each look interrupts all workers, which wait for one another.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Drivers of trials take no CPU: more processes than CPUs are meant, not a leak to warn of.
    "RAY_worker_maximum_startup_concurrency": "16",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "0",
    "TUNE_RESULT_BUFFER_LENGTH": "0",
}
# Addresses of the clusters that this process has started.
_own_clusters: set[str] = set()


def quiet_environment() -> dict[str, str]:
    """The settings of Ray that a driver and its workers share; the user's own win."""
    return {key: os.environ.get(key, value) for key, value in QUIET_ENVIRONMENT.items()}


def ensure_ray(num_cpus: int | None = None) -> Any:
    """Join the cluster at RAY_ADDRESS, or start one on this machine; return the ray module.

    Args:
        num_cpus: CPUs of a cluster started here; default: all.

    Returns:
        The imported `ray`, connected. Already connected: nothing changes.

    Raises:
        ConfigError: the cluster can't be joined.
        RunFailedError: Ray doesn't start here.
    """
    os.environ.update(quiet_environment())
    if "RAY_ADDRESS" not in os.environ:
        # Before the import, which reads them.
        os.environ.update(private_environment())
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\..*")
    import ray

    if ray.is_initialized():
        return ray
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address := os.environ.get("RAY_ADDRESS"):
        join_cluster(ray, address, runtime_env={"env_vars": quiet_environment()}, **common)
    else:
        _start(ray, num_cpus=num_cpus, **common)
    STOP.restore()
    for name in ("ray", "ray.train", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return ray


def _start(ray: Any, **settings: Any) -> None:
    """Start a cluster on loopback."""
    try:
        ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", **settings)
        _own_clusters.add(ray.get_runtime_context().gcs_address)
    except Exception as error:
        # Seen at a load of nine processes per core; Ray has no class of its own for it.
        if "timed out during startup" not in str(error):
            raise
        raise RunFailedError(
            "Ray did not start within half a minute: this machine is too busy, or out of memory; "
            "try again, or train without Ray (scaling.num_workers=0)"
        ) from error


def started_here() -> bool:
    """Whether this process started the cluster that it is connected to: such a one can't grow."""
    import ray

    return ray.get_runtime_context().gcs_address in _own_clusters


def cluster_cpus() -> float:
    """CPUs of the cluster that this process is connected to."""
    import ray

    return float(ray.cluster_resources().get("CPU", 0.0))


def stop_ray() -> None:
    """Leave the cluster; one that was started here ends with it."""
    import ray

    if ray.is_initialized():
        ray.shutdown()
