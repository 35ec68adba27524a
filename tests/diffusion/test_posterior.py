"""The posterior mean over a reference batch, against sums written out."""

from __future__ import annotations

import math

import torch

from raysched.diffusion.posterior import posterior_mean


def test_it_is_the_weighted_mean_of_the_allowed_images_and_the_own_one() -> None:
    x_t, x0 = torch.tensor([[0.3], [2.0]]), torch.tensor([[0.5], [-1.0]])
    reference = torch.tensor([[0.0], [1.0], [100.0]])
    alpha, sigma = torch.tensor([0.8, 0.5]), torch.tensor([0.6, 1.5])
    allowed = torch.tensor([[True, True, False], [False, False, False]])
    mean = posterior_mean(x_t, x0, alpha, sigma, reference, allowed)
    weights = [math.exp(-((0.3 - 0.8 * y) ** 2) / (2 * 0.36)) for y in (0.5, 0.0, 1.0)]
    expected = (0.5 * weights[0] + 1.0 * weights[2]) / sum(weights)
    torch.testing.assert_close(mean, torch.tensor([[expected], [-1.0]]))


def test_it_survives_weights_that_underflow() -> None:
    x_t = torch.full((1, 3000), 0.9)
    reference = torch.stack([torch.full((3000,), 0.9), torch.full((3000,), -0.9)])
    own = torch.full((1, 3000), 0.91)
    mean = posterior_mean(
        x_t, own, torch.ones(1), torch.tensor([0.01]), reference, torch.ones(1, 2).bool()
    )
    assert bool(mean.isfinite().all())
    torch.testing.assert_close(mean, reference[:1], rtol=0, atol=1e-4)


def test_with_the_whole_of_a_gaussian_as_reference_it_is_the_gaussian_denoiser() -> None:
    generator = torch.Generator().manual_seed(0)
    data = 0.6 * torch.randn(200_000, 1, dtype=torch.float64, generator=generator)
    x_t = torch.tensor([[0.5], [-1.0]], dtype=torch.float64)
    alpha, sigma = torch.tensor([0.7, 0.4]), torch.tensor([0.7, 0.9])
    allowed = torch.ones(2, len(data), dtype=torch.bool)
    mean = posterior_mean(x_t, data[:2], alpha, sigma, data, allowed)
    gain = alpha * 0.36 / (alpha**2 * 0.36 + sigma**2)
    torch.testing.assert_close(mean[:, 0], gain * x_t[:, 0], rtol=0, atol=0.01)
