"""Runs killed at random moments and resumed: how many end with the straight run's weights.

For each number of workers (0: the loop without Ray) one straight run, then as many killed ones,
each a run of its own that SIGKILL ends at a random moment and `--resume` takes up. All logged
points and the weights must be equal, bit for bit. Aim: 20 of 20, with one and with two workers.
A kill's moment depends on its number and the seed alone, so the twenty can be had in portions.

    OMP_NUM_THREADS=1 python benchmarks/kill_resume.py --kills 20 --workers 1 2 --json
    OMP_NUM_THREADS=1 python benchmarks/kill_resume.py --first 11 --kills 10 --workers 1 --json
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import sys
from pathlib import Path
from typing import Any

from raysched.config.loading import load
from raysched.config.run import RunConfig
from raysched.distributed.verify_resume import verify_resume
from raysched.signals import STOP

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "digits_flow.yaml"


def make_config(workers: int, steps: int) -> RunConfig:
    """The demo's model and data on a short budget, with checkpoints and an evaluation within it.

    Args:
        workers: Ray Train workers.
        steps: optimizer steps.
    """
    overrides = [
        f"training.budget.steps={steps}",
        "training.budget.forward_equivalents=null",
        f"training.checkpoint_every_steps={max(steps // 6, 1)}",
        "training.log_every_steps=5",
        "evaluation.num_samples=100",
        "evaluation.nfe=[5]",
        f"scaling.num_workers={workers}",
    ]
    return load(CONFIG, overrides).config


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The verdict for each number of workers."""
    found: dict[str, Any] = {}
    for workers in options.workers:
        verdict = verify_resume(
            make_config(workers, options.steps),
            kills=options.kills,
            seed=options.seed + workers,
            out=None,
            say=functools.partial(print, file=sys.stderr, flush=True),
            first=options.first,
        )
        told = verdict.as_json()
        kills = told.pop("all_kills")
        told["before_first_checkpoint"] = sum(k["resumed_from"] is None for k in kills)
        told["steps_at_kill"] = [kill["step"] for kill in kills]
        found[str(workers)] = told
    return found


def main() -> None:
    """Measure, then print; exit code 1 if any run ended differently."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--kills", type=int, default=20, help="per number of workers")
    parser.add_argument("--first", type=int, default=1, help="number of the first kill")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments")
    options = parser.parse_args()
    STOP.install()
    found = {"workers": measure(options), "steps": options.steps, "machine": platform.machine()}
    if options.json:
        print(json.dumps(found))
    else:
        for workers, told in found["workers"].items():
            print(f"{workers} workers: {told['identical']} of {told['kills']} identical")
    if any(told["identical"] < told["kills"] for told in found["workers"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
