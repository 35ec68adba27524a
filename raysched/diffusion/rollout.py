"""The rollout engine: many short ODE solutions, run as few full network calls.

Each rolled sample is a lane with its own source, target and number of steps; a lane is a chain of
forwards, and `plan_calls` packs the chains of one or several micro-batches of an optimizer step
into calls. Predictions at the teacher-forced latents ("clean", wanted by ReflexFlow) are chains
of one forward and fill free places. Everything that a call needs besides the state lies in
tensors that are made once per plan: no synchronisation with the device between calls.

The state and the solver's history are fp32 (float64 if the latent is), whatever the network's
precision; the network gets the state as it is, and its caller casts.

Legend: B samples, L lanes, W forwards in all, D… sample dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from raysched.config.run import PredictionType, SolverName
from raysched.diffusion.curriculum import RolloutPlan
from raysched.diffusion.packing import pack_chains
from raysched.diffusion.schedules import NoiseSchedule
from raysched.diffusion.solvers import Order, Program, SolverTable, build_table


class LaneNetwork(Protocol):
    """A network whose caller closes over labels and precision."""

    def __call__(self, *, sample: Tensor, timestep: Tensor, lanes: Tensor) -> Tensor:
        """Predict: sample (n, D…), timestep (n,), lanes (n,) int64 sample numbers -> (n, D…)."""


@dataclass(frozen=True)
class CallPlan:
    """All network calls of a rollout, on the device.

    Attributes:
        program: the solver's linear combinations.
        samples: (W,) int64, which sample a row belongs to, call after call.
        rows: (W,) int64, which row of the state.
        timesteps: (W,) in the state's dtype.
        coefficients: (num_terms, W, 1) in the state's dtype.
        bounds: offsets of the calls.
        rolled: (L,) int64, the samples with k > 0.
        with_clean: whether each of them has a clean prediction too.
        in_step: all rows take part in every call, in their order: nothing has to be gathered.
    """

    program: Program
    samples: Tensor
    rows: Tensor
    timesteps: Tensor
    coefficients: Tensor
    bounds: tuple[int, ...]
    rolled: Tensor
    with_clean: bool
    in_step: bool

    @property
    def num_calls(self) -> int:
        """Network calls."""
        return len(self.bounds) - 1

    @property
    def num_forwards(self) -> int:
        """Sample-forwards, clean predictions included: what the compute meter counts."""
        return self.bounds[-1]


@dataclass(frozen=True)
class RolloutResult:
    """What a rollout made.

    Attributes:
        x_hat: (B, D…), self-made latents; samples with k = 0 are bitwise the input.
        clean_pred: (B, D…), predictions at the teacher-forced latents of rolled samples, zero
            elsewhere; None if not asked for.
        num_forwards: sample-forwards spent.
        num_calls: network calls made.
    """

    x_hat: Tensor
    clean_pred: Tensor | None
    num_forwards: int
    num_calls: int


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or float64 for float64 latents."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def plan_calls(
    plan: RolloutPlan,
    schedule: NoiseSchedule,
    *,
    solver: SolverName,
    prediction_type: PredictionType,
    capacity: int,
    order: Order = "auto",
    with_clean: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> CallPlan:
    """Solver table and packing of a plan, made once per optimizer step.

    Args:
        plan: the rollouts of all micro-batches of the step.
        schedule: the noise schedule.
        solver: solver of the ODE.
        prediction_type: what the network predicts.
        capacity: most rows of a network call, usually the micro-batch.
        order: of dpm and unipc.
        with_clean: predict at the teacher-forced latents of rolled samples too.
        device: where the latents are.
        dtype: of the latents.
    """
    rolled = torch.nonzero(plan.rolled)[:, 0]
    table = build_table(
        schedule,
        plan.nodes_u[rolled],
        plan.num_steps[rolled],
        solver=solver,
        prediction_type=prediction_type,
        order=order,
    )
    clean_times = schedule.model_time(plan.target_u[rolled]) if with_clean else None
    return _calls(table, rolled, clean_times, capacity, device, state_dtype(dtype))


def _calls(
    table: SolverTable,
    rolled: Tensor,
    clean_times: Tensor | None,
    capacity: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> CallPlan:
    """Pack lanes, then clean predictions, and lay out what each row of each call needs."""
    num_lanes, with_clean = rolled.numel(), clean_times is not None
    lengths = table.num_forwards
    if with_clean:
        lengths = torch.cat([lengths, torch.ones_like(rolled)])
    packing = pack_chains(lengths, capacity)
    chain, position = packing.chain, packing.position
    is_lane = chain < num_lanes
    lane = torch.where(is_lane, chain, chain - num_lanes)
    coefficients = table.coefficients[:, lane, position]
    timesteps = table.timesteps[lane, position]
    if clean_times is not None:
        coefficients = torch.where(is_lane, coefficients, table.program.emitting()[:, None])
        timesteps = torch.where(is_lane, timesteps, clean_times[lane])
    sizes_equal = packing.num_calls * lengths.numel() == chain.numel()
    return CallPlan(
        program=table.program,
        samples=rolled[lane].to(device),
        rows=chain.to(device),
        timesteps=timesteps.to(device=device, dtype=dtype),
        coefficients=coefficients[:, :, None].to(device=device, dtype=dtype),
        bounds=packing.bounds,
        rolled=rolled.to(device),
        with_clean=with_clean,
        in_step=sizes_equal and lengths.numel() <= capacity,
    )


def rollout(
    network: LaneNetwork, x_source: Tensor, calls: CallPlan, x_clean: Tensor | None = None
) -> RolloutResult:
    """Run the calls of a plan, without gradient.

    Args:
        network: called by keyword with sample, timestep and lanes.
        x_source: (B, D…), latents at the sources (where k = 0: at the targets).
        calls: from `plan_calls`.
        x_clean: (B, D…), teacher-forced latents x_t, if the plan has clean predictions.
    """
    if calls.num_forwards == 0:
        empty = torch.zeros_like(x_source) if calls.with_clean else None
        return RolloutResult(x_source, empty, 0, 0)
    dtype, num_lanes = state_dtype(x_source.dtype), calls.rolled.numel()
    start = x_source.index_select(0, calls.rolled).to(dtype).flatten(1)
    if calls.with_clean:
        assert x_clean is not None, "the plan has clean predictions: x_clean is needed"
        clean = x_clean.index_select(0, calls.rolled).to(dtype).flatten(1)
        start = torch.cat([start, clean])
    final = _run(network, start, calls, x_source.shape[1:])
    shape = (-1, *x_source.shape[1:])
    x_hat = x_source.to(dtype).index_copy(0, calls.rolled, final[:num_lanes].view(shape))
    clean_pred = None
    if calls.with_clean:
        clean_pred = torch.zeros_like(x_hat)
        clean_pred.index_copy_(0, calls.rolled, final[num_lanes:].view(shape))
    return RolloutResult(x_hat, clean_pred, calls.num_forwards, calls.num_calls)


@torch.no_grad()
def _run(network: LaneNetwork, start: Tensor, calls: CallPlan, shape: torch.Size) -> Tensor:
    """Make the calls; state rows are (lanes, D) each. Returns row x, (lanes, D)."""
    program = calls.program
    state = {
        row: start.clone() if row in program.start else torch.zeros_like(start)
        for row in program.rows
    }
    for begin, end in zip(calls.bounds[:-1], calls.bounds[1:], strict=True):
        rows = calls.rows[begin:end]
        active = state if calls.in_step else {r: v.index_select(0, rows) for r, v in state.items()}
        out = network(
            sample=active["x"].view(-1, *shape),
            timestep=calls.timesteps[begin:end],
            lanes=calls.samples[begin:end],
        )
        values = _advance(
            program, active, out.flatten(1).to(start.dtype), calls.coefficients[:, begin:end]
        )
        if calls.in_step:
            state = {row: values[name] for row, name in program.carry.items()}
        else:
            for row, name in program.carry.items():
                state[row].index_copy_(0, rows, values[name])
    return state["x"]


def _advance(
    program: Program, active: dict[str, Tensor], out: Tensor, coefficients: Tensor
) -> dict[str, Tensor]:
    """Apply a program's updates: values (n, D), coefficients (num_terms, n, 1).

    Plain multiply-adds on purpose: a matrix product would run in TF32 on some devices.
    """
    values = {**active, "out": out}
    term = 0
    for name, sources in program.updates:
        total = values[sources[0]] * coefficients[term]
        for place, source in enumerate(sources[1:], start=term + 1):
            total.addcmul_(values[source], coefficients[place])
        term += len(sources)
        values[name] = total
    return values


def integrate(
    network: LaneNetwork,
    x: Tensor,
    schedule: NoiseSchedule,
    nodes_u: Tensor,
    *,
    solver: SolverName,
    prediction_type: PredictionType,
    order: Order = "auto",
    epsilon_scaling: float | None = None,
) -> RolloutResult:
    """Solve the ODE for a whole batch along common nodes, without gradient.

    Args:
        network: called by keyword with sample, timestep and lanes.
        x: (B, D…), latents at the first node.
        schedule: the noise schedule.
        nodes_u: (N + 1,) descending coordinates, from noise to the end, often 0.
        solver: solver of the ODE.
        prediction_type: what the network predicts.
        order: of dpm and unipc.
        epsilon_scaling: see `build_table`.
    """
    num_samples, num_steps = x.shape[0], nodes_u.numel() - 1
    table = build_table(
        schedule,
        nodes_u[None, :].double(),
        torch.tensor([num_steps]),
        solver=solver,
        prediction_type=prediction_type,
        order=order,
        epsilon_scaling=epsilon_scaling,
    )
    wide = SolverTable(
        table.program,
        table.coefficients.expand(-1, num_samples, -1),
        table.timesteps.expand(num_samples, -1),
        table.num_forwards.expand(num_samples),
    )
    everyone = torch.arange(num_samples)
    calls = _calls(wide, everyone, None, max(num_samples, 1), x.device, state_dtype(x.dtype))
    return rollout(network, x, calls)
