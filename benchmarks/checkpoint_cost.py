"""What checkpoints cost: the same run with one every 200 steps and with none but the last.

Both runs make the loop's training steps with the demo's model in this process, and save as the
loop does, without evaluation. They go on in turns of some steps, so that a slow second of the
machine hits both; the ratios are of spans of 200 steps, and the median counts. A span begins with
its checkpoint, and the turn ends when that is on the disk, so nothing of its cost falls into the
other run's turn.

  ratio            time of a span with its checkpoint over the same span without, median; with
                   --clock cpu the processor time of all threads, waits for the disk left out
  checkpoint_share share of the spans' time that the training thread spent in saving, by the
                   loop's own timer (snapshot, and waiting for the file before)
  written_share    share that the writing thread took beside it: with checkpoint_share the most
                   that checkpoints could cost if nothing of the writing overlapped
  written_ms       the writing of one checkpoint, median

    python benchmarks/checkpoint_cost.py --json
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raysched.config.loading import load
from raysched.config.run import RunConfig
from raysched.training import keeper as keeper_module
from raysched.training.allocator import keep_freed_memory
from raysched.training.checkpoint import Snapshot, write_snapshot
from raysched.training.keeper import Keeper
from raysched.training.setup import Run, build_run
from raysched.training.train_step import train_step

CONFIG = Path(__file__).parents[1] / "configs" / "digits_flow.yaml"
LIMIT = 1.02


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Trainer:
    """One run, and the time that its spans took."""

    def __init__(self, config: RunConfig, run_dir: Path, *, saves: bool, clock: str) -> None:
        self.clock = CLOCKS[clock]
        self.run: Run = build_run(config)
        self.keeper = Keeper(self.run, run_dir)
        self.saves = saves
        self.spans: list[float] = []

    def train(self, steps: int, *, save: bool) -> float:
        """Train so many steps, with a checkpoint written beside them to its end; seconds taken."""
        start = self.clock()
        if save and self.saves:
            self.keeper.save({"metrics": {}})
        for _ in range(steps):
            train_step(self.run, self.run.step)
            self.run.step += 1
            self.keeper.check()
        self.keeper.on_disk()
        return self.clock() - start


def train_in_turns(trainers: tuple[Trainer, ...], steps: int, turn: int) -> None:
    """One span of each run, in turns of a few steps; the first turn begins with a checkpoint."""
    seconds = dict.fromkeys(trainers, 0.0)
    for done in range(0, steps, turn):
        order = trainers if done // turn % 2 else trainers[::-1]
        for trainer in order:
            seconds[trainer] += trainer.train(min(turn, steps - done), save=done == 0)
    for trainer, total in seconds.items():
        trainer.spans.append(total)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The row of numbers."""
    written: list[float] = []

    def timed(run_dir: Path, snapshot: Snapshot) -> Path:
        start = time.perf_counter()
        folder = write_snapshot(run_dir, snapshot)
        written.append(time.perf_counter() - start)
        return folder

    keeper_module.write_snapshot = timed
    root = Path(tempfile.mkdtemp(prefix="raysched-checkpoint-cost-", dir=options.folder))
    overrides = ["scaling.num_workers=0", "training.device=cpu", *options.overrides]
    config = load(CONFIG, overrides).config
    try:
        without, saving = (
            Trainer(config, root / name, saves=name == "saving", clock=options.clock)
            for name in ("without", "saving")
        )
        for trainer in (without, saving):
            trainer.train(options.warmup, save=False)
        blocked = saving.run.meter.seconds("checkpoint")
        for _ in range(options.spans):
            train_in_turns((without, saving), options.steps, options.turn)
        blocked = saving.run.meter.seconds("checkpoint") - blocked
    finally:
        shutil.rmtree(root, ignore_errors=True)
    ratios = [a / b for a, b in zip(saving.spans, without.spans, strict=True)]
    ratio = statistics.median(ratios)
    return {
        "clock": options.clock,
        "steps_between_checkpoints": options.steps,
        "spans": options.spans,
        "seconds_per_span": statistics.median(without.spans),
        "ratio": ratio,
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "checkpoint_share": blocked / sum(saving.spans),
        "written_share": sum(written) / sum(saving.spans),
        "written_ms": 1000 * statistics.median(written),
        "limit": LIMIT,
        "ok": ratio <= LIMIT,
        "machine": f"{platform.machine()}, torch {torch.__version__}, 1 thread",
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE settings of the run")
    parser.add_argument("--steps", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--spans", type=int, default=9, help="pairs of spans")
    parser.add_argument("--turn", type=int, default=10, help="steps of a turn")
    parser.add_argument("--warmup", type=int, default=20, help="steps before the first span")
    parser.add_argument(
        "--clock", choices=[*CLOCKS], default="wall", help="cpu: on a busy machine"
    )
    parser.add_argument("--folder", default=None, help="where to write; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    row = measure(options)
    if options.json:
        print(json.dumps(row))
        return
    for name, value in row.items():
        print(f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}")


if __name__ == "__main__":
    main()
