"""The exposure-bias probe: what a model's self-made states have that forward states have not.

For the same (x0, eps) even a perfect model shows x_hat_t != x_t: that is posterior variance. So
conclusions come from populations, the law of x_hat_t against the law of x_t, and the drift of
single rollouts stands beside that of the closed-form empirical denoiser.

Statistics of the table (t path time, k rollout steps, nfe network evaluations):

    energy(t)                  states sampled from noise against forward states
    energy_floor(t)            the same between halves of the forward states: chance alone
    prediction_norm_sampled(t), _forward(t), _ratio(t)    RMS of the network's output
    band_b_ratio(t)            power in ring b of spatial frequency, sampled over forward states
    rollout_energy(t, k)       k steps from true forward states against forward states at t
    rollout_energy_floor(t, k) the same for the empirical denoiser
    drift(t, k)                RMS of x_hat_t - x_t, mean over the pairs
    drift_floor, drift_excess  of the empirical denoiser, and what is beyond it
    delta(t, k)                (std over pixels of x_hat_t - alpha·x0, mean, - sigma)², ADM-ES
    delta_forward(t)           the same of x_t: not 0, because an image has few pixels
    spread_excess(t, k)        std of x_hat_t - alpha·x0 minus that of x_t - alpha·x0
    delta_floor, spread_excess_floor(t, k)    of the empirical denoiser
    q(nfe)                     quality of samples, lower is better

Legend: n sampled states, m forward states, p pairs, R replicates, N grid steps, K longest rollout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from raysched.config.run import QualityMetric, SolverName
from raysched.data.dataset import ImageDataset, to_pixels
from raysched.diffusion.randomness import normals
from raysched.evaluation import probe_statistics as stats
from raysched.evaluation.bootstrap import Interval, q_replicates, q_value
from raysched.evaluation.empirical_denoiser import EmpiricalDenoiser
from raysched.evaluation.probe_states import Rollouts, Subject, forward_states, roll_grid
from raysched.evaluation.reference import build_reference, thinned
from raysched.evaluation.sampling import (
    evaluation_noise,
    generate,
    network_device,
    sampling_nodes,
)

MAX_REFERENCE_IMAGES = 2000
NEIGHBOURS = 5


class Key(NamedTuple):
    """Which number: a statistic, and where it was measured."""

    statistic: str
    t: float | None = None
    k: int | None = None
    nfe: int | None = None


@dataclass(frozen=True)
class ProbeSettings:
    """How much to measure.

    Args:
        num_samples: n, states sampled from noise, and samples per NFE.
        num_pairs: p, pairs of data and noise that rollouts start from.
        num_steps: N, steps of the path's grid.
        max_offset: K, longest rollout in steps of the grid.
        nfe: network evaluations at which quality is measured.
        solver: of walks, rollouts and samples.
        metric: of quality.
        num_bootstrap: R.
        confidence: level of the intervals.
        seed: of noise and bootstrap; the same for all runs.
    """

    num_samples: int = 400
    num_pairs: int = 128
    num_steps: int = 20
    max_offset: int = 10
    nfe: tuple[int, ...] = (2, 5, 10, 20)
    solver: SolverName = "euler"
    metric: QualityMetric = "kid"
    num_bootstrap: int = 200
    confidence: float = 0.95
    seed: int = 1234


@dataclass(frozen=True, eq=False)
class Materials:
    """What all runs of a probe share: held-out images, noise, labels and bootstrap weights.

    Args:
        settings: of the probe.
        dataset: images and split.
        x0: (m, C, H, W) held-out images of the forward states.
        eps: (m, C, H, W) their noise.
        labels: (m,) their classes.
        noise: (n, C, H, W) that walks start from.
        walk_labels: (n,) classes of the walks, in the proportions of the forward states.
        pair_x0: (p, C, H, W) held-out images of the rollouts.
        pair_eps: (p, C, H, W) their noise.
        pair_labels: (p,) their classes.
        images: (r, C, H, W) training images of the empirical denoiser.
        image_labels: (r,) their classes.
        weights: of the bootstrap.
    """

    settings: ProbeSettings
    dataset: ImageDataset
    x0: Tensor
    eps: Tensor
    labels: Tensor
    noise: Tensor
    walk_labels: Tensor
    pair_x0: Tensor
    pair_eps: Tensor
    pair_labels: Tensor
    images: Tensor
    image_labels: Tensor
    weights: stats.Weights


@dataclass(frozen=True, eq=False)
class Measured:
    """What a probe found of one run.

    Args:
        confidence: level of the intervals.
        replicates: Key -> (R + 1,), the estimate and its bootstrap replicates.
        floors: Key -> interval, for what has no replicates.
    """

    confidence: float
    replicates: dict[Key, Tensor] = field(default_factory=dict)
    floors: dict[Key, Interval] = field(default_factory=dict)

    def intervals(self) -> dict[Key, Interval]:
        """Everything with its interval."""
        found = {k: stats.interval(v, self.confidence) for k, v in self.replicates.items()}
        return {**found, **self.floors}

    def select(self, statistic: str, k: int | None = None) -> dict[Key, Tensor]:
        """The replicates of one statistic, of one k if given."""
        return {
            key: value
            for key, value in self.replicates.items()
            if key.statistic == statistic and (k is None or key.k == k)
        }


def prepare(dataset: ImageDataset, settings: ProbeSettings) -> Materials:
    """Choose images, draw noise and bootstrap weights; the same for every run.

    Args:
        dataset: images and split.
        settings: of the probe.
    """
    held_out = thinned(dataset.holdout_indices, settings.num_samples)
    paired = thinned(dataset.holdout_indices, settings.num_pairs)
    trained = thinned(dataset.train_indices, MAX_REFERENCE_IMAGES)
    shape = (dataset.channels, dataset.image_size, dataset.image_size)
    n, m, p = settings.num_samples, len(held_out), len(paired)

    def noise(purpose: str, num: int) -> Tensor:
        return normals(settings.seed, purpose, 0, torch.arange(num), shape)

    labels = dataset.labels_at(held_out)
    return Materials(
        settings=settings,
        dataset=dataset,
        x0=dataset.images_at(held_out),
        eps=noise("probe_forward", m),
        labels=labels,
        noise=evaluation_noise(settings.seed, n, shape),
        walk_labels=labels[torch.arange(n) % m],
        pair_x0=dataset.images_at(paired),
        pair_eps=noise("probe_pairs", p),
        pair_labels=dataset.labels_at(paired),
        images=dataset.images_at(trained),
        image_labels=dataset.labels_at(trained),
        weights=stats.Weights.draw(
            n, m, p, num_bootstrap=settings.num_bootstrap, seed=settings.seed
        ),
    )


def measure(subject: Subject, materials: Materials, *, class_conditional: bool) -> Measured:
    """Probe one network.

    Args:
        subject: the network.
        materials: shared by all runs.
        class_conditional: whether it knows classes; its floor then knows them too.

    Raises:
        RunFailedError: the network's states are not finite.
    """
    measured = Measured(materials.settings.confidence)
    _walk(subject, materials, measured)
    _roll(subject, materials, measured, class_conditional)
    _quality(subject, materials, measured)
    return measured


def _walk(subject: Subject, materials: Materials, measured: Measured) -> None:
    """Populations along the path: states sampled from noise against forward states."""
    settings, weights = materials.settings, materials.weights
    nodes = sampling_nodes(subject.schedule, settings.num_steps)
    states, predictions = subject.path(materials.noise, nodes, materials.walk_labels)
    for node, u in enumerate(nodes):
        t = float(subject.schedule.path_time(u))
        x_t = forward_states(subject.schedule, u, materials.x0, materials.eps)
        found = measured.replicates
        found[Key("energy", t)] = stats.population_energy(
            states[node], x_t, weights.walk, weights.forward
        )
        measured.floors[Key("energy_floor", t)] = stats.same_law_floor(
            x_t,
            len(states[node]),
            num_splits=settings.num_bootstrap,
            confidence=settings.confidence,
            seed=settings.seed,
        )
        if node < len(predictions):
            forward = subject.predict(x_t, u, materials.labels)
            sampled_norm = stats.weighted_mean(stats.rms(predictions[node]), weights.walk)
            forward_norm = stats.weighted_mean(stats.rms(forward), weights.forward)
            found[Key("prediction_norm_sampled", t)] = sampled_norm
            found[Key("prediction_norm_forward", t)] = forward_norm
            found[Key("prediction_norm_ratio", t)] = sampled_norm / forward_norm
        bands = zip(stats.band_energies(states[node]).T, stats.band_energies(x_t).T, strict=True)
        for band, (sampled, expected) in enumerate(bands):
            ratio = stats.weighted_mean(sampled, weights.walk) / stats.weighted_mean(
                expected, weights.forward
            )
            if bool(ratio.isfinite().all()):
                found[Key(f"band_{band}_ratio", t)] = ratio


def _roll(
    subject: Subject, materials: Materials, measured: Measured, class_conditional: bool
) -> None:
    """The k x t maps, with those of the empirical denoiser beside them."""
    settings, w = materials.settings, materials.weights.pairs
    nodes = sampling_nodes(subject.schedule, settings.num_steps)
    rolled, floor = (
        roll_grid(
            each,
            nodes,
            materials.pair_x0,
            materials.pair_eps,
            materials.pair_labels,
            max_offset=settings.max_offset,
        )
        for each in (subject, closed_form(subject, materials, class_conditional))
    )
    found = measured.replicates
    for (node, k), x_hat in rolled.x_hat.items():
        t = float(subject.schedule.path_time(nodes[node]))
        x_t, x_floor = rolled.x_t[node], floor.x_hat[node, k]
        own, best = stats.rms(x_hat - x_t), stats.rms(x_floor - x_t)
        found[Key("drift", t, k)] = stats.weighted_mean(own, w)
        found[Key("drift_floor", t, k)] = stats.weighted_mean(best, w)
        found[Key("drift_excess", t, k)] = stats.weighted_mean(own - best, w)
        found[Key("rollout_energy", t, k)] = stats.paired_energy(x_hat, x_t, w)
        found[Key("rollout_energy_floor", t, k)] = stats.paired_energy(x_floor, x_t, w)
        _spread(subject, rolled, (node, k), w, found)
        _spread(subject, floor, (node, k), w, found, "_floor")


def _spread(
    subject: Subject,
    rolled: Rollouts,
    cell: tuple[int, int],
    w: Tensor,
    found: dict[Key, Tensor],
    whose: str = "",
) -> None:
    """delta_t of ADM-ES (Ning et al. 2023, arXiv 2308.15321) and its signed relative."""
    node, k = cell
    u = rolled.nodes_u[node]
    t = float(subject.schedule.path_time(u))
    alpha, sigma = (float(value) for value in subject.schedule.alpha_sigma(u))
    made = stats.weighted_mean(stats.noise_spread(rolled.x_hat[cell], rolled.x0, alpha), w)
    forward = stats.weighted_mean(stats.noise_spread(rolled.x_t[node], rolled.x0, alpha), w)
    found[Key(f"delta{whose}", t, k)] = (made - sigma).square()
    found[Key("delta_forward", t)] = (forward - sigma).square()
    found[Key(f"spread_excess{whose}", t, k)] = made - forward


def closed_form(subject: Subject, materials: Materials, class_conditional: bool) -> Subject:
    """The empirical denoiser of the training images, on the subject's path."""
    labels = materials.image_labels if class_conditional else None
    return Subject(
        EmpiricalDenoiser(materials.images, labels, subject.schedule),
        subject.schedule,
        "sample",
        subject.solver,
        subject.batch_size,
    )


def _quality(subject: Subject, materials: Materials, measured: Measured) -> None:
    """q at every NFE, from the same noise for all runs."""
    settings, dataset = materials.settings, materials.dataset
    device = network_device(subject.network)
    reference = build_reference(dataset, "auto", NEIGHBOURS, device)
    for nfe in settings.nfe:
        samples = generate(
            subject.network,
            subject.schedule,
            subject.prediction_type,
            labels=materials.walk_labels,
            noise=materials.noise,
            nfe=nfe,
            solver=subject.solver,
            batch_size=subject.batch_size,
            null_class=dataset.num_classes,
            meter=subject.meter,
        )
        features = [reference.space.extract(to_pixels(samples.nan_to_num()), device)]
        drawn = q_replicates(
            features,
            reference.holdout,
            settings.metric,
            num_bootstrap=settings.num_bootstrap,
            seed=settings.seed,
        )
        value = q_value(features, reference.holdout, settings.metric)
        estimate = torch.tensor([value], dtype=torch.float64)
        measured.replicates[Key("q", nfe=nfe)] = torch.cat([estimate, drawn])
