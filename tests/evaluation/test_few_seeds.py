import math
import random

import pytest
import torch
from scipy import stats

from raysched.evaluation.bootstrap import bootstrap_weights
from raysched.evaluation.few_seeds import interval_of, quantile, seed_spread, two_sided_p

Z = 1.959963985


def interval(points: list[float], within: float, generator: torch.Generator):
    """The interval that a bootstrap over seeds and samples gives, and the plain percentiles."""
    shared = torch.randn(250, 1, generator=generator, dtype=torch.float64) * within
    replicates = torch.tensor(points, dtype=torch.float64) + shared
    weights = bootstrap_weights(250, len(points), 0, 2) / len(points)
    drawn = (replicates * weights).sum(1)
    plain = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    point = sum(points) / len(points)
    spread = seed_spread(points, replicates)
    return interval_of(point, spread, 0.95), plain


def missed(num_seeds: int, within: float) -> tuple[int, int]:
    """Of 400 repetitions around a true 0: intervals without it, ours and plain percentiles."""
    rng, generator = random.Random(7), torch.Generator().manual_seed(0)
    wide = narrow = 0
    for _ in range(400):
        common = rng.gauss(0, within)
        points = [common + rng.gauss(0, 1) for _ in range(num_seeds)]
        (low, high), plain = interval(points, within, generator)
        wide += not low <= 0 <= high
        narrow += not plain[0] <= 0 <= plain[1]
    return wide, narrow


@pytest.mark.parametrize(("num_seeds", "within"), [(3, 0.0), (3, 0.5)])
def test_intervals_over_few_seeds_miss_as_seldom_as_they_say_and_plain_ones_far_more_often(
    num_seeds, within
):
    wide, narrow = missed(num_seeds, within)
    # 5 % of 400 are 20, with a standard deviation of 4.4.
    assert wide <= 30
    assert narrow >= 36


def test_where_the_seeds_agree_the_interval_is_the_one_that_the_samples_make():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(500, 1, generator=generator, dtype=torch.float64)
    replicates = 2.0 + shared.expand(-1, 3)
    spread = seed_spread([2.0, 2.0, 2.0], replicates)
    assert math.isinf(spread.dof)
    half = Z * float(shared.std())
    assert interval_of(2.0, spread, 0.95) == pytest.approx((2 - half, 2 + half), rel=1e-5)


def test_degrees_of_freedom_go_from_the_seeds_to_the_samples():
    points = [1.0, 2.0, 3.0]
    still = torch.zeros(100, 3, dtype=torch.float64)
    assert seed_spread(points, still).dof == pytest.approx(2)
    assert seed_spread(points, still).error == pytest.approx(math.sqrt(1 / 3))
    moving = torch.randn(100, 1, generator=torch.Generator().manual_seed(0)).double() * 10 + still
    assert seed_spread(points, moving).dof > 1000


@pytest.mark.parametrize("dof", [1.0, 2.0, 7.5, math.inf])
def test_quantiles_and_p_values_agree_with_scipy_and_with_each_other(dof):
    law = stats.norm if math.isinf(dof) else stats.t(dof)
    assert quantile(0.95, dof) == pytest.approx(law.ppf(0.975))
    assert two_sided_p(-1.7, dof) == pytest.approx(2 * law.sf(1.7))
    assert two_sided_p(quantile(0.9, dof), dof) == pytest.approx(0.1)


def test_without_any_spread_the_interval_is_the_point():
    still = torch.zeros(50, 2, dtype=torch.float64)
    spread = seed_spread([1.0, 1.0], still)
    assert interval_of(1.0, spread, 0.95) == (1.0, 1.0)
