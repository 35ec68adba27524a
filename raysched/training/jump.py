"""Jumps that keep their gradient: made within the micro-batch that trains on them."""

from __future__ import annotations

import torch
from torch import Tensor

from raysched.diffusion.compute import GRADIENT_COST
from raysched.training.batch import Batch
from raysched.training.inputs import TrainingInputs
from raysched.training.rollout_step import plan_rollout, roll_out, row_mask
from raysched.training.setup import Run
from raysched.training.targets import rollout_targets


class DifferentiableJump:
    """The one-step rollouts of a batch, made with gradient, micro-batch by micro-batch.

    A jump that ends in no finite number is counted and its row falls back to teacher forcing,
    but what the network computed on the way may still spoil the gradient; then the step fails.

    Attributes:
        drift: summed over the samples made so far, root mean square distance from x_t.
        num_forwards: forward equivalents spent so far, 3 per forward.
        failed: (b,) bool on the device, jumps so far that ended in no finite number.
    """

    def __init__(self, run: Run, batch: Batch, plain: TrainingInputs) -> None:
        self.drift: float | Tensor = 0.0
        self.num_forwards = 0
        self.failed = torch.zeros(len(batch.x0), dtype=torch.bool, device=batch.x0.device)
        self._run, self._batch, self._plain = run, batch, plain

    def remake(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Sample (with gradient) and target (without) of the rows (m,)."""
        run, part = self._run, self._batch.select(rows)
        x_t, original = self._plain.sample[rows], self._plain.target[rows]
        if not part.plan.num_rolled:
            return x_t, original
        planned = plan_rollout(run, part, with_gradient=True)
        rolled = roll_out(run, part, x_t, planned, with_gradient=True)
        run.network.train()
        self.drift = self.drift + rolled.drift
        self.num_forwards += GRADIENT_COST * rolled.num_forwards
        self.failed[rows] |= rolled.failed
        chosen = torch.nonzero(part.plan.rolled)[:, 0]
        aim = rollout_targets(
            run, part, chosen, rolled.sample[chosen], part.plan.target_u[chosen], original[chosen]
        )
        target = original.index_copy(0, chosen.to(original.device), aim)
        failed = self.failed[rows]
        sample = torch.where(row_mask(failed, x_t), x_t, rolled.sample)
        return sample, torch.where(row_mask(failed, target), original, target)
