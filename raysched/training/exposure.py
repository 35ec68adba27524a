"""Scheduled sampling: from a batch to what the network is trained on.

Plain teacher forcing is both a method and what the others begin with; those that compete with
scheduled sampling are in `rivals`, and `methods` lists them all.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from raysched.diffusion.parameterization import add_noise, anchored_target, prediction_target
from raysched.training.batch import Batch
from raysched.training.inputs import TrainingInputs
from raysched.training.rollout_step import roll_out
from raysched.training.setup import Run


def teacher_forced(run: Run, batch: Batch) -> TrainingInputs:
    """Perfectly noised inputs with their targets: training without rollouts."""
    alpha, sigma = run.schedule.alpha_sigma(batch.plan.target_u)
    prediction_type = run.config.prediction_type
    return TrainingInputs(
        sample=add_noise(batch.x0, batch.eps, alpha, sigma),
        u=batch.plan.target_u,
        x0=batch.x0,
        labels=batch.labels,
        target=prediction_target(prediction_type, batch.x0, batch.eps, alpha, sigma),
        rolled=torch.zeros(len(batch.x0), dtype=torch.bool),
        batch_rows=torch.arange(len(batch.x0)),
    )


def scheduled_sampling(run: Run, batch: Batch) -> TrainingInputs:
    """Inputs that the model makes itself, by rollouts from noisier times.

    ReflexFlow's biased input (arXiv 2512.04904) is the one-step case with `grid: jump`. Costs
    one forward equivalent per rollout step (four with rk4), and one per rolled sample for
    ReflexFlow's clean prediction. Without any rolled sample it is `teacher_forced` bit for bit.
    """
    plain = teacher_forced(run, batch)
    plan = batch.plan
    if not plan.num_rolled:
        return plain
    rolled = roll_out(run, batch, plain.sample)
    target = plain.target
    if run.config.rollout.target == "anchored":
        alpha, sigma = run.schedule.alpha_sigma(plan.target_u)
        anchored = anchored_target(
            run.config.prediction_type, batch.x0, rolled.sample, alpha, sigma, target
        )
        target = torch.where(_rows(plan.rolled, target), anchored, target)
    return replace(
        plain,
        sample=rolled.sample,
        target=target,
        rolled=plan.rolled,
        clean_prediction=rolled.clean_prediction,
        num_forwards=rolled.num_forwards,
        num_rolled=plan.num_rolled,
        num_steps=int(plan.num_steps.sum()),
        drift=rolled.drift,
    )


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    """A (b,) mask, on the device of `like` and broadcastable against it."""
    return mask.to(like.device).reshape(-1, *(1,) * (like.ndim - 1))
