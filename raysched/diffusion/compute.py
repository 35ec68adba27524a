"""Compute, counted where the network is called.

One forward equivalent (FE) is one sample-forward; a trained sample costs 3 (its forward, and two
for the backward pass). Rollout and training make the budget; evaluation is counted apart.
Counts are nominal: whatever the network's wrapper recomputes is not seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ComputeKind = Literal["rollout", "training", "evaluation"]
KINDS: tuple[ComputeKind, ...] = ("rollout", "training", "evaluation")
GRADIENT_COST = 3


class ComputeMeter:
    """Sample-forwards and seconds of a run, by what they were spent on."""

    def __init__(self) -> None:
        self._count: dict[ComputeKind, int] = dict.fromkeys(KINDS, 0)
        self._seconds: dict[ComputeKind, float] = dict.fromkeys(KINDS, 0.0)

    def forward(self, kind: ComputeKind, num_samples: int) -> None:
        """Count a forward without gradient of so many samples (guidance: both branches)."""
        self._count[kind] += num_samples

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

    def add_seconds(self, kind: ComputeKind, seconds: float) -> None:
        """Add time that was measured elsewhere."""
        self._seconds[kind] += seconds

    @contextmanager
    def timed(self, kind: ComputeKind) -> Iterator[None]:
        """Count the seconds of a block towards a kind."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(kind, time.perf_counter() - start)

    def seconds(self, kind: ComputeKind) -> float:
        """Seconds spent on a kind."""
        return self._seconds[kind]

    def summary(self) -> dict[str, float]:
        """The numbers that a result shows."""
        numbers = {"forward_equivalents": float(self.forward_equivalents)}
        for kind in KINDS:
            numbers[kind] = float(self._count[kind])
            numbers[f"{kind}_seconds"] = self._seconds[kind]
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state for a checkpoint."""
        return {"count": dict(self._count), "seconds": dict(self._seconds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        for kind in KINDS:
            self._count[kind] = int(state["count"][kind])
            self._seconds[kind] = float(state["seconds"][kind])


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
