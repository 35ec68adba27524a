"""One evaluation of a network: samples at every NFE, q with its interval, and what stands beside.

q is the mean over `evaluation.nfe` of `evaluation.metric`; lower is better. Everything is measured
on the samples as uint8 pixels, the form in which they are saved, so that a later comparison of two
runs from their files agrees with what each of them reported. A network whose samples are not
finite gets q = inf, and never an exception.

Legend: n samples, C channels, H and W pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raysched.config.run import QualityMetric, RunConfig
from raysched.data.dataset import ImageDataset
from raysched.diffusion.compute import ComputeMeter
from raysched.diffusion.schedules import NoiseSchedule
from raysched.evaluation import bootstrap, manifold, metrics
from raysched.evaluation.crew import ALONE, Crew, Job
from raysched.evaluation.features import BATCH
from raysched.evaluation.reference import Reference, build_reference
from raysched.evaluation.samples import Column, Sampler, Samples
from raysched.evaluation.sampling import network_device, price_notes

METRIC_LABELS: dict[QualityMetric, str] = {
    "kid": "KID",
    "energy_distance": "energy distance",
    "sliced_wasserstein": "sliced Wasserstein",
    "frechet_distance": "Frechet distance",
}
# A multiple of the feature network's batch, so that features are the same however they are shared.
FEATURE_ROWS = 4 * BATCH
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
    crew: Crew = ALONE,
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
        crew: the processes that share the work, all of which call this; their numbers are those
            of one process, bit for bit on the CPU.

    Returns:
        Metrics, samples and notes, the same in every process.
    """
    settings = config.evaluation
    reference = build_reference(
        dataset, settings.features, settings.neighbours, network_device(network)
    )
    samples = Sampler(network, config, dataset, schedule).samples(
        num_samples, crew, meter, with_scaling=with_epsilon_scaling
    )
    features = _features(reference, samples.columns, crew)
    scaled = _features(reference, samples.scaled, crew)
    broken = {nfe: column.broken for nfe, column in samples.columns.items()}
    found: dict[str, float] = {}
    for part in crew.do(_measurements(features, scaled, samples, reference, config)):
        found |= part
    found["quality/nonfinite"] = float(
        np.mean([float((~x.finite).double().mean()) for x in samples.columns.values()])
    )
    label = reference.space.metric_label(METRIC_LABELS[settings.metric])
    notes = _notes(config, reference, num_samples, broken)
    pixels = {nfe: column.pixels for nfe, column in samples.columns.items()}
    return Evaluation(found, pixels, samples.labels, label, notes)


def _features(
    reference: Reference, columns: Mapping[int, Column], crew: Crew
) -> dict[int, Tensor]:
    """Per NFE (n, D) features; all NaN where any sample is not finite."""
    space, device = reference.space, reference.device
    if space.name == "pixels":  # cheaper than their exchange
        found = {nfe: space.extract(column.pixels, device) for nfe, column in columns.items()}
    else:
        places = [
            (nfe, rows)
            for nfe, column in columns.items()
            for rows in torch.split(torch.arange(len(column.pixels)), FEATURE_ROWS)
        ]
        jobs = [
            Job(len(rows), functools.partial(space.extract, columns[nfe].pixels[rows], device))
            for nfe, rows in places
        ]
        parts: dict[int, list[Tensor]] = {nfe: [] for nfe in columns}
        for (nfe, _), part in zip(places, crew.do(jobs), strict=True):
            parts[nfe].append(part)
        found = {nfe: torch.cat(some) for nfe, some in parts.items()}
    return {
        nfe: torch.full_like(x, torch.nan) if columns[nfe].broken else x
        for nfe, x in found.items()
    }


def _measurements(
    features: dict[int, Tensor],
    scaled: dict[int, Tensor],
    samples: Samples,
    reference: Reference,
    config: RunConfig,
) -> list[Job[dict[str, float]]]:
    """Everything that is measured, in the order of the metrics; costs in units of one distance."""
    settings, columns = config.evaluation, list(features.values())
    labels = samples.labels if config.model.class_conditional else None
    jobs: list[Job[dict[str, float]]] = [
        Job(8.0 * len(columns), functools.partial(_quality, columns, reference.holdout, config))
    ]
    for nfe in features:
        jobs.append(
            Job(4.0, functools.partial(_distances, {nfe: features[nfe]}, reference.holdout))
        )
    jobs.append(
        Job(
            3.0 * len(columns),
            functools.partial(_beside, columns, labels, reference, settings.neighbours),
        )
    )
    jobs.append(Job(0.1, functools.partial(_self_consistency, samples)))
    if scaled:
        columns = list(scaled.values())
        jobs.append(
            Job(
                float(len(columns)),
                functools.partial(_scaled, columns, reference.holdout, settings.metric),
            )
        )
    return jobs


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


def _scaled(features: list[Tensor], holdout: Tensor, metric: QualityMetric) -> dict[str, float]:
    return {"quality/q_epsilon_scaled": bootstrap.q_value(features, holdout, metric)}


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


def _self_consistency(samples: Samples) -> dict[str, float]:
    """At the smallest NFE and on few samples: its cost is that of four times the NFE."""
    distance = manifold.self_consistency(samples.coarse, samples.fine)
    return {"quality/self_consistency": distance if np.isfinite(distance) else INF}


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
    told = price_notes("evaluation.nfe", settings.nfe, settings.sampler, settings.guidance_scale)
    return (*notes, *told)


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
