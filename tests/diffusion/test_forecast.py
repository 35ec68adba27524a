"""Forecast of forward equivalents: exact laws, and agreement with plans that are really drawn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from raysched.config.loading import load_mapping
from raysched.config.run import NoiseScheduleConfig, RunConfig, ScheduledSamplingConfig
from raysched.diffusion.calls import CallOptions
from raysched.diffusion.curriculum import draw_offsets, draw_plan
from raysched.diffusion.forecast import MAX_RAMP_STAGES, course, forecast_run, step_forecast
from raysched.diffusion.offset_law import Window, offset_law, offset_tail
from raysched.diffusion.randomness import uniforms
from raysched.diffusion.reuse import passed_states
from raysched.diffusion.rollout import plan_calls
from raysched.diffusion.schedules import NoiseSchedule

RAMP = {"max_step_offset": 4, "grid": 20, "ramp_steps": 100, "start_step": 20, "prob_end": 0.8}


def run_config(rollout: dict[str, Any], **sections: Any) -> RunConfig:
    return load_mapping({"scheduled_sampling": rollout, **sections}, "test").config


def fine_uniforms(count: int) -> torch.Tensor:
    """Midpoints of `count` cells of (0, 1)."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def room_tail(noise: NoiseScheduleConfig, grid: int, j: torch.Tensor) -> torch.Tensor:
    """P(room >= j) without windows."""
    window = Window.of(noise, ScheduledSamplingConfig())
    return window.chance(window.room_bound(grid, j))


@pytest.mark.parametrize("strategy", ["uniform", "biased_early", "biased_late"])
@pytest.mark.parametrize("max_step_offset", [1, 2, 7, 10])
def test_the_law_of_the_offset_is_that_of_the_draws(strategy: str, max_step_offset: int) -> None:
    k = draw_offsets(strategy, fine_uniforms(200_000), max_step_offset)
    j = torch.arange(1, max_step_offset + 1)
    drawn = (k[None, :] >= j[:, None]).double().mean(dim=1)
    law = offset_tail(strategy, max_step_offset, j)
    torch.testing.assert_close(law, drawn, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("count", "grid"), [(1000, 1000), (1000, 20), (1000, 7), (50, 30)])
def test_the_room_on_a_ddpm_path_is_exact_over_the_indices(count: int, grid: int) -> None:
    noise = NoiseScheduleConfig(kind="cosine", num_train_timesteps=count)
    u = torch.arange(1, count + 1).double() / count
    endless = torch.full((count,), 10**6)
    room = NoiseSchedule.from_config(noise).clamp_steps(u, endless, grid)
    j = torch.arange(1, grid + 1)
    counted = (room[None, :] >= j[:, None]).double().mean(dim=1)
    torch.testing.assert_close(room_tail(noise, grid, j), counted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["flow", "linear"])
@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_the_room_follows_the_law_of_the_training_time(kind: str, sampling: str) -> None:
    noise = NoiseScheduleConfig.model_validate({"kind": kind, "timestep_sampling": sampling})
    schedule = NoiseSchedule.from_config(noise)
    u = schedule.training_u(fine_uniforms(200_000))
    room = schedule.clamp_steps(u, torch.full(u.shape, 10**6), 20)
    j = torch.arange(1, 21)
    drawn = (room[None, :] >= j[:, None]).double().mean(dim=1)
    torch.testing.assert_close(room_tail(noise, 20, j), drawn, atol=2e-5, rtol=0)


def test_one_unclamped_offset_is_counted_by_hand() -> None:
    # Uniform on 0, 1, 2; on a grid of one million nothing is clamped: P(k > 0) = 2/3, E[k] = 1.
    noise = NoiseScheduleConfig(num_train_timesteps=100_000)
    law = offset_law(noise, ScheduledSamplingConfig(grid=100_000, reuse="all"), 2)
    assert law.rolled == pytest.approx(2 / 3, rel=1e-4)
    assert law.steps == pytest.approx(1.0, rel=1e-4)
    assert law.steps_squared == pytest.approx(5 / 3, rel=1e-4)
    # Only k = 2 passes a state on its way.
    assert law.passed == pytest.approx(1 / 3, rel=1e-4)
    # With N = 1 a step needs the whole path: a target on a continuous path never has room.
    one_step = offset_law(noise, ScheduledSamplingConfig(grid=1), 2)
    assert one_step.steps == pytest.approx(0.0, abs=1e-5)


