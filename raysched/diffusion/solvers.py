"""Solvers of the probability-flow ODE as tables of coefficients.

A solver is a *program*, the fixed list of linear combinations that take the state rows and the
raw network output to the new rows, and a *table* with their coefficients for every lane and every
forward of a whole plan, computed at once in float64. The conversion from what the network
predicts to x0 or eps is folded into the table, so that nothing but multiply-adds is left for the
time of the rollout. All lanes have their own history: empty at their source.

  euler   x/alpha over sigma/alpha on DDPM paths, x over t on the flow; with data prediction both
          are x_n = (sigma_n/sigma) x + (alpha_n - alpha sigma_n/sigma) x0, finite at alpha = 0
  dpm     DPM-Solver++ multistep, midpoint (Lu et al. 2022, arXiv 2211.01095)
  unipc   UniPC bh2 with data prediction (Zhao et al. 2023, arXiv 2302.04867)
  rk4     the classical Runge-Kutta method in Euler's variables, four forwards per step

Euler's step has an ancestral form, which keeps less of the predicted noise and adds fresh noise.

A step down to sigma = 0 is Euler's for every solver and gives x0 as predicted.

Legend: L lanes, S steps of the longest lane, F forwards of the longest lane.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raysched.config.run import PredictionType, SolverName
from raysched.diffusion.multistep import Terms, dpm_terms, unipc_terms
from raysched.diffusion.parameterization import eps_coefficients, x0_coefficients
from raysched.diffusion.programs import EULER, RK4, Order, Program, solver_program
from raysched.diffusion.schedules import MODEL_TIME_SCALE, NoiseSchedule

__all__ = ["Nodes", "Order", "Program", "SolverTable", "build_table", "solver_program"]

EPSILON_SCALING_ALPHA_FLOOR = 0.05


@dataclass(frozen=True)
class SolverTable:
    """A program with its coefficients; float64 on the CPU.

    Attributes:
        program: the linear combinations.
        coefficients: (num_terms, L, F).
        timesteps: (L, F), what the network gets.
        num_forwards: (L,) int64.
    """

    program: Program
    coefficients: Tensor
    timesteps: Tensor
    num_forwards: Tensor


@dataclass(frozen=True)
class Nodes:
    """The schedule along the lanes, (L, S + 1) each, and conversions at the sources of steps.

    Attributes:
        alpha: signal scale.
        sigma: noise scale.
        to_x0: coefficients (c_x, c_out) of x0.
        to_eps: coefficients (e_x, e_out) of eps.
    """

    alpha: Tensor
    sigma: Tensor
    to_x0: tuple[Tensor, Tensor]
    to_eps: tuple[Tensor, Tensor]

    @classmethod
    def at(
        cls, alpha: Tensor, sigma: Tensor, prediction_type: PredictionType, scaling: float | None
    ) -> Nodes:
        """Fold the prediction type, and Epsilon Scaling (arXiv 2308.15321) if asked for."""
        to_x0 = x0_coefficients(prediction_type, alpha, sigma)
        to_eps = eps_coefficients(prediction_type, alpha, sigma)
        if scaling is not None:
            usable = alpha >= EPSILON_SCALING_ALPHA_FLOOR
            divisor = torch.where(usable, torch.full_like(alpha, scaling), torch.ones_like(alpha))
            scaled = (to_eps[0] / divisor, to_eps[1] / divisor)
            safe = alpha.clamp_min(EPSILON_SCALING_ALPHA_FLOOR)
            x0 = ((1 - sigma * scaled[0]) / safe, -sigma * scaled[1] / safe)
            to_x0 = (torch.where(usable, x0[0], to_x0[0]), torch.where(usable, x0[1], to_x0[1]))
            to_eps = scaled
        return cls(alpha, sigma, to_x0, to_eps)

    def derivative(self, is_flow: bool) -> tuple[Tensor, Tensor]:
        """Coefficients of eps (d(x/alpha)/d(sigma/alpha)) or of eps - x0 (dx/dt)."""
        if not is_flow:
            return self.to_eps
        return self.to_eps[0] - self.to_x0[0], self.to_eps[1] - self.to_x0[1]


def build_table(
    schedule: NoiseSchedule,
    nodes_u: Tensor,
    num_steps: Tensor,
    *,
    solver: SolverName,
    prediction_type: PredictionType,
    order: Order = "auto",
    epsilon_scaling: float | None = None,
    ancestral: bool = False,
) -> SolverTable:
    """Coefficients of all lanes and forwards of a plan.

    Args:
        schedule: the noise schedule.
        nodes_u: (L, S + 1), coordinates from source to target; what follows a lane's target is
            ignored.
        num_steps: (L,) int64, steps per lane.
        solver: unipc, euler, dpm or rk4.
        prediction_type: what the network predicts.
        order: of dpm and unipc.
        epsilon_scaling: eps as predicted is divided by this and x0 recomputed, except where
            alpha < 0.05.
        ancestral: fresh noise in every step; euler only.
    """
    program = solver_program(solver, order, ancestral=ancestral)
    nodes = Nodes.at(*schedule.alpha_sigma(nodes_u), prediction_type, epsilon_scaling)
    timesteps = schedule.model_time(nodes_u[:, :-1])
    num_forwards = num_steps
    if program is RK4:
        terms, timesteps = _rk4_terms(schedule, nodes_u, nodes, prediction_type, epsilon_scaling)
        last = nodes.sigma.gather(1, num_steps[:, None])[:, 0]
        final_euler = (last == 0) & (num_steps > 0)
        num_forwards = 4 * num_steps - 3 * final_euler.long()
    else:
        terms = _terms(program, nodes, solver)
    zeros = torch.zeros_like(timesteps)
    stacked = torch.stack([terms.get(term, zeros) for term in program.terms])
    coefficients = torch.nan_to_num(stacked, nan=0.0, posinf=0.0, neginf=0.0)
    return SolverTable(program, coefficients, timesteps, num_forwards)


def _terms(program: Program, nodes: Nodes, solver: SolverName) -> Terms:
    """Coefficients of the solvers with one forward per step."""
    if program.is_noisy:
        return _ancestral_terms(nodes)
    if program is EULER:
        return _euler_terms(nodes)
    if solver == "dpm":
        return dpm_terms(nodes.alpha, nodes.sigma, nodes.to_x0, order=len(program.rows))
    return unipc_terms(nodes.alpha, nodes.sigma, nodes.to_x0, order=len(program.rows) - 2)


def _euler_terms(nodes: Nodes) -> Terms:
    """First order in x and the raw output, (L, S) each."""
    alpha, sigma = nodes.alpha, nodes.sigma
    ratio = sigma[:, 1:] / sigma[:, :-1]
    gain = alpha[:, 1:] - alpha[:, :-1] * ratio
    c_x, c_out = (c[:, :-1] for c in nodes.to_x0)
    return {("x", "x"): ratio + gain * c_x, ("x", "out"): gain * c_out}


def _ancestral_terms(nodes: Nodes) -> Terms:
    """x_n = alpha_n·x0 + sqrt(sigma_n² - s²)·eps + s·z, (L, S) each.

    s² = (sigma_n²/sigma²)(sigma² - (alpha/alpha_n)² sigma_n²) is the variance of x_n given x and
    x0, so that with x0 known a step of any length is exact (Ho et al. 2020, arXiv 2006.11239,
    eq. 7; Song et al. 2021, arXiv 2010.02502, eq. 16).
    """
    alpha, sigma = nodes.alpha, nodes.sigma
    share = (alpha[:, :-1] * sigma[:, 1:] / (alpha[:, 1:] * sigma[:, :-1])) ** 2
    fresh = sigma[:, 1:] * (1 - share).clamp_min(0.0).sqrt()
    kept = sigma[:, 1:] * share.clamp_max(1.0).sqrt()
    (c_x, c_out), (e_x, e_out) = (
        (c[0][:, :-1], c[1][:, :-1]) for c in (nodes.to_x0, nodes.to_eps)
    )
    return {
        ("x", "x"): alpha[:, 1:] * c_x + kept * e_x,
        ("x", "out"): alpha[:, 1:] * c_out + kept * e_out,
        ("x", "noise"): fresh,
    }


def _rk4_terms(
    schedule: NoiseSchedule,
    nodes_u: Tensor,
    nodes: Nodes,
    prediction_type: PredictionType,
    scaling: float | None,
) -> tuple[Terms, Tensor]:
    """Four stages per step, (L, 4 S); the state is x = g·z with dz/d(time) = D(x)."""
    flow = schedule.is_flow
    time = nodes.sigma if flow else nodes.sigma / nodes.alpha
    g = torch.ones_like(time) if flow else nodes.alpha
    middle = 0.5 * (time[:, :-1] + time[:, 1:])
    if flow:
        alpha_mid, g_mid, model_mid = (
            1 - middle,
            torch.ones_like(middle),
            MODEL_TIME_SCALE * middle,
        )
        sigma_mid = middle
    else:
        alpha_mid = g_mid = 1 / torch.sqrt(1 + middle**2)
        sigma_mid, model_mid = middle * alpha_mid, schedule.index_at_ratio(middle)
    mid = Nodes.at(alpha_mid, sigma_mid, prediction_type, scaling).derivative(flow)
    at = nodes.derivative(flow)
    d_x, d_out = ((d[:, :-1], m, m, d[:, 1:]) for d, m in zip(at, mid, strict=True))
    span, g_from, g_to = time[:, 1:] - time[:, :-1], g[:, :-1], g[:, 1:]
    terms = _rk4_stages(d_x, d_out, span, g_from, g_mid, g_to)
    final = nodes.sigma[:, 1:] == 0
    euler = _euler_terms(nodes)
    for source, stages in (("base", None), ("x", euler["x", "x"]), ("out", euler["x", "out"])):
        first = torch.zeros_like(span) if stages is None else stages
        first = torch.where(final, first, terms["x", source][..., 0])
        terms["x", source] = torch.cat([first[..., None], terms["x", source][..., 1:]], dim=-1)
    model = schedule.model_time(nodes_u)
    times = torch.stack([model[:, :-1], model_mid, model_mid, model[:, 1:]], dim=2)
    return {key: value.flatten(1) for key, value in terms.items()}, times.flatten(1)


def _rk4_stages(
    d_x: tuple[Tensor, ...],
    d_out: tuple[Tensor, ...],
    span: Tensor,
    g_from: Tensor,
    g_mid: Tensor,
    g_to: Tensor,
) -> Terms:
    """Coefficients (L, S, 4) of the stages: three trial moves by D, then the one by `acc`."""
    zero, one = torch.zeros_like(span), torch.ones_like(span)
    move = (0.5 * span * g_mid, 0.5 * span * g_mid, span * g_to, zero)
    weights = (1.0, 2.0, 2.0, 1.0)
    stages = {
        ("acc", "acc"): (zero, one, one, one),
        ("acc", "x"): tuple(w * d for w, d in zip(weights, d_x, strict=True)),
        ("acc", "out"): tuple(w * d for w, d in zip(weights, d_out, strict=True)),
        ("x", "base"): tuple(to / g_from for to in (g_mid, g_mid, g_to, g_to)),
        ("x", "acc"): (zero, zero, zero, span * g_to / 6),
        ("x", "x"): tuple(m * d for m, d in zip(move, d_x, strict=True)),
        ("x", "out"): tuple(m * d for m, d in zip(move, d_out, strict=True)),
        ("base", "base"): (one, one, one, zero),
        ("base", "x"): (zero, zero, zero, one),
    }
    return {key: torch.stack(list(values), dim=-1) for key, values in stages.items()}
