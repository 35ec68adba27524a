"""System metrics: sampled sparingly, and true."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from raysched.tracking.system import SystemMeter
from tests.tracking.conftest import Store


def test_a_sample_follows_the_memory_of_this_process(tmp_path: Path) -> None:
    meter = SystemMeter(tmp_path, every_s=0.0)
    # The heap of the test session may shrink in between: held against the kernel's own number.
    for held in (np.ones(1), np.ones(25_000_000)):  # 200 MB
        sampled = meter.sample()["system/process_memory_megabytes"]
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        assert abs(sampled - pages * os.sysconf("SC_PAGE_SIZE") / 1e6) < 20
        assert sampled > held.nbytes / 1e6


def test_the_disk_is_the_run_folders_own(tmp_path: Path) -> None:
    stat = os.statvfs(tmp_path)
    used = (stat.f_blocks - stat.f_bfree) / (stat.f_blocks - stat.f_bfree + stat.f_bavail)
    sample = SystemMeter(tmp_path, every_s=0.0).sample()
    assert abs(sample["system/disk_usage_percentage"] - 100 * used) < 1.0


def test_fresh_samples_are_not_repeated(tmp_path: Path) -> None:
    meter = SystemMeter(tmp_path, every_s=3600.0)
    assert meter.sample()
    assert meter.sample() == {}


def test_a_tracked_run_shows_system_metrics(store: Store, tracked: object) -> None:
    tracker, run_id, _ = tracked()  # type: ignore[operator]
    for step in (1, 2):
        tracker.log_metrics({"train/loss": 0.5}, step=step, forward_equivalents=step)
    tracker.close("finished")
    assert len(store.points(run_id, "system/system_memory_usage_megabytes")) == 1
    assert len(store.points(run_id, "train/loss")) == 2
