"""The engine: identity at k = 0, clean predictions, counts, precision."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from raysched.config.run import NoiseScheduleConfig, SolverName
from raysched.diffusion.curriculum import RolloutPlan, plan_from_steps
from raysched.diffusion.parameterization import add_noise
from raysched.diffusion.rollout import CallPlan, plan_calls, rollout
from raysched.diffusion.schedules import NoiseSchedule

SOLVERS = get_args(SolverName)
FLOW = NoiseSchedule.from_config(NoiseScheduleConfig())


class Recorder:
    """tanh of the sample, different per sample and time; remembers what it was called with."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, *, sample: Tensor, timestep: Tensor, lanes: Tensor) -> Tensor:
        self.sizes.append(sample.shape[0])
        self.dtypes.add(sample.dtype)
        return self.answer(sample, timestep, lanes)

    @staticmethod
    def answer(sample: Tensor, timestep: Tensor, lanes: Tensor) -> Tensor:
        shift = (timestep / 1000 + 0.01 * lanes).reshape(-1, *[1] * (sample.ndim - 1))
        return torch.tanh(sample + shift.to(sample.dtype))


def prepared(
    k: list[int], solver: SolverName, capacity: int = 4, **options: bool
) -> tuple[RolloutPlan, CallPlan, Tensor, Tensor]:
    count = len(k)
    u = torch.linspace(0.1, 0.8, count, dtype=torch.float64)
    plan = plan_from_steps(FLOW, u, torch.tensor(k), 100)
    calls = plan_calls(
        plan, FLOW, solver=solver, prediction_type="flow_matching", capacity=capacity, **options
    )
    x0, eps = torch.randn(2, count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    source = add_noise(x0, eps, *FLOW.alpha_sigma(plan.source_u))
    return plan, calls, source, add_noise(x0, eps, *FLOW.alpha_sigma(plan.target_u))


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_without_steps_are_bitwise_untouched(solver: SolverName) -> None:
    plan, calls, source, x_t = prepared([0, 3, 0, 5, 1], solver)
    result = rollout(Recorder(), source, calls)
    still = plan.num_steps == 0
    assert torch.equal(result.x_hat[still], x_t[still])
    assert not bool((result.x_hat[~still] == source[~still]).all(dim=(1, 2, 3)).any())


def test_a_plan_without_rollouts_calls_nothing_and_returns_the_input() -> None:
    _, calls, source, x_t = prepared([0, 0, 0], "unipc", with_clean=True)
    recorder = Recorder()
    result = rollout(recorder, source, calls, x_clean=x_t)
    assert recorder.sizes == []
    assert torch.equal(result.x_hat, source)
    assert (result.num_forwards, result.num_calls) == (0, 0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("capacity", [2, 5, 64])
def test_clean_predictions_ride_along_and_change_no_rollout(
    solver: SolverName, capacity: int
) -> None:
    k = [2, 0, 7, 1, 4, 4, 0, 3]
    per_step = 4 if solver == "rk4" else 1
    plan, calls, source, x_t = prepared(k, solver, capacity, with_clean=True)
    recorder = Recorder()
    result = rollout(recorder, source, calls, x_clean=x_t)
    plain = rollout(Recorder(), source, prepared(k, solver, capacity)[1])
    torch.testing.assert_close(result.x_hat, plain.x_hat, rtol=0, atol=1e-6)
    lanes = plan.rolled.nonzero()[:, 0]
    expected = Recorder.answer(x_t, FLOW.model_time(plan.target_u).float(), torch.arange(8))
    assert result.clean_pred is not None
    torch.testing.assert_close(result.clean_pred[lanes], expected[lanes], rtol=0, atol=1e-6)
    assert not bool(result.clean_pred[plan.num_steps == 0].any())
    total = per_step * sum(k) + plan.num_rolled
    assert sum(recorder.sizes) == total == result.num_forwards == calls.num_forwards
    assert max(recorder.sizes) <= capacity
    assert len(recorder.sizes) == max(per_step * max(k), -(-total // capacity))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_capacity_does_not_change_what_is_computed(solver: SolverName) -> None:
    k = [2, 9, 7, 1, 4, 4, 10, 3]
    _, wide, source, _ = prepared(k, solver, capacity=64)
    reference = rollout(Recorder(), source, wide).x_hat
    for capacity in (1, 3, 8):
        _, calls, _, _ = prepared(k, solver, capacity)
        torch.testing.assert_close(
            rollout(Recorder(), source, calls).x_hat, reference, rtol=0, atol=1e-6
        )


def test_the_engine_makes_no_graph_and_does_not_write_into_its_input() -> None:
    _, calls, source, _ = prepared([2, 3, 4], "unipc", capacity=3)
    kept = source.clone()
    weight = torch.nn.Parameter(torch.ones(()))

    def network(*, sample: Tensor, timestep: Tensor, lanes: Tensor) -> Tensor:
        return weight * sample

    result = rollout(network, source, calls)
    assert not result.x_hat.requires_grad
    assert torch.equal(source, kept)
    (result.x_hat * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_bf16_network_keeps_the_move_of_the_fp32_engine(solver: SolverName) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32))
    half = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32)).to(torch.bfloat16)
    half.load_state_dict(network.state_dict())
    count = 16
    plan = plan_from_steps(
        FLOW, torch.linspace(0.1, 0.9, count, dtype=torch.float64), torch.full((count,), 10), 1000
    )
    assert plan.num_steps.tolist() == [10] * count
    calls = plan_calls(plan, FLOW, solver=solver, prediction_type="flow_matching", capacity=count)
    source = torch.randn(count, 32)

    def full(*, sample: Tensor, timestep: Tensor, lanes: Tensor) -> Tensor:
        return network(sample) + sample

    def rounded(*, sample: Tensor, timestep: Tensor, lanes: Tensor) -> Tensor:
        assert sample.dtype == torch.float32
        return half(sample.bfloat16()) + sample.bfloat16()

    reference = rollout(full, source, calls).x_hat
    result = rollout(rounded, source, calls).x_hat
    assert result.dtype == torch.float32
    move = (reference - source).norm(dim=1)
    assert float(((result - reference).norm(dim=1) / move).max()) < 0.02
