"""What Ray Train costs: one worker against the same loop without Ray, and two workers against one.

  overhead      seconds per step of one Ray Train worker over those of the loop in this process,
                which has as many threads; minus 1. Aim: at most 0.03.
  weak scaling  samples per second of two workers over those of one, with as many samples per
                worker. Aim: at least 1.5 on two cores.

Seconds are those between two points that the run itself logs, after the warm-up and without
evaluations and checkpoints, so that no start is in them. Runs are made in pairs, in turn and with
the order changing; medians of the pairs' ratios.

    OMP_NUM_THREADS=1 python benchmarks/ray_overhead.py --json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

from raysched.config.loading import load_mapping
from raysched.distributed.launch import run_training
from raysched.distributed.runtime import ensure_ray, stop_ray
from raysched.training.run_folder import open_run_folder, read_metrics

WARM_UP_STEPS = 50


def seconds_per_step(workers: int, batch_size: int, options: argparse.Namespace) -> float:
    """Train the demo's model; wall seconds per step after the warm-up.

    Args:
        workers: Ray Train workers, 0: none, in this process.
        batch_size: samples per step of all workers together.
        options: of the command line.
    """
    config = load_mapping(
        {
            "training": {
                "budget": {"steps": WARM_UP_STEPS + options.steps},
                "batch_size": batch_size,
                "checkpoint_every_steps": 10 * (WARM_UP_STEPS + options.steps),
            },
            "scheduled_sampling": {
                "max_step_offset": 2,
                "grid": 20,
                "probability": 0.25,
            },
            "evaluation": {"enabled": False},
            "tracking": {"enabled": False},
            "scaling": {"num_workers": workers},
        },
        "benchmark",
    ).config
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        open_run_folder(config, run_dir, resume=False)
        result = run_training(config, run_dir=run_dir, report=lambda metrics: None)
        if result.status != "finished":
            raise SystemExit(f"a run ended as {result.status}: {result.error}")
        points = [p for p in read_metrics(run_dir) if p["step"] >= WARM_UP_STEPS]
    return float(
        (points[-1]["seconds"] - points[0]["seconds"]) / (points[-1]["step"] - points[0]["step"])
    )


def ratios(
    one: tuple[int, int], other: tuple[int, int], options: argparse.Namespace
) -> list[float]:
    """Seconds per step of one kind of run over the other's, per pair.

    Args:
        one: workers and batch size.
        other: the same of the other kind.
        options: of the command line.
    """
    found = []
    for pair in range(options.pairs):
        order = (one, other) if pair % 2 == 0 else (other, one)
        measured = {kind: seconds_per_step(*kind, options) for kind in order}
        found.append(measured[one] / measured[other])
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both numbers with the ratios that they are medians of."""
    size = options.batch
    found: dict[str, Any] = {}
    if not options.no_overhead:
        with_ray = ratios((1, size), (0, size), options)
        found["overhead"] = round(statistics.median(with_ray) - 1.0, 4)
        found["pairs"] = [round(ratio, 4) for ratio in with_ray]
    if not options.no_scaling:
        # Twice the samples per step in so much more time.
        slower = ratios((2, 2 * size), (1, size), options)
        found["weak_scaling"] = round(2.0 / statistics.median(slower), 4)
        found["scaling_pairs"] = [round(2.0 / ratio, 4) for ratio in slower]
    return found


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--steps", type=int, default=500, help="measured steps of a run")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64, help="samples per worker and step")
    parser.add_argument("--no-overhead", action="store_true", help="only the two workers")
    parser.add_argument("--no-scaling", action="store_true", help="leave the two workers out")
    options = parser.parse_args()
    ensure_ray(num_cpus=2)
    try:
        found = {**measure(options), "steps": options.steps, "machine": platform.machine()}
    finally:
        stop_ray()
    if options.json:
        print(json.dumps(found))
        return
    if "overhead" in found:
        print(f"overhead of Ray Train: {found['overhead']:+.2%} {found['pairs']}")
    if "weak_scaling" in found:
        print(f"weak scaling 1 -> 2: {found['weak_scaling']:.2f}x {found['scaling_pairs']}")


if __name__ == "__main__":
    main()
