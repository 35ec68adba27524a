"""Windows on the path, the curriculum of K, and strata with an exact histogram of k."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raysched.config.run import RunConfig, ScheduledSamplingConfig
from raysched.diffusion.curriculum import (
    draw_offsets,
    draw_plan,
    max_offset_at,
    stratified_uniforms,
)
from raysched.diffusion.reuse import passed_states
from raysched.diffusion.schedules import NoiseSchedule

COUNT = 400


def prepared(kind: str, **rollout: Any) -> tuple[RunConfig, NoiseSchedule, torch.Tensor]:
    noise = {"kind": kind, **({"shift": 3.0} if kind == "flow" else {})}
    section = {"max_step_offset": 10, "probability": 1.0, "grid": 50, **rollout}
    config = RunConfig.model_validate({"scheduled_sampling": section, "noise_schedule": noise})
    schedule = NoiseSchedule.from_config(config.noise_schedule)
    r = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    return config, schedule, schedule.training_u(r)


@pytest.mark.parametrize("kind", ["flow", "linear"])
@pytest.mark.parametrize("grid", [50, "jump"])
def test_targets_outside_the_window_are_teacher_forced(kind: str, grid: int | str) -> None:
    config, schedule, u = prepared(kind, t_min=0.2, t_max=0.6, grid=grid)
    plan = draw_plan(config, schedule, u, 0, 0, torch.arange(COUNT))
    inside = (plan.target_t >= 0.2) & (plan.target_t <= 0.6)
    assert 0 < int(inside.sum()) < COUNT
    assert not bool(plan.rolled[~inside].any())
    assert float(plan.rolled[inside].double().mean()) > 0.85
    everywhere = prepared(kind, grid=grid)[0]
    free = draw_plan(everywhere, schedule, u, 0, 0, torch.arange(COUNT))
    assert torch.equal(plan.num_steps[inside], free.num_steps[inside])
    assert torch.equal(plan.source_u[inside], free.source_u[inside])


@pytest.mark.parametrize("kind", ["flow", "linear"])
@pytest.mark.parametrize("grid", [50, 1000, "jump"])
def test_no_source_is_noisier_than_its_window_and_clamped_offsets_are_reported(
    kind: str, grid: int | str
) -> None:
    config, schedule, u = prepared(kind, source_t_max=0.7, grid=grid)
    u = 0.75 * u  # the path's own end clamps nothing
    plan = draw_plan(config, schedule, u, 0, 0, torch.arange(COUNT))
    assert bool(plan.rolled.any())
    assert float(plan.source_t[plan.rolled].max()) <= 0.7 + 1e-6
    free = draw_plan(prepared(kind, grid=grid)[0], schedule, u, 0, 0, torch.arange(COUNT))
    assert free.num_clamped == 0
    assert plan.num_clamped == int((free.num_steps > plan.num_steps).sum()) > 0
    if grid != "jump":
        # One more step would leave the window.
        held = plan.num_steps < free.num_steps
        u_max = schedule.uniform_coordinate(0.7)
        assert bool((plan.target_u[held] + (plan.num_steps[held] + 1) / grid > u_max).all())


def test_uniform_coordinates_invert_path_times() -> None:
    _, flow, _ = prepared("flow")
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    back = [flow.uniform_coordinate(float(t)) for t in flow.path_time(u)]
    torch.testing.assert_close(torch.tensor(back, dtype=torch.float64), u)
    _, ddpm, _ = prepared("linear")
    assert ddpm.uniform_coordinate(0.7) == 0.7
    assert ddpm.uniform_coordinate(0.7004) == 0.7


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_k_grows_along_its_ramp_and_bounds_the_offsets(shape: str) -> None:
    ramp = {"offset_start": 2, "offset_ramp_steps": 80, "start_step": 20, "ramp_shape": shape}
    config, schedule, u = prepared("flow", **ramp)
    rollout = config.scheduled_sampling
    course = [max_offset_at(step, rollout) for step in (0, 20, 60, 100, 500)]
    assert course == [2, 2, 6, 10, 10]
    assert max_offset_at(40, rollout) == (4 if shape == "linear" else 3)
    for step in (0, 60, 100):
        plan = draw_plan(config, schedule, u * 0.5, 0, step, torch.arange(COUNT))
        assert int(plan.num_steps.max()) == max_offset_at(step, rollout)
    grown = ScheduledSamplingConfig(max_step_offset=4, offset_ramp_steps=10)
    assert [max_offset_at(step, grown) for step in (0, 5, 10)] == [0, 2, 4]


@pytest.mark.parametrize("strategy", ["uniform", "biased_early", "biased_late"])
@pytest.mark.parametrize("probability", [0.3, 1.0])
def test_strata_keep_the_law_of_each_sample(strategy: str, probability: float) -> None:
    size, shifts, largest = 16, 4000, 5
    keys = torch.rand(size, generator=torch.Generator().manual_seed(1))

    def joint(w: torch.Tensor) -> torch.Tensor:
        k = draw_offsets(strategy, (w / probability).clamp_max(1.0), largest)
        return torch.where(w < probability, k, 0)

    # Over all shifts and all ranks, which a random order gives each sample alike.
    drawn = torch.cat(
        [joint(stratified_uniforms(keys, (i + 0.5) / shifts)) for i in range(shifts)]
    )
    law = torch.bincount(drawn, minlength=largest + 1).double() / len(drawn)
    v = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    free = torch.bincount(draw_offsets(strategy, v, largest), minlength=largest + 1) / 100_000
    expected = probability * free.double()
    expected[0] += 1 - probability
    torch.testing.assert_close(law, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("strategy", ["uniform", "biased_early", "biased_late"])
def test_strata_fix_the_histogram_and_with_it_the_cost_of_a_step(strategy: str) -> None:
    config, schedule, u = prepared("flow", stratified=True, probability=0.37, strategy=strategy)
    costs, plans = [], []
    for step in range(30):
        plan = draw_plan(config, schedule, u * 0.5, 3, step, torch.arange(COUNT) + step * COUNT)
        assert plan.num_rolled in range(int(0.2 * COUNT), int(0.37 * COUNT) + 2)
        costs.append(int(plan.num_steps.sum()))
        plans.append(plan.num_steps)
    histograms = torch.stack([torch.bincount(k, minlength=11) for k in plans])
    assert int((histograms.max(dim=0).values - histograms.min(dim=0).values).max()) <= 1
    assert max(costs) - min(costs) <= 10
    assert not torch.equal(plans[0], plans[1])


def test_strata_are_laid_over_the_samples_that_the_window_leaves() -> None:
    config, schedule, u = prepared("flow", stratified=True, t_max=0.5, source_t_max=1.0)
    plan = draw_plan(config, schedule, u, 3, 0, torch.arange(COUNT))
    inside = plan.target_t <= 0.5
    histogram = torch.bincount(plan.num_steps[inside], minlength=11)
    assert int(histogram.max() - histogram.min()) <= 1
    assert not bool(plan.rolled[~inside].any())


def test_states_on_the_way_that_leave_the_window_are_not_reused() -> None:
    config, schedule, u = prepared("flow", reuse="all", t_max=0.6)
    plan = draw_plan(config, schedule, u, 0, 0, torch.arange(COUNT))
    states = passed_states(plan, schedule, config.scheduled_sampling)
    assert float(schedule.path_time(states.u).max()) <= 0.6
    free = passed_states(plan, schedule, prepared("flow", reuse="all")[0].scheduled_sampling)
    assert 0 < len(states) < len(free) == int((plan.num_steps - 1).clamp_min(0).sum())
    assert torch.equal(free.u, plan.nodes_u[free.samples, free.steps])
