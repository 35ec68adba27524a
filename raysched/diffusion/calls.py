"""The network calls of a rollout, laid out once per optimizer step.

Solver tables of all lanes are packed into calls, and everything that a call needs besides the
state is put on the device at once: which rows take part, their times and coefficients, the
ancestral noise, which rows run a second time without their label for guidance, and which states
are kept on the way.

Legend: B samples, L lanes, W forwards in all, E kept states, D… sample dims.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from raysched.config.run import PredictionType, SolverName
from raysched.diffusion.curriculum import RolloutPlan
from raysched.diffusion.packing import Packing, pack_chains
from raysched.diffusion.programs import Order, Program
from raysched.diffusion.reuse import PassedStates
from raysched.diffusion.schedules import NoiseSchedule
from raysched.diffusion.solvers import SolverTable, build_table
from raysched.diffusion.transfer import to_device


class NoiseSource(Protocol):
    """Where the noise of ancestral steps comes from."""

    def __call__(self, *, samples: Tensor, forwards: Tensor) -> Tensor:
        """Draw: samples (n,) and the how-manieth forward of each (n,) -> (n, D…) on the host."""


@dataclass(frozen=True)
class Picks:
    """Rows of every call that are treated apart: those of call c are bounds[c]..bounds[c + 1].

    Attributes:
        rows: places within their call.
        slots: what each belongs to.
        bounds: offsets of the calls.
    """

    rows: Tensor
    slots: Tensor
    bounds: tuple[int, ...]

    def of(self, call: int) -> tuple[Tensor, Tensor]:
        """Rows and slots of a call."""
        places = slice(self.bounds[call], self.bounds[call + 1])
        return self.rows[places], self.slots[places]


@dataclass(frozen=True)
class CallPlan:
    """All network calls of a rollout, on the device.

    Attributes:
        program: the solver's linear combinations.
        num_samples: B.
        samples: (W,) int64, which sample a row belongs to, call after call.
        rows: (W,) int64, which row of the state.
        timesteps: (W,) in the state's dtype.
        coefficients: (num_sources, num_rows, W, 1), folded, in the state's dtype.
        bounds: offsets of the calls.
        rolled: (L,) int64, the samples with k > 0.
        with_clean: whether each of them has a clean prediction too.
        in_step: all rows take part in every call, in their order: nothing has to be gathered.
        noise: (W, D) of ancestral steps, else None; on the host, since a plan that is made ahead
            would hold as much of the device's memory as the samples of all forwards.
        guidance_scale: of classifier-free guidance; 1 is off.
        guided: the rows that run a second time without their label; None without guidance.
        kept: the rows whose state is kept, with its place among the kept ones; None if none is.
        bucket: rows of a call are padded to a multiple.
    """

    program: Program
    num_samples: int
    samples: Tensor
    rows: Tensor
    timesteps: Tensor
    coefficients: Tensor
    bounds: tuple[int, ...]
    rolled: Tensor
    with_clean: bool
    in_step: bool
    noise: Tensor | None = None
    guidance_scale: float = 1.0
    guided: Picks | None = None
    kept: Picks | None = None
    bucket: int = 1

    @property
    def num_calls(self) -> int:
        """Network calls."""
        return len(self.bounds) - 1

    @property
    def sizes(self) -> list[int]:
        """Rows of each call, without guidance's second run and padding."""
        return [end - begin for begin, end in itertools.pairwise(self.bounds)]

    @property
    def num_forwards(self) -> int:
        """Sample-forwards, clean predictions, guidance and padding included.

        A call without any row is filled so that it can be made; it stands for waiting and is
        not counted.
        """
        sizes = self.sizes
        if self.guided is not None:
            twice = itertools.pairwise(self.guided.bounds)
            sizes = [size + b - a for size, (a, b) in zip(sizes, twice, strict=True)]
        return sum(-(-size // self.bucket) * self.bucket for size in sizes)


@dataclass(frozen=True)
class CallOptions:
    """What a rollout does beside solving the ODE.

    Attributes:
        with_clean: predict at the teacher-forced latents of rolled samples too.
        guidance_scale: classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) in
            every forward of a lane; 1 is off. Clean predictions are not guided.
        bucket: pad the rows of a call to a multiple.
        least_calls: calls that are made at least, so that all ranks make as many.
        noise: makes the rollouts ancestral.
        kept: states on the way that are wanted.
    """

    with_clean: bool = False
    guidance_scale: float = 1.0
    bucket: int = 1
    least_calls: int = 0
    noise: NoiseSource | None = None
    kept: PassedStates | None = None

    @property
    def lanes_per_row(self) -> int:
        """Rows of a network call that a lane takes."""
        return 1 if self.guidance_scale == 1.0 else 2


PLAIN = CallOptions()


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
    options: CallOptions | None = None,
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
        with_clean: the same as the option, for calls without further options.
        options: what else the rollouts do.
        device, dtype: of the latents.
    """
    options = options or CallOptions(with_clean=with_clean)
    rolled = torch.nonzero(plan.rolled)[:, 0]
    table = build_table(
        schedule,
        plan.nodes_u[rolled],
        plan.num_steps[rolled],
        solver=solver,
        prediction_type=prediction_type,
        order=order,
        ancestral=options.noise is not None,
    )
    clean_times = schedule.model_time(plan.target_u[rolled]) if options.with_clean else None
    layout = Layout(table, rolled, len(plan.num_steps), clean_times, options)
    return layout.calls(capacity, device, state_dtype(dtype))


@dataclass(frozen=True)
class Layout:
    """Lanes, then clean predictions, before they are packed; on the host.

    Attributes:
        table: the lanes' coefficients.
        rolled: (L,) int64, their samples.
        num_samples: B.
        clean_times: (L,), times of the clean predictions; None without any.
        options: what else the rollouts do.
    """

    table: SolverTable
    rolled: Tensor
    num_samples: int
    clean_times: Tensor | None = None
    options: CallOptions = PLAIN

    def calls(self, capacity: int, device: torch.device | str, dtype: torch.dtype) -> CallPlan:
        """Pack, and lay out what each row of each call needs."""
        table, clean_times, num_lanes = self.table, self.clean_times, self.rolled.numel()
        lengths = table.num_forwards
        if clean_times is not None:
            lengths = torch.cat([lengths, torch.ones_like(self.rolled)])
        capacity = max(capacity // self.options.lanes_per_row, 1)
        packing = pack_chains(lengths, capacity, self.options.least_calls)
        is_lane = packing.chain < num_lanes
        lane = torch.where(is_lane, packing.chain, packing.chain - num_lanes)
        coefficients = table.program.folded(table.coefficients[:, lane, packing.position])
        timesteps = table.timesteps[lane, packing.position]
        if clean_times is not None:
            emitting = table.program.emitting()[:, :, None]
            coefficients = torch.where(is_lane, coefficients, emitting)
            timesteps = torch.where(is_lane, timesteps, clean_times[lane])
        sizes_equal = packing.num_calls * lengths.numel() == packing.chain.numel()
        guided = None
        if self.options.guidance_scale != 1.0:
            guided = _picks(packing, is_lane, packing.chain, device)
        return CallPlan(
            program=table.program,
            num_samples=self.num_samples,
            samples=to_device(self.rolled[lane], device),
            rows=to_device(packing.chain, device),
            timesteps=to_device(timesteps, device, dtype),
            coefficients=to_device(coefficients[..., None], device, dtype),
            bounds=packing.bounds,
            rolled=to_device(self.rolled, device),
            with_clean=clean_times is not None,
            in_step=sizes_equal and lengths.numel() <= capacity,
            noise=self._noise(self.rolled[lane], packing.position, is_lane, device, dtype),
            guidance_scale=self.options.guidance_scale,
            guided=guided,
            kept=self._kept(packing, is_lane, lane, device),
            bucket=self.options.bucket,
        )

    def _noise(
        self,
        samples: Tensor,
        position: Tensor,
        is_lane: Tensor,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """(W, D): unit Gaussians of the lanes' forwards, zeros for clean predictions."""
        if self.options.noise is None or not samples.numel():
            return None
        drawn = self.options.noise(samples=samples[is_lane], forwards=position[is_lane])
        drawn = drawn.flatten(1).to(dtype)
        noise = drawn.new_zeros(samples.numel(), drawn.shape[1])
        noise.index_copy_(0, torch.nonzero(is_lane)[:, 0], drawn)
        return noise.pin_memory() if torch.device(device).type == "cuda" else noise

    def _kept(
        self, packing: Packing, is_lane: Tensor, lane: Tensor, device: torch.device | str
    ) -> Picks | None:
        """The forwards whose input is a state that is wanted."""
        wanted = self.options.kept
        if wanted is None or not len(wanted):
            return None
        num_lanes, longest = self.table.timesteps.shape
        slots = torch.full((num_lanes, longest), -1, dtype=torch.int64)
        lane_of = torch.empty(self.num_samples, dtype=torch.int64)
        lane_of[self.rolled] = torch.arange(num_lanes)
        per_step = self.table.program.forwards_per_step
        slots[lane_of[wanted.samples], wanted.steps * per_step] = torch.arange(len(wanted))
        slot = torch.where(is_lane, slots[lane, packing.position], -1)
        return _picks(packing, slot >= 0, slot, device)


def _picks(packing: Packing, chosen: Tensor, slots: Tensor, device: torch.device | str) -> Picks:
    """The chosen rows (W,) bool by call, with their slots (W,)."""
    bounds = torch.tensor(packing.bounds)
    sizes = bounds[1:] - bounds[:-1]
    place = torch.arange(len(chosen)) - torch.repeat_interleave(bounds[:-1], sizes)
    before = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(chosen.long(), dim=0)])
    return Picks(
        rows=to_device(place[chosen], device),
        slots=to_device(slots[chosen], device),
        bounds=tuple(before[bounds].tolist()),
    )