def test_plain_training_costs_three_per_sample_and_nothing_else() -> None:
    plain = [
        run_config({}),
        run_config({"max_step_offset": 3, "probability": 1.0}, exposure="none"),
        run_config({"max_step_offset": 3, "probability": 0.0}),
    ]
    for config in plain:
        forecast = forecast_run(config)
        assert (forecast.rollout, forecast.training) == (0.0, 3.0 * 64 * 900)


def drawn_cost(config: RunConfig, num_steps: int) -> float:
    """FE of really drawn plans, counted by the definition."""
    schedule, size = NoiseSchedule.from_config(config.noise_schedule), config.training.batch_size
    rollout = config.rollout
    unit = (4 if rollout.sampler == "rk4" else 1) * (1 if rollout.guidance_scale == 1 else 2)
    clean = bool(rollout.reflexflow) and rollout.reflexflow_alpha != 0
    total = 0
    for step in range(num_steps):
        indices = torch.arange(step * size, (step + 1) * size)
        target_u = schedule.training_u(uniforms(1, "time", step, indices)[:, 0])
        plan = draw_plan(config, schedule, target_u, 1, step, indices)
        total += unit * int(plan.num_steps.sum()) + clean * plan.num_rolled + 3 * size
        total += 3 * len(passed_states(plan, schedule, rollout))
    return total


ALWAYS = {"max_step_offset": 6, "probability": 1.0, "grid": 20}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ramp with ReflexFlow": (RAMP, {}),
    "cosine ramp": ({**RAMP, "ramp_shape": "cosine", "strategy": "biased_late"}, {}),
    "falling ramp": ({**RAMP, "prob_start": 1.0, "prob_end": 0.0}, {}),
    "clamped hard": ({"max_step_offset": 15, "probability": 1.0, "grid": 10}, {}),
    "logit-normal times": (
        {"max_step_offset": 12, "probability": 1.0, "grid": 15, "reflexflow": False},
        {"noise_schedule": {"timestep_sampling": "logit_normal", "shift": 3.0}},
    ),
    "rk4 on a DDPM path": (
        {"max_step_offset": 5, "probability": 0.5, "grid": 20, "sampler": "rk4"},
        {"prediction_type": "epsilon", "noise_schedule": {"kind": "cosine"}},
    ),
    "jump": ({"max_step_offset": 1, "probability": 0.5, "grid": "jump"}, {}),
    "jump on a coarse DDPM path": (
        {"max_step_offset": 1, "probability": 1.0, "grid": "jump"},
        {"prediction_type": "epsilon", "noise_schedule": {"num_train_timesteps": 4}},
    ),
    "windows on a shifted flow path": (
        {**ALWAYS, "t_min": 0.2, "t_max": 0.7, "source_t_max": 0.9, "guidance_scale": 2.0},
        {"noise_schedule": {"shift": 2.0}},
    ),
    "windows on a DDPM path, all states": (
        {**ALWAYS, "t_min": 0.25, "t_max": 0.65, "source_t_max": 0.8, "reuse": "all"},
        {"prediction_type": "sample", "noise_schedule": {"num_train_timesteps": 50}},
    ),
    "three states, a ramp of K": (
        {**RAMP, "max_step_offset": 9, "offset_ramp_steps": 250, "offset_start": 1, "reuse": 3},
        {},
    ),
    "stratified, windowed jump": (
        {
            "max_step_offset": 1,
            "probability": 0.7,
            "grid": "jump",
            "stratified": True,
            "t_max": 0.8,
            "source_t_max": 0.6,
        },
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_forecast_is_within_two_percent_of_drawn_plans(case: str) -> None:
    rollout, sections = CASES[case]
    config = run_config(rollout, **sections, training={"budget": {"steps": 300}})
    forecast = forecast_run(config)
    assert forecast.steps == 300
    assert forecast.rollout > 0
    assert forecast.forward_equivalents == pytest.approx(drawn_cost(config, 300), rel=0.02)


@pytest.mark.parametrize("kind", ["flow", "cosine"])
@pytest.mark.parametrize("source_t_max", [1.0, 0.75])
def test_the_forecast_tells_k_as_it_is_clamped(kind: str, source_t_max: float) -> None:
    rollout = {"max_step_offset": 15, "probability": 1.0, "grid": 10}
    prediction = "flow_matching" if kind == "flow" else "sample"
    config = run_config(
        {**rollout, "source_t_max": source_t_max},
        prediction_type=prediction,
        noise_schedule={"kind": kind},
    )
    schedule, indices = NoiseSchedule.from_config(config.noise_schedule), torch.arange(40_000)
    target_u = schedule.training_u(uniforms(1, "time", 0, indices)[:, 0])
    plan = draw_plan(config, schedule, target_u, 1, 0, indices)
    k = plan.num_steps[plan.rolled].double()
    step = step_forecast(config, 0)
    assert step.max_offset == int(k.max()) == (9 if source_t_max == 1 else 7)
    assert step.mean_offset == pytest.approx(float(k.mean()), rel=0.02)
    assert plan.num_clamped > 0.5 * len(indices)


RANDOM: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {
            "max_step_offset": int(K),
            "grid": grid,
            "strategy": strategy,
            "reuse": reuse,
            "t_min": 0.1,
            "t_max": 0.8,
            "source_t_max": 0.9,
            "ramp_steps": 40,
            "prob_start": 0.2,
            "prob_end": 1.0,
            "ramp_shape": shape,
            "offset_ramp_steps": 25,
            "offset_start": 1,
        },
        sections,
    )
    for K, grid, strategy, reuse, shape, sections in (
        (5, 17, "uniform", "all", "linear", {"noise_schedule": {"shift": 3.0}}),
        (30, 100, "biased_early", 3, "cosine", {}),
        (
            10,
            20,
            "biased_late",
            2,
            "linear",
            {"prediction_type": "epsilon", "noise_schedule": {"num_train_timesteps": 37}},
        ),
    )
]


