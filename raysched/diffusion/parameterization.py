"""What a network predicts, and every conversion between predictions; signs live here only.

`x0` data, `eps` unit Gaussian, `t` in [0, 1] with 0 = data and 1 = noise,
`x_t = alpha·x0 + sigma·eps`, `velocity = dx_t/dt`, on the linear path `eps - x0`. Sampling walks
t downwards. The four prediction types are

    epsilon        eps
    v_prediction   alpha·eps - sigma·x0   (Salimans and Ho 2022, arXiv 2202.00512)
    sample         x0
    flow_matching  eps - x0               (Lipman et al. 2023, arXiv 2210.02747)

and each is linear in (x0, eps), so x0 and eps are linear in (x_t, prediction). Those
coefficients are what solver tables are folded from.

Legend: B samples, D… sample dims; alpha and sigma are (B,) or of any shape that the caller
broadcasts itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raysched.config.run import PredictionType
from raysched.diffusion.transfer import to_device

# An epsilon model says nothing about x0 where alpha = 0, and a sample model nothing about eps
# where sigma = 0; the divisor is floored there, far below any value that training visits.
DIVISOR_FLOOR = 1e-8
# Below this sigma the anchored target divides rounding errors by almost nothing.
ANCHOR_SIGMA_FLOOR = 0.05


def broadcast(coefficient: Tensor, like: Tensor) -> Tensor:
    """A (B,) coefficient on the device and in the dtype of `like`, shaped (B, 1, …)."""
    shape = (-1,) + (1,) * (like.ndim - 1)
    return to_device(coefficient, like.device, like.dtype).reshape(shape)


def add_noise(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = alpha·x0 + sigma·eps, (B, D…)."""
    return broadcast(alpha, x0) * x0 + broadcast(sigma, x0) * eps


def prediction_target(
    prediction_type: PredictionType, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """The teacher-forced target of a prediction type, (B, D…)."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x0
    if prediction_type == "flow_matching":
        return eps - x0
    return broadcast(alpha, x0) * eps - broadcast(sigma, x0) * x0


def anchored_target(
    prediction_type: PredictionType,
    x0: Tensor,
    x_hat_t: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    original: Tensor,
    floor: float = ANCHOR_SIGMA_FLOOR,
) -> Tensor:
    """The target that is consistent with a self-made latent: eps* = (x_hat_t - alpha·x0)/sigma.

    Args:
        prediction_type: what the network predicts.
        x0: (B, D…), data.
        x_hat_t: (B, D…), the latent that the network is trained on.
        alpha: (B,), at the target time.
        sigma: (B,), at the target time.
        original: (B, D…), the teacher-forced target, used where sigma < floor.
        floor: smallest sigma that is divided by.

    Returns:
        (B, D…); equal to `original` up to rounding if x_hat_t is x_t.
    """
    usable = sigma >= floor
    divisor = torch.where(usable, sigma, torch.ones_like(sigma))
    eps_star = (x_hat_t - broadcast(alpha, x0) * x0) / broadcast(divisor, x0)
    target = prediction_target(prediction_type, x0, eps_star, alpha, sigma)
    return torch.where(broadcast(usable.double(), x0) > 0, target, original)


def x0_coefficients(
    prediction_type: PredictionType, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """(c_x, c_out) with x0 = c_x·x_t + c_out·prediction, elementwise in alpha and sigma."""
    if prediction_type == "sample":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "epsilon":
        # Dividing rounding errors by almost nothing would explode: there x0 counts as 0.
        known = (alpha > DIVISOR_FLOOR).to(alpha.dtype)
        divisor = alpha.clamp_min(DIVISOR_FLOOR)
        return known / divisor, -sigma * known / divisor
    if prediction_type == "flow_matching":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    power = alpha**2 + sigma**2
    return alpha / power, -sigma / power


def eps_coefficients(
    prediction_type: PredictionType, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """(e_x, e_out) with eps = e_x·x_t + e_out·prediction, elementwise in alpha and sigma."""
    if prediction_type == "epsilon":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "sample":
        divisor = sigma.clamp_min(DIVISOR_FLOOR)
        return 1 / divisor, -alpha / divisor
    if prediction_type == "flow_matching":
        return 1 / (alpha + sigma), alpha / (alpha + sigma)
    power = alpha**2 + sigma**2
    return sigma / power, alpha / power


def x0_eps_from_prediction(
    prediction_type: PredictionType, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """x0 and eps that a prediction at x_t implies, both (B, D…)."""
    c_x, c_out = x0_coefficients(prediction_type, alpha.double(), sigma.double())
    e_x, e_out = eps_coefficients(prediction_type, alpha.double(), sigma.double())
    x0 = broadcast(c_x, x_t) * x_t + broadcast(c_out, x_t) * prediction
    return x0, broadcast(e_x, x_t) * x_t + broadcast(e_out, x_t) * prediction


def velocity_from_prediction(
    prediction_type: PredictionType, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """The linear path's velocity eps - x0 that a prediction at x_t implies, (B, D…)."""
    if prediction_type == "flow_matching":
        return prediction
    x0, eps = x0_eps_from_prediction(prediction_type, prediction, x_t, alpha, sigma)
    return eps - x0
