"""What rollouts do beside solving the ODE: noise, guidance, padding, states kept, equal calls."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from raysched.config.run import NoiseScheduleConfig, PredictionType, SolverName
from raysched.diffusion.calls import CallOptions
from raysched.diffusion.curriculum import RolloutPlan, plan_from_steps
from raysched.diffusion.packing import pack_chains
from raysched.diffusion.parameterization import prediction_target
from raysched.diffusion.randomness import normals
from raysched.diffusion.reuse import PassedStates, spaced_steps
from raysched.diffusion.rollout import CallPlan, plan_calls, rollout
from raysched.diffusion.schedules import NoiseSchedule
from raysched.diffusion.solvers import build_table

FLOW = NoiseSchedule.from_config(NoiseScheduleConfig())
SOLVERS = get_args(SolverName)
KINDS = ["flow", "linear", "cosine"]


class Recorder:
    """Different per sample, time and lane; remembers sizes and what it was given."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.seen: dict[tuple[int, float], Tensor] = {}

    def __call__(self, *, sample: Tensor, timestep: Tensor, lanes: Tensor) -> Tensor:
        self.sizes.append(len(sample))
        for row, time, lane in zip(sample, timestep.tolist(), lanes.tolist(), strict=True):
            self.seen[lane, round(time, 6)] = row.clone()
        return self.answer(sample, timestep, lanes)

    @staticmethod
    def answer(sample: Tensor, timestep: Tensor, lanes: Tensor) -> Tensor:
        shift = (timestep / 1000 + 0.03 * lanes).reshape(-1, *[1] * (sample.ndim - 1))
        return torch.tanh(sample + shift.to(sample.dtype))


