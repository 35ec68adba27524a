"""The rollout engine: many short ODE solutions, run as few full network calls.

Each rolled sample is a lane with its own source, target and number of steps; a lane is a chain of
forwards, and `plan_calls` packs the chains of one or several micro-batches of an optimizer step
into calls. Predictions at the teacher-forced latents ("clean", wanted by ReflexFlow) are chains
of one forward and fill free places. Everything that a call needs besides the state lies in
tensors that are made once per plan (`calls.py`): no synchronisation with the device between
calls.

The state and the solver's history are fp32 (float64 if the latent is), whatever the network's
precision; the network gets the state as it is, and its caller casts.

Legend: B samples, L lanes, W forwards in all, E kept states, D… sample dims.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from raysched.config.run import PredictionType, SolverName
from raysched.diffusion.calls import CallOptions, CallPlan, Layout, plan_calls, state_dtype
from raysched.diffusion.programs import Order
from raysched.diffusion.schedules import NoiseSchedule
from raysched.diffusion.solvers import SolverTable, build_table

__all__ = [
    "CallOptions",
    "CallPlan",
    "LaneNetwork",
    "RolloutResult",
    "integrate",
    "plan_calls",
    "rollout",
    "state_dtype",
]


class LaneNetwork(Protocol):
    """A network whose caller closes over labels and precision."""

    def __call__(self, *, sample: Tensor, timestep: Tensor, lanes: Tensor) -> Tensor:
        """Predict: sample (n, D…), timestep (n,), lanes (n,) int64 sample numbers -> (n, D…).

        Under guidance, lane B + i is sample i without its label. A network with a method
        `prepare(timestep, lanes)`, (W,) each, is asked once for tensors of W rows that do not
        depend on the sample, and gets each call's rows of them as `given`.
        """


@dataclass(frozen=True)
class RolloutResult:
    """What a rollout made.

    Attributes:
        x_hat: (B, D…), self-made latents; samples with k = 0 are bitwise the input.
        clean_pred: (B, D…), predictions at the teacher-forced latents of rolled samples, zero
            elsewhere; None if not asked for.
        num_forwards: sample-forwards spent.
        num_calls: network calls made.
        kept: (E, D…), the states on the way that were asked for, as the network got them: what
            UniPC's corrector makes of them afterwards no network ever sees.
    """

    x_hat: Tensor
    clean_pred: Tensor | None
    num_forwards: int
    num_calls: int
    kept: Tensor | None = None


def rollout(
    network: LaneNetwork,
    x_source: Tensor,
    calls: CallPlan,
    x_clean: Tensor | None = None,
    *,
    with_gradient: bool = False,
) -> RolloutResult:
    """Run the calls of a plan.

    Args:
        network: called by keyword with sample, timestep and lanes.
        x_source: (B, D…), latents at the sources (where k = 0: at the targets).
        calls: from `plan_calls`.
        x_clean: (B, D…), teacher-forced latents x_t, if the plan has clean predictions.
        with_gradient: keep the graph through the whole rollout.
    """
    if calls.num_calls == 0:
        empty = torch.zeros_like(x_source) if calls.with_clean else None
        return RolloutResult(x_source, empty, 0, 0)
    dtype, num_lanes = state_dtype(x_source.dtype), calls.rolled.numel()
    start = x_source.index_select(0, calls.rolled).to(dtype).flatten(1)
    if calls.with_clean:
        assert x_clean is not None, "the plan has clean predictions: x_clean is needed"
        clean = x_clean.index_select(0, calls.rolled).to(dtype).flatten(1)
        start = torch.cat([start, clean])
    with torch.set_grad_enabled(with_gradient):
        final, kept = _run(network, start, calls, x_source.shape[1:])
    shape = (-1, *x_source.shape[1:])
    x_hat = x_source.to(dtype).index_copy(0, calls.rolled, final[:num_lanes].view(shape))
    clean_pred = None
    if calls.with_clean:
        clean_pred = torch.zeros_like(x_hat)
        clean_pred.index_copy_(0, calls.rolled, final[num_lanes:].view(shape))
    passed = None if kept is None else kept.view(shape)
    return RolloutResult(x_hat, clean_pred, calls.num_forwards, calls.num_calls, passed)


def _run(
    network: LaneNetwork, start: Tensor, calls: CallPlan, shape: torch.Size
) -> tuple[Tensor, Tensor | None]:
    """Make the calls; state rows are (lanes, D) each. Returns row x (lanes, D), kept (E, D)."""
    program = calls.program
    zeros = torch.zeros_like(start)
    state = torch.stack([start if row in program.start else zeros for row in program.rows])
    kept = None if calls.kept is None else start.new_empty(len(calls.kept.rows), start.shape[1])
    for number, call in enumerate(_calls(network, calls)):
        active = state if calls.in_step else state.index_select(1, call.rows)
        if kept is not None and calls.kept is not None:
            places, slots = calls.kept.of(number)
            kept.index_copy_(0, slots, active[0].index_select(0, places).detach())
        sample = active[0].view(-1, *shape)
        out = _predict(network, sample, calls, number, call).flatten(1).to(start.dtype)
        if not len(call.rows):
            continue
        new = _advance(active, out, call)
        if calls.in_step:
            state = new
        else:
            state.index_copy_(1, call.rows, new)
    return state[0], kept


class _Call(NamedTuple):
    """One call's rows of what a plan has for all: n rows of the state, their times and samples.

    Attributes:
        rows: (n,).
        timesteps: (n,).
        samples: (n,).
        coefficients: of each source, (num_rows, n, 1).
        noise: (n, D) of ancestral steps, else None.
        given: n rows each of what the network made of times and samples beforehand.
    """

    rows: Tensor
    timesteps: Tensor
    samples: Tensor
    coefficients: tuple[Tensor, ...]
    noise: Tensor | None
    given: tuple[Tensor, ...]


def _calls(network: LaneNetwork, calls: CallPlan) -> Iterator[_Call]:
    """A plan's tensors, cut into calls all at once."""
    sizes = calls.sizes
    per_source = (torch.split(source, sizes, dim=1) for source in calls.coefficients.unbind(0))
    given = [torch.split(part, sizes) for part in _prepared(network, calls)]
    noise: Sequence[Tensor | None] = (None,) * len(sizes)
    if calls.noise is not None:
        noise = torch.split(calls.noise.to(calls.rows.device, non_blocking=True), sizes)
    return map(
        _Call._make,
        zip(
            torch.split(calls.rows, sizes),
            torch.split(calls.timesteps, sizes),
            torch.split(calls.samples, sizes),
            zip(*per_source, strict=True),
            noise,
            zip(*given, strict=True) if given else ((),) * len(sizes),
            strict=True,
        ),
    )


