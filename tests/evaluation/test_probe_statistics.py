"""Statistics of the probe against laws whose distance is known."""

import math

import pytest
import torch

from raysched.evaluation import probe_statistics as stats
from raysched.evaluation.metrics import energy_distance


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(n: int, m: int, p: int, num_bootstrap: int = 100) -> stats.Weights:
    return stats.Weights.draw(n, m, p, num_bootstrap=num_bootstrap, seed=0)


def test_the_energy_distance_of_equal_laws_is_covered_by_0_and_of_shifted_ones_is_not():
    w = weights(120, 100, 1)
    covered = 0
    for seed in range(20):
        x, y = normals(120, 1, 4, 4, seed=seed), normals(100, 1, 4, 4, seed=100 + seed)
        found = stats.interval(stats.population_energy(x, y, w.walk, w.forward), 0.95)
        covered += found.low <= 0 <= found.high
    assert covered >= 18
    moved = stats.population_energy(x + 0.4, y, w.walk, w.forward)
    assert stats.interval(moved, 0.95).low > 0
    assert float(moved[0]) == pytest.approx(
        energy_distance((x + 0.4).flatten(1), y.flatten(1)), abs=1e-9
    )


def test_paired_energy_has_no_bias_from_the_pairing_and_far_less_noise():
    # N(0, 1) against N(b, 1) in one dimension: 2 E|X - Y| - 2 E|X - X'|.
    shift = 0.5
    folded = 2 / math.sqrt(math.pi) * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)
    exact = 2 * folded - 4 / math.sqrt(math.pi)
    one = torch.ones(1, 300, dtype=torch.float64)
    paired, independent = [], []
    for seed in range(20):
        x, other = normals(300, 1, seed=seed), normals(300, 1, seed=1000 + seed)
        paired.append(float(stats.paired_energy(x + shift, x, one)))
        independent.append(float(stats.population_energy(x + shift, other, one, one)))
    paired_values, independent_values = torch.tensor(paired), torch.tensor(independent)
    error = float(paired_values.std()) / math.sqrt(20)
    assert abs(float(paired_values.mean()) - exact) < 4 * error
    assert float(paired_values.std()) < 0.5 * float(independent_values.std())


def test_identical_pairs_have_energy_distance_0_in_every_replicate():
    x = normals(40, 1, 4, 4)
    found = stats.paired_energy(x, x.clone(), weights(2, 2, 40).pairs)
    assert float(found.abs().max()) < 1e-12


def test_the_same_law_floor_is_exceeded_at_its_level():
    y = normals(80, 8)
    floor = stats.same_law_floor(y, 120, num_splits=200, confidence=0.95, seed=0)
    one = torch.ones(1, 120, dtype=torch.float64), torch.ones(1, 80, dtype=torch.float64)
    fresh = [
        float(stats.population_energy(normals(120, 8, seed=s), normals(80, 8, seed=99 - s), *one))
        for s in range(1, 41)
    ]
    above = sum(value > floor.high for value in fresh)
    assert above <= 8
    assert floor.low < 0 < floor.high
    assert abs(floor.value) < floor.high


@pytest.mark.parametrize("size", [8, 28])
def test_white_noise_has_the_same_power_in_all_bands(size: int):
    energies = stats.band_energies(normals(2000, 2, size, size))
    assert energies.shape == (2000, stats.NUM_BANDS)
    assert energies.mean(0).tolist() == pytest.approx([1.0] * stats.NUM_BANDS, abs=0.08)


def test_waves_are_found_in_the_band_of_their_frequency():
    place = torch.arange(16).float()
    for cycles, band in ((0, 0), (3, 1), (5, 2), (8, 3)):
        wave = torch.cos(2 * math.pi * cycles * place / 16).expand(1, 1, 16, 16)
        energies = stats.band_energies(wave)[0]
        assert int(energies.argmax()) == band
        assert float(energies.sum()) == pytest.approx(float(energies[band]))


def test_bands_without_a_frequency_are_nan():
    assert stats.band_energies(normals(3, 1, 4, 4)).isnan().all(0).tolist() == [
        False,
        True,
        False,
        False,
    ]


def test_the_noise_spread_is_that_of_the_noise_alone():
    x0 = normals(50, 1, 16, 16, seed=1).clamp(-1, 1)
    x_t = 0.3 * x0 + 0.7 * normals(50, 1, 16, 16)
    assert float(stats.noise_spread(x_t, x0, 0.3).mean()) == pytest.approx(0.7, abs=0.02)


def test_simultaneous_intervals_are_wider_and_cover_all_places_together():
    generator = torch.Generator().manual_seed(0)
    places, draws, repeats = 15, 400, 60
    together = pointwise = 0
    for _ in range(repeats):
        estimate = torch.randn(places, 1, generator=generator, dtype=torch.float64)
        noise = torch.randn(places, draws, generator=generator, dtype=torch.float64)
        replicates = torch.cat([estimate, estimate + noise], dim=1)
        ends = stats.simultaneous(replicates, 0.95)
        together += all(end.low <= 0 <= end.high for end in ends)
        single = [stats.interval(row, 0.95) for row in replicates]
        pointwise += all(end.low <= 0 <= end.high for end in single)
    assert together >= 0.85 * repeats
    assert pointwise < 0.75 * repeats
