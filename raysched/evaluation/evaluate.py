"""One evaluation of a network: samples at every NFE, q with its interval, and what stands beside.

q is the mean over `evaluation.nfe` of `evaluation.metric`; lower is better. Everything is measured
on the samples as uint8 pixels, the form in which they are saved, so that a later comparison of two
runs from their files agrees with what each of them reported. A network whose samples are not
finite gets q = inf, and never an exception.

Legend: n samples, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raysched.config.run import QualityMetric, RunConfig
from raysched.data.dataset import ImageDataset, to_pixels
from raysched.diffusion.compute import ComputeMeter
from raysched.diffusion.schedules import NoiseSchedule
from raysched.evaluation import bootstrap, manifold, metrics
from raysched.evaluation.reference import Reference, build_reference
from raysched.evaluation.sampling import (
    balanced_labels,
    evaluation_noise,
    generate,
    network_device,
    num_evaluations,
    num_steps,
)

METRIC_LABELS: dict[QualityMetric, str] = {
    "kid": "KID",
    "energy_distance": "energy distance",
    "sliced_wasserstein": "sliced Wasserstein",
    "frechet_distance": "Frechet distance",
}
CONSISTENCY_SAMPLES = 64
CONSISTENCY_FACTOR = 4
INF = float("inf")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation found.

    Args:
        metrics: `quality/...` -> value; inf marks a diverged network.
        samples: per NFE (n, C, H, W) uint8, row i of each from the same noise.
        labels: (n,) int64 classes that were asked for.
        metric_label: name of q's metric for people, with the feature space.
        notes: what a reader must know to trust the numbers, in whole sentences.
    """

    metrics: dict[str, float]
    samples: dict[int, Tensor]
    labels: Tensor
    metric_label: str
    notes: tuple[str, ...]


def evaluate(
    network: Callable[..., Tensor],
    *,
    config: RunConfig,
    dataset: ImageDataset,
    schedule: NoiseSchedule,
    num_samples: int,
    meter: ComputeMeter | None = None,
    with_epsilon_scaling: bool = True,
) -> Evaluation:
    """Sample and measure; the caller has put the EMA weights into the network.

    Args:
        network: called by keyword with `sample`, `timestep` and `class_labels`.
        config: the run.
        dataset: images and split.
        schedule: the run's noise schedule.
        num_samples: samples per NFE.
        meter: counts the forwards as evaluation.
        with_epsilon_scaling: False leaves the second column out, nearly half of the cost.

    Returns:
        Metrics, samples and notes.
    """
    settings = config.evaluation
    reference = build_reference(
        dataset, settings.features, settings.neighbours, network_device(network)
    )
    sampler = _Sampler(network, config, dataset, schedule, num_samples, meter)
    raw = {nfe: sampler.samples(nfe) for nfe in settings.nfe}
    samples = {nfe: to_pixels(x.nan_to_num()) for nfe, x in raw.items()}
    broken = {nfe: not bool(x.isfinite().all()) for nfe, x in raw.items()}
    features = {nfe: _features(reference, x, broken[nfe]) for nfe, x in samples.items()}
    found = _quality(list(features.values()), reference.holdout, config)
    found |= _distances(features, reference.holdout)
    labels = sampler.labels if config.model.class_conditional else None
    found |= _beside(list(features.values()), labels, reference, settings.neighbours)
    found["quality/nonfinite"] = float(
        np.mean([float((~x.isfinite()).flatten(1).any(1).double().mean()) for x in raw.values()])
    )
    found["quality/self_consistency"] = _self_consistency(sampler, raw)
    if settings.epsilon_scaling is not None and with_epsilon_scaling:
        scaled = [_scaled_features(sampler, reference, nfe) for nfe in settings.nfe]
        found["quality/q_epsilon_scaled"] = bootstrap.q_value(
            scaled, reference.holdout, settings.metric
        )
    label = reference.space.metric_label(METRIC_LABELS[settings.metric])
    notes = _notes(config, reference, num_samples, broken)
    return Evaluation(found, samples, sampler.labels, label, notes)


class _Sampler:
    """The fixed noise and labels of an evaluation, and the network that turns them to images."""

    def __init__(
        self,
        network: Callable[..., Tensor],
        config: RunConfig,
        dataset: ImageDataset,
        schedule: NoiseSchedule,
        num_samples: int,
        meter: ComputeMeter | None,
    ) -> None:
        shape = (dataset.channels, dataset.image_size, dataset.image_size)
        self.noise = evaluation_noise(config.evaluation.seed, num_samples, shape)
        self.labels = balanced_labels(num_samples, dataset.num_classes)
        self.config, self.null_class = config, dataset.num_classes
        self._network, self._schedule, self._meter = network, schedule, meter

    def samples(
        self, nfe: int, *, first: int | None = None, epsilon_scaling: float | None = None
    ) -> Tensor:
        """(n, C, H, W) in [-1, 1] of the first samples (default: all)."""
        settings = self.config.evaluation
        return generate(
            self._network,
            self._schedule,
            self.config.prediction_type,
            labels=self.labels[:first],
            noise=self.noise[:first],
            nfe=nfe,
            solver=settings.sampler,
            batch_size=settings.batch_size,
            null_class=self.null_class,
            guidance_scale=settings.guidance_scale,
            epsilon_scaling=epsilon_scaling,
            meter=self._meter,
        )


