"""Scheduled sampling: from a batch to what the network is trained on.

Plain teacher forcing is both a method and what the others begin with; those that compete with
scheduled sampling are in `rivals`, and `methods` lists them all.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from raysched.diffusion.parameterization import add_noise, prediction_target
from raysched.diffusion.reuse import PassedStates, passed_states
from raysched.diffusion.transfer import to_device
from raysched.training.batch import Batch, PlannedRollout
from raysched.training.inputs import TrainingInputs
from raysched.training.jump import DifferentiableJump
from raysched.training.rollout_step import (
    RolledInputs,
    clean_predictions,
    plan_rollout,
    roll_out,
    row_mask,
    wants_clean,
)
from raysched.training.setup import Run
from raysched.training.targets import num_original, rollout_targets, without_target


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
    one forward equivalent per rollout step (four with rk4, twice as many with guidance, three
    times with `jump_gradient`), one per rolled sample for ReflexFlow's clean prediction, and
    three per state on the way that `reuse` trains on. Without any rolled sample it is
    `teacher_forced` bit for bit.
    """
    plain, plan, settings = teacher_forced(run, batch), batch.plan, run.config.rollout
    if not any(of_rank.num_rolled for of_rank in batch.plans):
        return plain
    chosen = torch.nonzero(plan.rolled)[:, 0]
    plain = replace(
        plain,
        num_rolled=plan.num_rolled,
        num_steps=int(plan.num_steps.sum()),
        num_original=num_original(run, plan.target_u[chosen]),
    )
    if _in_micro_batches(run):
        return _through_the_jump(run, batch, plain)
    planned = batch.planned
    if planned is None:
        with run.meter.timed("rollout"):
            planned = plan_rollout(run, batch)
    rolled = roll_out(run, batch, plain.sample, planned)
    aim = rollout_targets(
        run, batch, chosen, rolled.sample[chosen], plan.target_u[chosen], plain.target[chosen]
    )
    target = plain.target.index_copy(0, to_device(chosen, aim.device), aim)
    inputs = replace(
        plain,
        sample=rolled.sample,
        target=torch.where(row_mask(rolled.failed, target), plain.target, target),
        rolled=rolled.rolled,
        clean_prediction=rolled.clean_prediction,
        num_forwards=rolled.num_forwards,
        drift=rolled.drift,
        failed=rolled.failed,
    )
    if settings.reuse == "last":
        return inputs
    return _with_passed(run, batch, inputs, rolled, planned.passed)


def plan_ahead(run: Run, batch: Batch) -> PlannedRollout | None:
    """The rollouts of a step that may begin later; None where the step makes none as a whole."""
    if run.config.exposure not in ("scheduled_sampling", "defar") or _in_micro_batches(run):
        return None
    if not any(of_rank.num_rolled for of_rank in batch.plans):
        return None
    return plan_rollout(run, batch)


def _in_micro_batches(run: Run) -> bool:
    """Whether rollouts keep their gradient, and are made where the gradient is."""
    settings = run.config.rollout
    return settings.jump_gradient and settings.grid == "jump"


def _through_the_jump(run: Run, batch: Batch, plain: TrainingInputs) -> TrainingInputs:
    """Leave the jumps to the micro-batches, so that the gradient flows through them."""
    jump, clean, num_forwards = DifferentiableJump(run, batch, plain), None, 0
    if wants_clean(run):
        with run.meter.timed("rollout"):
            clean, jump.failed = clean_predictions(run, batch, plain.sample)
        num_forwards = batch.plan.num_rolled
    return replace(
        plain,
        rolled=to_device(batch.plan.rolled, plain.sample.device),
        clean_prediction=clean,
        num_forwards=num_forwards,
        jump=jump,
    )


def _with_passed(
    run: Run, batch: Batch, inputs: TrainingInputs, rolled: RolledInputs, passed: PassedStates
) -> TrainingInputs:
    """Add the states on the way as rows of their own, with the plain loss.

    Those of a rollout that failed, or without a target that fits them, are teacher-forced too, so
    that the count stays the plan's.
    """
    counts = tuple(
        len(plan.num_steps) + len(passed_states(plan, run.schedule, run.config.rollout))
        for plan in batch.plans
    )
    if rolled.kept is None:
        return replace(inputs, rows_per_rank=counts)
    rows = passed.samples
    x0, eps = batch.x0[rows], batch.eps[rows]
    alpha, sigma = run.schedule.alpha_sigma(passed.u)
    astray = to_device(without_target(run, passed.u), x0.device)
    failed = row_mask(rolled.failed[rows] | astray, x0)
    original = prediction_target(run.config.prediction_type, x0, eps, alpha, sigma)
    sample = torch.where(failed, add_noise(x0, eps, alpha, sigma), rolled.kept)
    aim = rollout_targets(run, batch, rows, sample, passed.u, original)
    clean = inputs.clean_prediction
    return replace(
        inputs,
        sample=torch.cat([inputs.sample, sample]),
        u=torch.cat([inputs.u, passed.u]),
        x0=torch.cat([inputs.x0, x0]),
        labels=torch.cat([inputs.labels, batch.labels[rows]]),
        target=torch.cat([inputs.target, torch.where(failed, original, aim)]),
        rolled=torch.cat([inputs.rolled, torch.zeros_like(rolled.failed[rows])]),
        batch_rows=torch.cat([inputs.batch_rows, rows]),
        clean_prediction=None if clean is None else torch.cat([clean, torch.zeros_like(sample)]),
        rows_per_rank=counts,
    )
