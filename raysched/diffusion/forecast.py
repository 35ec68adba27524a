"""What a run will cost in forward equivalents, in closed form, before it is started.

`offset_law` knows the expected length of a rollout; everything else is multiplication, one small
function per factor. Only the padding of calls (`bucket`) needs an approximation: that the forwards
of a step are normally distributed. Nothing is drawn for that. A short run of few samples may miss
its expectation by some percent: `drawn_forecast` counts the rollouts that it will draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raysched.config.run import RunConfig
from raysched.diffusion.compute import GRADIENT_COST
from raysched.diffusion.curriculum import draw_step, max_offset_at, probability_at
from raysched.diffusion.offset_law import OffsetLaw, above_the_floor, offset_law
from raysched.diffusion.parameterization import ANCHOR_SIGMA_FLOOR
from raysched.diffusion.reuse import passed_states
from raysched.diffusion.schedules import CLAMP_TOLERANCE, NoiseSchedule

# A ramp is summed step by step up to so many steps, and by as many midpoints beyond.
MAX_RAMP_STAGES = 4096
# Quantiles of the normal law that padding is averaged over.
NORMAL_POINTS = 64
# Runs of more steps are near enough to their expectation, and would take seconds to draw.
MAX_DRAWN_STEPS = 1000


@dataclass(frozen=True)
class StepForecast:
    """Expected cost of one optimizer step.

    Attributes:
        num_rolled: R, samples with k > 0.
        num_unit_steps: sum of k.
        rollout: FE of making the inputs: the solver's forwards, clean and other predictions.
        training: FE of the gradient, states on the way that are trained on included.
        max_offset: the largest k that there can be, clamped to the path and its windows.
    """

    num_rolled: float
    num_unit_steps: float
    rollout: float
    training: float
    max_offset: int = 0

    @property
    def total(self) -> float:
        """FE of the step."""
        return self.rollout + self.training

    @property
    def mean_offset(self) -> float:
        """Expected k of a rolled sample, clamped."""
        return self.num_unit_steps / self.num_rolled if self.num_rolled else 0.0


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


def chance_of_rollout(config: RunConfig, step: int) -> float:
    """Chance that a sample of an optimizer step is chosen for a rollout."""
    rollout = config.rollout
    if rollout.max_step_offset == 0:
        return 0.0
    return probability_at(step, rollout)


def forwards_per_unit_step(config: RunConfig) -> int:
    """Sample-forwards of one rollout step: the solver's, twice with guidance."""
    rollout = config.rollout
    solver = 4 if rollout.sampler == "rk4" else 1
    return solver * (1 if rollout.guidance_scale == 1.0 else 2)


def price_of_a_forward(config: RunConfig) -> int:
    """FE of a rollout's forward: 3 where its gradient is kept."""
    rollout = config.rollout
    return GRADIENT_COST if rollout.jump_gradient and rollout.grid == "jump" else 1


def clean_forwards(config: RunConfig) -> int:
    """Predictions at x_t per rolled sample, which ReflexFlow's frequency compensation wants."""
    rollout = config.rollout
    return int(bool(rollout.reflexflow) and rollout.reflexflow_alpha != 0)


def other_forwards(config: RunConfig) -> int:
    """Forwards per sample of a method's own, outside rollouts."""
    return 1 if config.exposure == "dream" else 0


def making_inputs(config: RunConfig, num_unit_steps: float, num_rolled: float) -> float:
    """FE of a step's inputs without padding: rollouts, clean and other predictions."""
    return (
        forwards_per_unit_step(config) * num_unit_steps * price_of_a_forward(config)
        + clean_forwards(config) * num_rolled
        + other_forwards(config) * config.training.batch_size
    )


def padding(config: RunConfig, law: OffsetLaw, chance: float) -> float:
    """Expected FE of the rows that fill the calls of a step up to multiples of `bucket`."""
    rollout, training = config.rollout, config.training
    workers, unit = max(config.scaling.num_workers, 1), forwards_per_unit_step(config)
    if rollout.bucket == 1 or not chance * law.steps:
        return 0.0
    if price_of_a_forward(config) != 1:
        return price_of_a_forward(config) * _padded_jumps(config, chance * law.rolled)
    samples, clean = training.batch_size / workers, clean_forwards(config)
    mean = unit * law.steps + clean * law.rolled
    square = unit**2 * law.steps_squared + 2 * unit * clean * law.steps + clean * law.rolled
    spread = math.sqrt(samples * max(chance * square - (chance * mean) ** 2, 0.0))
    rows = _counts(samples * chance * mean, spread)
    # P(longest rollout <= m), and from it the chance of each longest one.
    beyond = torch.tensor([*law.tail, 0.0], dtype=torch.float64)
    longest_law = torch.diff((1 - chance * beyond) ** samples)
    longest = torch.arange(1, len(law.tail) + 1) * (4 if rollout.sampler == "rk4" else 1)
    full = (rows * training.gradient_accumulation / samples).ceil()
    calls = torch.maximum(full[:, None], longest[None, :])
    # Calls have the same number of rows, give or take one.
    least = (rows[:, None] / calls).floor()
    larger = rows[:, None] - least * calls
    padded = (calls - larger) * (least / rollout.bucket).ceil()
    padded += larger * ((least + 1) / rollout.bucket).ceil()
    waste = padded * rollout.bucket - rows[:, None]
    return workers * float((waste * longest_law).sum(dim=1).mean())


