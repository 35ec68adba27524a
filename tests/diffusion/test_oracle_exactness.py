"""With a network that knows the answer, a rollout equals the ODE's solution in float64."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from raysched.config.run import NoiseScheduleConfig, PredictionType, ScheduleKind, SolverName
from raysched.diffusion.curriculum import plan_from_steps
from raysched.diffusion.parameterization import (
    add_noise,
    broadcast,
    prediction_target,
    x0_eps_from_prediction,
)
from raysched.diffusion.rollout import integrate, plan_calls, rollout
from raysched.diffusion.schedules import NoiseSchedule

KINDS = get_args(ScheduleKind)
SOLVERS = [("euler", "auto"), ("rk4", "auto")] + [
    (solver, order) for solver in ("dpm", "unipc") for order in (1, 2, 3)
]
PREDICTIONS = get_args(PredictionType)


def schedule_of(kind: str, **options: float) -> NoiseSchedule:
    return NoiseSchedule.from_config(NoiseScheduleConfig(kind=kind, **options))


class Oracle:
    """Knows how (alpha, sigma) follow from the model time, and x0, eps or the velocity."""

    def __init__(
        self, schedule: NoiseSchedule, prediction_type: PredictionType, knows: str, value: Tensor
    ) -> None:
        self.schedule, self.prediction_type = schedule, prediction_type
        self.knows, self.value = knows, value
        self.num_forwards = self.num_calls = 0

    def alpha_sigma(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        if self.schedule.is_flow:
            t = timestep / 1000.0
            return 1 - t, t
        table = self.schedule.table
        ratio = torch.log(table[1][1:] / table[0][1:])
        low = timestep.floor().long().clamp_max(ratio.numel() - 2)
        tau = torch.exp(torch.lerp(ratio[low], ratio[low + 1], timestep - low))
        alpha = 1 / torch.sqrt(1 + tau**2)
        return alpha, tau * alpha

    def __call__(self, *, sample: Tensor, timestep: Tensor, lanes: Tensor) -> Tensor:
        self.num_calls += 1
        self.num_forwards += sample.shape[0]
        alpha, sigma = self.alpha_sigma(timestep)
        a, s = broadcast(alpha, sample), broadcast(sigma, sample)
        known = self.value[lanes]
        if self.knows == "x0":
            x0, eps = known, (sample - a * known) / s
        elif self.knows == "eps":
            x0, eps = (sample - s * known) / a, known
        else:
            x0, eps = sample - s * known, sample + a * known
        return prediction_target(self.prediction_type, x0, eps, alpha, sigma)


def case(kind: str, knows: str, count: int = 44) -> tuple[NoiseSchedule, Tensor, Tensor, Tensor]:
    schedule = schedule_of(kind, shift=3.0 if kind == "flow" else 1.0)
    generator = torch.Generator().manual_seed(count)
    x0, eps = torch.randn(2, count, 1, 4, 4, dtype=torch.float64, generator=generator)
    value = {"x0": x0, "eps": eps, "velocity": eps - x0}[knows]
    return schedule, x0, eps, value


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(("solver", "order"), SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_oracle_rollout_lands_on_the_forward_latent(
    kind: str, solver: SolverName, order: int, prediction_type: PredictionType
) -> None:
    for knows in ("x0", "velocity") if kind == "flow" else ("x0", "eps"):
        schedule, x0, eps, value = case(kind, knows)
        k = torch.arange(44) % 11
        position = torch.linspace(0.02, 0.98, 44, dtype=torch.float64)
        for grid in (1000, 40):
            plan = plan_from_steps(schedule, schedule.training_u(position), k, grid)
            calls = plan_calls(
                plan,
                schedule,
                solver=solver,
                order=order,
                prediction_type=prediction_type,
                capacity=16,
                dtype=torch.float64,
            )
            oracle = Oracle(schedule, prediction_type, knows, value)
            source = add_noise(x0, eps, *schedule.alpha_sigma(plan.source_u))
            result = rollout(oracle, source, calls)
            truth = add_noise(x0, eps, *schedule.alpha_sigma(plan.target_u))
            torch.testing.assert_close(result.x_hat, truth, rtol=0, atol=1e-8)
            per_step = 4 if solver == "rk4" else 1
            assert oracle.num_forwards == per_step * int(plan.num_steps.sum())
            assert result.num_forwards == oracle.num_forwards
            assert result.num_calls == oracle.num_calls


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(("solver", "order"), SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_sampling_with_an_oracle_that_knows_the_data_returns_the_data(
    kind: str, solver: SolverName, order: int, prediction_type: PredictionType
) -> None:
    schedule, x0, eps, value = case(kind, "x0", count=3)
    # At the flow's alpha = 0 the noise says nothing about the data.
    start_u = 0.999 if kind == "flow" and prediction_type == "epsilon" else 1.0
    nodes = torch.linspace(start_u, 0, 8, dtype=torch.float64)
    oracle = Oracle(schedule, prediction_type, "x0", value)
    start = add_noise(x0, eps, *schedule.alpha_sigma(nodes[:1].expand(3)))
    result = integrate(
        oracle,
        start,
        schedule,
        nodes,
        solver=solver,
        order=order,
        prediction_type=prediction_type,
    )
    torch.testing.assert_close(result.x_hat, x0, rtol=0, atol=1e-8)
    assert result.num_calls == (25 if solver == "rk4" else 7)


def test_a_flow_rollout_may_start_at_pure_noise() -> None:
    schedule, x0, eps, value = case("flow", "x0", count=2)
    target = torch.tensor([0.99, 0.8], dtype=torch.float64)
    for solver, order in SOLVERS:
        plan = plan_from_steps(schedule, target, torch.tensor([10, 200]), 1000)
        assert plan.source_u.tolist() == [1.0, 1.0]
        calls = plan_calls(
            plan,
            schedule,
            solver=solver,
            order=order,
            prediction_type="sample",
            capacity=2,
            dtype=torch.float64,
        )
        result = rollout(Oracle(schedule, "sample", "x0", value), eps, calls)
        truth = add_noise(x0, eps, *schedule.alpha_sigma(target))
        torch.testing.assert_close(result.x_hat, truth, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_conversions_invert_the_targets(kind: str, prediction_type: PredictionType) -> None:
    schedule, x0, eps, _ = case(kind, "x0")
    u = schedule.training_u(torch.linspace(0.02, 0.98, 44, dtype=torch.float64))
    alpha, sigma = schedule.alpha_sigma(u)
    target = prediction_target(prediction_type, x0, eps, alpha, sigma)
    x_t = add_noise(x0, eps, alpha, sigma)
    back = x0_eps_from_prediction(prediction_type, target, x_t, alpha, sigma)
    torch.testing.assert_close(back[0], x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(back[1], eps, rtol=0, atol=1e-10)
