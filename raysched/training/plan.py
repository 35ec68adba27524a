"""What a run will cost, before it is started: FE in closed form, the rest from a few real steps.

Steps of the run itself are made on its own data at full size (`measure.py`). Their seconds per
forward equivalent, apart for rollouts and gradient, turn the forecast into time. Nothing is
written but the cache of decoded images, and no random stream of the process moves.

With several workers one worker's share of the batch is measured in this process, on as many
threads as a worker gets; what the workers spend on summing gradients is not seen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from raysched.config.run import RunConfig
from raysched.diffusion.forecast import RunForecast, drawn_forecast, forecast_run
from raysched.training.budget import DEFAULT_EVALUATIONS
from raysched.training.measure import (
    MAX_SECONDS,
    checkpoint_bytes,
    evaluation_seconds,
    measure_speed,
    num_bytes,
)
from raysched.training.setup import build_run
from raysched.training.spend import peak_memory_bytes

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Plan:
    """The forecast of a run; the first four have the names of `train --json`'s `compute`.

    Attributes:
        forward_equivalents: rollout and training, without evaluation.
        seconds: the same part of the run in time.
        peak_memory_bytes: most memory in use while steps and an evaluation were measured; with
            several workers, of one of them.
        disk_bytes: the checkpoints kept at the end, at most.
        steps: optimizer steps.
        rollout: FE of the rollouts, clean predictions included.
        training: FE of the gradient steps.
        fe_per_step_start: FE of the first step.
        fe_per_step_end: FE of the last step.
        max_offset: the largest k in the last step, clamped to the path and its windows.
        mean_offset: the expected k of a rolled sample there, clamped.
        seconds_per_forward_equivalent: mean over the run.
        seconds_per_step: mean over the run.
        evaluation_seconds: all evaluations that training waits for, on top of `seconds`.
        num_evaluations: how many there will be.
        checkpoint_bytes: one checkpoint; while one is written there is one more than are kept.
        pipeline_bytes: about as much for the exported pipeline.
        num_measured_steps: optimizer steps that were made to measure.
        device: where.
        notes: what the numbers leave out, in whole sentences.
    """

    forward_equivalents: float
    seconds: float
    peak_memory_bytes: int
    disk_bytes: int
    steps: int
    rollout: float
    training: float
    fe_per_step_start: float
    fe_per_step_end: float
    max_offset: int
    mean_offset: float
    seconds_per_forward_equivalent: float
    seconds_per_step: float
    evaluation_seconds: float
    num_evaluations: int
    checkpoint_bytes: int
    pipeline_bytes: int
    num_measured_steps: int
    device: str
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return {**asdict(self), "notes": list(self.notes)}


def plan_run(
    config: RunConfig, *, max_seconds: float = MAX_SECONDS, with_evaluation: bool = True
) -> Plan:
    """Forecast a run's compute, time, memory and disk.

    Args:
        config: the resolved run.
        max_seconds: about how long steps are measured.
        with_evaluation: whether to measure an evaluation, too; without, it counts as 0.

    Raises:
        ConfigError, DataError: what training would refuse, too.
    """
    with _left_as_found(config.scaling.cpus_per_worker):
        run = build_run(_one_workers_share(config))
        speed = measure_speed(run, config, max_seconds=max_seconds)
        forecast = drawn_forecast(config, forecast_run(config, speed.seconds_of))
        count = count_evaluations(config, forecast)
        evaluation = evaluation_seconds(run, speed, count) if with_evaluation else 0.0
        checkpoint = checkpoint_bytes(run)
        memory = peak_memory_bytes(run.device)
        weights = sum(num_bytes(tensor) for tensor in run.ema.weights().values())
    seconds = forecast.steps * speed.per_step + forecast.rollout * speed.per_rollout_fe
    saves = 1 + (forecast.steps - 1) // config.training.checkpoint_every_steps
    return Plan(
        forward_equivalents=forecast.forward_equivalents,
        seconds=seconds,
        peak_memory_bytes=memory,
        disk_bytes=min(saves, _num_kept(config, count)) * checkpoint,
        steps=forecast.steps,
        rollout=forecast.rollout,
        training=forecast.training,
        fe_per_step_start=forecast.first.total,
        fe_per_step_end=forecast.last.total,
        max_offset=forecast.last.max_offset,
        mean_offset=forecast.last.mean_offset,
        seconds_per_forward_equivalent=seconds / forecast.forward_equivalents,
        seconds_per_step=seconds / forecast.steps,
        evaluation_seconds=evaluation,
        num_evaluations=count,
        checkpoint_bytes=checkpoint,
        pipeline_bytes=weights,
        num_measured_steps=speed.num_steps,
        device=str(run.device),
        notes=_notes(config, run.device),
    )


def count_evaluations(config: RunConfig, forecast: RunForecast) -> int:
    """Evaluations of a run, the one at its end included."""
    if not config.evaluation.enabled:
        return 0
    every = config.evaluation.every_forward_equivalents
    if every is None:
        return min(DEFAULT_EVALUATIONS, forecast.steps)
    return min(math.ceil(forecast.forward_equivalents / every - 1e-9), forecast.steps)


def forecast_as_json(config: RunConfig) -> dict[str, Any]:
    """The part of a plan that needs no measuring: steps, compute and evaluations.

    Args:
        config: a run whose budget is in steps or forward equivalents.
    """
    forecast = forecast_run(config)
    return {
        **asdict(forecast),
        "forward_equivalents": forecast.forward_equivalents,
        "num_evaluations": count_evaluations(config, forecast),
    }


def print_plan(plan: Plan, console: Console) -> None:
    """A table and a sentence for people."""
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in _rows(plan):
        table.add_row(name, value)
    console.print(table)
    share = plan.rollout / plan.forward_equivalents
    console.print(
        f"{plan.steps:,} steps will take about {_duration(plan.seconds)} on this machine"
        + (f", {share:.0%} of the compute for rollouts" if plan.rollout else "")
        + (
            f"; {plan.num_evaluations} evaluation(s) add about "
            f"{_duration(plan.evaluation_seconds)}."
            if plan.num_evaluations
            else "."
        ),
        highlight=False,
    )
    for note in plan.notes:
        console.print(note, highlight=False)


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "forward equivalents", f"{plan.forward_equivalents:,.0f}"
    yield "  rollouts / gradient", f"{plan.rollout:,.0f} / {plan.training:,.0f}"
    yield (
        "  per step, first / last",
        f"{plan.fe_per_step_start:,.1f} / {plan.fe_per_step_end:,.1f}",
    )
    if plan.max_offset:
        yield "  k at the end, mean / largest", f"{plan.mean_offset:.2f} / {plan.max_offset}"
    yield "time without evaluation", _duration(plan.seconds)
    yield "  per 1,000 FE", f"{1000 * plan.seconds_per_forward_equivalent:.3g} s"
    yield "evaluations", f"{plan.num_evaluations}, {_duration(plan.evaluation_seconds)} in all"
    yield "peak memory per worker", f"{plan.peak_memory_bytes / 2**20:,.0f} MiB"
    yield "checkpoints kept", f"{plan.disk_bytes / 2**20:,.1f} MiB"


def _num_kept(config: RunConfig, num_evaluations: int) -> int:
    """Checkpoints that stay at most: the best ones may be among the last."""
    return config.training.keep_last + min(config.training.keep_best, num_evaluations)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _one_workers_share(config: RunConfig) -> RunConfig:
    """The run as one of its workers sees it."""
    workers = max(config.scaling.num_workers, 1)
    share = {"batch_size": config.training.batch_size // workers}
    return config.model_copy(update={"training": config.training.model_copy(update=share)})


def _notes(config: RunConfig, device: torch.device) -> tuple[str, ...]:
    workers, notes = config.scaling.num_workers, []
    if workers > 1:
        notes.append(
            f"Time and memory are those of one of {workers} workers, measured alone in this "
            "process: summing the gradients between them is not included."
        )
    if config.evaluation.enabled and config.evaluation.placement == "background":
        notes.append(
            "Evaluations beside the training are not included, only the last one; where they have "
            "no core or GPU of their own they slow the training down."
        )
    if config.scaling.use_gpu and device.type != "cuda":
        notes.append("The workers will have GPUs, and this machine has none: time is the CPU's.")
    if config.training.storage_path is not None:
        notes.append("As much as the checkpoints kept is uploaded to training.storage_path.")
    return tuple(notes)


@contextmanager
def _left_as_found(num_threads: int) -> Iterator[None]:
    """Run on a worker's threads; threads and random streams are as before afterwards."""
    threads, python, numpy = torch.get_num_threads(), random.getstate(), np.random.get_state()
    torch.set_num_threads(num_threads)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(python)
        np.random.set_state(numpy)
