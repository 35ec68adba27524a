"""Solver programs multiplied out: the same numbers as update after update, and UniPC by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from raysched.config.run import NoiseScheduleConfig
from raysched.diffusion.curriculum import plan_from_steps
from raysched.diffusion.programs import ANCESTRAL, DPM, EULER, RK4, UNIPC, Program
from raysched.diffusion.rollout import plan_calls, rollout
from raysched.diffusion.schedules import NoiseSchedule

PROGRAMS = (EULER, ANCESTRAL, DPM[2], DPM[3], UNIPC[1], UNIPC[2], UNIPC[3], RK4)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_folded_program_is_the_program_update_after_update(program: Program) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    coefficients = draw(len(program.terms), 3, 5)
    values = {source: draw(3, 5) for source in program.sources}
    start, weights = dict(values), dict(zip(program.terms, coefficients, strict=True))
    # A name that is updated twice has the same term names only once: they are used in order.
    assert len(weights) == len(program.terms)
    for name, sources in program.updates:
        values[name] = sum(weights[name, source] * values[source] for source in sources)
    folded = program.folded(coefficients)
    given = torch.stack([start[source] for source in program.sources])
    for place, row in enumerate(program.rows):
        made = (folded[:, place] * given).sum(0)
        torch.testing.assert_close(made, values[program.carry[row]], rtol=1e-12, atol=1e-12)


def velocity(x: float, t: float) -> float:
    """A smooth velocity field without meaning."""
    return math.sin(3 * x) + t * x - 0.4


def unipc_by_hand(x: float, times: list[float]) -> float:
    """UniPC-2 (bh2, x0-prediction, multistep) for one number, step after step, as published.

    The last state is the uncorrected predictor; the first step is of order one.
    """
    history: list[tuple[float, float]] = []  # (lambda, x0) of earlier nodes
    at_last = x  # the corrected state at the node before
    for number in range(len(times) - 1):
        t, after = times[number], times[number + 1]
        m = x - t * velocity(x, t)
        lam, lam_after = math.log((1 - t) / t), math.log((1 - after) / after)
        if history:
            x = _corrected(at_last, times[number - 1], t, history, lam, m)
        h = lam_after - lam
        gain = (1 - after) * -math.expm1(-h)
        predicted = after / t * x + gain * m
        if history:
            r = (history[-1][0] - lam) / h
            predicted += gain * 0.5 * (history[-1][1] - m) / r
        history.append((lam, m))
        at_last, x = x, predicted
    return x


def _corrected(
    x: float, t: float, after: float, history: list[tuple[float, float]], lam: float, m: float
) -> float:
    """UniC of the predictor's order, which knows x0 at the new node."""
    before, m0 = history[-1]
    h = lam - before
    first = math.expm1(-h) / -h  # phi_1(-h)
    gain = (1 - after) * h * first
    state = after / t * x + gain * m0
    if len(history) == 1:
        return state + gain * 0.5 * (m - m0)
    second = (1 - first) / h  # phi_2(-h)
    third = (0.5 - second) / h
    r = (history[-2][0] - before) / h
    # rho_1 + rho_2 = phi_2/phi_1 and r rho_1 + rho_2 = 2 phi_3/phi_1.
    rho_1 = (second - 2 * third) / first / (1 - r)
    rho_2 = second / first - rho_1
    return state + gain * (rho_1 * (history[-2][1] - m0) / r + rho_2 * (m - m0))


def test_lanes_of_different_lengths_follow_unipc_as_it_is_published() -> None:
    steps = torch.tensor([1, 2, 3, 7, 0, 5])
    target = torch.tensor([0.31, 0.2, 0.55, 0.1, 0.4, 0.23], dtype=torch.float64)
    schedule, grid = NoiseSchedule.from_config(NoiseScheduleConfig()), 12
    plan = plan_from_steps(schedule, target, steps, grid)
    assert plan.num_clamped == 0
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(6, 1, 1, 1)

    def network(*, sample: Tensor, timestep: Tensor, lanes: Tensor) -> Tensor:
        t = (timestep / 1000).reshape(-1, 1, 1, 1)
        return torch.sin(3 * sample) + t * sample - 0.4

    calls = plan_calls(
        plan,
        schedule,
        solver="unipc",
        prediction_type="flow_matching",
        capacity=3,
        dtype=torch.float64,
    )
    made = rollout(network, x, calls).x_hat.flatten().tolist()
    for lane, k in enumerate(steps.tolist()):
        times = [float(target[lane]) + j / grid for j in range(k, -1, -1)]
        by_hand = unipc_by_hand(float(x[lane]), times)
        assert made[lane] == pytest.approx(by_hand, rel=1e-10, abs=1e-12)
