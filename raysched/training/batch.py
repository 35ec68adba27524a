"""This rank's share of an optimizer step: samples, noise, labels, times and the rollout plan.

Everything random is drawn for the global batch, by global sample index, so that another number of
workers or a resumed run draws the same. B samples in the global batch, b on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raysched.data.batches import batch_indices
from raysched.diffusion.calls import CallPlan
from raysched.diffusion.curriculum import RolloutPlan, draw_step
from raysched.diffusion.randomness import normals, uniforms
from raysched.diffusion.reuse import PassedStates
from raysched.diffusion.transfer import to_device
from raysched.training.setup import Run


@dataclass(frozen=True)
class PlannedRollout:
    """What the rollouts of a batch need besides the weights.

    Attributes:
        calls: the network calls of this rank.
        passed: states on the way that are trained on.
    """

    calls: CallPlan
    passed: PassedStates


@dataclass(frozen=True)
class Batch:
    """One rank's samples of one optimizer step.

    Attributes:
        step: number of the optimizer step.
        sample_indices: (b,) global sample indices.
        dataset_rows: (b,) where the images lie in the dataset.
        x0: (b, C, H, W) images in [-1, 1].
        eps: (b, C, H, W) unit Gaussian noise.
        labels: (b,) class ids, dropped ones already replaced by the null class.
        plan: targets, sources and offsets of these samples; on the host.
        plans: those of every rank, this one's included.
        planned: the calls of the rollouts, where they were made ahead of the step.
    """

    step: int
    sample_indices: Tensor
    dataset_rows: Tensor
    x0: Tensor
    eps: Tensor
    labels: Tensor
    plan: RolloutPlan
    plans: tuple[RolloutPlan, ...]
    planned: PlannedRollout | None = None

    def select(self, rows: Tensor) -> Batch:
        """Some of the samples; `plans` stay those of whole ranks, nothing is planned for them."""
        return replace(
            self,
            sample_indices=self.sample_indices[rows],
            dataset_rows=self.dataset_rows[rows],
            x0=self.x0[rows],
            eps=self.eps[rows],
            labels=self.labels[rows],
            plan=self.plan.select(rows),
            planned=None,
        )


def draw_batch(run: Run, step: int) -> Batch:
    """Draw the global batch's plan, deal it to the ranks, and load this rank's samples."""
    config, seed, size = run.config, run.config.seed, run.config.training.batch_size
    plan = draw_step(config, run.schedule, step)
    hands = deal(plan.num_steps, run.world_size)
    mine = hands[run.rank]
    indices = step * size + mine
    rows = batch_indices(seed, step, size, run.dataset.train_indices)[mine]
    dropped = uniforms(seed, "label_dropout", step, indices)[:, 0] < config.model.label_dropout
    labels = torch.where(dropped, run.dataset.num_classes, run.dataset.labels_at(rows))
    x0 = run.dataset.images_at(rows)
    eps = normals(seed, "noise", step, indices, tuple(x0.shape[1:]))
    plans = tuple(plan.select(hand) for hand in hands)
    return Batch(
        step=step,
        sample_indices=indices,
        dataset_rows=rows,
        x0=to_device(x0, run.device),
        eps=to_device(eps, run.device),
        labels=to_device(labels, run.device),
        plan=plans[run.rank],
        plans=plans,
    )


def deal(num_steps: Tensor, world_size: int) -> list[Tensor]:
    """Deal a global batch to the ranks so that rollout work differs by at most one lane.

    Round by round, longest lanes first, the rank with the least work gets the longest lane of
    the round (Graham's list scheduling with equal counts), so sums differ by at most max k.

    Args:
        num_steps: (B,) rollout steps per sample; B is a multiple of `world_size`.
        world_size: number of ranks.

    Returns:
        For each rank its (B / world_size,) rows, in ascending order.
    """
    if world_size == 1:
        return [torch.arange(len(num_steps))]
    order = torch.argsort(num_steps, descending=True, stable=True).tolist()
    work = [0] * world_size
    hands: list[list[int]] = [[] for _ in range(world_size)]
    for start in range(0, len(order), world_size):
        ranks = sorted(range(world_size), key=lambda rank: (work[rank], rank))
        for rank, row in zip(ranks, order[start : start + world_size], strict=True):
            hands[rank].append(row)
            work[rank] += int(num_steps[row])
    return [torch.tensor(sorted(hand), dtype=torch.long) for hand in hands]
