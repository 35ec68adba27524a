"""Two hundred trials that hardly train: how long the sweep itself takes, and its memory.

Trials report four evaluations of a known quality and end. What is left is Ray Tune, the searcher,
the journal and the early stopping. Aims: at most 5 minutes with two at once; the driver's memory
flat.

  seconds         from the start of the sweep to its end, Ray's start included
  memory_quarter  resident MiB of the driver after a quarter of the trials
  memory_end      after the last
  growth          their ratio

    python benchmarks/many_trials.py --json
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console

from raysched.config.run import RunConfig
from raysched.config.space import load_sweep
from raysched.training.result import RunResult
from raysched.tuning.records import TrialRecord
from raysched.tuning.sweep import run_sweep
from raysched.tuning.verdict import Comparison

OFFSET, CHANCE = "scheduled_sampling.max_step_offset", "scheduled_sampling.probability"


class Watch(io.StringIO):
    """Takes the sweep's lines, and the driver's memory at the end of every trial."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[int] = []

    def write(self, text: str) -> int:
        """A line was shown."""
        if " finished: " in text or " stopped early: " in text:
            self.memory.append(psutil.Process().memory_info().rss)
        return len(text)


def train(
    config: RunConfig, *, run_dir: Path, report: Callable[[Mapping[str, Any]], None], tracking: Any
) -> RunResult:
    """Four evaluations, falling to a quality that the settings make."""
    run_dir.mkdir(parents=True, exist_ok=True)
    budget = config.training.budget.forward_equivalents or 0.0
    rollout = config.scheduled_sampling
    q = 0.5 + 0.01 * rollout.max_step_offset + (rollout.probability - 0.3) ** 2
    for part in (1, 2, 3, 4):
        report({"quality/q": q + 4 - part, "compute/forward_equivalents": budget * part / 4})
    compute = {"forward_equivalents": budget, "seconds": 1e-3, "wall_seconds": 1e-3}
    return RunResult("finished", str(run_dir), metrics={"quality/q": q}, compute=compute)


def compare(
    baseline: TrialRecord, candidates: Sequence[TrialRecord], *, config: RunConfig, seeds: int
) -> list[Comparison]:
    """Differences of the known qualities."""
    assert baseline.q is not None
    gains = [(c.number, baseline.q - c.q) for c in candidates if c.q is not None]
    return [Comparison(number, gain, gain - 0.01, gain + 0.01) for number, gain in gains]


def run(folder: Path, trials: int, algorithm: str) -> dict[str, Any]:
    """The sweep, timed and watched."""
    content = {
        "name": "many",
        "overrides": {"tracking.enabled": False, "scaling.num_workers": 0},
        "budget_forward_equivalents": 100000,
        "space": {OFFSET: {"randint": [1, 9]}, CHANCE: {"uniform": [0.05, 1.0]}},
        "search": {"num_samples": trials, "max_concurrent": 2, "algorithm": algorithm},
        "early_stopping": {"kind": "asha", "grace_fraction": 0.25},
        "output_dir": str(folder / "sweep"),
    }
    space = folder / "space.yaml"
    space.write_text(yaml.safe_dump(content), encoding="utf-8")
    watch, began = Watch(), time.monotonic()
    result = run_sweep(
        load_sweep(space),
        resume=False,
        console=Console(file=watch, width=200),
        train=train,
        compare=compare,
    )
    seconds = time.monotonic() - began
    assert len(result.trials) == trials + 1, "the sweep ended early"
    quarter, end = watch.memory[len(watch.memory) // 4], watch.memory[-1]
    return {
        "algorithm": algorithm,
        "trials": trials,
        "seconds": round(seconds, 1),
        "seconds_per_trial": round(seconds / trials, 3),
        "memory_quarter": round(quarter / 2**20, 1),
        "memory_end": round(end / 2**20, 1),
        "growth": round(end / quarter, 4),
    }


def main() -> None:
    """Print the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--algorithm", default="tpe")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        row = run(Path(scratch), options.trials, options.algorithm)
    print(json.dumps(row) if options.json else "  ".join(f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
