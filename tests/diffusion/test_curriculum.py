"""Plans: exact laws of k, clamping, ramps, and what switches rollouts off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raysched.config.run import NoiseScheduleConfig, RunConfig, ScheduledSamplingConfig
from raysched.diffusion.curriculum import draw_offsets, draw_plan, plan_from_steps, probability_at
from raysched.diffusion.schedules import NoiseSchedule


def schedule_of(kind: str, **options: Any) -> NoiseSchedule:
    return NoiseSchedule.from_config(NoiseScheduleConfig(kind=kind, **options))


def config_of(kind: str = "flow", **rollout: Any) -> RunConfig:
    section = {"max_step_offset": 10, "probability": 1.0, **rollout}
    return RunConfig.model_validate(
        {"scheduled_sampling": section, "noise_schedule": {"kind": kind}}
    )


@pytest.mark.parametrize("largest", [1, 5, 10])
def test_offsets_have_exactly_their_law(largest: int) -> None:
    cells = 2**16
    v = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    ks = torch.arange(largest + 1, dtype=torch.float64)

    def law(strategy: str) -> torch.Tensor:
        drawn = draw_offsets(strategy, v, largest)
        return torch.bincount(drawn, minlength=largest + 1).double() / cells

    uniform = torch.full_like(ks, 1 / (largest + 1))
    torch.testing.assert_close(law("uniform"), uniform, rtol=0, atol=2 / cells)
    # round(v²K) <= k exactly for v² < (k + 1/2)/K.
    below = ((ks + 0.5) / largest).clamp(0, 1).sqrt()
    early = torch.diff(below, prepend=torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(law("biased_early"), early, rtol=0, atol=2 / cells)
    torch.testing.assert_close(law("biased_late"), early.flip(0), rtol=0, atol=2 / cells)


@given(
    index=st.integers(0, 999),
    k=st.integers(0, 2000),
    grid=st.sampled_from([1, 3, 7, 10, 999, 1000]),
)
def test_ddpm_clamping_is_the_largest_offset_that_fits(index: int, k: int, grid: int) -> None:
    schedule = schedule_of("linear")
    u = torch.tensor([(index + 1) / 1000], dtype=torch.float64)
    plan = plan_from_steps(schedule, u, torch.tensor([k]), grid)
    clamped = int(plan.num_steps[0])
    assert clamped == min(k, (999 - index) * grid // 1000)
    assert plan.num_clamped == int(clamped < k)
    source = int(schedule.index(plan.source_u)[0])
    assert source <= 999
    # Rounded halves upwards, in integers; exact for N = T.
    assert source == index + (2 * clamped * 1000 + grid) // (2 * grid)


def test_flow_clamping_keeps_the_source_on_the_path_and_the_target_unsnapped() -> None:
    schedule = schedule_of("flow", shift=3.0)
    u = torch.tensor([0.123456, 0.99, 0.5, 0.9999], dtype=torch.float64)
    plan = plan_from_steps(schedule, u, torch.tensor([4, 30, 10, 5]), 20)
    assert plan.num_steps.tolist() == [4, 0, 10, 0]
    assert plan.num_clamped == 2
    expected = torch.tensor([0.123456 + 0.2, 0.99, 1.0, 0.9999], dtype=torch.float64)
    torch.testing.assert_close(plan.source_u, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(plan.source_t, 3 * expected / (1 + 2 * expected))
    assert torch.equal(plan.target_u, u)
    walked = plan.nodes_u[0, :6]
    expected_walk = 0.123456 + torch.tensor([0.2, 0.15, 0.1, 0.05, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(walked, expected_walk, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["flow", "cosine"])
def test_jump_sources_are_uniform_between_the_target_and_noise(kind: str) -> None:
    schedule = schedule_of(kind)
    indices = torch.arange(4000)
    u = torch.full((4000,), 0.4, dtype=torch.float64)
    config = config_of(kind, grid="jump", probability=0.5)
    plan = draw_plan(config, schedule, u, 0, 3, indices)
    assert set(plan.num_steps.tolist()) == {0, 1}
    assert abs(float(plan.num_steps.double().mean()) - 0.5) < 0.04
    jumped = plan.source_u[plan.rolled]
    assert float(jumped.min()) > 0.4
    assert float(jumped.max()) <= 1.0
    assert abs(float(jumped.mean()) - 0.7) < 0.02
    assert torch.equal(plan.source_u[~plan.rolled], u[~plan.rolled])


def test_a_ddpm_jump_from_the_last_index_is_impossible_and_counted() -> None:
    schedule = schedule_of("linear")
    config = config_of("linear", grid="jump")
    u = torch.tensor([1.0, 0.999], dtype=torch.float64)
    plan = draw_plan(config, schedule, u, 0, 0, torch.arange(2))
    assert plan.num_steps.tolist() == [0, 1]
    assert plan.num_clamped == 1
    assert schedule.index(plan.source_u).tolist() == [999, 999]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_step_offset": 0},
        {"max_step_offset": 0, "offset_ramp_steps": 100, "offset_start": 5},
        {"probability": 0.0},
        {"ramp_steps": 10, "start_step": 100},
    ],
)
def test_settings_that_switch_rollouts_off_leave_every_sample_alone(
    changes: dict[str, Any],
) -> None:
    u = torch.linspace(0.1, 0.9, 16, dtype=torch.float64)
    plan = draw_plan(config_of(**changes), schedule_of("flow"), u, 0, 5, torch.arange(16))
    assert plan.num_rolled == 0
    assert torch.equal(plan.source_u, u)


def test_exposure_none_switches_rollouts_off() -> None:
    config = config_of().model_copy(update={"exposure": "none"})
    u = torch.linspace(0.1, 0.9, 16, dtype=torch.float64)
    assert draw_plan(config, schedule_of("flow"), u, 0, 5, torch.arange(16)).num_rolled == 0


def test_a_samples_plan_does_not_depend_on_the_others() -> None:
    schedule, config = schedule_of("flow"), config_of(probability=0.7)
    indices = torch.arange(100, 132)
    u = torch.linspace(0.05, 0.6, 32, dtype=torch.float64)
    whole = draw_plan(config, schedule, u, 9, 4, indices)
    part = draw_plan(config, schedule, u[10:20], 9, 4, indices[10:20])
    assert torch.equal(whole.num_steps[10:20], part.num_steps)
    assert 0 < whole.num_rolled < 32


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.35), ("cosine", 0.35)])
def test_ramps_start_and_end_where_they_should(shape: str, middle: float) -> None:
    config = ScheduledSamplingConfig(
        ramp_steps=100, start_step=50, prob_start=0.1, prob_end=0.6, ramp_shape=shape
    )
    assert probability_at(0, config) == 0.1
    assert probability_at(50, config) == 0.1
    assert probability_at(100, config) == pytest.approx(middle)
    assert probability_at(150, config) == pytest.approx(0.6)
    assert probability_at(10_000, config) == pytest.approx(0.6)
    quarter = 0.1 + 0.5 * (0.25 if shape == "linear" else 0.5 * (1 - 0.5**0.5))
    assert probability_at(75, config) == pytest.approx(quarter)


def test_without_a_ramp_the_probability_is_constant() -> None:
    config = ScheduledSamplingConfig(probability=0.3, start_step=50)
    assert {probability_at(step, config) for step in (0, 49, 51, 1000)} == {0.3}
