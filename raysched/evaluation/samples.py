"""The samples of one evaluation, made by one process or shared among several.

The unit of work is one network batch of one column (an NFE, plain or Epsilon-Scaled): the batches
are cut at the same global sample indices whoever makes them, and the noise belongs to the index,
so that the samples of any number of processes are those of one, bit for bit.

Legend: n samples, C channels, H and W pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raysched.config.run import RunConfig
from raysched.data.dataset import ImageDataset, to_pixels
from raysched.diffusion.compute import ComputeMeter
from raysched.diffusion.schedules import NoiseSchedule
from raysched.evaluation.crew import Crew, Job
from raysched.evaluation.sampling import (
    balanced_labels,
    evaluation_noise,
    generate,
    num_evaluations,
    num_steps,
)

CONSISTENCY_SAMPLES = 64
CONSISTENCY_FACTOR = 4


@dataclass(frozen=True, eq=False)
class Column:
    """The samples at one NFE.

    Attributes:
        pixels: (n, C, H, W) uint8.
        finite: (n,) bool, whether the network's output was.
    """

    pixels: Tensor
    finite: Tensor

    @property
    def broken(self) -> bool:
        """Whether any sample is not finite."""
        return not bool(self.finite.all())


@dataclass(frozen=True, eq=False)
class Samples:
    """All samples of an evaluation.

    Attributes:
        columns: per NFE.
        scaled: per NFE with Epsilon Scaling; empty where that is left out.
        coarse: (at most 64, C, H, W) float, the first samples at the smallest NFE.
        fine: the same noise at four times the NFE.
        labels: (n,) int64 classes that were asked for.
    """

    columns: dict[int, Column]
    scaled: dict[int, Column]
    coarse: Tensor
    fine: Tensor
    labels: Tensor


@dataclass(frozen=True)
class _Spec:
    """One column to be sampled: an NFE, its divisor of the noise, how many samples."""

    nfe: int
    epsilon_scaling: float | None
    num_samples: int
    keep_values: int = 0


@dataclass(frozen=True, eq=False)
class _Made:
    """One batch: pixels, finite rows, the first values as floats, its forwards, who made it."""

    pixels: Tensor
    finite: Tensor
    values: Tensor
    num_forwards: int
    maker: int


class Sampler:
    """What all batches of an evaluation share.

    Args:
        network: called by keyword with `sample`, `timestep` and `class_labels`.
        config: the run.
        dataset: its images' shape and classes.
        schedule: the run's noise schedule.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        config: RunConfig,
        dataset: ImageDataset,
        schedule: NoiseSchedule,
    ) -> None:
        self._network, self._config, self._schedule = network, config, schedule
        self._num_classes = dataset.num_classes
        shape = (dataset.channels, dataset.image_size, dataset.image_size)
        seed = config.evaluation.seed

        @functools.lru_cache(maxsize=1)
        def noise(first: int, count: int) -> Tensor:
            return evaluation_noise(seed, count, shape, first=first)

        self._noise = noise

    def samples(
        self, num_samples: int, crew: Crew, meter: ComputeMeter | None, *, with_scaling: bool
    ) -> Samples:
        """Sample every column; all processes of the crew get all of it.

        Args:
            num_samples: n.
            crew: who shares the work.
            meter: counts the forwards of all processes as evaluation.
            with_scaling: sample the Epsilon-Scaled columns as well.
        """
        settings = self._config.evaluation
        few = min(num_samples, CONSISTENCY_SAMPLES)
        least = min(settings.nfe)
        plain = [_Spec(nfe, None, num_samples, few if nfe == least else 0) for nfe in settings.nfe]
        scaled = []
        if with_scaling and settings.epsilon_scaling is not None:
            scaled = [_Spec(nfe, settings.epsilon_scaling, num_samples) for nfe in settings.nfe]
        fine = _Spec(CONSISTENCY_FACTOR * least, None, few, few)
        made = self._make([*plain, *scaled, fine], crew, meter)
        return Samples(
            columns={spec.nfe: _column(made[spec]) for spec in plain},
            scaled={spec.nfe: _column(made[spec]) for spec in scaled},
            coarse=torch.cat([part.values for part in made[plain[settings.nfe.index(least)]]]),
            fine=torch.cat([part.values for part in made[fine]]),
            labels=balanced_labels(num_samples, self._num_classes),
        )

    def _make(
        self, specs: list[_Spec], crew: Crew, meter: ComputeMeter | None
    ) -> dict[_Spec, list[_Made]]:
        size = self._config.evaluation.batch_size
        # Batch by batch, so that a process which makes several columns draws their noise once.
        places = sorted(
            ((first, spec) for spec in specs for first in range(0, spec.num_samples, size)),
            key=lambda place: place[0],
        )
        jobs = [
            Job(
                self._evaluations(spec.nfe) * (min(first + size, spec.num_samples) - first),
                functools.partial(
                    self._batch,
                    spec,
                    first,
                    min(size, spec.num_samples - first),
                    meter or ComputeMeter(),
                    crew.rank,
                ),
            )
            for first, spec in places
        ]
        made: dict[_Spec, list[_Made]] = {spec: [] for spec in specs}
        for (_, spec), batch in zip(places, crew.do(jobs), strict=True):
            made[spec].append(batch)
            # One's own are counted as they are made: whoever watches the meter sees it going on.
            if meter is not None and batch.maker != crew.rank:
                meter.forward("evaluation", batch.num_forwards)
        return made

    def _evaluations(self, nfe: int) -> int:
        settings = self._config.evaluation
        steps = num_steps(nfe, settings.sampler, settings.guidance_scale)
        return num_evaluations(steps, settings.sampler, settings.guidance_scale)

    def _batch(
        self, spec: _Spec, first: int, count: int, meter: ComputeMeter, maker: int
    ) -> _Made:
        settings, before = self._config.evaluation, meter.evaluation
        values = generate(
            self._network,
            self._schedule,
            self._config.prediction_type,
            labels=balanced_labels(first + count, self._num_classes)[first:],
            noise=self._noise(first, count),
            nfe=spec.nfe,
            solver=settings.sampler,
            batch_size=count,
            null_class=self._num_classes,
            guidance_scale=settings.guidance_scale,
            epsilon_scaling=spec.epsilon_scaling,
            meter=meter,
        )
        return _Made(
            pixels=to_pixels(values.nan_to_num()),
            finite=values.isfinite().flatten(1).all(dim=1),
            values=values[: max(spec.keep_values - first, 0)].clone(),
            num_forwards=meter.evaluation - before,
            maker=maker,
        )


def _column(parts: list[_Made]) -> Column:
    return Column(
        pixels=torch.cat([part.pixels for part in parts]),
        finite=torch.cat([part.finite for part in parts]),
    )
