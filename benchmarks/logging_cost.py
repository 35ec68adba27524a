"""What tracking in MLflow costs a training, and whether all points arrive.

    python benchmarks/logging_cost.py --json

Cost: the demo's run is trained in a process of its own, as a worker is, with a point per step,
pictures and artifacts; this process sends, as the driver does. Timers inside the tracker's calls
are held against the training time; beside it the CPU time of the whole run, with tracking over
without, in turn. Aim: at most 1 % with SQLite and with a server.
Completeness: 16 trials in four processes write 10,000 points each at once, to SQLite and to a
server that is killed with SIGKILL in between and started again; every history must come back whole
and in order.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

from raysched.config.loading import load  # noqa: E402
from raysched.config.run import TrackingConfig  # noqa: E402
from raysched.tracking import (  # noqa: E402
    Courier,
    MlflowTracker,
    StoreHandle,
    prepare_store,
    start_run,
    sync,
)
from raysched.tracking.client import connect  # noqa: E402
from raysched.tracking.spool import Spool  # noqa: E402
from tests.tracking.servers import Server  # noqa: E402

LIMIT = 0.01
PROCESSES = 4
# A busy machine may train for long.
WAIT_S = 900.0
STORES = ("sqlite", "server")
CALLS = ("log_metrics", "log_image", "log_artifact", "set_tags", "close")


class TimedTracker:
    """A tracker whose calls are timed, all of them together."""

    def __init__(self, tracker: Any) -> None:
        self.seconds, self.num_calls = 0.0, 0
        for name in CALLS:
            setattr(self, name, self._timed(getattr(tracker, name)))

    def _timed(self, call: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> None:
            began = time.perf_counter()
            call(*args, **kwargs)
            self.seconds += time.perf_counter() - began
            self.num_calls += 1

        return timed


def train(job: tuple[StoreHandle, str] | None, run_dir: Path, steps: int, answer: Any) -> None:
    """In a process of its own: one training, tracked or not."""
    from raysched.distributed.launch import run_training
    from raysched.training.run_folder import open_run_folder

    settings = {"scaling.num_workers": 0, "training.log_every_steps": 1}
    settings["training.budget.steps"] = steps
    overrides = [f"{key}={value}" for key, value in settings.items()]
    config = load(str(ROOT / "configs" / "digits_flow.yaml"), overrides).config
    open_run_folder(config, run_dir, resume=False)
    timed: list[TimedTracker] = []

    def make() -> Any:
        assert job is not None
        timed.append(TimedTracker(MlflowTracker(*job, run_dir, send=False)))
        return timed[0]

    began = time.process_time()
    result = run_training(
        config, run_dir=run_dir, report=lambda _: None, make_tracker=make if job else None
    )
    assert result.status == "finished", result.error
    tracked = timed[0] if timed else None
    answer.put(
        {
            "cpu_s": time.process_time() - began,
            "training_s": result.compute["seconds"],
            "tracker_s": tracked.seconds if tracked else 0.0,
            "calls": tracked.num_calls if tracked else 0,
        }
    )


def in_process(target: Any, *args: Any) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=target, args=(*args, answer))
    process.start()
    found = answer.get(timeout=WAIT_S)
    process.join(WAIT_S)
    return dict(found)


def cost(handle: StoreHandle, folder: Path, *, steps: int, repeats: int) -> dict[str, Any]:
    """Share of the training time that the tracker's calls take; CPU time with over without."""
    shares, ratios, calls = [], [], 0
    for number in range(repeats):
        plain = in_process(train, None, folder / f"plain-{number}", steps)
        run_dir = folder / f"tracked-{number}"
        run_id = start_run(handle, run_dir.name, run_dir=run_dir)
        courier = Courier(handle)
        courier.watch(run_dir)
        tracked = in_process(train, (handle, run_id), run_dir, steps)
        courier.close(WAIT_S)
        assert Spool(run_dir).num_pending() == 0
        shares.append(tracked["tracker_s"] / tracked["training_s"])
        ratios.append(tracked["cpu_s"] / plain["cpu_s"])
        calls = int(tracked["calls"])
    return {
        "share": statistics.median(shares),
        "shares": shares,
        "cpu_with_over_without": statistics.median(ratios),
        "cpu_ratios": ratios,
        "calls": calls,
    }


