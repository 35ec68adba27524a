"""Where images come from: each source names what it reads, and decodes it.

`identity` is cheap and says what the decoded pixels depend on (it becomes the cache's key);
`decode` does the work. N images, C channels, H = W pixels.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysched.config.paths import user_path
from raysched.config.run import DataConfig
from raysched.data.image_folder import decode_folder, list_folder, resize_and_crop
from raysched.errors import DataError

# Debian's package, and the spelling that some derivatives use.
FASHION_MNIST_FOLDERS = (
    Path("/usr/share/datasets/fashion-mnist"),
    Path("/usr/share/dataset/fashion-mnist"),
)
FASHION_MNIST_PARTS = ("train", "t10k")
FASHION_MNIST_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
IDX_UBYTE = 8
FOLDER_IMAGE_SIZE = 32


@dataclass(frozen=True, eq=False)
class DecodedSource:
    """All images of a source: (N, C, H, W) uint8, (N,) int64 labels, one name per class."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]


def source_identity(config: DataConfig) -> dict[str, Any]:
    """What the decoded images depend on, as JSON-able values; reads no image.

    Raises:
        DataError: the source isn't there.
    """
    options = {"source": config.source, "image_size": config.image_size}
    return {**options, **_SOURCES[config.source][0](config)}


def decode_source(config: DataConfig) -> DecodedSource:
    """Read and decode the whole source.

    Raises:
        DataError: a file is missing, corrupt or unsupported.
    """
    return _SOURCES[config.source][1](config)


def _digits_identity(config: DataConfig) -> dict[str, Any]:
    return {"scikit-learn": version("scikit-learn")}


def _decode_digits(config: DataConfig) -> DecodedSource:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # 17 grey levels, 0..16.
    pixels = np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    names = tuple(str(name) for name in bunch.target_names)
    return DecodedSource(_resized(pixels, config.image_size), labels, names)


def _fashion_mnist_files(config: DataConfig) -> list[tuple[Path, Path]]:
    """Image and label file of both parts; gzip or plain."""
    folders = (
        (user_path(config.path, "data.path"),)
        if config.path is not None
        else FASHION_MNIST_FOLDERS
    )
    for folder in folders:
        pairs = []
        for part in FASHION_MNIST_PARTS:
            images = _gzip_or_plain(folder / f"{part}-images-idx3-ubyte")
            labels = _gzip_or_plain(folder / f"{part}-labels-idx1-ubyte")
            if images is not None and labels is not None:
                pairs.append((images, labels))
        if len(pairs) == len(FASHION_MNIST_PARTS):
            return pairs
    raise DataError(
        f"data.source: fashion_mnist: its files aren't in {folders[0]}; run `apt-get install "
        "dataset-fashion-mnist` (Debian, Ubuntu), or set data.path=FOLDER to a folder with the "
        "four IDX files train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, "
        "t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz"
    )


def _gzip_or_plain(stem: Path) -> Path | None:
    for path in (stem.with_name(stem.name + ".gz"), stem):
        if path.is_file():
            return path
    return None


def _fashion_mnist_identity(config: DataConfig) -> dict[str, Any]:
    files = [path for pair in _fashion_mnist_files(config) for path in pair]
    return {"files": [file_identity(path, path.parent) for path in files]}


def _decode_fashion_mnist(config: DataConfig) -> DecodedSource:
    images, labels = [], []
    for image_path, label_path in _fashion_mnist_files(config):
        part_images, part_labels = read_idx(image_path), read_idx(label_path)
        if part_images.ndim != 3 or part_labels.shape != part_images.shape[:1]:
            raise DataError(
                f"{image_path} and {label_path.name}: shapes {part_images.shape} and "
                f"{part_labels.shape} don't belong together; get both files again"
            )
        if part_labels.size and part_labels.max() >= len(FASHION_MNIST_CLASSES):
            raise DataError(f"{label_path}: holds label {part_labels.max()}, the highest is 9")
        images.append(part_images)
        labels.append(part_labels)
    pixels = np.concatenate(images)[:, None]
    return DecodedSource(
        _resized(pixels, config.image_size),
        np.concatenate(labels).astype(np.int64),
        FASHION_MNIST_CLASSES,
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a file of unsigned bytes in the IDX format of MNIST, gzip or plain.

    Raises:
        DataError: the file can't be read, or isn't what its header says.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read ({error}); get the file again") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != IDX_UBYTE or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{path}: isn't an IDX file of unsigned bytes; get the file again")
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    values = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3])
    if values.size != int(np.prod(shape)):
        raise DataError(
            f"{path}: its header says {shape}, but {values.size} bytes follow; get the file again"
        )
    return values.reshape(shape)


def _folder_root(config: DataConfig) -> Path:
    if config.path is None:
        raise DataError(
            "data.path: image_folder needs the folder of the images; set data.path=FOLDER"
        )
    return user_path(config.path, "data.path")


def _folder_identity(config: DataConfig) -> dict[str, Any]:
    root = _folder_root(config)
    listing = list_folder(root)
    return {
        # Two folders may hold files of equal names, sizes and times.
        "root": str(root.resolve()),
        "grayscale": config.grayscale,
        "files": [file_identity(path, root) for path in listing.files],
        "labels": listing.labels,
    }


def _decode_folder(config: DataConfig) -> DecodedSource:
    listing = list_folder(_folder_root(config))
    size = config.image_size or FOLDER_IMAGE_SIZE
    images = decode_folder(listing, size, config.grayscale)
    return DecodedSource(images, np.asarray(listing.labels, dtype=np.int64), listing.class_names)


def file_identity(path: Path, root: Path) -> list[str | int]:
    """Name below `root`, size in bytes and time of the last change in ns.

    Raises:
        DataError: a link that leads nowhere, or a file that may not be looked at.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(
            f"{path}: can't be read ({error.strerror or error}); repair or remove it"
        ) from error
    return [os.path.relpath(path, root), status.st_size, status.st_mtime_ns]


def _resized(pixels: NDArray[np.uint8], image_size: int | None) -> NDArray[np.uint8]:
    """Resize (N, 1, H, W) to the asked edge; None leaves the source's own."""
    if image_size is None or pixels.shape[-2:] == (image_size, image_size):
        return pixels
    from PIL import Image

    resized = [resize_and_crop(Image.fromarray(image[0]), image_size) for image in pixels]
    return np.stack([np.asarray(image, dtype=np.uint8) for image in resized])[:, None]


_SOURCES: dict[
    str,
    tuple[Callable[[DataConfig], dict[str, Any]], Callable[[DataConfig], DecodedSource]],
] = {
    "digits": (_digits_identity, _decode_digits),
    "fashion_mnist": (_fashion_mnist_identity, _decode_fashion_mnist),
    "image_folder": (_folder_identity, _decode_folder),
}
