"""Distances against closed forms and hand computation."""

import math

import pytest
import torch

from raysched.evaluation import metrics


def gaussian(n: int, d: int, seed: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    raw = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean + std * raw


def test_kid_agrees_with_the_estimator_written_out_on_three_points():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    y = torch.tensor([[2.0, 0.0], [0.0, 0.0], [-1.0, 1.0]])
    # (x.y / 2 + 1)^3 by hand for the pairs 12, 13, 23 of each set and for all pairs across.
    within_x = (1.0**3 + 1.5**3 + 1.5**3) / 3
    within_y = (1.0**3 + 0.0**3 + 1.0**3) / 3
    across = (2.0**3 + 1 + 0.5**3) + (1 + 1 + 1.5**3) + (2.0**3 + 1 + 1)
    expected = within_x + within_y - 2 * across / 9
    assert metrics.kid(x, y) == pytest.approx(expected, abs=1e-12)


def test_kid_of_two_gaussians_equals_the_difference_of_their_moments():
    # In one dimension (xy + 1)^3 compares the first three moments with weights 3, 3 and 1.
    x, y = gaussian(2500, 1, 0, mean=0.5, std=0.5), gaussian(2500, 1, 1, std=0.5)
    second, third = 0.25 + 0.25, 0.125 + 3 * 0.5 * 0.25
    expected = 3 * 0.5**2 + 3 * (second - 0.25) ** 2 + third**2
    assert metrics.kid(x, y) == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("name", sorted(metrics.KERNELS))
def test_unbiased_distances_average_to_zero_when_the_laws_agree(name):
    kernel, draws = metrics.KERNELS[name], gaussian(1000 * 27, 4, 0, std=0.5).split(27)
    values = torch.tensor([metrics.METRICS[name](x[:12], x[12:]) for x in draws])
    standard_error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean())) < 3 * standard_error
    assert float(values.min()) < 0.0
    # The same means with the pairs i = j left in are far from zero: the check can fail.
    biased = [
        kernel(x[:12], x[:12]).mean()
        + kernel(x[12:], x[12:]).mean()
        - 2 * kernel(x[:12], x[12:]).mean()
        for x in draws
    ]
    assert float(torch.stack(biased).mean()) > 10 * standard_error


def test_energy_distance_of_shifted_gaussians_has_its_closed_form():
    shift = 1.3

    def mean_absolute(mu: float) -> float:  # E|Z| for Z ~ N(mu, 2)
        s = math.sqrt(2.0)
        return s * math.sqrt(2 / math.pi) * math.exp(-(mu**2) / 4) + mu * math.erf(mu / 2)

    expected = 2 * mean_absolute(shift) - 2 * mean_absolute(0.0)
    x, y = gaussian(3000, 1, 2, mean=shift), gaussian(3000, 1, 3)
    assert metrics.energy_distance(x, y) == pytest.approx(expected, rel=0.05)


def test_energy_distance_of_two_point_sets_is_exact():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0]])
    # 2 * mean(0, 3, 1, 2) - 1 - 3
    assert metrics.energy_distance(x, y) == pytest.approx(2 * 1.5 - 4.0, abs=1e-12)


def test_sliced_wasserstein_of_a_shift_is_the_projected_shift():
    x = gaussian(50, 3, 4)
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    expected = (shift @ metrics.projections(3)).square().mean().sqrt()
    assert metrics.sliced_wasserstein(x + shift, x) == pytest.approx(float(expected), abs=1e-12)
    assert metrics.sliced_wasserstein(x, x) == 0.0


def test_sliced_wasserstein_with_unequal_counts_is_the_exact_transport():
    # One dimension: mass 1/2 at 0 and at 1 against mass 1/3 at 0, 0 and 3.
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [0.0], [3.0]])
    # The upper half of x (at 1) sends 1/6 to 0 and 1/3 to 3.
    expected = math.sqrt(1 / 6 * 1 + 1 / 3 * 4)
    assert metrics.sliced_wasserstein(x, y) == pytest.approx(expected, abs=1e-12)


def test_frechet_distance_equals_the_closed_form_of_the_fitted_gaussians():
    x = gaussian(300, 3, 5) @ torch.tensor(
        [[1.0, 0.4, 0.0], [0.0, 0.8, 0.3], [0.0, 0.0, 1.5]], dtype=torch.float64
    )
    y = 0.7 + 1.2 * gaussian(400, 3, 6)
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross
    assert metrics.frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_stands_singular_covariances_and_counts_as_weights():
    x, y = gaussian(6, 20, 7), gaussian(9, 20, 8)
    assert metrics.frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    counts = torch.tensor([2.0, 0.0, 1.0, 1.0, 2.0, 0.0])
    repeated = x.repeat_interleave(counts.long(), 0)
    weighted = metrics.frechet_distance(x, y, weights_x=counts)
    assert weighted == pytest.approx(metrics.frechet_distance(repeated, y), rel=1e-9)
    assert not metrics.frechet_is_reliable(6, 9, 20)
    assert metrics.frechet_is_reliable(40, 50, 20)


@pytest.mark.parametrize("name", sorted(metrics.METRICS))
def test_every_distance_is_larger_for_a_worse_law(name):
    reference = gaussian(200, 4, 10, std=0.5)
    near = metrics.METRICS[name](gaussian(200, 4, 11, mean=0.1, std=0.5), reference)
    far = metrics.METRICS[name](gaussian(200, 4, 11, mean=0.6, std=0.5), reference)
    assert near < far


def test_weighted_statistics_of_unit_weights_equal_the_plain_ones():
    x, y = gaussian(7, 2, 12), gaussian(5, 2, 13)
    kernel = metrics.cubic_kernel
    pairs = [float(kernel(x, x)[i, j]) for i in range(7) for j in range(7) if i != j]
    ones = torch.ones(1, 7, dtype=torch.float64)
    assert float(metrics.within(kernel(x, x), ones)) == pytest.approx(sum(pairs) / 42)
    across = metrics.between(kernel(x, y), ones, torch.ones(1, 5, dtype=torch.float64))
    assert float(across) == pytest.approx(float(kernel(x, y).mean()))
