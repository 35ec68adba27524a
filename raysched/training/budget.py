"""How much of the budget is spent, and what depends on it: learning rate, evaluations, the end."""

from __future__ import annotations

import math

import torch

from raysched.config.run import BudgetConfig, OptimizerConfig, RunConfig
from raysched.diffusion.compute import ComputeMeter

# Evaluations over a run whose interval is not given.
DEFAULT_EVALUATIONS = 4


def fraction_spent(budget: BudgetConfig, step: int, meter: ComputeMeter) -> float:
    """Share of the budget spent, in its own unit; 1 or more when it is used up.

    Args:
        budget: steps, forward equivalents or seconds of training.
        step: optimizer steps done.
        meter: compute spent so far.
    """
    if budget.steps is not None:
        return step / budget.steps
    if budget.forward_equivalents is not None:
        return meter.forward_equivalents / budget.forward_equivalents
    assert budget.seconds is not None, "the config model guarantees one unit"
    return training_seconds(meter) / budget.seconds


def training_seconds(meter: ComputeMeter) -> float:
    """Seconds of rollouts and gradient steps, evaluation and checkpoints left out."""
    if meter.agreed_seconds is not None:
        return meter.agreed_seconds
    return meter.seconds("rollout") + meter.seconds("training")


def agree_on_seconds(meter: ComputeMeter, device: torch.device) -> None:
    """Let all ranks go by rank 0's clock, so that they end after the same step; a collective."""
    meter.agreed_seconds = None
    seconds = torch.tensor([training_seconds(meter)], dtype=torch.float64, device=device)
    torch.distributed.broadcast(seconds, src=0)
    meter.agreed_seconds = float(seconds.item())


def learning_rate_at(config: OptimizerConfig, fraction: float) -> float:
    """Learning rate after a fraction of the budget: linear warm-up, then the schedule's decay."""
    fraction = min(max(fraction, 0.0), 1.0)
    if fraction < config.warmup_fraction:
        return config.learning_rate * fraction / config.warmup_fraction
    rest = (fraction - config.warmup_fraction) / (1.0 - config.warmup_fraction)
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - rest)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * rest))
    return config.learning_rate


def evaluation_due(
    config: RunConfig, before: tuple[float, float], after: tuple[float, float]
) -> bool:
    """Whether an evaluation falls due between two moments of training.

    Args:
        config: the run; `evaluation.every_forward_equivalents` or a quarter of the budget.
        before: (fraction of the budget, forward equivalents) before a step.
        after: the same after it.
    """
    if not config.evaluation.enabled:
        return False
    if after[0] >= 1.0:
        return True
    every = config.evaluation.every_forward_equivalents
    if every is None:
        return int(after[0] * DEFAULT_EVALUATIONS) > int(before[0] * DEFAULT_EVALUATIONS)
    return int(after[1] / every) > int(before[1] / every)


def picture_step(config: RunConfig, fraction: float, forward_equivalents: float) -> int:
    """Where an evaluation's pictures stand on the slider of an image grid.

    Trials of a sweep reach an evaluation after different numbers of optimizer steps, and a slider
    shows pictures of one step only; so they stand where the evaluation fell due, which is the same
    for all of them: in forward equivalents, or in the unit of a budget in steps or seconds.

    Args:
        config: the run.
        fraction: share of the budget spent at the evaluation.
        forward_equivalents: spent at the evaluation.
    """
    budget, every = config.training.budget, config.evaluation.every_forward_equivalents
    total = budget.steps or budget.forward_equivalents or budget.seconds
    assert total is not None, "the config model guarantees one unit"
    if every is not None and (fraction < 1.0 or budget.forward_equivalents is None):
        return round(int(forward_equivalents / every) * every)
    return round(min(int(fraction * DEFAULT_EVALUATIONS) / DEFAULT_EVALUATIONS, 1.0) * total)


def probe_due(config: RunConfig, before: float, after: float) -> bool:
    """Whether an exposure-bias probe falls due between two amounts of forward equivalents."""
    every = config.evaluation.probe_every_forward_equivalents
    if every is None or not config.evaluation.enabled:
        return False
    return int(after / every) > int(before / every)
