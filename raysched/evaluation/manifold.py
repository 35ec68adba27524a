"""Fidelity, diversity and adherence apart, because one number misleads.

Training on one's own latents pulls samples towards the mean of their class: adherence and
precision rise while recall and coverage fall. Neighbourhoods are closed balls that reach to a
point's k-th nearest neighbour in its own set.

Legend: n samples, m reference rows, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CLASSIFIER_NEIGHBOURS = 5


@dataclass(frozen=True)
class Manifold:
    """Shares in [0, 1]; density may exceed 1.

    Args:
        precision: samples that lie in the reference's manifold (fidelity).
        recall: reference rows that lie in the samples' manifold (diversity).
        density: mean number of reference balls around a sample, over k (fidelity).
        coverage: reference balls that hold a sample (diversity).
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbour_radii(distances: Tensor, k: int) -> Tensor:
    """Distance of every row to its k-th nearest neighbour, itself left out.

    Args:
        distances: (n, n) distances within one set.
        k: neighbours; at most n - 1 are used.

    Returns:
        (n,) radii.
    """
    others = distances.clone().fill_diagonal_(float("inf"))
    return others.kthvalue(min(k, len(distances) - 1), dim=1).values


def manifold_metrics(
    samples: Tensor, reference: Tensor, k: int, reference_radii: Tensor | None = None
) -> Manifold:
    """Precision and recall (Kynkäänniemi et al. 2019, eq. 1-2), density and coverage (Naeem 2020).

    Args:
        samples: (n, D) features, n >= 2.
        reference: (m, D) features, m >= 2.
        k: neighbours that span a ball.
        reference_radii: (m,) of `neighbour_radii`, where they are known already.

    Returns:
        The four shares.
    """
    samples, reference = samples.double(), reference.double()
    if reference_radii is None:
        reference_radii = neighbour_radii(torch.cdist(reference, reference), k)
    radii = neighbour_radii(torch.cdist(samples, samples), k)
    across = torch.cdist(reference, samples)
    in_reference_ball = across <= reference_radii[:, None]
    in_sample_ball = across <= radii[None, :]
    return Manifold(
        precision=float(in_reference_ball.any(0).double().mean()),
        recall=float(in_sample_ball.any(1).double().mean()),
        density=float(in_reference_ball.double().sum(0).mean()) / min(k, len(reference) - 1),
        coverage=float(in_reference_ball.any(1).double().mean()),
    )


def classify(
    samples: Tensor,
    train: Tensor,
    train_labels: Tensor,
    num_classes: int,
    k: int = CLASSIFIER_NEIGHBOURS,
) -> Tensor:
    """k-nearest-neighbour classes; a tie goes to the class of the nearest neighbour.

    Args:
        samples: (n, D) features.
        train: (N, D) features of training images.
        train_labels: (N,) their classes.
        num_classes: number of classes.
        k: neighbours that vote.

    Returns:
        (n,) predicted classes.
    """
    k = min(k, len(train))
    nearest = torch.cdist(samples.float(), train.float()).topk(k, largest=False).indices
    # The bonus for nearness sums to less than one vote, so it only decides ties.
    ballots = 1.0 + 0.5 ** torch.arange(1, k + 1, dtype=torch.float64)
    votes = torch.zeros(len(samples), num_classes, dtype=torch.float64)
    votes.scatter_add_(1, train_labels[nearest], ballots.expand(len(samples), k))
    return votes.argmax(1)


def class_accuracy(
    samples: Tensor, labels: Tensor, train: Tensor, train_labels: Tensor, num_classes: int
) -> float:
    """Share of samples that the classifier assigns to the class that was asked for.

    Args:
        samples: (n, D) features.
        labels: (n,) requested classes.
        train: (N, D) features of training images.
        train_labels: (N,) their classes.
        num_classes: number of classes.

    Returns:
        A share in [0, 1].
    """
    predicted = classify(samples, train, train_labels, num_classes)
    return float((predicted == labels).double().mean())


def self_consistency(coarse: Tensor, fine: Tensor) -> float:
    """RMS distance per pixel of samples from the same noise at N and 4N evaluations.

    Args:
        coarse: (n, C, H, W) samples in [-1, 1] at N network evaluations.
        fine: (n, C, H, W) samples of the same noise at 4N.

    Returns:
        The distance; 0 for a model whose paths are straight.
    """
    return float((coarse.double() - fine.double()).square().mean().sqrt())
