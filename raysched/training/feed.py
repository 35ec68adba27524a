"""Batches made one step ahead, beside the network's work.

Samples, noise and the calls of a step's rollouts depend on the config, the seed and the step's
number alone, not on the weights. A second thread makes those of the next step while the backward
pass of this one runs, which needs neither the data nor Python's lock.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import replace

import torch

from raysched.training.batch import Batch, draw_batch
from raysched.training.exposure import plan_ahead
from raysched.training.setup import Run

# How often whoever waits for a batch looks whether its thread still lives. A batch that takes
# long is no error: the watchdog knows what hangs.
LOOK_S = 1.0
START_S = 60.0


def prepared_batch(run: Run, step: int) -> Batch:
    """A step's batch with all that can be planned before the step begins."""
    batch = draw_batch(run, step)
    return replace(batch, planned=plan_ahead(run, batch))


def next_step(step: int) -> int | None:
    """What a run makes after a step."""
    return step + 1


class Feed:
    """Hands out the batches of one rank; `close` ends its thread.

    Args:
        run: the rank's run; only what doesn't change while it trains is read.
        following: the step that comes after a step; None: none does.
    """

    def __init__(self, run: Run, following: Callable[[int], int | None] = next_step) -> None:
        self._run, self._following = run, following
        self._orders: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        self._ordered: int | None = None
        self._thread: threading.Thread | None = None

    def order_after(self, step: int) -> None:
        """Have the batch of the step after this one made meanwhile."""
        following = self._following(step)
        if following is not None:
            self.order(following)

    def order(self, step: int) -> None:
        """Have a step's batch made meanwhile; the one ordered before must have been taken."""
        assert self._ordered is None, f"the batch of step {self._ordered} was not taken"
        if self._thread is None:
            self._thread = self._start()
        self._ordered = step
        self._orders.put(step)

    def take(self, step: int) -> Batch:
        """The batch of a step: what was made ahead, or made now.

        Raises:
            Exception: whatever making it raised.
        """
        ordered, self._ordered = self._ordered, None
        made = None if ordered is None else self._wait()
        if ordered != step:  # the first step, or one that nobody foresaw
            return prepared_batch(self._run, step)
        if isinstance(made, BaseException):
            raise made
        assert made is not None
        return made

    def close(self) -> None:
        """End the thread; a batch that was ordered is not made or thrown away."""
        if self._thread is not None:
            self._orders.put(None)
            self._thread.join(timeout=5.0)
            self._thread = None

    def _start(self) -> threading.Thread:
        started = threading.Event()
        thread = threading.Thread(
            target=self._work, args=(started,), name="raysched-feed", daemon=True
        )
        thread.start()
        assert started.wait(START_S), "the thread that makes batches did not start"
        # What the thread has set for itself is what later threads would begin with.
        torch.set_num_threads(torch.get_num_threads())
        return thread

    def _wait(self) -> Batch | BaseException:
        assert self._thread is not None
        while True:
            alive = self._thread.is_alive()
            try:
                return self._made.get(timeout=LOOK_S if alive else 0.0)
            except queue.Empty:
                if not alive:
                    raise RuntimeError("the thread that makes batches is gone") from None

    def _work(self, started: threading.Event) -> None:
        # With a pool of its own there would be more threads than cores, and OpenMP would put the
        # training's to sleep between any two operators: steps of twice the time.
        torch.get_num_threads()  # or the thread's first operator would set its number anew
        torch.set_num_threads(1)
        started.set()
        device = self._run.device
        while (step := self._orders.get()) is not None:
            try:
                on_device = torch.cuda.device(device) if device.type == "cuda" else None
                with on_device or contextlib.nullcontext():
                    self._made.put(prepared_batch(self._run, step))
            except BaseException as error:  # noqa: BLE001 - raised in the thread that takes it
                self._made.put(error)
