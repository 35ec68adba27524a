import numpy as np
import pytest
import torch

from raysched.config.run import DataConfig
from raysched.data.dataset import load_dataset, stratified_subset, to_pixels, to_unit_range
from raysched.errors import DataError


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return load_dataset(DataConfig(cache_dir=str(tmp_path_factory.mktemp("cache"))))


def test_digits_are_1797_eight_pixel_images_of_ten_classes(digits):
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == np.uint8
    assert (digits.channels, digits.image_size, digits.num_classes) == (1, 8, 10)
    assert digits.class_names == tuple("0123456789")
    assert digits.images.min() == 0
    assert digits.images.max() == 255


def test_the_digit_pixels_are_scikit_learns_grey_levels_scaled_to_255(digits):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    np.testing.assert_array_equal(digits.labels, bunch.target)
    assert np.abs(digits.images[:, 0] / 255.0 * 16.0 - bunch.images).max() < 0.5 * 16 / 255 + 1e-9


def test_images_come_as_float_from_minus_one_to_one(digits):
    images = digits.images_at(torch.tensor([5, 0]))
    assert images.dtype == torch.float32
    assert images.shape == (2, 1, 8, 8)
    assert images.min() == -1.0
    torch.testing.assert_close(to_pixels(images[1]), torch.from_numpy(digits.images[0]))
    assert torch.equal(digits.labels_at(np.array([5, 0])), torch.tensor([5, 0]))


def test_pixels_survive_the_way_to_unit_range_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_unit_range(pixels)), pixels)
    assert to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_the_split_is_disjoint_complete_and_stratified(digits):
    both = np.concatenate([digits.train_indices, digits.holdout_indices])
    np.testing.assert_array_equal(np.sort(both), np.arange(1797))
    assert len(digits.holdout_indices) == round(0.2 * 1797)
    for label in range(10):
        total = (digits.labels == label).sum()
        held = (digits.labels[digits.holdout_indices] == label).sum()
        assert abs(held - 0.2 * total) < 1.0


def test_the_split_depends_on_its_seed_alone(digits, tmp_path):
    again = load_dataset(DataConfig(cache_dir=str(tmp_path)))
    other = load_dataset(DataConfig(cache_dir=str(tmp_path), split_seed=1))
    assert again.fingerprint == digits.fingerprint
    np.testing.assert_array_equal(again.holdout_indices, digits.holdout_indices)
    assert other.fingerprint != digits.fingerprint
    assert not np.array_equal(other.holdout_indices, digits.holdout_indices)


def test_a_limit_keeps_the_balance_of_the_classes(tmp_path):
    dataset = load_dataset(DataConfig(cache_dir=str(tmp_path), limit=100))
    assert len(dataset.labels) == 100
    assert set(np.bincount(dataset.labels, minlength=10)) <= {9, 10, 11}


def test_a_limit_of_four_images_still_has_both_parts(tmp_path):
    dataset = load_dataset(DataConfig(cache_dir=str(tmp_path), limit=4, holdout_fraction=0.01))
    assert (len(dataset.train_indices), len(dataset.holdout_indices)) == (3, 1)


def test_image_size_resizes_a_source_that_has_its_own_size(tmp_path):
    dataset = load_dataset(DataConfig(cache_dir=str(tmp_path), image_size=16, limit=20))
    assert dataset.images.shape == (20, 1, 16, 16)
    small = load_dataset(DataConfig(cache_dir=str(tmp_path), limit=20))
    halves = dataset.images.reshape(20, 1, 8, 2, 8, 2).mean(axis=(3, 5))
    assert np.corrcoef(halves.ravel(), small.images.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("size", [0, 1, 3, 7, 12, 15])
def test_a_stratified_subset_has_exactly_the_asked_size(size):
    labels = np.array([0] * 9 + [1] * 5 + [2])
    picked = stratified_subset(labels, size, (0,))
    assert len(np.unique(picked)) == size
    counts = np.bincount(labels[picked], minlength=3)
    exact = np.array([9, 5, 1]) * size / 15
    assert (np.abs(counts - exact) <= 1.0).all()


def test_a_class_of_a_single_image_stays_in_training_while_that_is_possible():
    labels = np.array([0] * 9 + [1] * 5 + [2])
    for size in range(13):
        assert 14 not in stratified_subset(labels, size, (3,))


def test_one_image_is_too_few(tmp_path):
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "only.png")
    config = DataConfig(
        source="image_folder", path=str(tmp_path), cache_dir=str(tmp_path / ".cache")
    )
    with pytest.raises(DataError, match=r"1 image.*at least 2"):
        load_dataset(config)