def _padded_jumps(config: RunConfig, chance: float) -> float:
    """Expected filling rows of jumps with gradient: one call in each micro-batch of each rank."""
    training, bucket = config.training, config.rollout.bucket
    calls = max(config.scaling.num_workers, 1) * training.gradient_accumulation
    samples = training.batch_size / calls
    rows = _counts(samples * chance, math.sqrt(samples * chance * (1 - chance)))
    return calls * float(((rows / bucket).ceil() * bucket - rows).mean())


def _counts(mean: float, spread: float) -> Tensor:
    """(NORMAL_POINTS,) whole numbers that stand for the law of a count."""
    points = (torch.arange(NORMAL_POINTS, dtype=torch.float64) + 0.5) / NORMAL_POINTS
    counts: Tensor = (mean + spread * torch.special.ndtri(points)).round().clamp_min(0.0)
    return counts


def step_forecast(config: RunConfig, step: int) -> StepForecast:
    """Expected FE of one optimizer step.

    Args:
        config: the resolved run.
        step: number of the step, from 0.
    """
    rollout, size = config.rollout, config.training.batch_size
    chance, largest = chance_of_rollout(config, step), max_offset_at(step, rollout)
    law = OffsetLaw(0.0, 0.0, 0.0, 0.0, ())
    if chance and largest:
        law = offset_law(config.noise_schedule, rollout, largest)
        if config.exposure == "self_correction":
            law = above_the_floor(config.noise_schedule, law)
    num_rolled, num_unit_steps = size * chance * law.rolled, size * chance * law.steps
    return StepForecast(
        num_rolled=num_rolled,
        num_unit_steps=num_unit_steps,
        rollout=making_inputs(config, num_unit_steps, num_rolled) + padding(config, law, chance),
        training=GRADIENT_COST * size * (1 + chance * law.passed),
        # A target at the very end of the path has no chance, but a rounding's worth of one.
        max_offset=sum(of_at_least > CLAMP_TOLERANCE for of_at_least in law.tail),
    )


def course(config: RunConfig) -> Iterator[Stage]:
    """The run's stages in order: what lies before the ramps, these, and the endless rest."""
    rollout = config.rollout
    begin = rollout.start_step
    length = max(rollout.ramp_steps, rollout.offset_ramp_steps)
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


def drawn_forecast(config: RunConfig, forecast: RunForecast) -> RunForecast:
    """The same run with the rollouts that its steps will draw in place of the expected ones.

    Args:
        config: the resolved run.
        forecast: of `forecast_run`.

    Returns:
        The forecast as it was for long runs, for budgets that are not in steps (there the draws
        change the number of steps, hardly the FE), and where calls are padded.
    """
    given = config.training.budget.steps is not None and config.rollout.bucket == 1
    if not given or forecast.steps > MAX_DRAWN_STEPS or not forecast.rollout:
        return forecast
    schedule = NoiseSchedule.from_config(config.noise_schedule)
    steps = [_drawn_step(config, schedule, step) for step in range(forecast.steps)]
    return replace(
        forecast,
        rollout=float(sum(rollout for rollout, _ in steps)),
        training=float(sum(training for _, training in steps)),
    )


def _drawn_step(config: RunConfig, schedule: NoiseSchedule, step: int) -> tuple[float, int]:
    """FE of the rollouts and of the gradient of one step, as it will be drawn."""
    size, plan = config.training.batch_size, draw_step(config, schedule, step)
    rolled = plan.rolled
    if config.exposure == "self_correction":
        rolled = rolled & (schedule.alpha_sigma(plan.target_u)[1] >= ANCHOR_SIGMA_FLOOR)
    num_rolled, num_unit_steps = int(rolled.sum()), int((plan.num_steps * rolled).sum())
    passed = len(passed_states(plan, schedule, config.rollout))
    return making_inputs(config, num_unit_steps, num_rolled), GRADIENT_COST * (size + passed)
