"""Speed, evaluation time and checkpoint size of a run, from a few of its own steps.

The steps are spread over the run's course and made at full size with a learning rate of 0: same
work, and the weights stay as they are and finite.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass

from torch import Tensor

from raysched.config.run import RunConfig
from raysched.diffusion.compute import GRADIENT_COST
from raysched.diffusion.forecast import StepForecast, forecast_run
from raysched.errors import RunFailedError
from raysched.evaluation.evaluate import evaluate
from raysched.evaluation.samples import CONSISTENCY_FACTOR, CONSISTENCY_SAMPLES
from raysched.evaluation.sampling import num_evaluations, num_steps
from raysched.models.checkpoint_files import GROUPS
from raysched.training.evaluate_step import replayed
from raysched.training.feed import Feed
from raysched.training.optimizer_state import optimizer_tensors
from raysched.training.out_of_memory import memory_errors
from raysched.training.setup import Run
from raysched.training.train_step import train_step
from raysched.training.wrapping import averaged

WARM_UP_STEPS = 3
# Measuring goes on until one of the upper limits, and past the time limit up to the lower one.
MIN_STEPS, MAX_STEPS, MAX_SECONDS = 5, 100, 8.0
# Sample indices beyond this step would not fit an int64; no run gets there.
LAST_STEP = 2**40
# An evaluation that would take longer is not made, but reckoned from its forwards.
MAX_EVALUATION_SECONDS = 20.0
# A step that something else disturbed counts at most so many times the median.
DISTURBED = 3.0


@dataclass(frozen=True)
class Speed:
    """Measured seconds.

    Attributes:
        per_step: of the gradient part of an optimizer step.
        per_rollout_fe: of a forward equivalent of the rollouts.
        num_steps: measured optimizer steps.
    """

    per_step: float
    per_rollout_fe: float
    num_steps: int

    def seconds_of(self, step: StepForecast) -> float:
        """How long a step takes."""
        return self.per_step + self.per_rollout_fe * step.rollout


def measure_speed(run: Run, config: RunConfig, *, max_seconds: float = MAX_SECONDS) -> Speed:
    """Make steps from all over the run, and time their two parts apart.

    Args:
        run: one worker's share of the run, just built; its weights stay as they are.
        config: the whole run.
        max_seconds: about how long.

    Raises:
        RunFailedError: a step's loss was no number.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    started = time.perf_counter()
    warm_up = [_timed_step(run, step) for step in range(WARM_UP_STEPS)][-1]
    one_step = warm_up.training + warm_up.rollout
    horizon = min(forecast_run(config, lambda step: one_step).steps, LAST_STEP)
    pace = (time.perf_counter() - started) / WARM_UP_STEPS
    num = min(max(int(max_seconds / pace), MIN_STEPS), MAX_STEPS, max(horizon, MIN_STEPS))
    # The last step first: it has the largest share of rollouts in most runs, and so most memory.
    steps = [horizon - 1, *(int((i + 0.5) * horizon / num) for i in range(num))]
    followers = iter([*steps[1:], None])
    feed = Feed(run, lambda step: next(followers))
    try:
        measured = [_timed_step(run, step, feed) for step in steps][1:]
    finally:
        feed.close()
    per_step = _steadied_mean([m.training for m in measured], [1.0] * num)
    rolled = [m for m in measured if m.forwards]
    per_forward = per_step / (GRADIENT_COST * run.config.training.batch_size)
    if rolled:
        per_forward = _steadied_mean(
            [m.rollout for m in rolled], [float(m.forwards) for m in rolled]
        )
    # The workers do their shares at the same time.
    workers = config.training.batch_size / run.config.training.batch_size
    return Speed(per_step, per_forward / workers, len(measured))


def evaluation_seconds(run: Run, speed: Speed, count: int) -> float:
    """Time that training waits for evaluations, from a real one where that is quick.

    Workers that share an evaluation are taken to be done at once; one beside the training costs
    nothing here, but the last one is never beside it.
    """
    settings = run.config.evaluation
    if not count:
        return 0.0
    usual = _evaluation_forwards(run.config, settings.num_samples, final=False)
    final = _evaluation_forwards(run.config, settings.final_num_samples, final=True)
    per_forward = speed.per_step / (GRADIENT_COST * run.config.training.batch_size)
    if per_forward * usual < MAX_EVALUATION_SECONDS:
        start = time.perf_counter()
        with averaged(run) as network, run.accelerator.autocast():
            evaluate(
                replayed(run, network),
                config=run.config,
                dataset=run.dataset,
                schedule=run.schedule,
                num_samples=settings.num_samples,
                with_epsilon_scaling=False,
            )
        per_forward = (time.perf_counter() - start) / usual
    placement, workers = settings.placement, max(run.config.scaling.num_workers, 1)
    shared = 1 if placement == "inline" else workers
    beside = placement == "background"
    return per_forward * ((0 if beside else count - 1) * usual + final) / shared


def _evaluation_forwards(config: RunConfig, num_samples: int, *, final: bool) -> int:
    """Sample-forwards of one evaluation."""
    settings = config.evaluation

    def each(nfe: int) -> int:
        steps = num_steps(nfe, settings.sampler, settings.guidance_scale)
        return num_evaluations(steps, settings.sampler, settings.guidance_scale)

    columns = 2 if final and settings.epsilon_scaling is not None else 1
    consistency = CONSISTENCY_SAMPLES * each(CONSISTENCY_FACTOR * min(settings.nfe))
    return columns * num_samples * sum(map(each, settings.nfe)) + consistency


def checkpoint_bytes(run: Run) -> int:
    """Size of one checkpoint, from its tensors, without writing it."""
    parts: dict[str, dict[str, Tensor]] = {
        "model": dict(run.policy.state_dict()),
        "ema": run.ema.state_dict(),
        "optimizer": optimizer_tensors(run.optimizer.optimizer, run.parameter_names),
    }
    state = {"config": run.config.model_dump(mode="json"), "meter": run.meter.state_dict()}
    # Metrics of the last evaluation and the step in state.json, four digests in manifest.json.
    small = len(json.dumps(state, indent=1)) + 4096
    return small + sum(safetensors_bytes(parts[name]) for name in GROUPS)


def safetensors_bytes(tensors: dict[str, Tensor]) -> int:
    """Size of a safetensors file: length, JSON header padded to 8 bytes, and the values."""
    header, place = {}, 0
    for name, tensor in tensors.items():
        end = place + num_bytes(tensor)
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [place, end],
        }
        place = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + place


@dataclass(frozen=True)
class _Timing:
    training: float
    rollout: float
    forwards: int


def _timed_step(run: Run, step: int, feed: Feed | None = None) -> _Timing:
    meter = run.meter
    before = meter.seconds("training"), meter.seconds("rollout"), meter.rollout
    run.step = step
    with memory_errors(run.config, step + 1):
        result = train_step(run, step, feed)
    if result.failed:
        raise RunFailedError(f"step {step + 1}: {result.describe_failure()}")
    return _Timing(
        meter.seconds("training") - before[0],
        meter.seconds("rollout") - before[1],
        meter.rollout - before[2],
    )


def _steadied_mean(values: list[float], weights: list[float]) -> float:
    """Sum of values over sum of weights; a value far above its share counts as the limit."""
    limit = DISTURBED * statistics.median(v / w for v, w in zip(values, weights, strict=True))
    kept = (min(v, limit * w) for v, w in zip(values, weights, strict=True))
    return sum(kept) / sum(weights)


def num_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()
