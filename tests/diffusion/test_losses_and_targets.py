"""Losses with hand-computed numbers, and targets."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from raysched.config.run import NoiseScheduleConfig, PredictionType
from raysched.diffusion.losses import plain_loss, reflexflow_loss
from raysched.diffusion.parameterization import (
    add_noise,
    anchored_target,
    prediction_target,
    velocity_from_prediction,
)
from raysched.diffusion.schedules import NoiseSchedule

V = torch.tensor([[3.0, 4.0]])
TARGET = torch.tensor([[1.0, 1.0]])
ORIGIN = torch.zeros(1, 2)


def test_the_plain_loss_is_the_mean_square_per_sample() -> None:
    # ((3-1)² + (4-1)²)/2 = 6.5
    assert plain_loss(V, TARGET).tolist() == [6.5]
    assert plain_loss(V.bfloat16(), TARGET).dtype == torch.float32


@pytest.mark.parametrize(
    ("drift", "expected"),
    [
        ([6.0, 8.0], 0.0),  # along v: nothing
        ([-4.0, 3.0], 2.0),  # at a right angle: 2(1 - cos) = 2
        ([-3.0, -4.0], 4.0),  # against v: 4
        ([5.0, 0.0], 0.8),  # cos = 3/5: 2(1 - 0.6)
    ],
)
def test_the_direction_term_pulls_the_velocity_along_the_noiseward_drift(
    drift: list[float], expected: float
) -> None:
    x0 = torch.tensor([[0.5, -0.25]])
    x_hat = x0 + torch.tensor([drift])
    loss = reflexflow_loss(V, TARGET, x_hat, x0, None, alpha=0.0, beta1=10.0, beta2=0.0)
    assert loss.tolist() == pytest.approx([10 * expected], abs=1e-5)


def test_descending_the_direction_term_turns_the_velocity_towards_the_drift() -> None:
    v = torch.tensor([[1.0, 0.0]], requires_grad=True)
    drift = torch.tensor([[0.0, 2.0]])
    reflexflow_loss(v, TARGET, drift, ORIGIN, None, alpha=0.0, beta1=1.0, beta2=0.0).backward()
    assert v.grad is not None
    # d/dv of 2(1 - cos) at a right angle is -2 (d/|d|)/|v|.
    torch.testing.assert_close(v.grad, torch.tensor([[0.0, -2.0]]))


def test_frequency_compensation_weighs_where_the_clean_prediction_is_larger() -> None:
    # delta = clean - biased = (1, -3); l1_sum 4: w = (1.25, 0.25), (1.25·4 + 0.25·9)/2 = 3.625
    clean = V + torch.tensor([[1.0, -3.0]])
    options = {"alpha": 1.0, "beta1": 0.0, "beta2": 1.0}
    published = reflexflow_loss(V, TARGET, V, ORIGIN, clean, **options)
    assert published.tolist() == pytest.approx([3.625])
    # l1_mean 2: w = (1.5, -0.5 -> 0), (1.5·4 + 0)/2 = 3
    effective = reflexflow_loss(V, TARGET, V, ORIGIN, clean, norm="l1_mean", **options)
    assert effective.tolist() == pytest.approx([3.0])
    doubled = reflexflow_loss(V, TARGET, V, ORIGIN, clean, alpha=2.0, beta1=0.0, beta2=0.5)
    # w = (1.5, -0.5): (1.5·4 - 0.5·9)/2 = 0.75, times beta2
    assert doubled.tolist() == pytest.approx([0.375])


def test_no_gradient_flows_through_the_compensation_weight() -> None:
    v = V.clone().requires_grad_()
    clean = V + torch.tensor([[1.0, -3.0]])
    reflexflow_loss(v, TARGET, V, ORIGIN, clean, alpha=1.0, beta1=0.0, beta2=1.0).backward()
    assert v.grad is not None
    # w r, as 2/D = 1
    torch.testing.assert_close(v.grad, torch.tensor([[1.25 * 2, 0.25 * 3]]))


def test_no_gradient_flows_through_the_drifts_direction() -> None:
    # A latent that its own prediction made: the slope of the loss is that of the prediction at a
    # fixed direction, not the one with which the drift would follow the prediction.
    w = torch.tensor([0.6], requires_grad=True)
    made = torch.tensor([[3.0, 1.0]]) * w
    reflexflow_loss(
        torch.cat([w, w * w])[None], TARGET, made, ORIGIN, None, alpha=0.0, beta1=1.0, beta2=0.0
    ).backward()
    fixed = made.detach()

    def loss(value: float) -> float:
        v = torch.tensor([[value, value * value]])
        found = reflexflow_loss(v, TARGET, fixed, ORIGIN, None, alpha=0.0, beta1=1.0, beta2=0.0)
        return float(found)

    assert w.grad is not None
    assert float(w.grad) == pytest.approx((loss(0.605) - loss(0.595)) / 0.01, rel=1e-3)


def test_both_terms_add_up() -> None:
    clean = V + torch.tensor([[1.0, -3.0]])
    drift = torch.tensor([[5.0, 0.0]])
    loss = reflexflow_loss(V, TARGET, drift, ORIGIN, clean, alpha=1.0, beta1=10.0, beta2=2.0)
    assert loss.tolist() == pytest.approx([2 * 3.625 + 10 * 0.8], rel=1e-6)


def test_samples_that_were_not_rolled_get_exactly_the_plain_loss_and_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    v, target, x_hat, x0, clean = torch.randn(5, 4, 1, 3, 3, generator=generator).unbind()
    v.requires_grad_()
    rolled = torch.tensor([True, False, True, False])
    mixed = reflexflow_loss(v, target, x_hat, x0, clean, rolled=rolled)
    everything = reflexflow_loss(v, target, x_hat, x0, clean)
    plain = plain_loss(v, target)
    assert torch.equal(mixed[~rolled], plain[~rolled])
    assert torch.equal(mixed[rolled], everything[rolled])
    (gradient,) = torch.autograd.grad(mixed.sum(), v, retain_graph=True)
    (reference,) = torch.autograd.grad(plain.sum(), v)
    assert torch.equal(gradient[~rolled], reference[~rolled])


def test_vanishing_norms_are_floored() -> None:
    zero = torch.zeros(2, 3, requires_grad=True)
    loss = reflexflow_loss(zero, zero.detach(), zero.detach(), zero.detach(), zero.detach())
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0]
    assert zero.grad is not None
    assert bool(torch.isfinite(zero.grad).all())


@pytest.mark.parametrize("kind", ["flow", "linear", "cosine"])
@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_anchored_is_teacher_forced_where_the_latent_is(
    kind: str, prediction_type: PredictionType
) -> None:
    schedule = NoiseSchedule.from_config(NoiseScheduleConfig(kind=kind))
    generator = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 30, 1, 4, 4, dtype=torch.float64, generator=generator)
    u = schedule.training_u(torch.linspace(0.001, 0.999, 30, dtype=torch.float64))
    alpha, sigma = schedule.alpha_sigma(u)
    original = prediction_target(prediction_type, x0, eps, alpha, sigma)
    x_t = add_noise(x0, eps, alpha, sigma)
    anchored = anchored_target(prediction_type, x0, x_t, alpha, sigma, original)
    torch.testing.assert_close(anchored, original, rtol=0, atol=1e-10)


def test_anchored_targets_have_the_stated_form_and_keep_the_original_near_the_data() -> None:
    generator = torch.Generator().manual_seed(2)
    x0, x_hat, original = torch.randn(3, 3, 2, 2, dtype=torch.float64, generator=generator)
    t = torch.tensor([0.04, 0.05, 0.5], dtype=torch.float64)
    flow = anchored_target("flow_matching", x0, x_hat, 1 - t, t, original)
    assert torch.equal(flow[0], original[0])
    torch.testing.assert_close(flow[1:], (x_hat - x0)[1:] / t[1:].reshape(-1, 1, 1))
    a, s = math.sqrt(1 - 0.36), 0.6
    alpha, sigma = torch.full((3,), a, dtype=torch.float64), torch.full((3,), s).double()
    eps = (x_hat - alpha[0] * x0) / sigma[0]
    v = anchored_target("v_prediction", x0, x_hat, alpha, sigma, original)
    torch.testing.assert_close(v, alpha[0] * eps - sigma[0] * x0)
    assert torch.equal(anchored_target("sample", x0, x_hat, alpha, sigma, original), x0)


def test_every_prediction_type_implies_the_same_velocity() -> None:
    generator = torch.Generator().manual_seed(3)
    x0, eps = torch.randn(2, 5, 3, 3, dtype=torch.float64, generator=generator)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    x_t = add_noise(x0, eps, 1 - t, t)
    for prediction_type in get_args(PredictionType):
        out = prediction_target(prediction_type, x0, eps, 1 - t, t)
        velocity = velocity_from_prediction(prediction_type, out, x_t, 1 - t, t)
        torch.testing.assert_close(velocity, eps - x0, rtol=0, atol=1e-10)
