"""What Ray Train costs: one worker against the same loop without Ray, and two workers against one.

  overhead         time per step of one Ray Train worker over that of the loop without Ray, which
                   has as many threads; minus 1. Aim: at most 0.03.
  weak_scaling     samples per second of two workers over those of one, with as many samples per
                   worker. Aim: at least 1.5 on two cores.
  machine_scaling  the same of two loops without Ray that know nothing of each other: what the
                   machine has to give at that time, most of all a virtual one

All runs of a comparison are started first, as `raysched train` in processes of their own, and
warmed up; no start is in the numbers. Then they go on in turns of some seconds: all processes of
the others, Ray's included, are stopped meanwhile (SIGSTOP). A turn's steps are those that the
run logs. Neighbouring turns make a pair; the median of blocks of pairs counts, so that a slow
minute of the machine hits both. Workers get the priority of other processes (Ray itself lowers
it), or whatever else the machine does would slow down one side only.

`…_cpu` is the same by the processor time of the training processes alone, which other processes
disturb less; `beside_cpu` is what Ray's other processes and the command take in addition, as a
share of it. Both are free as long as a core is.

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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from raysched.config.loading import load_mapping, write_yaml
from raysched.distributed.child_run import ChildRun, wait_for
from raysched.training.heartbeat import WORKERS_FOLDER
from raysched.training.run_folder import read_last_point

WARM_UP_STEPS = 50
# Fine enough to count steps by; the default is 10.
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
        self.cpu: list[float] = []
        self.beside: list[float] = []
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

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Let it run meanwhile."""
        before, processes = self.step, self.child.processes()
        spent = self._processor_time(processes)
        send(signal.SIGCONT, processes)
        start = time.perf_counter()
        yield
        self.seconds.append(time.perf_counter() - start)
        send(signal.SIGSTOP, processes)
        self.steps.append(self.step - before)
        training, everything = self._processor_time(processes)
        self.cpu.append(training - spent[0])
        self.beside.append(everything - spent[1] - self.cpu[-1])
        if self.child.ended:
            raise self.child.failure("ended by itself")

    def _processor_time(self, processes: list[psutil.Process]) -> tuple[float, float]:
        """Seconds of the processes that train, and of all."""
        beats = (self.child.run_dir / WORKERS_FOLDER).glob("rank-*.json")
        training = {json.loads(beat.read_text(encoding="utf-8"))["pid"] for beat in beats}
        training = training or {processes[0].pid}
        times = {}
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                times[process.pid] = sum(process.cpu_times()[:2])
        return sum(times.get(pid, 0.0) for pid in training), sum(times.values())

    def cpu_rate(self, block: slice) -> float:
        """Samples per second of processor time."""
        return self.batch_size * sum(self.steps[block]) / sum(self.cpu[block])

    def rate(self, block: slice) -> float:
        """Samples per second of some turns."""
        return self.batch_size * sum(self.steps[block]) / sum(self.seconds[block])


def send(number: signal.Signals, processes: list[psutil.Process]) -> None:
    """A signal to processes, as far as they are still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def take_turns(
    kinds: Sequence[tuple[tuple[int, int], ...]], options: argparse.Namespace
) -> tuple[list[list[Turns]], list[slice]]:
    """Groups of runs, (workers, batch size) each; the runs of a group go on at the same time.

    Returns:
        The groups, and the turns of each block.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as at_end:
        groups = []
        for kind in kinds:
            group = []
            for workers, batch_size in kind:
                run = Turns(Path(tempfile.mkdtemp(dir=folder)), workers, batch_size)
                at_end.enter_context(run.child)
                run.warm_up()
                group.append(run)
            groups.append(group)
        turns, end = 0, time.monotonic() + options.limit
        while turns < 2 * BLOCKS or least_steps(groups) < options.steps:
            if time.monotonic() > end and turns >= BLOCKS:
                break
            for group in groups if turns % 2 else groups[::-1]:
                with contextlib.ExitStack() as together:
                    for run in group:
                        together.enter_context(run.turn())
                    time.sleep(options.turn)
            turns += 1
        for run in itertools.chain(*groups):
            send(signal.SIGCONT, run.child.processes())
    edges = [round(turns * block / BLOCKS) for block in range(BLOCKS + 1)]
    return groups, [slice(a, b) for a, b in itertools.pairwise(edges)]


def least_steps(groups: Iterable[Iterable[Turns]]) -> int:
    """Steps of the run that made fewest."""
    return min(sum(run.steps) for run in itertools.chain(*groups))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both numbers with the ratios that they are medians of."""
    size = options.batch
    found: dict[str, Any] = {}
    if not options.no_overhead:
        groups, blocks = take_turns([((1, size),), ((0, size),)], options)
        (ray,), (plain,) = groups
        wall = [plain.rate(block) / ray.rate(block) - 1.0 for block in blocks]
        cpu = [plain.cpu_rate(block) / ray.cpu_rate(block) - 1.0 for block in blocks]
        for key, slower in (("overhead", wall), ("overhead_cpu", cpu)):
            found[key] = round(statistics.median(slower), 4)
            found[f"{key}_blocks"] = [round(ratio, 4) for ratio in slower]
        found["beside_cpu"] = round(sum(ray.beside) / sum(ray.cpu), 4)
        found["overhead_steps"] = least_steps(groups)
    if not options.no_scaling:
        kinds = [((2, 2 * size),), ((1, size),), ((0, size), (0, size)), ((0, size),)]
        groups, blocks = take_turns(kinds, options)
        (two,), (one,), twins, (alone,) = groups
        scaled = [two.rate(block) / one.rate(block) for block in blocks]
        machine = [sum(run.rate(block) for run in twins) / alone.rate(block) for block in blocks]
        for key, ratios in (("weak_scaling", scaled), ("machine_scaling", machine)):
            found[key] = round(statistics.median(ratios), 4)
            found[f"{key}_blocks"] = [round(ratio, 4) for ratio in ratios]
        share = statistics.median(a / b for a, b in zip(scaled, machine, strict=True))
        found["scaling_over_machine"] = round(share, 4)
        found["scaling_steps"] = least_steps(groups)
    return found


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--steps", type=int, default=1000, help="measured steps of each run")
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
        print(f"  by processor time: {found['overhead_cpu']:+.2%} {found['overhead_cpu_blocks']}")
    if "weak_scaling" in found:
        print(f"weak scaling 1 -> 2: {found['weak_scaling']:.2f}x {found['weak_scaling_blocks']}")
        print(
            f"  the machine's: {found['machine_scaling']:.2f}x {found['machine_scaling_blocks']}"
        )


if __name__ == "__main__":
    main()
