"""How near `raysched plan` comes to what the run then takes.

For each config the command `raysched plan` is run, then `raysched train`, both as fresh processes
and in this process's environment, and what the two print under the same names is divided:
forecast over run. Promised are `forward_equivalents` within 2 % and `seconds` within 25 %.

  plain            teacher forcing on the digits
  ramp             rollouts with a ramp and ReflexFlow, four micro-batches per step
  ddpm_rk4         noise prediction on the cosine schedule, rollouts by rk4

`--clock processor` lets both count processor seconds in place of wall seconds: on a machine that
is busy with other work, these compare forecast and run where wall seconds compare the load.

    python benchmarks/plan_accuracy.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

NAMES = ("forward_equivalents", "seconds", "peak_memory_bytes", "disk_bytes")
COMMON = ("tracking.enabled=false",)
PROCESSOR_CLOCK = (
    "import sys, time; time.perf_counter = time.process_time; "
    "from raysched.cli import main; sys.exit(main())"
)
CONFIGS: dict[str, tuple[str, ...]] = {
    "plain": ("exposure=none",),
    "ramp": (
        "scheduled_sampling.max_step_offset=4",
        "scheduled_sampling.grid=20",
        "scheduled_sampling.ramp_steps=150",
        "scheduled_sampling.prob_end=0.8",
        "training.gradient_accumulation=4",
    ),
    "ddpm_rk4": (
        "prediction_type=epsilon",
        "noise_schedule.kind=cosine",
        "scheduled_sampling.max_step_offset=3",
        "scheduled_sampling.probability=0.5",
        "scheduled_sampling.grid=20",
        "scheduled_sampling.sampler=rk4",
    ),
}


def call(command: str, settings: tuple[str, ...], folder: str, clock: str) -> dict[str, Any]:
    """One `raysched` command in a process of its own; its JSON."""
    program = ["-c", PROCESSOR_CLOCK] if clock == "processor" else ["-m", "raysched"]
    done = subprocess.run(
        [sys.executable, *program, command, *settings, "--json"],
        cwd=folder,
        env=os.environ,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=1800,
    )
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: forecast, run, and forecast over run."""
    settings = (
        *COMMON,
        *CONFIGS[name],
        f"training.budget.steps={options.steps}",
        f"scaling.num_workers={options.workers}",
    )
    with tempfile.TemporaryDirectory() as folder:
        plan = call("plan", settings, folder, options.clock)
        run = call("train", settings, folder, options.clock)["compute"]
    ratio = {key: round(plan[key] / run[key], 4) for key in (*NAMES, "evaluation_seconds")}
    return {
        "config": name,
        "forecast": {key: plan[key] for key in NAMES},
        "run": {key: run[key] for key in NAMES},
        "ratio": ratio,
    }


def main() -> None:
    """Measure every config, then print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument("--workers", type=int, default=0, help="Ray Train workers; 0: no Ray")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    options = parser.parse_args()
    rows = [measure(name, options) for name in options.configs]
    if options.json:
        print(json.dumps({"rows": rows, **vars(options)}))
        return
    for row in rows:
        print(row["config"], *(f"{key} {value:.3f}" for key, value in row["ratio"].items()))


if __name__ == "__main__":
    main()
