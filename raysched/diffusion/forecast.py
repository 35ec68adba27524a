"""What a run will cost in forward equivalents, in closed form, before it is started.

Nothing is drawn. The offset k follows its strategy's law, the room above a target follows the law
of the training time, and both are independent, so that the clamped offset has
E[min(k, room)] = sum over j >= 1 of P(k >= j) P(room >= j). Everything else is multiplication,
one small function per factor.

Legend: B samples, K the largest offset, N the rollout grid, T training timesteps, j = 1, 2, …
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from raysched.config.run import NoiseScheduleConfig, RunConfig
from raysched.diffusion.compute import GRADIENT_COST
from raysched.diffusion.curriculum import probability_at

# A ramp is summed step by step up to so many steps, and by as many midpoints beyond.
MAX_RAMP_STAGES = 4096
# `NoiseSchedule.clamp_steps` forgives rounding by as much on a flow path.
CLAMP_TOLERANCE = 1e-6


@dataclass(frozen=True)
class StepForecast:
    """Expected cost of one optimizer step.

    Attributes:
        num_rolled: R, samples with k > 0.
        num_unit_steps: sum of k.
        rollout: FE of making the inputs: the solver's forwards, clean and other predictions.
        training: FE of the gradient.
    """

    num_rolled: float
    num_unit_steps: float
    rollout: float
    training: float

    @property
    def total(self) -> float:
        """FE of the step."""
        return self.rollout + self.training


@dataclass(frozen=True)
class Stage:
    """Consecutive optimizer steps that cost the same.

    Attributes:
        first_step: the first of them.
        num_steps: how many; infinity in the last stage.
        step: the cost of each.
    """

    first_step: int
    num_steps: float
    step: StepForecast


@dataclass(frozen=True)
class RunForecast:
    """Expected cost of a whole run, evaluation left out.

    Attributes:
        steps: optimizer steps until the budget is spent.
        rollout: FE without gradient.
        training: FE of the gradient.
        first: the first step's cost.
        last: the last step's cost.
    """

    steps: int
    rollout: float
    training: float
    first: StepForecast
    last: StepForecast

    @property
    def forward_equivalents(self) -> float:
        """FE of the run."""
        return self.rollout + self.training


def offset_tail(strategy: str, max_step_offset: int, j: Tensor) -> Tensor:
    """P(k >= j) of a sample chosen for a rollout, before clamping.

    Args:
        strategy: uniform U{0..K}, biased_early round(v²K) or biased_late round((1 - v²)K).
        max_step_offset: K.
        j: any shape, 1..K.
    """
    if strategy == "uniform":
        return (max_step_offset + 1 - j).double() / (max_step_offset + 1)
    share = (j.double() - 0.5) / max_step_offset
    return 1 - share.sqrt() if strategy == "biased_early" else (1 - share).sqrt()


def time_cdf(noise: NoiseScheduleConfig, u: Tensor) -> Tensor:
    """P(r <= u) of the drawn coordinate r, before a DDPM schedule takes its index floor(r T)."""
    u = u.double().clamp(0.0, 1.0)
    return torch.special.ndtr(torch.logit(u)) if noise.timestep_sampling == "logit_normal" else u


def room_tail(noise: NoiseScheduleConfig, grid: int, j: Tensor) -> Tensor:
    """P(room >= j), room being the steps of the grid that fit between a target and the noisy end.

    Args:
        noise: the schedule.
        grid: N.
        j: any shape, 1 or more.
    """
    if noise.kind == "flow":
        return time_cdf(noise, 1 - (j.double() - CLAMP_TOLERANCE) / grid)
    count = noise.num_train_timesteps
    # (T - 1 - i) N // T >= j in integers: i + 1 <= T - ceil(j T / N).
    highest = count + torch.div(-j * count, grid, rounding_mode="floor")
    return time_cdf(noise, highest.double() / count)


@functools.lru_cache(maxsize=1024)
def chosen_sample(
    noise: NoiseScheduleConfig, strategy: str, max_step_offset: int, grid: int | str
) -> tuple[float, float]:
    """What to expect of one sample that the Bernoulli draw chose: P(k > 0) and E[k], clamped."""
    if grid == "jump":
        last = torch.tensor(1.0 if noise.kind == "flow" else 1 - 1 / noise.num_train_timesteps)
        possible = float(time_cdf(noise, last))
        return possible, possible
    assert isinstance(grid, int)
    j = torch.arange(1, min(max_step_offset, grid) + 1)
    tail = offset_tail(strategy, max_step_offset, j) * room_tail(noise, grid, j)
    return float(tail[0]), float(tail.sum())


def chance_of_rollout(config: RunConfig, step: int) -> float:
    """Chance that a sample of an optimizer step is chosen for a rollout."""
    rollout = config.rollout
    if rollout.max_step_offset == 0:
        return 0.0
    return probability_at(step, rollout)


def forwards_per_unit_step(config: RunConfig) -> int:
    """FE of one step of the rollout's solver: its forwards, at 3 where their gradient is kept."""
    if config.exposure == "defar" and config.defar.jump_gradient:
        return GRADIENT_COST
    return 4 if config.rollout.sampler == "rk4" else 1


