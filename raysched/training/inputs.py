"""What the gradient forward of a step sees, whichever method against exposure bias made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Jump(Protocol):
    """Inputs that are made within the micro-batch that trains on them, with gradient."""

    drift: float | Tensor
    num_forwards: int
    failed: Tensor

    def remake(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Sample and target of the rows (m,), (m, C, H, W) each; adds to the three sums."""


@dataclass(frozen=True)
class TrainingInputs:
    """One rank's inputs and targets of an optimizer step; n rows, b of them from the batch.

    Attributes:
        sample: (n, C, H, W), x_t or a self-made latent.
        u: (n,) float64 on the host, where on the path the sample is.
        x0: (n, C, H, W), data.
        labels: (n,), null class included.
        target: (n, C, H, W), in the network's prediction type.
        rolled: (n,) bool, rows that get ReflexFlow's loss where that is on.
        batch_rows: (n,) int64 on the host, the row of the batch that each row comes from.
        clean_prediction: (n, C, H, W), the prediction at x_t of rolled rows (0 elsewhere); None
            unless ReflexFlow's frequency compensation is on.
        num_forwards: sample-forwards without gradient that it took on this rank.
        num_rolled: R on this rank.
        num_steps: sum of k on this rank.
        num_original: rolled samples that keep the teacher-forced target.
        drift: summed over the rolled rows, root mean square distance from x_t.
        failed: (b,) bool, rollouts that fell back to teacher forcing; None if none can have.
        rows_per_rank: n of every rank; empty where each has b.
        jump: makes sample, target, drift and failures instead of those above, where a gradient
            flows through what made them.
    """

    sample: Tensor
    u: Tensor
    x0: Tensor
    labels: Tensor
    target: Tensor
    rolled: Tensor
    batch_rows: Tensor
    clean_prediction: Tensor | None = None
    num_forwards: int = 0
    num_rolled: int = 0
    num_steps: int = 0
    num_original: int = 0
    drift: float | Tensor = 0.0
    failed: Tensor | None = None
    rows_per_rank: tuple[int, ...] = ()
    jump: Jump | None = None