def _features(reference: Reference, samples: Tensor, broken: bool) -> Tensor:
    """(n, D) features; all NaN where any sample is not finite."""
    features = reference.space.extract(samples, reference.device)
    return torch.full_like(features, torch.nan) if broken else features


def _scaled_features(sampler: _Sampler, reference: Reference, nfe: int) -> Tensor:
    scaling = sampler.config.evaluation.epsilon_scaling
    raw = sampler.samples(nfe, epsilon_scaling=scaling)
    return _features(reference, to_pixels(raw.nan_to_num()), not bool(raw.isfinite().all()))


def _quality(features: list[Tensor], holdout: Tensor, config: RunConfig) -> dict[str, float]:
    settings = config.evaluation
    q = bootstrap.q_interval(
        features,
        holdout,
        settings.metric,
        num_bootstrap=settings.num_bootstrap,
        confidence=settings.confidence,
        seed=settings.seed,
    )
    return {"quality/q": q.value, "quality/q_low": q.low, "quality/q_high": q.high}


def _distances(features: dict[int, Tensor], holdout: Tensor) -> dict[str, float]:
    return {
        f"quality/{name}/nfe_{nfe}": bootstrap.q_value([x], holdout, name)
        for nfe, x in features.items()
        for name in metrics.METRICS
    }


def _beside(
    features: list[Tensor], labels: Tensor | None, reference: Reference, neighbours: int
) -> dict[str, float]:
    """Fidelity, diversity and adherence, each the mean over the NFEs; 0 where it diverged."""
    rows: dict[str, list[float]] = {}
    for x in features:
        finite = bool(x.isfinite().all())
        found = (
            manifold.manifold_metrics(x, reference.holdout, neighbours, reference.radii)
            if finite
            else manifold.Manifold(0.0, 0.0, 0.0, 0.0)
        )
        for name, value in vars(found).items():
            rows.setdefault(name, []).append(value)
        if labels is not None:
            accuracy = 0.0
            if finite:
                accuracy = manifold.class_accuracy(
                    x, labels, reference.train, reference.train_labels, reference.num_classes
                )
            rows.setdefault("class_accuracy", []).append(accuracy)
    return {f"quality/{name}": float(np.mean(values)) for name, values in rows.items()}


def _self_consistency(sampler: _Sampler, raw: Mapping[int, Tensor]) -> float:
    """At the smallest NFE and on few samples: its cost is that of four times the NFE."""
    nfe = min(raw)
    coarse = raw[nfe][:CONSISTENCY_SAMPLES]
    fine = sampler.samples(CONSISTENCY_FACTOR * nfe, first=CONSISTENCY_SAMPLES)
    distance = manifold.self_consistency(coarse, fine)
    return distance if np.isfinite(distance) else INF


def _notes(
    config: RunConfig, reference: Reference, num_samples: int, broken: Mapping[int, bool]
) -> tuple[str, ...]:
    settings, notes = config.evaluation, []
    m, width = reference.holdout.shape
    if any(broken.values()):
        where = ", ".join(str(nfe) for nfe, bad in broken.items() if bad)
        notes.append(f"Samples at nfe {where} are not finite: the network diverged, q is inf.")
    if m < reference.num_holdout:
        notes.append(f"The reference is {m} of {reference.num_holdout} held-out images.")
    if not metrics.frechet_is_reliable(num_samples, m, width):
        notes.append(
            f"The Frechet distance is unreliable: {min(num_samples, m)} images for {width} "
            "features, fewer than twice as many."
        )
    for nfe in settings.nfe:
        steps = num_steps(nfe, settings.sampler, settings.guidance_scale)
        price = num_evaluations(steps, settings.sampler, settings.guidance_scale)
        if price != nfe:
            notes.append(
                f"evaluation.nfe: {nfe} pays for {steps} step(s) of {settings.sampler}, which "
                f"take {price} network evaluations."
            )
    return tuple(notes)


def compare(
    pairs: Sequence[tuple[Mapping[int, Tensor], Mapping[int, Tensor]]],
    *,
    config: RunConfig,
    dataset: ImageDataset,
    num_bootstrap: int | None = None,
) -> bootstrap.Difference:
    """q of trial a minus q of trial b, from the saved samples of one or more training seeds.

    Args:
        pairs: per training seed the samples (NFE -> (n, C, H, W) uint8) of trial a and trial b,
            row i of all of them from the same noise.
        config: names metric, features and level of the interval.
        dataset: images and split.
        num_bootstrap: replicates; default: the config's.

    Returns:
        The difference with its paired interval; negative: a is better.

    Raises:
        ValueError: the trials were not evaluated at the same NFEs with as many samples.
    """
    settings = config.evaluation
    cpu = torch.device("cpu")
    reference = build_reference(dataset, settings.features, settings.neighbours, cpu)
    for a, b in pairs:
        if sorted(a) != sorted(b):
            raise ValueError(f"trials were evaluated at nfe {sorted(a)} and {sorted(b)}")

    def features(samples: Mapping[int, Tensor]) -> list[Tensor]:
        return [reference.space.extract(samples[nfe], cpu) for nfe in sorted(samples)]

    return bootstrap.paired_difference_over_seeds(
        [(features(a), features(b)) for a, b in pairs],
        reference.holdout,
        settings.metric,
        num_bootstrap=num_bootstrap or settings.num_bootstrap,
        confidence=settings.confidence,
        seed=settings.seed,
    )
