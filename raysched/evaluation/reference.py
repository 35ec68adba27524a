"""What samples are compared with: held-out images, and training images for the classifier.

Legend: m reference rows, N classifier rows, D features.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysched.data.dataset import ImageDataset
from raysched.errors import DataError
from raysched.evaluation.features import FeatureName, FeatureSpace, feature_space
from raysched.evaluation.manifold import neighbour_radii

# Kernel matrices grow with the square of these; beyond, intervals hardly narrow.
MAX_REFERENCE = 2000
MAX_CLASSIFIER = {"pixels": 10_000, "efficientnet_lite0": 2000}
MIN_REFERENCE = 2


@dataclass(frozen=True, eq=False)
class Reference:
    """Features of real images, computed once per data set and process.

    Args:
        space: the feature space.
        holdout: (m, D) features of held-out images, which training never saw.
        radii: (m,) distance of each to its k-th nearest neighbour.
        train: (N, D) features of training images, for the classifier.
        train_labels: (N,) their classes.
        num_classes: classes of the data.
        num_holdout: held-out images there are; more than m where they were thinned.
        device: where a feature network runs.
    """

    space: FeatureSpace
    holdout: Tensor
    radii: Tensor
    train: Tensor
    train_labels: Tensor
    num_classes: int
    num_holdout: int
    device: torch.device


@functools.lru_cache(maxsize=2)
def build_reference(
    dataset: ImageDataset, features: FeatureName, neighbours: int, device: torch.device
) -> Reference:
    """Extract the features of a data set; the result is kept for the next evaluation.

    Args:
        dataset: images and split.
        features: name of the feature space.
        neighbours: k of the manifold metrics.
        device: where a feature network runs.

    Returns:
        The reference.

    Raises:
        UserError: the feature space can't be had.
        DataError: fewer than two images are held out.
    """
    space = feature_space(features, channels=dataset.channels, image_size=dataset.image_size)
    held_out = thinned(dataset.holdout_indices, MAX_REFERENCE)
    if len(held_out) < MIN_REFERENCE:
        raise DataError(
            f"data.holdout_fraction: quality needs at least {MIN_REFERENCE} held-out images, got "
            f"{len(held_out)}; hold out a larger share, or set evaluation.enabled to false"
        )
    trained = thinned(dataset.train_indices, MAX_CLASSIFIER[space.name])
    holdout = space.extract(torch.from_numpy(dataset.images[held_out]), device)
    return Reference(
        space=space,
        holdout=holdout,
        radii=neighbour_radii(torch.cdist(holdout, holdout), neighbours),
        train=space.extract(torch.from_numpy(dataset.images[trained]), device),
        train_labels=dataset.labels_at(trained),
        num_classes=dataset.num_classes,
        num_holdout=len(dataset.holdout_indices),
        device=device,
    )


def thinned(indices: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """At most `limit` of the indices, evenly spaced, so that files sorted by class stay mixed."""
    if len(indices) <= limit:
        return indices
    return indices[np.linspace(0, len(indices) - 1, limit).round().astype(np.int64)]
