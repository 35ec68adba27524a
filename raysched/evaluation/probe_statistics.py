"""Statistics of exposure bias, each with its bootstrap replicates.

Every statistic takes weights (one row per replicate) and returns one value per row. Row 0 is all
ones, so its value is the estimate. Runs that are compared get the same weights: what they share,
the noise and the data, cancels in their difference.

Legend: R replicates (plus the estimate), n sampled and m forward states, D… sample dims, S
statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raysched.evaluation.bootstrap import Interval, bootstrap_weights
from raysched.evaluation.metrics import between, negative_distance, within

NUM_BANDS = 4
# Tiny spreads, as of a statistic that is 0 in every replicate, must not be divided by.
SPREAD_FLOOR = 1e-12
_SPLIT_STREAM = 7


@dataclass(frozen=True, eq=False)
class Weights:
    """Bootstrap weights that all runs of a probe share; row 0 of each is the estimate's.

    Args:
        walk: (R + 1, n) of the states sampled from noise.
        forward: (R + 1, m) of the forward states.
        pairs: (R + 1, p) of the pairs that rollouts start from.
    """

    walk: Tensor
    forward: Tensor
    pairs: Tensor

    @classmethod
    def draw(cls, n: int, m: int, p: int, *, num_bootstrap: int, seed: int) -> Weights:
        """Multinomial counts below a row of ones."""

        def counts(size: int, stream: int) -> Tensor:
            ones = torch.ones(1, size, dtype=torch.float64)
            return torch.cat([ones, bootstrap_weights(num_bootstrap, size, seed, stream)])

        return cls(counts(n, 10), counts(m, 11), counts(p, 12))


def population_energy(x: Tensor, y: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Energy distance of two independent samples: (R + 1,).

    Args:
        x: (n, D…) sampled states.
        y: (m, D…) forward states.
        w: (R + 1, n).
        v: (R + 1, m).
    """
    x, y = x.flatten(1), y.flatten(1)
    own = within(negative_distance(x, x), w) + within(negative_distance(y, y), v)
    return own - 2.0 * between(negative_distance(x, y), w, v)


def paired_energy(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Energy distance of the laws of x and y from pairs (x_i, y_i): (R + 1,).

    Unbiased although x_i and y_i depend on each other, because only rows i != j meet; and far
    less noisy than with independent samples, because what they share cancels.

    Args:
        x: (n, D…) self-made states.
        y: (n, D…) teacher-forced states from the same data and noise.
        w: (R + 1, n).
    """
    x, y = x.flatten(1), y.flatten(1)
    across = negative_distance(x, y)
    kernel = negative_distance(x, x) + negative_distance(y, y) - across - across.T
    return within(kernel, w)


def same_law_floor(
    y: Tensor, num_sampled: int, *, num_splits: int, confidence: float, seed: int
) -> Interval:
    """Energy distances between random halves of the forward states: what chance alone gives.

    Under equal laws the spread goes with 1/n + 1/m, so that of two halves is scaled to the sizes
    of the comparison.

    Args:
        y: (m, D…) forward states, m >= 4.
        num_sampled: n, sampled states of the comparison.
        num_splits: random halvings.
        confidence: share of the halvings that lie below the upper end.
        seed: of the halvings.

    Returns:
        Mean, lower and (one-sided) upper end.
    """
    m = len(y)
    half = m // 2
    generator = torch.Generator().manual_seed(seed + _SPLIT_STREAM)
    first = torch.zeros(num_splits, m, dtype=torch.float64)
    for row in first:
        row[torch.randperm(m, generator=generator)[:half]] = 1.0
    kernel = negative_distance(y.flatten(1), y.flatten(1))
    second = 1.0 - first
    halves = within(kernel, first) + within(kernel, second) - 2 * between(kernel, first, second)
    scaled = halves * (1 / num_sampled + 1 / m) / (1 / half + 1 / (m - half))
    ends = torch.tensor([1 - confidence, confidence], dtype=torch.float64)
    low, high = torch.quantile(scaled, ends).tolist()
    return Interval(float(scaled.mean()), low, high)


def weighted_mean(values: Tensor, w: Tensor) -> Tensor:
    """Mean of one value per sample, (n,), under weights (R + 1, n): (R + 1,)."""
    return (w @ values.double()) / w.sum(1)


def rms(x: Tensor) -> Tensor:
    """Root mean square over the elements of each sample: (n, D…) -> (n,) float64."""
    return x.flatten(1).double().square().mean(1).sqrt()


def noise_spread(x_t: Tensor, x0: Tensor, alpha: float) -> Tensor:
    """Standard deviation over the pixels of x_t - alpha·x0, (n,) (ADM-ES, arXiv 2308.15321)."""
    return (x_t.double() - alpha * x0.double()).flatten(1).std(1)


def band_energies(x: Tensor) -> Tensor:
    """Mean power in rings of spatial frequency: (n, bands) float64; white noise has 1 in all.

    Ring b holds |f| in [b, b + 1)/8 cycles per pixel, the last one all beyond 3/8 with the
    corners. Rings without a frequency, in very small images, are NaN.

    Args:
        x: (n, C, H, W).
    """
    height, width = x.shape[-2:]
    power = torch.fft.fft2(x.double(), norm="ortho").abs().square().mean(1).flatten(1)
    f_y = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    f_x = torch.fft.fftfreq(width, dtype=torch.float64)[None, :]
    ring = ((f_y**2 + f_x**2).sqrt() * 2 * NUM_BANDS).long().clamp_max(NUM_BANDS - 1).flatten()
    return torch.stack([power[:, ring == band].mean(1) for band in range(NUM_BANDS)], dim=1)


def interval(replicates: Tensor, confidence: float) -> Interval:
    """The estimate (row 0) and the percentile interval of the rest: (R + 1,)."""
    tail = (1.0 - confidence) / 2.0
    ends = torch.tensor([tail, 1.0 - tail], dtype=torch.float64)
    low, high = torch.quantile(replicates[1:], ends).tolist()
    return Interval(float(replicates[0]), low, high)


def simultaneous(replicates: Tensor, confidence: float) -> list[Interval]:
    """Intervals that hold for all statistics at once, by the bootstrap of the largest deviation.

    Args:
        replicates: (S, R + 1), with common weights.
        confidence: chance that every interval covers.
    """
    estimate, drawn = replicates[:, :1], replicates[:, 1:]
    spread = drawn.std(1, keepdim=True)
    deviation = (drawn - drawn.mean(1, keepdim=True)).abs() / spread.clamp_min(SPREAD_FLOOR)
    width = torch.quantile(deviation.max(0).values, confidence) * spread
    rows = torch.cat([estimate, estimate - width, estimate + width], dim=1).tolist()
    return [Interval(*row) for row in rows]
