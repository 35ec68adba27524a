"""What Ray Train costs: one worker against the same loop without Ray, and two workers against one.

  overhead      time per step of one Ray Train worker over that of the loop without Ray, which has
                as many threads; minus 1. Aim: at most 0.03.
  weak_scaling  samples per second of two workers over those of one, with as many samples per
                worker. Aim: at least 1.5 on two cores.

Both runs of a comparison are started first, as `raysched train` in processes of their own, and
warmed up; no start is in the numbers. Then they go on in turns of some seconds: all processes of
the other one, Ray's included, are stopped meanwhile (SIGSTOP). A turn's steps are those that the
run logs. Neighbouring turns make a pair; the median of blocks of pairs counts, so that a slow
minute of the machine hits both. Workers get the priority of other processes (Ray itself lowers
it), or whatever else the machine does would slow down one side only.

    OMP_NUM_THREADS=1 python benchmarks/ray_overhead.py --json
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from raysched.config.loading import load_mapping, write_yaml
from raysched.distributed.child_run import ChildRun, wait_for
from raysched.training.run_folder import read_last_point

WARM_UP_STEPS = 50
LOG_EVERY = 5
BLOCKS = 5


class Turns:
    """A run that is stopped between its turns.

    Args:
        root: folder for it.
        workers: Ray Train workers, 0: none.
        batch_size: samples per step of all workers together.
    """

    def __init__(self, root: Path, workers: int, batch_size: int) -> None:
        self.batch_size = batch_size
        self.steps: list[int] = []
        self.seconds: list[float] = []
        root = root / f"{workers}-workers"
        root.mkdir()
        config = load_mapping(
            {
                "training": {
                    "budget": {"steps": 10**6},
                    "batch_size": batch_size,
                    "checkpoint_every_steps": 10**6,
                    "log_every_steps": LOG_EVERY,
                },
                "scheduled_sampling": {"max_step_offset": 2, "grid": 20, "probability": 0.25},
                "evaluation": {"enabled": False},
                "tracking": {"enabled": False},
                "scaling": {"num_workers": workers},
            },
            "benchmark",
        ).config
        write_yaml(config, root / "config.yaml")
        self.child = ChildRun(root / "config.yaml", root / "run")

    def warm_up(self) -> None:
        """Train the first steps, then stop."""
        wait_for(self.child, lambda: self.step >= WARM_UP_STEPS or self.child.ended, stall_s=120.0)
        if self.child.ended:
            raise self.child.failure("ended by itself")
        send(signal.SIGSTOP, self.child.processes())

    @property
    def step(self) -> int:
        """The last logged one."""
        point = read_last_point(self.child.run_dir)
        return 0 if point is None else int(point["step"])

    def take(self, seconds: float) -> None:
        """One turn."""
        before, processes = self.step, self.child.processes()
        send(signal.SIGCONT, processes)
        start = time.perf_counter()
        time.sleep(seconds)
        self.seconds.append(time.perf_counter() - start)
        send(signal.SIGSTOP, processes)
        self.steps.append(self.step - before)
        if self.child.ended:
            raise self.child.failure("ended by itself")

    def rate(self, block: slice) -> float:
        """Samples per second of some turns."""
        return self.batch_size * sum(self.steps[block]) / sum(self.seconds[block])


def send(number: signal.Signals, processes: list[psutil.Process]) -> None:
    """A signal to processes, as far as they are still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def compare(
    one: tuple[int, int], other: tuple[int, int], options: argparse.Namespace
) -> tuple[list[float], list[float], int]:
    """Samples per second of two kinds of run, (workers, batch size) each, per block of turns.

    And the steps that the slower one made meanwhile.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as at_end:
        pair = []
        for workers, batch_size in (one, other):
            run = Turns(Path(folder), workers, batch_size)
            at_end.enter_context(run.child)
            run.warm_up()
            pair.append(run)
        turns, end = 0, time.monotonic() + options.limit
        while min(sum(run.steps) for run in pair) < options.steps or turns < 2 * BLOCKS:
            if time.monotonic() > end and turns >= BLOCKS:
                break
            for run in pair if turns % 2 else pair[::-1]:
                run.take(options.turn)
            turns += 1
        for run in pair:
            send(signal.SIGCONT, run.child.processes())
        edges = [round(turns * block / BLOCKS) for block in range(BLOCKS + 1)]
        blocks = [slice(a, b) for a, b in itertools.pairwise(edges)]
        first, second = ([run.rate(block) for block in blocks] for run in pair)
        steps = min(sum(run.steps) for run in pair)
    return first, second, steps


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both numbers with the ratios that they are medians of."""
    size = options.batch
    found: dict[str, Any] = {}
    if not options.no_overhead:
        with_ray, without, found["overhead_steps"] = compare((1, size), (0, size), options)
        ratios = [a / b for a, b in zip(without, with_ray, strict=True)]
        found["overhead"] = round(statistics.median(ratios) - 1.0, 4)
        found["overhead_blocks"] = [round(ratio - 1.0, 4) for ratio in ratios]
    if not options.no_scaling:
        two, single, found["scaling_steps"] = compare((2, 2 * size), (1, size), options)
        ratios = [a / b for a, b in zip(two, single, strict=True)]
        found["weak_scaling"] = round(statistics.median(ratios), 4)
        found["scaling_blocks"] = [round(ratio, 4) for ratio in ratios]
    return found


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--steps", type=int, default=500, help="measured steps of each run")
    parser.add_argument("--limit", type=float, default=900.0, help="most seconds of turns")
    parser.add_argument("--turn", type=float, default=4.0, help="seconds of a turn")
    parser.add_argument("--batch", type=int, default=64, help="samples per worker and step")
    parser.add_argument("--no-overhead", action="store_true", help="only the two workers")
    parser.add_argument("--no-scaling", action="store_true", help="leave the two workers out")
    options = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")
    found = {**measure(options), "machine": platform.machine()}
    found["load"] = [round(load, 1) for load in os.getloadavg()]
    if options.json:
        print(json.dumps(found))
        return
    if "overhead" in found:
        print(f"overhead of Ray Train: {found['overhead']:+.2%} {found['overhead_blocks']}")
    if "weak_scaling" in found:
        print(f"weak scaling 1 -> 2: {found['weak_scaling']:.2f}x {found['scaling_blocks']}")


if __name__ == "__main__":
    main()
