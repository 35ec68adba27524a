"""Compute, counted where the network is called.

One forward equivalent (FE) is one sample-forward; a trained sample costs 3 (its forward, and two
for the backward pass). Rollout and training make the budget; evaluation is counted apart.
Counts are nominal: whatever the network's wrapper recomputes is not seen.

Seconds are the host's, except for the network's work on a CUDA device: that is measured by events
on its stream, which are read once they have passed, so that timing never waits for the device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ComputeKind = Literal["rollout", "training", "evaluation"]
KINDS: tuple[ComputeKind, ...] = ("rollout", "training", "evaluation")
GRADIENT_COST = 3
# What takes time: the three kinds, the parts of `training`, and what is no compute at all;
# `background` is evaluation by another process, beside the training.
Phase = Literal[
    "rollout",
    "training",
    "evaluation",
    "forward",
    "backward",
    "optimizer",
    "data",
    "checkpoint",
    "background",
]
PHASES: tuple[Phase, ...] = (
    *KINDS,
    "forward",
    "backward",
    "optimizer",
    "data",
    "checkpoint",
    "background",
)
ON_DEVICE: frozenset[Phase] = frozenset(
    {"rollout", "training", "forward", "backward", "optimizer"}
)


class ComputeMeter:
    """Sample-forwards and seconds of a run, by what they were spent on.

    Args:
        device: where the network works; on CUDA its phases are timed there.
        on_forward: called with every forward that is counted.
    """

    def __init__(
        self, device: torch.device | None = None, on_forward: Callable[[], None] | None = None
    ) -> None:
        self._on_forward = on_forward
        self._count: dict[ComputeKind, int] = dict.fromkeys(KINDS, 0)
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._on_cuda = device is not None and device.type == "cuda"
        self._events: deque[tuple[Phase, torch.cuda.Event, torch.cuda.Event]] = deque()
        # What the ranks agreed on where a budget is in seconds: clocks differ.
        self.agreed_seconds: float | None = None

    def forward(self, kind: ComputeKind, num_samples: int) -> None:
        """Count a forward without gradient of so many samples (guidance: both branches)."""
        self._count[kind] += num_samples
        if self._on_forward is not None:
            self._on_forward()

    def gradient(self, num_samples: int) -> None:
        """Count so many trained samples: forward and backward, 3 FE each."""
        self._count["training"] += GRADIENT_COST * num_samples

    @property
    def forward_equivalents(self) -> int:
        """What budgets are measured in: rollout and training, without evaluation."""
        return self._count["rollout"] + self._count["training"]

    @property
    def rollout(self) -> int:
        """FE spent on rollouts and clean predictions."""
        return self._count["rollout"]

    @property
    def training(self) -> int:
        """FE spent on gradient steps and other forwards of the training step."""
        return self._count["training"]

    @property
    def evaluation(self) -> int:
        """FE spent on evaluation, outside every budget."""
        return self._count["evaluation"]

    def add_seconds(self, phase: Phase, seconds: float) -> None:
        """Add time that was measured elsewhere."""
        self._seconds[phase] += seconds

    @contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        """Count the seconds of a block towards a phase."""
        if self._on_cuda and phase in ON_DEVICE:
            start, end = _timing_event(), _timing_event()
            start.record()
            try:
                yield
            finally:
                end.record()
                self._events.append((phase, start, end))
            return
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(phase, time.perf_counter() - begun)

    def _read_events(self) -> None:
        """Take up the device's times that are known by now."""
        while self._events and self._events[0][2].query():  # type: ignore[no-untyped-call]
            phase, start, end = self._events.popleft()
            self.add_seconds(phase, start.elapsed_time(end) / 1000.0)

    def seconds(self, phase: Phase) -> float:
        """Seconds spent on a phase; on CUDA without what the device still has to do."""
        self._read_events()
        return self._seconds[phase]

    def summary(self) -> dict[str, float]:
        """The numbers that a result shows."""
        numbers = {"forward_equivalents": float(self.forward_equivalents)}
        for kind in KINDS:
            numbers[kind] = float(self._count[kind])
            numbers[f"{kind}_seconds"] = self.seconds(kind)
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state for a checkpoint."""
        if self._events:
            self._events[-1][2].synchronize()
        self._read_events()
        return {"count": dict(self._count), "seconds": dict(self._seconds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        for kind in KINDS:
            self._count[kind] = int(state["count"][kind])
        for phase in PHASES:
            self._seconds[phase] = float(state["seconds"].get(phase, 0.0))
        self._events.clear()


def _timing_event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event


def forward_flops(
    network: nn.Module | Callable[..., Tensor],
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
) -> int:
    """Floating-point operations of one sample-forward, by torch's counter.

    Args:
        network: called by keyword with `sample`, `timestep` and `class_labels`.
        shape: (C, H, W) of a sample.
        device: where the network lives.
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(
            sample=torch.zeros(1, *shape, device=device),
            timestep=torch.ones(1, device=device),
            class_labels=torch.zeros(1, dtype=torch.int64, device=device),
        )
    return int(counter.get_total_flops())
