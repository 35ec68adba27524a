"""The exact law of a rollout's length: strategy, rounding, windows, and the end of the path.

The offset k drawn for a chosen sample and the room above its target are independent, so that the
clamped offset is at least j with chance P(k >= j) P(target allowed, room >= j): the target lies
in its window, and low enough for j steps of the grid below the noisiest source. Every such event
is an interval of u, whose chance is a difference of the training time's distribution function.

Legend: K the largest offset, N the rollout grid, T training timesteps, j = 1, 2, …
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raysched.config.run import NoiseScheduleConfig, ScheduledSamplingConfig
from raysched.diffusion.parameterization import ANCHOR_SIGMA_FLOOR
from raysched.diffusion.reuse import spaced_steps
from raysched.diffusion.schedules import CLAMP_TOLERANCE, NoiseSchedule


@dataclass(frozen=True)
class OffsetLaw:
    """What to expect of one sample that was chosen for a rollout, its offset clamped.

    Attributes:
        rolled: P(k > 0).
        steps: E[k].
        steps_squared: E[k²].
        passed: expected states on the way that are trained on too.
        tail: P(k >= j) for j = 1, 2, …
    """

    rolled: float
    steps: float
    steps_squared: float
    passed: float
    tail: tuple[float, ...]


@dataclass(frozen=True)
class Window:
    """Where targets and sources may lie, in u; on a DDPM schedule multiples of 1/T.

    Attributes:
        noise: the schedule.
        above: targets lie above this (or at it, on a flow path).
        highest: and at or below this.
        source: the noisiest source.
    """

    noise: NoiseScheduleConfig
    above: float
    highest: float
    source: float

    @classmethod
    def of(cls, noise: NoiseScheduleConfig, config: ScheduledSamplingConfig) -> Window:
        """The windows that a run's rollouts have."""
        schedule = NoiseSchedule.from_config(noise)
        above = schedule.uniform_coordinate(config.t_min)
        if noise.kind != "flow":
            count = noise.num_train_timesteps
            above = (math.ceil(config.t_min * count - CLAMP_TOLERANCE) - 1) / count
        highest = schedule.uniform_coordinate(config.t_max)
        return cls(noise, above, highest, schedule.uniform_coordinate(config.source_t_max))

    def chance(self, bound: Tensor) -> Tensor:
        """P(target in its window and at most `bound`)."""
        high = time_cdf(self.noise, bound.double().clamp_max(self.highest))
        low = time_cdf(self.noise, torch.tensor(self.above))
        return (high - low).clamp_min(0.0)

    def room_bound(self, grid: int, j: Tensor) -> Tensor:
        """The highest target with room for j steps of the grid, as `clamp_steps` counts."""
        if self.noise.kind == "flow":
            return self.source - (j.double() - CLAMP_TOLERANCE) / grid
        count = self.noise.num_train_timesteps
        # (U - p) N // T >= j in integers: p <= U - ceil(j T / N).
        highest = round(self.source * count) + torch.div(-j * count, grid, rounding_mode="floor")
        return highest.double() / count

    def jump_bound(self) -> Tensor:
        """The highest target from which a jump's source differs."""
        if self.noise.kind == "flow":
            return torch.tensor(self.source)
        count = self.noise.num_train_timesteps
        return torch.tensor((round(self.source * count) - 1) / count)

    def passed_bound(self, grid: int, remaining: Tensor) -> Tensor:
        """The highest target whose state so many steps before the end is in the window."""
        if self.noise.kind == "flow":
            return self.highest - remaining.double() / grid
        count = self.noise.num_train_timesteps
        offset = (2 * remaining * count + grid) // (2 * grid)  # as `NoiseSchedule.nodes` rounds
        return self.highest - offset.double() / count


def offset_tail(strategy: str, max_step_offset: int, j: Tensor) -> Tensor:
    """P(k >= j) of a sample chosen for a rollout, before clamping.

    Args:
        strategy: uniform U{0..K}, biased_early round(v²K) or biased_late round((1 - v²)K).
        max_step_offset: K.
        j: any shape, 1 or more.
    """
    if strategy == "uniform":
        return (max_step_offset + 1 - j).double().clamp_min(0.0) / (max_step_offset + 1)
    share = ((j.double() - 0.5) / max_step_offset).clamp_max(1.0)
    return 1 - share.sqrt() if strategy == "biased_early" else (1 - share).sqrt()


def time_cdf(noise: NoiseScheduleConfig, u: Tensor) -> Tensor:
    """P(r <= u) of the drawn coordinate r, before a DDPM schedule takes its index floor(r T)."""
    u = u.double().clamp(0.0, 1.0)
    return torch.special.ndtr(torch.logit(u)) if noise.timestep_sampling == "logit_normal" else u


@functools.lru_cache(maxsize=256)
def offset_law(
    noise: NoiseScheduleConfig, config: ScheduledSamplingConfig, max_step_offset: int
) -> OffsetLaw:
    """The law of one chosen sample's rollout.

    Args:
        noise: the run's schedule.
        config: the rollouts.
        max_step_offset: K, as its ramp has it.
    """
    window = Window.of(noise, config)
    if config.grid == "jump":
        possible = float(window.chance(window.jump_bound()))
        return OffsetLaw(possible, possible, possible, 0.0, (possible,))
    grid = config.grid or noise.num_train_timesteps
    assert isinstance(grid, int)
    j = torch.arange(1, min(max_step_offset, grid) + 1)
    drawn = offset_tail(config.strategy, max_step_offset, j)
    tail = drawn * window.chance(window.room_bound(grid, j))
    passed = _passed(window, config, grid, j, drawn)
    squared = float(((2 * j - 1) * tail).sum())
    law = tuple(tail.tolist())
    return OffsetLaw(float(tail[0]), float(tail.sum()), squared, passed, law)


def above_the_floor(noise: NoiseScheduleConfig, law: OffsetLaw) -> OffsetLaw:
    """The law of jumps that are made only where the target's sigma can be divided by.

    Args:
        noise: the run's schedule.
        law: of the same jumps wherever they end.
    """
    schedule = NoiseSchedule.from_config(noise)
    if noise.kind == "flow":
        bound = schedule.uniform_coordinate(ANCHOR_SIGMA_FLOOR)
    else:
        count = noise.num_train_timesteps
        u = torch.arange(1, count + 1, dtype=torch.float64) / count
        bound = int((schedule.alpha_sigma(u)[1] < ANCHOR_SIGMA_FLOOR).sum()) / count
    below_floor = float(time_cdf(noise, torch.tensor(bound)))
    possible = max(law.rolled - below_floor, 0.0)
    return OffsetLaw(possible, possible, possible, 0.0, (possible,))


def _passed(
    window: Window, config: ScheduledSamplingConfig, grid: int, j: Tensor, drawn: Tensor
) -> float:
    """Expected states that `reuse` takes up: sum over k of P(k, state in the window)."""
    if config.reuse == "last":
        return 0.0
    rows, steps = spaced_steps(j, config.reuse)
    bound = window.passed_bound(grid, j[rows] - steps)
    rooms = torch.cat([window.room_bound(grid, j), torch.tensor([-1.0], dtype=torch.float64)])
    drawn = torch.cat([drawn, torch.zeros(1, dtype=torch.float64)])
    # {k >= j} is {drawn >= j} and {room >= j}: the chance of k = j is a difference of two.
    at_least = drawn[rows] * window.chance(torch.minimum(rooms[rows], bound))
    beyond = drawn[rows + 1] * window.chance(torch.minimum(rooms[rows + 1], bound))
    return float((at_least - beyond).sum())
