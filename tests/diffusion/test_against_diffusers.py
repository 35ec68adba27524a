"""On a common grid, diffusers' schedulers take the same steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from raysched.config.run import NoiseScheduleConfig, PredictionType, SolverName
from raysched.diffusion.rollout import integrate
from raysched.diffusion.schedules import NoiseSchedule

# diffusers hands numpy a copy argument that torch's arrays don't take yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

START = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
DIFFUSERS_BETAS = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
}


def network(*, sample: Tensor, timestep: Tensor, lanes: Tensor) -> Tensor:
    """Smooth, nonlinear, and different at every time."""
    time = timestep.reshape(-1, 1, 1, 1).to(sample.dtype) / 1000
    return torch.tanh(0.8 * sample + 0.2) * (0.6 + 0.3 * torch.cos(3 * time)) + 0.1 * time


def ours(
    schedule: NoiseSchedule,
    nodes: Tensor,
    solver: SolverName,
    order: int,
    predicts: PredictionType,
) -> Tensor:
    return integrate(
        network, START, schedule, nodes, solver=solver, order=order, prediction_type=predicts
    ).x_hat


def theirs(scheduler: Any, num_steps: int) -> Tensor:
    x = START.clone()
    for time in scheduler.timesteps[:num_steps]:
        rows = time.expand(2).double()
        out = network(sample=x, timestep=rows, lanes=torch.arange(2))
        x = scheduler.step(out, time, x, return_dict=False)[0]
    return x.double()


def multistep(name: str, order: int, **options: Any) -> Any:
    if name == "dpm":
        from diffusers.schedulers.scheduling_dpmsolver_multistep import (
            DPMSolverMultistepScheduler as Scheduler,
        )

        options["euler_at_final"] = False
    else:
        from diffusers.schedulers.scheduling_unipc_multistep import (
            UniPCMultistepScheduler as Scheduler,
        )
    return Scheduler(solver_order=order, lower_order_final=False, **options)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("solver", "order"), [("dpm", 2), ("dpm", 3), ("unipc", 1), ("unipc", 2), ("unipc", 3)]
)
def test_multistep_solvers_agree_on_ddpm_schedules(
    kind: str, predicts: PredictionType, solver: SolverName, order: int
) -> None:
    config = NoiseScheduleConfig(kind=kind)
    scheduler = multistep(
        solver,
        order,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=DIFFUSERS_BETAS[kind],
        prediction_type=predicts,
    )
    scheduler.set_timesteps(12)
    # The noisiest steps amplify diffusers' fp32 tables beyond the tolerance.
    skipped = 3
    scheduler.timesteps = scheduler.timesteps[skipped:]
    scheduler.sigmas = scheduler.sigmas[skipped:]
    nodes = (scheduler.timesteps.double() + 1) / 1000
    expected = theirs(scheduler, nodes.numel() - 1)
    schedule = NoiseSchedule.from_config(config)
    result = ours(schedule, nodes, solver, order, predicts)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("solver", "order"), [("dpm", 2), ("dpm", 3), ("unipc", 2), ("unipc", 3)])
def test_multistep_solvers_agree_on_the_flow(solver: SolverName, order: int) -> None:
    scheduler = multistep(
        solver, order, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    scheduler.set_timesteps(10)
    nodes = scheduler.sigmas[:10].double()
    # diffusers rounds the network's time to an integer; ours is exact, so give it the sigmas'.
    scheduler.timesteps = scheduler.sigmas[:10].double() * 1000
    scheduler.set_begin_index(0)
    expected = theirs(scheduler, 9)
    schedule = NoiseSchedule.from_config(NoiseScheduleConfig())
    result = ours(schedule, nodes, solver, order, "flow_matching")
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_agrees_on_the_flow_down_to_the_data(shift: float) -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2])
    expected = theirs(scheduler, 5)
    schedule = NoiseSchedule.from_config(NoiseScheduleConfig(shift=shift))
    nodes = torch.linspace(1, 0, 6, dtype=torch.float64)
    result = ours(schedule, nodes, "euler", 1, "flow_matching")
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_euler_is_ddim_on_a_ddpm_schedule(predicts: PredictionType) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler(
        prediction_type=predicts,
        clip_sample=False,
        timestep_spacing="trailing",
        beta_start=1e-4,
        beta_end=0.02,
    )
    scheduler.set_timesteps(8)
    # The noisiest steps amplify diffusers' fp32 tables beyond the tolerance.
    skipped = 2
    scheduler.timesteps = scheduler.timesteps[skipped:]
    expected = theirs(scheduler, 6)
    schedule = NoiseSchedule.from_config(NoiseScheduleConfig(kind="linear"))
    nodes = torch.linspace(1, 0, 9, dtype=torch.float64)[skipped:]
    result = ours(schedule, nodes, "euler", 1, predicts)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_alphas_are_diffusers_alphas(kind: str) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    reference = DDIMScheduler(beta_schedule=DIFFUSERS_BETAS[kind], beta_start=1e-4, beta_end=0.02)
    schedule = NoiseSchedule.from_config(NoiseScheduleConfig(kind=kind))
    squared = schedule.table[0][1:] ** 2
    torch.testing.assert_close(squared, reference.alphas_cumprod.double(), rtol=1e-4, atol=1e-6)