def prepared(
    k: list[int], solver: SolverName, options: CallOptions, capacity: int = 8
) -> tuple[RolloutPlan, CallPlan, Tensor]:
    u = torch.linspace(0.1, 0.8, len(k), dtype=torch.float64)
    plan = plan_from_steps(FLOW, u, torch.tensor(k), 100)
    calls = plan_calls(
        plan,
        FLOW,
        solver=solver,
        prediction_type="flow_matching",
        capacity=capacity,
        options=options,
    )
    return plan, calls, torch.randn(len(k), 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("capacity", [2, 5, 64])
def test_guidance_is_the_rollout_of_the_combined_prediction(
    solver: SolverName, capacity: int
) -> None:
    k, scale = [2, 0, 3, 1], 2.5
    options = CallOptions(guidance_scale=scale, with_clean=True)
    plan, calls, source = prepared(k, solver, options, capacity)

    def combined(*, sample: Tensor, timestep: Tensor, lanes: Tensor) -> Tensor:
        labelled = Recorder.answer(sample, timestep, lanes)
        blind = Recorder.answer(sample, timestep, lanes + len(k))
        return blind + scale * (labelled - blind)

    recorder = Recorder()
    result = rollout(recorder, source, calls, source)
    expected = rollout(combined, source, prepared(k, solver, CallOptions())[1])
    torch.testing.assert_close(result.x_hat, expected.x_hat, rtol=1e-5, atol=1e-5)
    per_step = 4 if solver == "rk4" else 1
    # Two forwards per step of a lane, one per clean prediction, which is not guided.
    assert result.num_forwards == 2 * per_step * sum(k) + plan.num_rolled
    assert sum(recorder.sizes) == result.num_forwards
    assert max(recorder.sizes) <= capacity
    times = FLOW.model_time(plan.target_u).float()
    clean = Recorder.answer(source, times, torch.arange(len(k)))
    assert result.clean_pred is not None
    torch.testing.assert_close(result.clean_pred[plan.rolled], clean[plan.rolled])


@pytest.mark.parametrize("bucket", [3, 4, 16])
def test_padding_rounds_every_call_up_is_counted_and_changes_nothing(bucket: int) -> None:
    k = [2, 0, 7, 1, 4, 4]
    _, calls, source = prepared(k, "unipc", CallOptions(bucket=bucket))
    recorder = Recorder()
    result = rollout(recorder, source, calls)
    plain = rollout(Recorder(), source, prepared(k, "unipc", CallOptions())[1])
    torch.testing.assert_close(result.x_hat, plain.x_hat, rtol=0, atol=1e-6)
    assert all(size % bucket == 0 for size in recorder.sizes)
    assert sum(recorder.sizes) == result.num_forwards > sum(k)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("capacity", [3, 64])
def test_kept_states_are_what_the_network_was_given(solver: SolverName, capacity: int) -> None:
    k = [5, 0, 3, 5, 1]
    samples, steps = spaced_steps(torch.tensor(k), "all")
    plan = prepared(k, solver, CallOptions())[0]
    states = PassedStates(samples, steps, plan.nodes_u[samples, steps])
    _, calls, source = prepared(k, solver, CallOptions(kept=states), capacity)
    recorder = Recorder()
    result = rollout(recorder, source, calls)
    assert result.kept is not None
    assert len(result.kept) == len(states) == 4 + 2 + 4
    for state, lane, u in zip(result.kept, samples.tolist(), states.u, strict=True):
        time = round(float(FLOW.model_time(u).float()), 6)
        near = [v for (i, t), v in recorder.seen.items() if i == lane and abs(t - time) < 1e-3]
        assert any(torch.equal(state, value) for value in near)
    per_step = 4 if solver == "rk4" else 1
    assert result.num_forwards == per_step * sum(k) == sum(recorder.sizes)


def test_at_most_so_many_states_are_kept_evenly_spaced_with_the_last() -> None:
    samples, steps = spaced_steps(torch.tensor([10, 3, 0, 2, 1]), 3)
    by_sample = [steps[samples == i].tolist() for i in range(5)]
    # Beside the last one, after 10, 3, 2 and 1 steps.
    assert by_sample == [[3, 7], [1, 2], [], [1], []]
    for reuse in ("last", 1):
        assert len(spaced_steps(torch.tensor([10, 3]), reuse)[0]) == 0
    samples, steps = spaced_steps(torch.tensor([3, 0, 2]), "all")
    assert (samples.tolist(), steps.tolist()) == ([0, 0, 2], [1, 2, 1])


def test_a_rank_with_less_work_makes_as_many_calls() -> None:
    _, calls, source = prepared([2, 0, 1], "euler", CallOptions(least_calls=5))
    recorder = Recorder()
    result = rollout(recorder, source, calls)
    assert len(recorder.sizes) == 5
    assert min(recorder.sizes) == 1
    assert result.num_forwards == 3  # the two calls that stand for waiting are not counted
    plain = rollout(Recorder(), source, prepared([2, 0, 1], "euler", CallOptions())[1])
    torch.testing.assert_close(result.x_hat, plain.x_hat)
    _, calls, source = prepared([0, 0], "unipc", CallOptions(least_calls=3, with_clean=True))
    recorder = Recorder()
    result = rollout(recorder, source, calls, source)
    assert len(recorder.sizes) == 3
    assert result.num_forwards == 0
    assert torch.equal(result.x_hat, source)


def test_spreading_over_more_calls_keeps_the_order_within_chains() -> None:
    lengths = torch.tensor([3, 1, 2, 5])
    for least in (0, 6, 11, 20):
        packing = pack_chains(lengths, 4, least)
        assert packing.num_calls == max(5, least)
        for chain in range(4):
            inside = packing.position[packing.chain == chain]
            assert inside.tolist() == list(range(int(lengths[chain])))


@pytest.mark.parametrize("kind", KINDS)
def test_ancestral_steps_are_the_posterior_of_the_forward_process(kind: str) -> None:
    schedule = NoiseSchedule.from_config(NoiseScheduleConfig(kind=kind))
    nodes = torch.tensor([[0.9, 0.5, 0.2]], dtype=torch.float64)
    table = build_table(
        schedule,
        nodes,
        torch.tensor([2]),
        solver="euler",
        prediction_type="sample",
        ancestral=True,
    )
    (a, s), x, x0 = schedule.alpha_sigma(nodes), 0.7, -0.3
    for step in range(2):
        ratio = float(a[0, step] / a[0, step + 1])
        forward = float(s[0, step] ** 2) - ratio**2 * float(s[0, step + 1] ** 2)
        near = float(s[0, step + 1] ** 2)
        # N(x_s; ratio·x_n, forward)·N(x_n; alpha_n·x0, near), completed to a square in x_n.
        variance = 1 / (ratio**2 / forward + 1 / near)
        mean = variance * (ratio * x / forward + float(a[0, step + 1]) * x0 / near)
        on_x, on_out, on_noise = table.coefficients[:, 0, step].tolist()
        assert on_x * x + on_out * x0 == pytest.approx(mean, rel=1e-9)
        assert on_noise**2 == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
@pytest.mark.parametrize("kind", KINDS)
def test_ancestral_rollouts_with_the_gaussian_denoiser_end_in_the_law_of_x_t(
    kind: str, prediction_type: PredictionType
) -> None:
    schedule = NoiseSchedule.from_config(NoiseScheduleConfig(kind=kind))
    spread, centre = 0.6, 0.4
    errors = []
    for steps in (50, 100):
        offsets = torch.linspace(0.75, 0.25, steps + 1, dtype=torch.float64)[None]
        nodes = schedule.nodes(torch.zeros(1, 1), torch.round(offsets * 1000).long(), 1000)
        table = build_table(
            schedule,
            nodes,
            torch.tensor([steps]),
            solver="euler",
            prediction_type=prediction_type,
            ancestral=True,
        )
        a, s = (v[0] for v in schedule.alpha_sigma(nodes))
        mean, variance = float(a[0]) * centre, float((a[0] * spread) ** 2 + s[0] ** 2)
        for step in range(steps):
            total = (a[step] * spread) ** 2 + s[step] ** 2
            gain = a[step] * spread**2 / total

            def predicted(
                x: Tensor, a: Tensor = a[step], s: Tensor = s[step], gain: Tensor = gain
            ) -> Tensor:
                x0 = centre + gain * (x - a * centre)
                target = prediction_target(
                    prediction_type, x0[None], (x - a * x0)[None] / s, a[None], s[None]
                )
                return target[0]

            zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
            offset, slope = predicted(zero), predicted(one) - predicted(zero)
            on_x, on_out, on_noise = table.coefficients[:, 0, step]
            mean = float((on_x + on_out * slope) * mean + on_out * offset)
            variance = float((on_x + on_out * slope) ** 2 * variance + on_noise**2)
        true = float((a[-1] * spread) ** 2 + s[-1] ** 2)
        # A denoiser that is linear keeps the mean exactly; the variance is first order.
        assert mean == pytest.approx(float(a[-1]) * centre, abs=1e-9)
        errors.append(abs(variance / true - 1))
    assert errors[1] < 0.03
    assert 1.7 < errors[0] / errors[1] < 2.3


def test_ancestral_noise_is_the_samples_own_whatever_the_calls() -> None:
    def noise(*, samples: Tensor, forwards: Tensor) -> Tensor:
        return normals(0, "test", 0, samples * 1000 + forwards, (2, 3))

    k, results = [2, 0, 7, 1, 4], []
    for capacity in (1, 3, 64):
        options = CallOptions(noise=noise, with_clean=True)
        _, calls, source = prepared(k, "euler", options, capacity)
        results.append(rollout(Recorder(), source, calls, source).x_hat)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=1e-6)
    still = rollout(Recorder(), source, prepared(k, "euler", CallOptions())[1]).x_hat
    moved = (results[0] - still).flatten(1).norm(dim=1)
    assert (moved > 0.05).tolist() == [steps > 0 for steps in k]


def test_a_rollout_with_gradient_is_the_same_and_differentiable() -> None:
    weight = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def network(*, sample: Tensor, timestep: Tensor, lanes: Tensor) -> Tensor:
        return torch.tanh(weight * sample)

    _, calls, source = prepared([2, 0, 3, 1], "unipc", CallOptions(), capacity=2)
    source = source.double()
    calls = plan_calls(
        prepared([2, 0, 3, 1], "unipc", CallOptions())[0],
        FLOW,
        solver="unipc",
        prediction_type="flow_matching",
        capacity=2,
        dtype=torch.float64,
    )

    def total() -> Tensor:
        return rollout(network, source, calls, with_gradient=True).x_hat.square().sum()

    value = total()
    value.backward()
    assert value.item() == rollout(network, source, calls).x_hat.square().sum().item()
    with torch.no_grad():
        weight += 1e-5
        high = float(total())
        weight -= 2e-5
        low = float(total())
    assert weight.grad is not None
    assert float(weight.grad) == pytest.approx((high - low) / 2e-5, rel=1e-6)
