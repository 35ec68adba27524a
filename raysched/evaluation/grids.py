"""Sample grids: one column per class, enlarged so that 8 x 8 images can be seen.

Legend: n images, C channels, H and W pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raysched.errors import StorageError

MIN_CELL = 48
GAP = 2
BACKGROUND = 255


def sample_grid(
    images: Tensor, labels: Tensor, *, num_classes: int, max_images: int
) -> NDArray[np.uint8]:
    """The first images of every class, a column each.

    Args:
        images: (n, C, H, W) uint8, C is 1 or 3.
        labels: (n,) classes in 0..num_classes-1.
        num_classes: number of classes; columns beyond `max_images` are left out.
        max_images: cells of the grid, at least one row.

    Returns:
        (height, width, 3) uint8.
    """
    columns = min(num_classes, max_images)
    rows = max(1, max_images // columns)
    members = [(labels == c).nonzero().flatten()[:rows].tolist() for c in range(columns)]
    rows = max(1, *(len(m) for m in members)) if members else 1
    scale = max(1, -(-MIN_CELL // max(images.shape[-2:])))
    height, width = (length * scale for length in images.shape[-2:])
    shape = (rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3)
    grid = np.full(shape, BACKGROUND, np.uint8)
    for column, indices in enumerate(members):
        for row, index in enumerate(indices):
            top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
            grid[top : top + height, left : left + width] = enlarged(images[index], scale)
    return grid


def enlarged(image: Tensor, scale: int) -> NDArray[np.uint8]:
    """One image (C, H, W) uint8 as RGB (H scale, W scale, 3), every pixel a square."""
    pixels = image.cpu().numpy().transpose(1, 2, 0)
    rgb = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    return rgb.repeat(scale, 0).repeat(scale, 1)


def save_png(image: NDArray[np.uint8], path: Path) -> Path:
    """Write an RGB image.

    Args:
        image: (H, W, 3) uint8.
        path: file to write; its folder is made.

    Returns:
        The path.

    Raises:
        StorageError: the file can't be written.
    """
    from PIL import Image

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, format="PNG")
    except OSError as error:
        raise StorageError(
            f"{path}: can't write the image: {error.strerror or error}; choose another place or "
            "make room there"
        ) from error
    return path
