"""Targets at self-made latents: teacher-forced, consistent with the latent, or with its posterior.

Legend: n rows, b samples of this rank, M reference images.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from raysched.data.batches import batch_indices
from raysched.diffusion.parameterization import ANCHOR_SIGMA_FLOOR, anchored_target
from raysched.diffusion.posterior import posterior_mean
from raysched.diffusion.randomness import generator
from raysched.training.batch import Batch
from raysched.training.setup import Run


def rollout_targets(
    run: Run, batch: Batch, rows: Tensor, sample: Tensor, u: Tensor, original: Tensor
) -> Tensor:
    """The targets that `scheduled_sampling.target` asks for.

    Args:
        run: this rank's run.
        batch: its samples.
        rows: (n,) int64 on the host, the sample that each latent belongs to.
        sample: (n, C, H, W), self-made latents; no gradient flows into the target.
        u: (n,) float64 on the host, where on the path they are.
        original: (n, C, H, W), teacher-forced targets, kept where sigma < 0.05.
    """
    kind = run.config.rollout.target
    if kind == "original" or not len(rows):
        return original
    alpha, sigma = run.schedule.alpha_sigma(u)
    x0, sample = batch.x0[rows], sample.detach()
    if kind == "posterior_mean":
        x0 = _posterior_mean(run, batch, rows, sample, alpha, sigma)
    return anchored_target(run.config.prediction_type, x0, sample, alpha, sigma, original)


def num_original(run: Run, u: Tensor) -> int:
    """How many latents at u (n,) keep the teacher-forced target."""
    if run.config.rollout.target == "original":
        return len(u)
    return int((run.schedule.alpha_sigma(u)[1] < ANCHOR_SIGMA_FLOOR).sum())


def without_target(run: Run, u: Tensor) -> Tensor:
    """(n,) bool on the host: latents at u (n,) that no target fits, so they stay teacher-forced.

    Below sigma = 0.05 there is only the teacher-forced target, and fresh noise has left the noise
    behind that it speaks of.
    """
    if not run.config.rollout.ancestral:
        return torch.zeros(len(u), dtype=torch.bool)
    return run.schedule.alpha_sigma(u)[1] < ANCHOR_SIGMA_FLOOR


def _posterior_mean(
    run: Run, batch: Batch, rows: Tensor, sample: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """Means of the data given the latents, over training images of the same class.

    A sample whose label was dropped, or a network without labels, takes images of all classes.
    """
    drawn = reference_rows(run, batch.step)
    reference = run.dataset.images_at(drawn).to(sample)
    labels = batch.labels[rows].cpu()
    any_class = labels == run.dataset.num_classes
    if not run.config.model.class_conditional:
        any_class = torch.ones_like(any_class)
    allowed = any_class[:, None] | (labels[:, None] == run.dataset.labels_at(drawn)[None, :])
    # The own image takes part already; twice it would weigh double.
    allowed &= batch.dataset_rows[rows][:, None] != drawn[None, :]
    floor = sigma.clamp_min(ANCHOR_SIGMA_FLOOR)
    return posterior_mean(sample, batch.x0[rows], alpha, floor, reference, allowed)


def global_rows(run: Run, step: int) -> Tensor:
    """The dataset's rows of a step's global batch, the same on every rank: (B,)."""
    size = run.config.training.batch_size
    return batch_indices(run.config.seed, step, size, run.dataset.train_indices)


def reference_rows(run: Run, step: int) -> Tensor:
    """Training images drawn for a step, without repetition, the same on every rank: (M,).

    A quarter of the places is dealt evenly to the classes of the global batch, one at least to
    each, so that no condition is without references; the rest follows the data's own law.
    """
    train = torch.from_numpy(np.asarray(run.dataset.train_indices, dtype=np.int64))
    order = torch.randperm(
        len(train), generator=generator(run.config.seed, "posterior_reference", step)
    )
    train, count = train[order], run.config.rollout.posterior_reference
    labels = run.dataset.labels_at(train)
    classes = set(run.dataset.labels_at(global_rows(run, step)).tolist())
    quota = max(count // (4 * len(classes)), 1)
    first = torch.zeros(len(train), dtype=torch.bool)
    for label in sorted(classes):
        first[torch.nonzero(labels == label)[:quota, 0]] = True
    return torch.cat([train[first], train[~first]])[:count]
