"""Intervals cover the truth as often as they say; pairing narrows them."""

import math

import pytest
import torch

from raysched.config.run import QualityMetric
from raysched.evaluation import bootstrap, metrics


def gaussian(n: int, d: int, seed: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    raw = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean + std * raw


def kid_truth(mean: float, std: float) -> float:
    """Cubic-kernel MMD^2 of N(mean, std^2) against N(0, std^2) in one dimension."""
    return 3 * mean**2 + 3 * mean**4 + (mean**3 + 3 * mean * std**2) ** 2


def energy_truth(mean: float, std: float) -> float:
    s = std * math.sqrt(2.0)

    def mean_absolute(mu: float) -> float:
        decay = math.exp(-(mu**2) / (2 * s * s))
        return s * math.sqrt(2 / math.pi) * decay + mu * math.erf(mu / (s * math.sqrt(2)))

    return 2 * mean_absolute(mean) - 2 * mean_absolute(0.0)


@pytest.mark.parametrize(
    ("metric", "truth"),
    [("kid", kid_truth(0.5, 0.5)), ("energy_distance", energy_truth(0.5, 0.5))],
)
def test_intervals_cover_the_truth_about_as_often_as_stated(metric: QualityMetric, truth: float):
    trials, hits = 150, 0
    for s in range(trials):
        x, y = gaussian(80, 1, s, mean=0.5, std=0.5), gaussian(90, 1, 5000 + s, std=0.5)
        found = bootstrap.q_interval([x], y, metric, num_bootstrap=150, confidence=0.9, seed=s)
        assert found.low <= found.high
        hits += found.low <= truth <= found.high
    assert 0.82 <= hits / trials <= 0.97


@pytest.mark.parametrize("metric", ["sliced_wasserstein", "frechet_distance"])
def test_resampled_distances_have_replicates_around_their_estimate(metric: QualityMetric):
    samples = [gaussian(60, 2, 1, mean=0.4), gaussian(60, 2, 2, mean=0.2)]
    reference = gaussian(70, 2, 3)
    values = bootstrap.q_replicates(samples, reference, metric, num_bootstrap=60)
    estimate = bootstrap.q_value(samples, reference, metric)
    assert float(values.mean()) == pytest.approx(estimate, abs=1e-12)
    assert float(values.std()) > 0.01


@pytest.mark.parametrize("metric", sorted(metrics.KERNELS))
def test_replicates_of_unbiased_distances_stay_centred_without_a_shift(metric: QualityMetric):
    x, y = gaussian(30, 2, 4), gaussian(30, 2, 5)
    values = bootstrap.q_replicates([x], y, metric, num_bootstrap=4000)
    error = float(values.std()) / math.sqrt(4000)
    assert abs(float(values.mean()) - bootstrap.q_value([x], y, metric)) < 4 * error


def test_replicates_equal_copied_rows_with_copies_of_a_row_never_paired():
    x, y = gaussian(5, 2, 6), gaussian(4, 2, 7)
    w = bootstrap.bootstrap_weights(3, 5, 0, 0)
    v = bootstrap.bootstrap_weights(3, 4, 0, 1)
    values = bootstrap.q_replicates([x], y, "energy_distance", num_bootstrap=3)
    for r in range(3):
        rows = torch.arange(5).repeat_interleave(w[r].long()).tolist()
        others = torch.arange(4).repeat_interleave(v[r].long()).tolist()

        def mean(a, b, rows_a, rows_b, distinct):
            terms = [
                float((a[i] - b[j]).norm())
                for i in rows_a
                for j in rows_b
                if not (distinct and i == j)
            ]
            return sum(terms) / len(terms)

        expected = 2 * mean(x, y, rows, others, False)
        expected -= mean(x, x, rows, rows, True) + mean(y, y, others, others, True)
        assert float(values[r]) == pytest.approx(expected, abs=1e-9)


def test_q_is_the_mean_over_the_nfes_and_the_interval_surrounds_it():
    samples = [gaussian(50, 3, 8, mean=0.5), gaussian(50, 3, 9, mean=0.3)]
    reference = gaussian(50, 3, 10)
    found = bootstrap.q_interval(samples, reference, "kid", num_bootstrap=100, confidence=0.95)
    expected = sum(metrics.kid(x, reference) for x in samples) / 2
    assert found.value == pytest.approx(expected)
    assert found.low < found.value < found.high


def test_a_paired_interval_is_narrower_than_an_unpaired_one_on_shared_noise():
    noise, reference = gaussian(120, 3, 11), gaussian(150, 3, 12)
    a, b = [0.8 * noise + 0.3], [0.8 * noise + 0.35]
    paired = bootstrap.paired_difference(a, b, reference, "kid", num_bootstrap=200)
    first = bootstrap.q_replicates(a, reference, "kid", num_bootstrap=200, seed=1)
    second = bootstrap.q_replicates(b, reference, "kid", num_bootstrap=200, seed=2)
    ends = torch.quantile(first - second, torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert paired.high - paired.low < 0.5 * float(ends[1] - ends[0])
    assert paired.low < paired.difference < paired.high


def test_a_clear_winner_wins_in_nearly_every_replicate_and_a_trial_ties_with_itself():
    noise, reference = gaussian(100, 3, 13), gaussian(100, 3, 14)
    won = bootstrap.paired_difference([noise], [noise + 1.0], reference, "energy_distance")
    assert won.difference < 0.0
    assert won.high < 0.0
    assert won.share_a_better > 0.99
    tie = bootstrap.paired_difference([noise], [noise], reference, "energy_distance")
    assert (tie.difference, tie.low, tie.high, tie.share_a_better) == (0.0, 0.0, 0.0, 0.0)


def test_paired_intervals_cover_the_true_difference_about_as_often_as_stated():
    truth = kid_truth(0.5, 0.5) - kid_truth(0.3, 0.5)
    trials, hits = 150, 0
    for s in range(trials):
        noise, y = gaussian(80, 1, s, std=0.5), gaussian(80, 1, 7000 + s, std=0.5)
        found = bootstrap.paired_difference(
            [noise + 0.5], [noise + 0.3], y, "kid", num_bootstrap=150, confidence=0.9, seed=s
        )
        hits += found.low <= truth <= found.high
    assert 0.82 <= hits / trials <= 0.97


def test_disagreeing_seeds_widen_the_interval():
    noise, reference = gaussian(80, 2, 15), gaussian(80, 2, 16)
    base = [noise + 0.5]
    agreeing = [([noise + 0.3], base)] * 3
    disagreeing = [([noise + 0.3], base), ([noise + 0.7], base), ([noise + 0.2], base)]
    narrow = bootstrap.paired_difference_over_seeds(agreeing, reference, "kid")
    wide = bootstrap.paired_difference_over_seeds(disagreeing, reference, "kid")
    assert narrow.num_seeds == wide.num_seeds == 3
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
    single = bootstrap.paired_difference(*agreeing[0], reference, "kid")
    assert narrow.difference == pytest.approx(single.difference)


def test_samples_that_are_not_finite_lose_without_a_crash():
    good, reference = gaussian(20, 2, 17), gaussian(20, 2, 18)
    bad = good.clone()
    bad[3, 1] = float("nan")
    found = bootstrap.q_interval([good, bad], reference, "kid", num_bootstrap=20, confidence=0.9)
    assert found.value == found.low == found.high == float("inf")
    lost = bootstrap.paired_difference([bad], [good], reference, "kid", num_bootstrap=20)
    assert (lost.difference, lost.share_a_better) == (float("inf"), 0.0)
    won = bootstrap.paired_difference([good], [bad], reference, "kid", num_bootstrap=20)
    assert (won.difference, won.share_a_better) == (float("-inf"), 1.0)
    both = bootstrap.paired_difference([bad], [bad], reference, "kid", num_bootstrap=20)
    assert both.low < both.difference < both.high


def test_pairs_of_different_shape_are_refused():
    x, reference = gaussian(10, 2, 19), gaussian(10, 2, 20)
    with pytest.raises(ValueError, match="same number of rows"):
        bootstrap.paired_difference([x], [x[:9]], reference, "kid", num_bootstrap=20)


def test_weights_are_repeatable_and_draw_as_often_as_there_are_rows():
    first = bootstrap.bootstrap_weights(50, 12, 3, 0)
    assert torch.equal(first, bootstrap.bootstrap_weights(50, 12, 3, 0))
    assert not torch.equal(first, bootstrap.bootstrap_weights(50, 12, 3, 1))
    assert torch.equal(first.sum(1), torch.full((50,), 12.0, dtype=torch.float64))
