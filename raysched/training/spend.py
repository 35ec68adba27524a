"""What a run has cost, under the names that `train --json` and `plan --json` share."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from raysched.training.budget import training_seconds
from raysched.training.checkpoint import checkpoint_folders
from raysched.training.setup import Run


def compute_summary(run: Run, run_dir: Path, wall_seconds: float) -> dict[str, float]:
    """Forward equivalents and their parts, FLOPs, seconds, memory and disk of the whole run.

    Args:
        run: the run at its end.
        run_dir: its folder, for the checkpoints' size.
        wall_seconds: wall time, evaluations and checkpoints included.

    Returns:
        `forward_equivalents` and `seconds` leave the evaluation out.
    """
    return {
        **run.meter.summary(),
        # The part of the evaluations' forwards that other processes spent beside the training.
        "background_seconds": run.meter.seconds("background"),
        "steps": float(run.step),
        "samples": float(run.step * run.config.training.batch_size),
        "seconds": training_seconds(run.meter),
        "wall_seconds": wall_seconds,
        "peak_memory_bytes": float(peak_memory_bytes(run.device)),
        "disk_bytes": float(disk_bytes(run_dir)),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: of the GPU's allocator, or resident in this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return int(peak if sys.platform == "darwin" else peak * 1024)


def disk_bytes(run_dir: Path) -> int:
    """Size of the checkpoints kept."""
    return sum(
        path.stat().st_size for folder in checkpoint_folders(run_dir) for path in folder.iterdir()
    )