def write_all(handle: StoreHandle, runs: list[tuple[str, Path]], num_points: int) -> None:
    """In a process of its own: the points of several trials at once."""
    threads = [
        threading.Thread(target=write, args=(handle, run_id, run_dir, num_points))
        for run_id, run_dir in runs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def write(handle: StoreHandle, run_id: str, run_dir: Path, num_points: int) -> None:
    """One trial's points."""
    tracker = MlflowTracker(handle, run_id, run_dir, send=False, system_every_s=None)
    for step in range(num_points):
        tracker.log_metrics({"train/loss": step / 3}, step=step, forward_equivalents=step)
        time.sleep(0.0005)
    tracker.close("finished")


def completeness(
    handle: StoreHandle, folder: Path, server: Server | None, *, trials: int, num_points: int
) -> dict[str, Any]:
    """Whether all points of trials that write at once arrive; the server dies on the way."""
    context = multiprocessing.get_context("spawn")
    courier, writers, runs = Courier(handle, flush_every_s=0.5), [], {}
    began = time.perf_counter()
    for number in range(trials):
        run_dir = folder / f"{number:02d}"
        runs[start_run(handle, run_dir.name, run_dir=run_dir)] = run_dir
        courier.watch(run_dir)
    jobs = list(runs.items())
    for first in range(min(PROCESSES, trials)):
        share = jobs[first::PROCESSES]
        process = context.Process(target=write_all, args=(handle, share, num_points))
        process.start()
        writers.append(process)
    killed_with = 0
    if server is not None:
        spools = [Spool(run_dir) for run_dir in runs.values()]
        until = time.monotonic() + WAIT_S
        while not any(spool.acknowledged() > 0 for spool in spools):
            assert time.monotonic() < until, "nothing was sent before the kill"
            time.sleep(0.02)
        server.kill()
        killed_with = sum(spool.num_pending() for spool in spools)
    for process in writers:
        process.join(WAIT_S)
        assert process.exitcode == 0
    if server is not None:
        server.start()
    courier.close(WAIT_S)
    # A courier whose store was away does not wait for it at its end: the rest is sent on asking.
    sync(folder, timeout_s=WAIT_S)
    seconds = time.perf_counter() - began
    client, expected = connect(handle.uri), [(step, step / 3) for step in range(num_points)]
    whole = 0
    for run_id in runs:
        history = client.get_metric_history(run_id, "train/loss")
        whole += [(metric.step, metric.value) for metric in history] == expected
    return {
        "trials": trials,
        "points_per_trial": num_points,
        "whole_and_in_order": whole,
        "pending_at_kill": killed_with,
        "seconds": seconds,
    }


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    folder.mkdir()
    server = Server(folder) if name == "server" else None
    try:
        if server is not None:
            server.start()
        handle = prepare_store(TrackingConfig(uri=server.uri if server else None), folder)
        assert not handle.offline
        found: dict[str, Any] = {}
        if options.repeats:
            found |= cost(handle, folder, steps=options.steps, repeats=options.repeats)
        arrived = completeness(
            handle, folder, server, trials=options.trials, num_points=options.points
        )
        return {**found, "completeness": arrived}
    finally:
        if server is not None:
            server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stores", nargs="+", choices=STORES, default=STORES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--points", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raysched-logging-") as name:
        found = {store: measure(store, Path(name) / store, options) for store in options.stores}
    if options.json:
        print(json.dumps({"limit": LIMIT, **found}))
        return
    for store, values in found.items():
        arrived = values["completeness"]
        if options.repeats:
            print(
                f"{store:7} calls / training {values['share']:.2%} (limit {LIMIT:.0%}), CPU time "
                f"with / without {values['cpu_with_over_without']:.3f}, {values['calls']} calls"
            )
        print(
            f"{store:7} {arrived['whole_and_in_order']} of {arrived['trials']} histories of "
            f"{arrived['points_per_trial']:,} points whole and in order, "
            f"{arrived['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