def _prepared(network: LaneNetwork, calls: CallPlan) -> tuple[Tensor, ...]:
    """What the network makes of all times and lanes alone, W rows each; empty if nothing."""
    prepare = getattr(network, "prepare", None)
    if prepare is None or calls.guided is not None or calls.bucket > 1 or not min(calls.sizes):
        return ()
    whole: tuple[Tensor, ...] = prepare(calls.timesteps, calls.samples)
    return whole


def _predict(
    network: LaneNetwork, sample: Tensor, calls: CallPlan, number: int, call: _Call
) -> Tensor:
    """One network call, with guidance and padding: (n, D…) -> (n, D…)."""
    num_rows, timestep, lanes = len(sample), call.timesteps, call.samples
    if calls.guided is not None:
        twice, _ = calls.guided.of(number)
        sample = torch.cat([sample, sample.index_select(0, twice)])
        timestep = torch.cat([timestep, timestep.index_select(0, twice)])
        lanes = torch.cat([lanes, lanes.index_select(0, twice) + calls.num_samples])
    missing = -len(sample) % calls.bucket if len(sample) else calls.bucket
    if missing:
        sample = torch.cat([sample, sample.new_zeros(missing, *sample.shape[1:])])
        timestep = torch.cat([timestep, timestep.new_zeros(missing)])
        lanes = torch.cat([lanes, lanes.new_zeros(missing)])
    known: dict[str, Any] = {"given": call.given} if call.given else {}
    out = network(sample=sample, timestep=timestep, lanes=lanes, **known)
    if calls.guided is None:
        return out[:num_rows] if missing else out
    labelled, blind = out[:num_rows], out[num_rows : num_rows + len(twice)]
    guided = torch.lerp(blind, labelled.index_select(0, twice), calls.guidance_scale)
    return labelled.index_copy(0, twice, guided)


def _advance(active: Tensor, out: Tensor, call: _Call) -> Tensor:
    """The new rows (num_rows, n, D) of the old ones and the network's output (n, D).

    Plain multiply-adds on purpose: a matrix product would run in TF32 on some devices.
    """
    sources = [*active, out] if call.noise is None else [*active, out, call.noise]
    new: Tensor = call.coefficients[0] * sources[0]
    for coefficient, source in zip(call.coefficients[1:], sources[1:], strict=True):
        new.addcmul_(coefficient, source)
    return new


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
        prediction_type: what the network predicts.
        solver, order, epsilon_scaling: see `build_table`.
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
    layout = Layout(wide, torch.arange(num_samples), num_samples)
    return rollout(network, x, layout.calls(max(num_samples, 1), x.device, state_dtype(x.dtype)))
