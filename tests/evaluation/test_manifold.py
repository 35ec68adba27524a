"""Fidelity, diversity and adherence on sets whose answer is known."""

import pytest
import torch

from raysched.evaluation import manifold


def gaussian(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_disjoint_sets_score_zero_everywhere():
    x = gaussian(40, 2, 0)
    found = manifold.manifold_metrics(x + 1000.0, x, 5)
    assert (found.precision, found.recall, found.density, found.coverage) == (0, 0, 0, 0)


def test_identical_sets_score_one():
    x = gaussian(40, 2, 1)
    found = manifold.manifold_metrics(x, x, 5)
    assert (found.precision, found.recall, found.coverage) == (1.0, 1.0, 1.0)
    # Every ball holds its 5 neighbours and its own centre.
    assert found.density == pytest.approx(6 / 5)


def test_density_of_an_independent_draw_from_the_same_law_is_near_one():
    found = manifold.manifold_metrics(gaussian(600, 2, 2), gaussian(600, 2, 3), 5)
    assert found.density == pytest.approx(1.0, abs=0.08)
    assert min(found.precision, found.recall, found.coverage) > 0.9


def test_collapse_to_one_of_two_modes_costs_diversity_and_not_fidelity():
    far = torch.tensor([50.0, 0.0], dtype=torch.float64)
    reference = torch.cat([gaussian(100, 2, 4), gaussian(100, 2, 5) + far])
    whole = torch.cat([gaussian(100, 2, 6), gaussian(100, 2, 7) + far])
    both = manifold.manifold_metrics(whole, reference, 5)
    one = manifold.manifold_metrics(gaussian(200, 2, 8), reference, 5)
    assert one.precision == pytest.approx(both.precision, abs=0.05)
    assert one.recall < 0.55 < both.recall
    assert one.coverage < 0.55 < both.coverage


def test_shrinking_towards_the_mean_keeps_precision_and_lowers_recall():
    reference, samples = gaussian(300, 2, 9), gaussian(300, 2, 10)
    full = manifold.manifold_metrics(samples, reference, 5)
    shrunk = manifold.manifold_metrics(0.3 * samples, reference, 5)
    assert shrunk.precision >= full.precision
    assert shrunk.recall < 0.5 * full.recall


def test_radii_are_distances_to_the_kth_other_point():
    points = torch.tensor([[0.0], [1.0], [3.0]])
    distances = torch.cdist(points, points)
    assert manifold.neighbour_radii(distances, 1).tolist() == [1.0, 1.0, 2.0]
    assert manifold.neighbour_radii(distances, 99).tolist() == [3.0, 2.0, 3.0]


def test_known_radii_change_nothing():
    reference, samples = gaussian(30, 2, 11), gaussian(20, 2, 12)
    radii = manifold.neighbour_radii(torch.cdist(reference, reference), 5)
    known = manifold.manifold_metrics(samples, reference, 5, reference_radii=radii)
    assert known == manifold.manifold_metrics(samples, reference, 5)


def test_class_accuracy_counts_samples_that_lie_with_the_class_asked_for():
    train = torch.cat([gaussian(20, 2, 13), gaussian(20, 2, 14) + 30.0])
    train_labels = torch.tensor([0] * 20 + [1] * 20)
    samples = torch.tensor([[0.0, 0.0], [30.0, 30.0], [30.0, 29.0], [1.0, 0.0]])
    labels = torch.tensor([0, 1, 0, 0])
    assert manifold.class_accuracy(samples, labels, train, train_labels, 2) == 0.75


def test_a_tied_vote_goes_to_the_nearer_class_and_a_majority_beats_nearness():
    train = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    labels = torch.tensor([1, 0, 0, 1])
    origin = torch.tensor([[-0.1]])
    assert manifold.classify(origin, train, labels, 2, k=4).tolist() == [1]
    assert manifold.classify(origin, train, labels, 2, k=3).tolist() == [0]


def test_self_consistency_is_the_root_mean_square_of_the_pixel_difference():
    coarse = torch.zeros(2, 1, 2, 2)
    fine = torch.full((2, 1, 2, 2), 0.5)
    fine[1] = -0.5
    assert manifold.self_consistency(coarse, fine) == pytest.approx(0.5)
    assert manifold.self_consistency(fine, fine) == 0.0