@pytest.mark.parametrize(("rollout", "sections"), RANDOM)
def test_the_forecast_is_the_mean_of_independent_draws(
    rollout: dict[str, Any], sections: dict[str, Any]
) -> None:
    # Sharper than two percent: within four standard errors of 80 steps of 64 samples.
    config = run_config(rollout, **sections)
    schedule, size = NoiseSchedule.from_config(config.noise_schedule), 64
    clean, surplus = int(bool(config.rollout.reflexflow)), []
    for step in range(80):
        indices = torch.arange(step * size, (step + 1) * size)
        target_u = schedule.training_u(uniforms(5, "time", step, indices)[:, 0])
        plan = draw_plan(config, schedule, target_u, 5, step, indices)
        spent = int(plan.num_steps.sum()) + clean * plan.num_rolled
        spent += 3 * (size + len(passed_states(plan, schedule, config.rollout)))
        surplus.append(spent - step_forecast(config, step).total)
    each = torch.tensor(surplus, dtype=torch.float64)
    assert abs(float(each.mean())) < 4 * float(each.std()) / len(each) ** 0.5


@pytest.mark.parametrize("noise", [{"kind": "flow", "shift": 0.2}, {"kind": "cosine"}])
def test_self_correction_is_not_billed_for_the_targets_that_it_leaves_alone(
    noise: dict[str, Any],
) -> None:
    method = {"exposure": "self_correction", "self_correction": {"probability": 0.9}}
    kind = {} if noise["kind"] == "flow" else {"prediction_type": "epsilon"}
    config = load_mapping({**method, **kind, "noise_schedule": noise}, "test").config
    schedule = NoiseSchedule.from_config(config.noise_schedule)
    u = schedule.training_u(fine_uniforms(8192))
    plan = draw_plan(config, schedule, u, 0, 0, torch.arange(8192))
    corrected = plan.rolled & (schedule.alpha_sigma(u)[1] >= 0.05)
    share = step_forecast(config, 0).num_rolled / config.training.batch_size
    assert share == pytest.approx(float(corrected.double().mean()), rel=0.02)
    assert share < 0.99 * float(plan.rolled.double().mean())


