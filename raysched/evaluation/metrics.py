"""Distances between the law of the samples and that of the reference; lower is better.

Everything is computed in float64 on flat features. Kernel statistics (KID, energy distance) are
U-statistics: unbiased, so they may be negative when the laws agree. They take one weight per row,
which is how the bootstrap resamples them without copying a row (a copy would meet itself and bias
the statistic).

Legend: n samples, m reference rows, D features, R bootstrap replicates, P projections.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from raysched.config.run import QualityMetric

NUM_PROJECTIONS = 64
Kernel = Callable[[Tensor, Tensor], Tensor]


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / D + 1)^3, the kernel of KID (Binkowski et al. 2018, arXiv 1801.01401, section 4).

    Args:
        x: (n, D) features.
        y: (m, D) features.

    Returns:
        (n, m) kernel values, float64.
    """
    x, y = x.double(), y.double()
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def negative_distance(x: Tensor, y: Tensor) -> Tensor:
    """-|x - y|; as a kernel it turns the MMD into the energy distance (Sejdinovic et al. 2013).

    Args:
        x: (n, D) features.
        y: (m, D) features.

    Returns:
        (n, m) negative Euclidean distances, float64.
    """
    return -torch.cdist(x.double(), y.double())


KERNELS: dict[QualityMetric, Kernel] = {
    "kid": cubic_kernel,
    "energy_distance": negative_distance,
}


def within(kernel_xx: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the kernel over pairs i != j of one sample.

    Args:
        kernel_xx: (n, n) symmetric kernel matrix.
        weights: (R, n) non-negative weights (all one: the plain U-statistic).

    Returns:
        (R,) means, one per row of weights.
    """
    diagonal = torch.diagonal(kernel_xx)
    squares = weights.square()
    pairs = ((weights @ kernel_xx) * weights).sum(1) - squares @ diagonal
    return pairs / (weights.sum(1).square() - squares.sum(1))


def between(kernel_xy: Tensor, weights_x: Tensor, weights_y: Tensor) -> Tensor:
    """Weighted mean of the kernel over pairs of two samples.

    Args:
        kernel_xy: (n, m) kernel matrix.
        weights_x: (R, n) non-negative weights.
        weights_y: (R, m) non-negative weights.

    Returns:
        (R,) means, one per row of weights.
    """
    pairs = ((weights_x @ kernel_xy) * weights_y).sum(1)
    return pairs / (weights_x.sum(1) * weights_y.sum(1))


def kid(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD with the cubic kernel (Gretton et al. 2012, lemma 6).

    Args:
        x: (n, D) features of the samples, n >= 2.
        y: (m, D) features of the reference, m >= 2.

    Returns:
        The estimate; it may be negative.
    """
    return _mmd(cubic_kernel, x, y)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X-Y| - E|X-X'| - E|Y-Y'| as a U-statistic (Szekely and Rizzo 2013).

    Args:
        x: (n, D) features of the samples, n >= 2.
        y: (m, D) features of the reference, m >= 2.

    Returns:
        The estimate; it may be negative.
    """
    return _mmd(negative_distance, x, y)


def _mmd(kernel: Kernel, x: Tensor, y: Tensor) -> float:
    wx = torch.ones(1, len(x), dtype=torch.float64)
    wy = torch.ones(1, len(y), dtype=torch.float64)
    value = within(kernel(x, x), wx) + within(kernel(y, y), wy)
    return float(value - 2.0 * between(kernel(x, y), wx, wy))


@functools.lru_cache(maxsize=8)
def projections(num_features: int) -> Tensor:
    """Fixed unit directions, the same for all trials: (D, P), float64."""
    raw = np.random.default_rng(20_240_601).standard_normal((num_features, NUM_PROJECTIONS))
    return torch.from_numpy(raw / np.linalg.norm(raw, axis=0))


@functools.lru_cache(maxsize=8)
def _quantile_grid(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pieces of [0, 1] on which both empirical quantile functions are constant.

    Returns:
        Ranks in the samples, ranks in the reference, lengths of the pieces; each (pieces,).
    """
    # Breakpoints in units of 1 / (n m) are exact integers; floats would misplace common ones.
    edges = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    left, length = edges[:-1], np.diff(edges) / (n * m)
    return torch.from_numpy(left // m), torch.from_numpy(left // n), torch.from_numpy(length)


def sliced_wasserstein(x: Tensor, y: Tensor) -> float:
    """Sliced 2-Wasserstein distance (Bonneel et al. 2015) over fixed projections.

    Args:
        x: (n, D) features of the samples.
        y: (m, D) features of the reference.

    Returns:
        Root of the mean squared 1-D distance; exact per projection, also for n != m.
    """
    directions = projections(x.shape[1])
    return sliced_wasserstein_of_projected(x.double() @ directions, y.double() @ directions)


def sliced_wasserstein_of_projected(x: Tensor, y: Tensor) -> float:
    """The same on values that are already projected: (n, P) and (m, P)."""
    rank_x, rank_y, length = _quantile_grid(len(x), len(y))
    gap = x.sort(0).values[rank_x] - y.sort(0).values[rank_y]
    return float((gap.square().mean(1) @ length).sqrt())


def frechet_distance(
    x: Tensor, y: Tensor, weights_x: Tensor | None = None, weights_y: Tensor | None = None
) -> float:
    """Squared Frechet distance of two Gaussian fits (Heusel et al. 2017), biased upwards.

    The trace of (S_x S_y)^(1/2) is the nuclear norm of A B^T for any factors S_x = A^T A and
    S_y = B^T B: no matrix root, and nothing breaks when a covariance is singular.

    Args:
        x: (n, D) features of the samples.
        y: (m, D) features of the reference.
        weights_x: (n,) bootstrap counts; default: ones.
        weights_y: (m,) bootstrap counts; default: ones.

    Returns:
        |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)).
    """
    mean_x, factor_x = _gaussian_fit(x.double(), weights_x)
    mean_y, factor_y = _gaussian_fit(y.double(), weights_y)
    spread = factor_x.square().sum() + factor_y.square().sum()
    overlap = torch.linalg.svdvals(factor_x @ factor_y.T).sum()
    return float((mean_x - mean_y).square().sum() + spread - 2.0 * overlap)


def frechet_is_reliable(n: int, m: int, num_features: int) -> bool:
    """Whether both covariances rest on at least twice as many rows as features."""
    return min(n, m) >= 2 * num_features


def _gaussian_fit(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean (D,) and a factor A (min(n, D), D) with A^T A = covariance."""
    w = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.double()
    mean = (w @ x) / w.sum()
    centred = (x - mean) * (w / (w.sum() - 1.0)).sqrt()[:, None]
    if len(x) > x.shape[1]:
        centred = torch.linalg.qr(centred, mode="r").R
    return mean, centred


METRICS: dict[QualityMetric, Callable[[Tensor, Tensor], float]] = {
    "kid": kid,
    "energy_distance": energy_distance,
    "sliced_wasserstein": sliced_wasserstein,
    "frechet_distance": frechet_distance,
}
