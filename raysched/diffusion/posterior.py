"""The mean of the data given a noisy state, over a reference batch.

Stable Target Field (Xu, Tong and Jaakkola 2023, arXiv 2302.00670): a single image is a noisy
label of what the network should say at a state that many images could have led to; the
self-normalised posterior mean over a batch depends on the state alone, at a bias that shrinks
with the batch.

Legend: n states, M reference images, D… sample dims.
"""

from __future__ import annotations

import torch
from torch import Tensor


def posterior_mean(
    x_t: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    reference: Tensor,
    allowed: Tensor,
) -> Tensor:
    """Mean of x0' under weights proportional to N(x_t; alpha·x0', sigma²), computed in float64.

    Args:
        x_t: (n, D…), states.
        x0: (n, D…), each state's own image, which always takes part.
        alpha: (n,).
        sigma: (n,), above 0.
        reference: (M, D…), other images.
        allowed: (n, M) bool, which of them take part: those that meet the state's condition.

    Returns:
        (n, D…) in the dtype of x0.
    """
    state, own, others = (v.double().flatten(1) for v in (x_t, x0, reference))
    alpha, sigma = (v.to(state)[:, None] for v in (alpha, sigma))
    # |x - alpha y|² up to |x|², which all weights of a state share.
    shared = alpha**2 * others.square().sum(dim=1) - 2 * alpha * (state @ others.T)
    single = alpha**2 * own.square().sum(1, keepdim=True) - 2 * alpha * (state * own).sum(
        1, keepdim=True
    )
    shared = shared.masked_fill(~allowed.to(state.device), torch.inf)
    log_weights = torch.cat([single, shared], dim=1) / (-2 * sigma**2)
    weights = torch.softmax(log_weights, dim=1)
    mean = weights[:, :1] * own + weights[:, 1:] @ others
    return mean.to(x0.dtype).view_as(x0)