@pytest.mark.parametrize("accumulation", [1, 4])
def test_padded_jumps_with_gradient_are_billed_at_three_by_micro_batch(accumulation: int) -> None:
    rollout = {"grid": "jump", "jump_gradient": True, "probability": 0.5, "bucket": 16}
    config = run_config(
        {"max_step_offset": 1, "reflexflow": False, **rollout},
        training={"batch_size": 128, "gradient_accumulation": accumulation},
    )
    plain = run_config(
        {"max_step_offset": 1, "reflexflow": False, **rollout, "bucket": 1},
        training={"batch_size": 128, "gradient_accumulation": accumulation},
    )
    filled = step_forecast(config, 0).rollout - step_forecast(plain, 0).rollout
    rolled = torch.distributions.Binomial(128 // accumulation, torch.tensor(0.5))
    torch.manual_seed(0)
    rows = rolled.sample((100_000,))
    waste = ((rows / 16).ceil() * 16 - rows).mean()
    assert filled == pytest.approx(3 * accumulation * float(waste), rel=0.05)


def test_the_ramp_is_summed_step_by_step() -> None:
    config = run_config(RAMP, training={"budget": {"steps": 150}})
    by_hand = sum(step_forecast(config, step).total for step in range(150))
    assert forecast_run(config).forward_equivalents == pytest.approx(by_hand, rel=1e-12)


def test_a_ramp_of_a_billion_steps_is_summed_by_midpoints() -> None:
    config = run_config({**RAMP, "ramp_steps": 10**9, "start_step": 0})
    stages = list(course(config))
    assert len(stages) <= MAX_RAMP_STAGES + 1
    assert sum(stage.num_steps for stage in stages[:-1]) == 10**9
    mean = sum(stage.num_steps * stage.step.rollout for stage in stages[:-1]) / 10**9
    assert mean == pytest.approx(stages[-1].step.rollout / 2, rel=1e-4)


@pytest.mark.parametrize("budget", [20_000, 19_200, 100_000])
def test_a_budget_in_fe_ends_with_the_step_that_reaches_it(budget: int) -> None:
    config = run_config(RAMP, training={"budget": {"forward_equivalents": float(budget)}})
    forecast = forecast_run(config)
    assert 0 <= forecast.forward_equivalents - budget < forecast.last.total
    spent = sum(step_forecast(config, step).total for step in range(forecast.steps))
    assert forecast.forward_equivalents == pytest.approx(spent, rel=1e-9)


def test_a_plain_budget_in_fe_is_met_without_a_step_too_many() -> None:
    config = run_config({}, training={"budget": {"forward_equivalents": 115_200.0}})
    assert forecast_run(config).steps == 600


def test_a_budget_in_seconds_is_walked_with_the_speed_given() -> None:
    config = run_config(RAMP, training={"budget": {"seconds": 10.0}})
    forecast = forecast_run(config, seconds_of=lambda step: step.total / 2000)
    assert 20_000 <= forecast.forward_equivalents < 20_000 + forecast.last.total
    assert math.isfinite(forecast.steps)


@pytest.mark.parametrize(("bucket", "probability"), [(4, 0.8), (16, 0.8), (64, 0.2)])
def test_the_padding_of_calls_is_within_two_percent(bucket: int, probability: float) -> None:
    rollout = {"max_step_offset": 4, "probability": probability, "grid": 20, "bucket": bucket}
    training = {"budget": {"steps": 200}, "gradient_accumulation": 2}
    config = run_config(rollout, training=training)
    schedule, size = NoiseSchedule.from_config(config.noise_schedule), config.training.batch_size
    total = 0
    for step in range(200):
        indices = torch.arange(step * size, (step + 1) * size)
        target_u = schedule.training_u(uniforms(1, "time", step, indices)[:, 0])
        calls = plan_calls(
            draw_plan(config, schedule, target_u, 1, step, indices),
            schedule,
            solver="unipc",
            prediction_type="flow_matching",
            capacity=size // 2,
            options=CallOptions(with_clean=True, bucket=bucket),
        )
        total += calls.num_forwards + 3 * size
    assert forecast_run(config).forward_equivalents == pytest.approx(total, rel=0.02)
