"""The images of a run, in memory, with their held-out split.

Dimension legend: N images, C channels, H = W = image_size; indices count images of the dataset.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysched.config.run import DataConfig
from raysched.data.cache import cached_source
from raysched.errors import DataError

_LIMIT_STREAM, _SPLIT_STREAM = 1, 2


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Decoded images with labels and the split between training and held-out reference.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64 in 0..num_classes-1.
        class_names: one per class.
        train_indices: sorted dataset indices that training may see.
        holdout_indices: sorted dataset indices kept as the reference of quality.
        fingerprint: SHA-256 over all of the above.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    train_indices: NDArray[np.int64]
    holdout_indices: NDArray[np.int64]
    fingerprint: str

    @property
    def num_classes(self) -> int:
        """Classes of the data, without the null class."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """C: 1 or 3."""
        return int(self.images.shape[1])

    @property
    def image_size(self) -> int:
        """H = W in pixels."""
        return int(self.images.shape[2])

    def images_at(self, indices: Tensor | NDArray[np.int64]) -> Tensor:
        """Images (B, C, H, W) float32 in [-1, 1] at dataset indices (B,)."""
        return to_unit_range(torch.from_numpy(self.images[np.asarray(indices)]))

    def labels_at(self, indices: Tensor | NDArray[np.int64]) -> Tensor:
        """Labels (B,) int64 at dataset indices (B,)."""
        return torch.from_numpy(self.labels[np.asarray(indices)])


def to_unit_range(pixels: Tensor) -> Tensor:
    """Map uint8 pixels 0..255 to float32 in [-1, 1]."""
    return pixels.to(torch.float32) / 127.5 - 1.0


def to_pixels(images: Tensor) -> Tensor:
    """Map float images in [-1, 1] (clamped) to uint8 0..255, the inverse of `to_unit_range`."""
    return ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def load_dataset(config: DataConfig) -> ImageDataset:
    """Decode the source, or take it from the cache, and split it.

    Raises:
        DataError: the source is missing, corrupt or too small.
        StorageError: the cache can't be written.
    """
    source = cached_source(config)
    images, labels = source.images, source.labels
    if config.limit is not None and config.limit < len(labels):
        kept = stratified_subset(labels, config.limit, (config.split_seed, _LIMIT_STREAM))
        images, labels = images[kept], labels[kept]
    if len(labels) < 2:
        where = f" in {config.path}" if config.path else ""
        raise DataError(
            f"data.source: {config.source} has {len(labels)} image(s){where}; at least 2 are "
            "needed, one to train on and one to hold out"
        )
    num_holdout = min(max(round(config.holdout_fraction * len(labels)), 1), len(labels) - 1)
    holdout = stratified_subset(labels, num_holdout, (config.split_seed, _SPLIT_STREAM))
    train = np.setdiff1d(np.arange(len(labels), dtype=np.int64), holdout)
    fingerprint = _fingerprint(images, labels, source.class_names, train)
    return ImageDataset(images, labels, source.class_names, train, holdout, fingerprint)


def stratified_subset(
    labels: NDArray[np.int64], size: int, seed: tuple[int, ...]
) -> NDArray[np.int64]:
    """Pick `size` indices so that every class keeps its share as nearly as integers allow.

    Shares are rounded by largest remainder. A class keeps at least one image outside the subset
    while that is possible, so that no class vanishes from training.

    Args:
        labels: (N,) int64.
        size: images to pick, 0..N.
        seed: of the choice within the classes.

    Returns:
        (size,) sorted indices.
    """
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * (size / len(labels))
    quotas = np.minimum(np.floor(exact).astype(np.int64), counts)
    order = np.argsort(-(exact - quotas), kind="stable")
    for spare in (1, 0):
        while quotas.sum() < size:
            open_classes = [c for c in order if quotas[c] < counts[c] - spare]
            if not open_classes:
                break
            for c in open_classes[: size - int(quotas.sum())]:
                quotas[c] += 1
    picked = [
        np.random.default_rng((*seed, int(c))).permutation(np.flatnonzero(labels == c))[:quota]
        for c, quota in zip(classes, quotas, strict=True)
    ]
    return np.sort(np.concatenate(picked)).astype(np.int64)


def _fingerprint(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    class_names: tuple[str, ...],
    train_indices: NDArray[np.int64],
) -> str:
    digest = hashlib.sha256(json.dumps([list(images.shape), list(class_names)]).encode())
    for array in (images, labels, train_indices):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