def clean_forwards(config: RunConfig) -> int:
    """Predictions at x_t per rolled sample, which ReflexFlow's frequency compensation wants."""
    rollout = config.rollout
    return int(bool(rollout.reflexflow) and rollout.reflexflow_alpha != 0)


def step_forecast(config: RunConfig, step: int) -> StepForecast:
    """Expected FE of one optimizer step.

    Args:
        config: the resolved run.
        step: number of the step, from 0.
    """
    rollout, size = config.rollout, config.training.batch_size
    chosen = size * chance_of_rollout(config, step)
    num_rolled = num_unit_steps = 0.0
    if chosen:
        grid = rollout.grid or config.noise_schedule.num_train_timesteps
        rolled, steps = chosen_sample(
            config.noise_schedule, rollout.strategy, rollout.max_step_offset, grid
        )
        num_rolled, num_unit_steps = chosen * rolled, chosen * steps
    return StepForecast(
        num_rolled=num_rolled,
        num_unit_steps=num_unit_steps,
        rollout=forwards_per_unit_step(config) * num_unit_steps
        + clean_forwards(config) * num_rolled
        + (size if config.exposure == "dream" else 0),
        training=float(GRADIENT_COST * size),
    )


def course(config: RunConfig) -> Iterator[Stage]:
    """The run's stages in order: what lies before the ramp, the ramp, and the endless rest."""
    rollout = config.rollout
    begin, length = rollout.start_step, rollout.ramp_steps
    if not length:
        yield Stage(0, math.inf, step_forecast(config, 0))
        return
    if begin:
        yield Stage(0, begin, step_forecast(config, 0))
    stride = -(-length // MAX_RAMP_STAGES)
    for first in range(begin, begin + length, stride):
        num = min(stride, begin + length - first)
        yield Stage(first, num, step_forecast(config, first + (num - 1) // 2))
    yield Stage(begin + length, math.inf, step_forecast(config, begin + length))


def forecast_run(
    config: RunConfig, seconds_of: Callable[[StepForecast], float] | None = None
) -> RunForecast:
    """Walk the run's stages until its budget is spent, as the loop will: the last step is whole.

    Args:
        config: the resolved run.
        seconds_of: how long a step takes; needed for a budget in seconds.
    """
    budget = config.training.budget
    limit = budget.steps or budget.forward_equivalents or budget.seconds
    assert limit is not None, "the config model guarantees one unit"
    assert budget.seconds is None or seconds_of is not None, "a budget in seconds needs a speed"

    def price(step: StepForecast) -> float:
        if budget.steps is not None:
            return 1.0
        if budget.forward_equivalents is not None or seconds_of is None:
            return step.total
        return seconds_of(step)

    spent = rollout = training = 0.0
    steps, last = 0, step_forecast(config, 0)
    for stage in course(config):
        left = max(math.ceil((limit - spent) / price(stage.step) - 1e-9), 0)
        num = int(min(stage.num_steps, left))
        if not num:
            break
        last, steps = stage.step, steps + num
        spent += num * price(stage.step)
        rollout += num * stage.step.rollout
        training += num * stage.step.training
    return RunForecast(steps, rollout, training, step_forecast(config, 0), last)
