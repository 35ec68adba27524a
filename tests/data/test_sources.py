import gzip
import struct

import numpy as np
import pytest

from raysched.config.run import DataConfig
from raysched.data import sources
from raysched.data.dataset import load_dataset
from raysched.data.sources import read_idx
from raysched.errors import DataError


def idx_bytes(values):
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()


def write_fashion_mnist(folder, counts=(12, 6), compress=True):
    generator = np.random.default_rng(0)
    folder.mkdir()
    written = []
    for part, count in zip(("train", "t10k"), counts, strict=True):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            data = idx_bytes(values)
            suffix = ".gz" if compress else ""
            path = folder / f"{part}-{name}-ubyte{suffix}"
            path.write_bytes(gzip.compress(data) if compress else data)
        written.append((images, labels))
    return [np.concatenate(arrays) for arrays in zip(*written, strict=True)]


def fashion(folder, tmp_path, **options):
    return DataConfig(
        source="fashion_mnist", path=str(folder), cache_dir=str(tmp_path / "cache"), **options
    )


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist_joins_both_parts_of_the_idx_files(tmp_path, compress):
    images, labels = write_fashion_mnist(tmp_path / "idx", compress=compress)
    dataset = load_dataset(fashion(tmp_path / "idx", tmp_path))
    np.testing.assert_array_equal(dataset.images[:, 0], images)
    np.testing.assert_array_equal(dataset.labels, labels)
    assert dataset.class_names[0] == "t-shirt"
    assert dataset.num_classes == 10


def test_fashion_mnist_can_be_resized(tmp_path):
    write_fashion_mnist(tmp_path / "idx")
    assert load_dataset(fashion(tmp_path / "idx", tmp_path, image_size=16)).image_size == 16


def test_missing_fashion_mnist_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FASHION_MNIST_FOLDERS", (tmp_path / "nowhere",))
    for path in (None, str(tmp_path)):
        config = DataConfig(source="fashion_mnist", path=path, cache_dir=str(tmp_path / "cache"))
        with pytest.raises(DataError) as caught:
            load_dataset(config)
        assert "apt-get install dataset-fashion-mnist" in str(caught.value)
        assert "data.path=FOLDER" in str(caught.value)


def test_one_missing_idx_file_counts_as_missing(tmp_path):
    write_fashion_mnist(tmp_path / "idx")
    (tmp_path / "idx" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="aren't in"):
        load_dataset(fashion(tmp_path / "idx", tmp_path))


@pytest.mark.parametrize("kept", [0, 3, 40, -8])
def test_a_gzip_file_cut_short_is_named(tmp_path, kept):
    write_fashion_mnist(tmp_path / "idx")
    path = tmp_path / "idx" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"train-images.*get the file again"):
        load_dataset(fashion(tmp_path / "idx", tmp_path))


def test_an_idx_file_that_lies_about_its_size_is_named(tmp_path):
    path = tmp_path / "values"
    path.write_bytes(idx_bytes(np.zeros((3, 4), dtype=np.uint8))[:-1])
    with pytest.raises(DataError, match=r"values: its header says \(3, 4\), but 11 bytes"):
        read_idx(path)
    path.write_bytes(b"\0\0\x0d\x01\0\0\0\0")
    with pytest.raises(DataError, match="isn't an IDX file of unsigned bytes"):
        read_idx(path)


def test_labels_of_another_length_are_refused(tmp_path):
    write_fashion_mnist(tmp_path / "idx")
    labels = gzip.compress(idx_bytes(np.zeros(5, dtype=np.uint8)))
    (tmp_path / "idx" / "train-labels-idx1-ubyte.gz").write_bytes(labels)
    with pytest.raises(DataError, match="don't belong together"):
        load_dataset(fashion(tmp_path / "idx", tmp_path))
