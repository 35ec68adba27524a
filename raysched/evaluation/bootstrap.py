"""Bootstrap intervals of q, and of the difference between two trials on the same noise.

q is the mean of one metric over several NFEs. Sample i of every NFE and of every trial starts from
the same noise, so a replicate gives index i one weight everywhere: what the trials share cancels
in their difference. The reference is resampled as well. The labels of the samples are balanced by
design while the weights are drawn without regard to them, which makes intervals a little wide.

Legend: n samples, m reference rows, D features, R bootstrap replicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raysched.config.run import QualityMetric
from raysched.evaluation import metrics
from raysched.evaluation.few_seeds import interval_of, seed_spread


@dataclass(frozen=True)
class Interval:
    """A value with its bootstrap percentile interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """q of trial a minus q of trial b, with its paired interval.

    Args:
        difference: q_a - q_b; negative: a is better.
        low: lower end of the interval.
        high: upper end of the interval.
        share_a_better: share of the replicates in which q_a < q_b.
        num_seeds: seeds that it rests on.
        dof: degrees of freedom of its error; inf with a single seed, whose spread is unknown.
    """

    difference: float
    low: float
    high: float
    share_a_better: float
    num_seeds: int = 1
    dof: float = float("inf")


def bootstrap_weights(num_replicates: int, size: int, seed: int, stream: int) -> Tensor:
    """Multinomial counts: how often a replicate drew each row.

    Args:
        num_replicates: R.
        size: number of rows to draw from, and draws per replicate.
        seed: seed of the bootstrap.
        stream: separates samples from reference and seeds.

    Returns:
        (R, size) counts, float64; each row sums to `size`.
    """
    rng = np.random.default_rng([seed, stream])
    counts = rng.multinomial(size, np.full(size, 1.0 / size), size=num_replicates)
    return torch.from_numpy(counts.astype(np.float64))


def q_value(samples: Sequence[Tensor], reference: Tensor, metric: QualityMetric) -> float:
    """q: the metric's mean over the NFEs.

    Args:
        samples: per NFE (n, D) features.
        reference: (m, D) features.
        metric: name of the distance.

    Returns:
        The mean distance; inf if any feature is not finite.
    """
    if not all(bool(torch.isfinite(x).all()) for x in samples):
        return float("inf")
    return float(np.mean([metrics.METRICS[metric](x, reference) for x in samples]))


def q_replicates(
    samples: Sequence[Tensor],
    reference: Tensor,
    metric: QualityMetric,
    *,
    num_bootstrap: int,
    seed: int = 0,
) -> Tensor:
    """q in every bootstrap replicate; replicate r of two trials uses the same weights.

    Distances that are not U-statistics grow when rows repeat; their replicates are shifted so
    that their mean is the estimate itself, which keeps the spread and drops that bias.

    Args:
        samples: per NFE (n, D) features, the same n for all.
        reference: (m, D) features.
        metric: name of the distance.
        num_bootstrap: R.
        seed: seed of the weights.

    Returns:
        (R,) values, float64.
    """
    if not all(bool(torch.isfinite(x).all()) for x in samples):
        return torch.full((num_bootstrap,), float("inf"), dtype=torch.float64)
    w = bootstrap_weights(num_bootstrap, len(samples[0]), seed, 0)
    v = bootstrap_weights(num_bootstrap, len(reference), seed, 1)
    if metric in metrics.KERNELS:
        return _kernel_replicates(samples, reference, metrics.KERNELS[metric], w, v)
    resampled = _sliced_replicates if metric == "sliced_wasserstein" else _frechet_replicates
    values = resampled(samples, reference, w, v)
    return values - values.mean() + q_value(samples, reference, metric)


def _kernel_replicates(
    samples: Sequence[Tensor], reference: Tensor, kernel: metrics.Kernel, w: Tensor, v: Tensor
) -> Tensor:
    total = metrics.within(kernel(reference, reference), v)
    for x in samples:
        own = metrics.within(kernel(x, x), w)
        total = total + (own - 2.0 * metrics.between(kernel(x, reference), w, v)) / len(samples)
    return total


def _sliced_replicates(
    samples: Sequence[Tensor], reference: Tensor, w: Tensor, v: Tensor
) -> Tensor:
    directions = metrics.projections(reference.shape[1])
    projected = [x.double() @ directions for x in samples]
    projected_reference = reference.double() @ directions
    rows = []
    for counts, reference_counts in zip(w.long(), v.long(), strict=True):
        y = projected_reference.repeat_interleave(reference_counts, 0)
        drawn = [x.repeat_interleave(counts, 0) for x in projected]
        rows.append(np.mean([metrics.sliced_wasserstein_of_projected(x, y) for x in drawn]))
    return torch.tensor(rows, dtype=torch.float64)


