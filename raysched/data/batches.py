"""Which images an optimizer step sees: a pure function of (seed, step).

Nothing has to be saved for a resume: the position in the data is step * batch_size. B is the
global batch, over all workers and micro-batches; a worker takes its rows of it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysched.data.dataset import ImageDataset

_DATA_ORDER_STREAM = 0x64617461


@lru_cache(maxsize=4)
def _epoch_permutation(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    """Order of an epoch: (num_images,), a fresh permutation for every (seed, epoch)."""
    bits = np.random.Philox(np.random.SeedSequence((_DATA_ORDER_STREAM, seed, epoch)))
    order = np.random.Generator(bits).permutation(num_images).astype(np.int64)
    order.setflags(write=False)
    return order


def batch_indices(
    seed: int, step: int, batch_size: int, train_indices: NDArray[np.int64]
) -> Tensor:
    """Dataset indices of the global batch of a step; every epoch is a permutation of the data.

    Args:
        seed: of the run.
        step: optimizer step, from 0.
        batch_size: B; may exceed the training set, then a batch spans epochs.
        train_indices: (N,), dataset indices to draw from.

    Returns:
        (B,) int64.
    """
    num_images = len(train_indices)
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = np.divmod(positions, num_images)
    picked = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        rows = epochs == epoch
        picked[rows] = _epoch_permutation(seed, int(epoch), num_images)[places[rows]]
    return torch.from_numpy(np.asarray(train_indices, dtype=np.int64)[picked])


def sample_indices(step: int, batch_size: int) -> Tensor:
    """Global sample indices of a step's batch, the key of every random draw: (B,) int64."""
    return torch.arange(step * batch_size, (step + 1) * batch_size, dtype=torch.int64)


def gather_batch(dataset: ImageDataset, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch.

    Args:
        dataset: where they lie.
        indices: (B,) int64, dataset indices.

    Returns:
        images (B, C, H, W) float32 in [-1, 1], labels (B,) int64.
    """
    return dataset.images_at(indices), dataset.labels_at(indices)
