"""What a whole training step with rollouts costs, against its parts done separately.

Measured in turn within one process, medians of paired ratios:

  step with rollouts  the training step of the demo's model with p = 1, K = 10
  parts               the same model's plain training step, and as many sample-forwards without
                      gradient in full batches of the micro-batch's size, by the recorded forward
                      that rollouts use; for `step_over_eager_parts` the network called as it is

Batches and plans are made as in training, one step ahead by a second thread. Two shares of the
step with rollouts, by timers inside:

  planning_share       what the step itself spends: waiting for its batch and plan, and everything
                       in the rollout but the network (gathering, the solver's arithmetic)
  planning_work_share  the same with the second thread's processor time for drawing the plan,
                       packing and solver tables in place of the wait

    python benchmarks/training_step.py --json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from raysched.config.loading import load_mapping
from raysched.training import batch as batch_module
from raysched.training import rollout_step
from raysched.training.allocator import keep_freed_memory
from raysched.training.feed import Feed
from raysched.training.setup import Run, build_run
from raysched.training.train_step import train_step

CLOCK: dict[str, Callable[[], float]] = {"now": time.perf_counter}


class Stopwatch:
    """Adds up the time spent in wrapped functions.

    Args:
        clock: seconds; the benchmark's own if not given.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.seconds = 0.0
        self._clock = clock

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            clock = self._clock or CLOCK["now"]
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += clock() - start

        return timed


def make_run(max_step_offset: int, options: argparse.Namespace, accumulation: int) -> Run:
    """A run of the demo's model on the digits."""
    config = {
        "scheduled_sampling": {
            "max_step_offset": max_step_offset,
            "probability": 1.0 if max_step_offset else 0.0,
            "reflexflow": False,
        },
        "training": {
            "batch_size": options.batch * accumulation,
            "gradient_accumulation": accumulation,
        },
        "scaling": {"num_workers": 0},
        "model": options.model,
    }
    return build_run(load_mapping(config, "benchmark").config)


def measure(options: argparse.Namespace, accumulation: int) -> dict[str, Any]:
    """One row."""
    rolled, plain = (make_run(k, options, accumulation) for k in (options.max_step_offset, 0))
    feeds = Feed(rolled), Feed(plain)
    try:
        return {
            "model": "demo_unet_8x8",
            "batch": options.batch,
            "accumulation": accumulation,
            "max_step_offset": options.max_step_offset,
            **measure_pairs(options, rolled, plain, *feeds),
        }
    finally:
        for feed in feeds:
            feed.close()


def measure_pairs(
    options: argparse.Namespace, rolled: Run, plain: Run, rolled_feed: Feed, plain_feed: Feed
) -> dict[str, float]:
    """Medians over steps made in turn."""
    engine, network, wait = Stopwatch(), Stopwatch(), Stopwatch()
    ahead = Stopwatch(time.thread_time)
    rollout_step.rollout = engine.wrap(rollout_step.rollout)
    rolled_feed.take = wait.wrap(rolled_feed.take)  # type: ignore[method-assign]
    rollout_step.plan_calls = ahead.wrap(rollout_step.plan_calls)
    draw, draw_timed = batch_module.draw_plan, ahead.wrap(batch_module.draw_plan)
    batch_module.draw_plan = lambda config, *rest: (
        draw_timed if config is rolled.config else draw
    )(config, *rest)
    plain.policy.eval()
    rolled.predict = network.wrap(rolled.predict)  # type: ignore[method-assign]
    rolled.prepare = network.wrap(rolled.prepare)  # type: ignore[method-assign]
    ratios, over_eager, shares, work_shares, wholes = [], [], [], [], []
    before = 0.0
    for step in range(options.repeats + 2):
        clocks = engine.seconds - network.seconds, wait.seconds, rolled.meter.rollout
        whole = seconds(lambda s=step: train_step(rolled, s, rolled_feed))
        forwards = rolled.meter.rollout - clocks[2]
        arithmetic = engine.seconds - network.seconds - clocks[0]
        waited = wait.seconds - clocks[1]
        parts = seconds(lambda s=step: train_step(plain, s, plain_feed))
        eager = seconds(
            lambda n=forwards: full_batches(plain.policy, n, options.batch, plain.device)
        )
        fast = seconds(
            lambda n=forwards: full_batches(
                plain.replay or plain.policy, n, options.batch, plain.device
            )
        )
        if step == 1:
            before = ahead.seconds
        if step >= 2:  # the first ones warm up
            ratios.append(whole / (parts + fast))
            over_eager.append(whole / (parts + eager))
            shares.append((waited + arithmetic) / whole)
            work_shares.append(arithmetic / whole)
            wholes.append(whole)
    made_ahead = (ahead.seconds - before) / sum(wholes)
    return {
        "step_over_parts": round(statistics.median(ratios), 4),
        "step_over_eager_parts": round(statistics.median(over_eager), 4),
        "planning_share": round(statistics.median(shares), 4),
        "planning_work_share": round(statistics.median(work_shares) + made_ahead, 4),
    }


@torch.no_grad()
def full_batches(
    network: Callable[..., torch.Tensor], num_forwards: int, size: int, device: torch.device
) -> None:
    """So many sample-forwards in full batches; the last one is what is left."""
    for left in range(num_forwards, 0, -size):
        count = min(left, size)
        network(
            sample=torch.zeros(count, 1, 8, 8, device=device),
            timestep=torch.full((count,), 500.0, device=device),
            class_labels=torch.zeros(count, dtype=torch.int64, device=device),
        )


def seconds(work: Callable[[], Any]) -> float:
    """Time of one call, with what it leaves the device to do."""
    start = CLOCK["now"]()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return CLOCK["now"]() - start


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--batch", type=int, default=64, help="samples per micro-batch")
    parser.add_argument("--max-step-offset", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--torch-threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    options.model = {}
    torch.set_num_threads(options.torch_threads)
    keep_freed_memory()
    if options.clock == "cpu":
        CLOCK["now"] = time.process_time
    rows = [measure(options, accumulation) for accumulation in (1, 4)]
    if options.json:
        about = {"threads": options.torch_threads, "clock": options.clock}
        print(json.dumps({"rows": rows, **about, "machine": platform.machine()}))
        return
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
