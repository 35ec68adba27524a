"""What the machine does while a run trains, under the names that MLflow's system page reads."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil

MEGABYTE = 1e6
PREFIX = "system/"


class SystemMeter:
    """Samples the machine and this process, at most once per interval.

    Args:
        run_dir: whose disk is looked at.
        every_s: seconds between two samples.
    """

    def __init__(self, run_dir: Path, *, every_s: float = 10.0) -> None:
        self._run_dir = run_dir
        self._every_s = every_s
        self._process = psutil.Process()
        self._due = 0.0
        # The first call of each only starts the measurement.
        psutil.cpu_percent()
        self._process.cpu_percent()

    def sample(self) -> dict[str, float]:
        """The metrics, or nothing where the last sample is too fresh.

        Returns:
            Percentages and megabytes; CPU use is the mean since the sample before, that of this
            process in percent of one core.
        """
        now = time.monotonic()
        if now < self._due:
            return {}
        self._due = now + self._every_s
        memory = psutil.virtual_memory()
        sampled = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": psutil.disk_usage(str(self._run_dir)).percent,
            "process_cpu_percentage": self._process.cpu_percent(),
            "process_memory_megabytes": self._process.memory_info().rss / MEGABYTE,
            **_gpu_memory(),
        }
        return {PREFIX + key: float(value) for key, value in sampled.items()}


def _gpu_memory() -> dict[str, float]:
    """Memory in use on the GPUs that torch has begun to use; it is never loaded for this."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    used = {}
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        used[f"gpu_{number}_memory_usage_megabytes"] = (total - free) / MEGABYTE
        used[f"gpu_{number}_memory_usage_percentage"] = 100.0 * (total - free) / total
    return used
