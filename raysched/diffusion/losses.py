"""Losses, one value per sample; reduction belongs to the training step.

ReflexFlow (arXiv 2512.04904) adds, for samples that were rolled out, a term that turns the
velocity at the self-made latent away from the drift's direction (anti-drift rectification, ADR),
and weights the residual by where the prediction changed (frequency compensation, FC). Its paper
has t = 0 for noise; here t = 0 is data and all directions are noise-ward.

Legend: B samples, D… sample dims.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

_FLOOR = 1e-6


def plain_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample, in fp32 (float64 stays float64).

    Args:
        prediction: (B, D…).
        target: (B, D…).

    Returns:
        (B,).
    """
    return (_wide(prediction) - _wide(target)).square().flatten(1).mean(dim=1)


def reflexflow_loss(
    v_pred: Tensor,
    target: Tensor,
    x_hat_t: Tensor,
    x0: Tensor,
    v_clean: Tensor | None,
    alpha: float = 1.0,
    beta1: float = 10.0,
    beta2: float = 1.0,
    norm: Literal["l1_sum", "l1_mean"] = "l1_sum",
    rolled: Tensor | None = None,
) -> Tensor:
    """beta2·mean(w·r²) + beta1·|v/|v| - d/|d||², per sample (arXiv 2512.04904).

    r = v_pred - target, d = x_hat_t - x0, w = 1 + alpha·delta/norm(delta) with
    delta = v_clean - v_pred. d and w are constants, as the target is: where a gradient flows
    through what made x_hat_t, it flows in by v_pred alone. Through d the model could meet the
    direction term by drifting along its own velocity, and training collapsed.

    Args:
        v_pred: (B, D…), prediction at x_hat_t, with gradient.
        target: (B, D…).
        x_hat_t: (B, D…), the self-made latent.
        x0: (B, D…), data.
        v_clean: (B, D…), prediction at the teacher-forced x_t; may be None if alpha is 0.
        alpha: weight of the frequency compensation.
        beta1: weight of the direction term.
        beta2: weight of the compensated residual.
        norm: l1_sum as published (nearly inert: w - 1 averages alpha/D), or l1_mean, where w is
            clipped at 0.
        rolled: (B,) bool; the others get exactly `plain_loss`. None: all.

    Returns:
        (B,).
    """
    plain = plain_loss(v_pred, target)
    v, residual = _wide(v_pred).flatten(1), (_wide(v_pred) - _wide(target)).flatten(1)
    compensated = plain
    if alpha != 0:
        assert v_clean is not None, "frequency compensation needs the clean prediction"
        weight = _compensation(_wide(v_clean).flatten(1) - v, alpha, norm)
        compensated = (weight * residual.square()).mean(dim=1)
    direction = (_wide(x_hat_t) - _wide(x0)).flatten(1).detach()
    drift = (_unit(v) - _unit(direction)).square().sum(dim=1)
    loss = beta2 * compensated + beta1 * drift
    return loss if rolled is None else torch.where(rolled.to(loss.device), loss, plain)


def _compensation(delta: Tensor, alpha: float, norm: str) -> Tensor:
    """w = 1 + alpha·delta/norm, (B, D), without gradient."""
    delta = delta.detach()
    size = delta.abs().sum(dim=1, keepdim=True)
    if norm == "l1_mean":
        size = size / delta.shape[1]
        return (1 + alpha * delta / size.clamp_min(_FLOOR)).clamp_min(0.0)
    return 1 + alpha * delta / size.clamp_min(_FLOOR)


def _unit(vector: Tensor) -> Tensor:
    """Rows divided by their length, which is floored."""
    length: Tensor = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    return vector / length.clamp_min(_FLOOR)


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()
