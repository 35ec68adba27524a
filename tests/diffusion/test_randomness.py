"""Counter-based randomness: independence of the batch, of other purposes, and moments."""

from __future__ import annotations

import torch

from raysched.diffusion.randomness import generator, normals, uniforms


def test_draws_do_not_depend_on_which_others_are_asked_for() -> None:
    order = torch.tensor([7, 3, 900, 2**40, 0])
    together = uniforms(5, "noise", 3, order, num=4)
    gaussian = normals(5, "noise", 3, order, (3, 5, 5))
    for row, index in enumerate(order):
        assert torch.equal(uniforms(5, "noise", 3, index[None], num=4)[0], together[row])
        assert torch.equal(normals(5, "noise", 3, index[None], (3, 5, 5))[0], gaussian[row])
    assert torch.equal(uniforms(5, "noise", 3, order, num=2), together[:, :2])


def test_seeds_purposes_steps_and_samples_are_separate_streams() -> None:
    indices = torch.arange(64)
    draws = [
        uniforms(seed, purpose, step, indices + offset, num=64).flatten()
        for seed, purpose, step, offset in [
            (0, "time", 0, 0),
            (1, "time", 0, 0),
            (0, "noise", 0, 0),
            (0, "time", 1, 0),
            (0, "time", 0, 64),
        ]
    ]
    correlation = torch.corrcoef(torch.stack(draws))
    off_diagonal = correlation - torch.eye(len(draws), dtype=torch.float64)
    assert float(off_diagonal.abs().max()) < 5 / 64  # 5 standard errors of 4096 draws
    assert len(torch.unique(torch.cat(draws))) == sum(d.numel() for d in draws)


def test_uniforms_fill_the_open_interval_evenly() -> None:
    draws = uniforms(0, "time", 0, torch.arange(20_000), num=2)
    assert float(draws.min()) > 0
    assert float(draws.max()) < 1
    counts = torch.histc(draws.flatten(), bins=20, min=0, max=1)
    # chi-square with 19 degrees of freedom exceeds 43.8 once in a thousand
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 43.8
    assert abs(float(torch.corrcoef(draws.T)[0, 1])) < 0.03
    successive = torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1]
    assert abs(float(successive)) < 0.03


def test_normals_have_the_moments_of_a_standard_gaussian() -> None:
    draws = normals(0, "noise", 0, torch.arange(4000), (1, 5, 5), dtype=torch.float64)
    assert draws.shape == (4000, 1, 5, 5)
    values = draws.flatten()
    bound = 5 / values.numel() ** 0.5
    assert abs(float(values.mean())) < bound
    assert abs(float((values**2).mean()) - 1) < bound * 2**0.5
    assert abs(float((values**3).mean())) < bound * 15**0.5
    assert abs(float((values**4).mean()) - 3) < bound * 96**0.5
    across_pixels = torch.corrcoef(draws.flatten(1).T) - torch.eye(25, dtype=torch.float64)
    assert float(across_pixels.abs().max()) < 5 / 4000**0.5
    assert normals(0, "noise", 0, torch.arange(2), (3,)).dtype == torch.float32


def test_generators_repeat_themselves_and_differ_by_name() -> None:
    first = torch.rand(4, generator=generator(3, "permutation", 2))
    assert torch.equal(first, torch.rand(4, generator=generator(3, "permutation", 2)))
    assert not torch.equal(first, torch.rand(4, generator=generator(3, "weights", 2)))
