import numpy as np
import pytest
import torch

from raysched.config.run import DataConfig
from raysched.data.batches import batch_indices, gather_batch, sample_indices
from raysched.data.dataset import load_dataset

TRAIN = np.array([2, 3, 5, 7, 11, 13, 17], dtype=np.int64)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 20])
def test_every_epoch_has_every_image_exactly_once(batch_size):
    epochs = 3 * batch_size
    steps = epochs * len(TRAIN) // batch_size
    stream = torch.cat([batch_indices(4, step, batch_size, TRAIN) for step in range(steps)])
    for epoch in stream.reshape(-1, len(TRAIN)).numpy():
        np.testing.assert_array_equal(np.sort(epoch), TRAIN)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    straight = [batch_indices(9, step, 5, TRAIN) for step in range(30)]
    for step in (29, 3, 17, 0):
        assert torch.equal(batch_indices(9, step, 5, TRAIN), straight[step])
    assert straight[0].dtype == torch.int64


def test_seeds_and_epochs_have_orders_of_their_own():
    data = np.arange(50, dtype=np.int64)
    orders = [batch_indices(seed, step, 50, data) for seed in (0, 1) for step in (0, 1)]
    for first in range(4):
        for second in range(first):
            assert not torch.equal(orders[first], orders[second])


def test_the_order_does_not_depend_on_how_the_stream_is_cut():
    whole = torch.cat([batch_indices(1, step, 4, TRAIN) for step in range(6)])
    other = torch.cat([batch_indices(1, step, 12, TRAIN) for step in range(2)])
    assert torch.equal(whole, other)


def test_first_images_are_drawn_uniformly():
    data = np.arange(8, dtype=np.int64)
    first = np.array([int(batch_indices(seed, 0, 1, data)) for seed in range(4000)])
    counts = np.bincount(first, minlength=8)
    # Chi-squared with 7 degrees of freedom: 24.3 is its 99.9 % point.
    assert ((counts - 500.0) ** 2 / 500.0).sum() < 24.3


def test_sample_indices_number_all_samples_of_a_run():
    assert torch.cat([sample_indices(step, 3) for step in range(3)]).tolist() == list(range(9))


def test_a_gathered_batch_holds_the_images_and_labels_at_the_indices(tmp_path):
    dataset = load_dataset(DataConfig(cache_dir=str(tmp_path)))
    indices = batch_indices(0, 2, 16, dataset.train_indices)
    images, labels = gather_batch(dataset, indices)
    assert torch.equal(images, dataset.images_at(indices))
    assert labels.tolist() == [int(dataset.labels[i]) for i in indices]
    assert images.dtype == torch.float32
    assert images.shape == (16, 1, 8, 8)