def _frechet_replicates(
    samples: Sequence[Tensor], reference: Tensor, w: Tensor, v: Tensor
) -> Tensor:
    rows = [
        np.mean([metrics.frechet_distance(x, reference, a, b) for x in samples])
        for a, b in zip(w, v, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def q_interval(
    samples: Sequence[Tensor],
    reference: Tensor,
    metric: QualityMetric,
    *,
    num_bootstrap: int,
    confidence: float,
    seed: int = 0,
) -> Interval:
    """q with its bootstrap interval; all inf if any feature is not finite.

    Args:
        samples: per NFE (n, D) features, the same n for all.
        reference: (m, D) features.
        metric: name of the distance.
        num_bootstrap: replicates.
        confidence: level of the interval, e.g. 0.95.
        seed: seed of the weights.

    Returns:
        The estimate and the percentile interval.
    """
    value = q_value(samples, reference, metric)
    if not np.isfinite(value):
        return Interval(value, value, value)
    replicates = q_replicates(samples, reference, metric, num_bootstrap=num_bootstrap, seed=seed)
    low, high = _percentiles(replicates, confidence)
    return Interval(value, low, high)


def paired_difference(
    samples_a: Sequence[Tensor],
    samples_b: Sequence[Tensor],
    reference: Tensor,
    metric: QualityMetric,
    *,
    num_bootstrap: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """q_a - q_b for two trials whose samples come from the same noise.

    Args:
        samples_a: per NFE (n, D) features of trial a.
        samples_b: the same for trial b; row i from the noise of row i of a.
        reference: (m, D) features.
        metric: name of the distance.
        num_bootstrap: replicates.
        confidence: level of the interval.
        seed: seed of the weights.

    Returns:
        The difference with its paired interval.
    """
    return paired_difference_over_seeds(
        [(samples_a, samples_b)],
        reference,
        metric,
        num_bootstrap=num_bootstrap,
        confidence=confidence,
        seed=seed,
    )


def paired_difference_over_seeds(
    pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
    reference: Tensor,
    metric: QualityMetric,
    *,
    num_bootstrap: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Mean over training seeds of q_a - q_b, resampling the seeds as well as the samples.

    Args:
        pairs: per training seed the features (per NFE) of trial a and of trial b.
        reference: (m, D) features.
        metric: name of the distance.
        num_bootstrap: replicates.
        confidence: level of the interval.
        seed: seed of the weights.

    Returns:
        The difference; from two seeds on its interval has the width of Student's t. One seed
        tells nothing of the spread between seeds: name their number with it.
    """
    for a, b in pairs:
        if [len(x) for x in a] != [len(x) for x in b]:
            raise ValueError("paired samples must have the same NFEs and the same number of rows")

    def replicates(samples: Sequence[Tensor]) -> Tensor:
        return q_replicates(samples, reference, metric, num_bootstrap=num_bootstrap, seed=seed)

    # inf or -inf where one trial diverged, NaN where both did.
    per_seed = torch.stack([replicates(a) - replicates(b) for a, b in pairs], 1)
    if not bool(torch.isfinite(per_seed).all()):
        return _diverged(per_seed)
    points = [q_value(a, reference, metric) - q_value(b, reference, metric) for a, b in pairs]
    seed_weights = bootstrap_weights(num_bootstrap, len(pairs), seed, 2) / len(pairs)
    drawn = (per_seed * seed_weights).sum(1)
    share = float((drawn < 0).double().mean())
    point = float(np.mean(points))
    if len(pairs) == 1:
        return Difference(point, *_percentiles(drawn, confidence), share)
    spread = seed_spread(points, per_seed)
    low, high = interval_of(point, spread, confidence)
    return Difference(point, low, high, share, len(pairs), spread.dof)


def _diverged(per_seed: Tensor) -> Difference:
    """The verdict when samples are not finite: who produced them lost; both: undecided."""
    num_seeds = per_seed.shape[1]
    a_lost = bool((per_seed == float("inf")).any())
    b_lost = bool((per_seed == float("-inf")).any())
    if a_lost == b_lost:
        return Difference(0.0, float("-inf"), float("inf"), 0.5, num_seeds)
    end = float("inf") if a_lost else float("-inf")
    return Difference(end, end, end, 0.0 if a_lost else 1.0, num_seeds)


def _percentiles(replicates: Tensor, confidence: float) -> tuple[float, float]:
    tail = (1.0 - confidence) / 2.0
    ends = torch.tensor([tail, 1.0 - tail], dtype=torch.float64)
    low, high = torch.quantile(replicates, ends).tolist()
    return low, high
