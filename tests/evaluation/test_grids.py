"""Sample grids: place, size and errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raysched.errors import StorageError
from raysched.evaluation import grids


def test_a_grid_has_a_column_per_class_and_small_images_are_enlarged():
    labels = torch.arange(8) % 4
    images = (labels * 60).to(torch.uint8).reshape(8, 1, 1, 1).expand(8, 1, 8, 8)
    grid = grids.sample_grid(images, labels, num_classes=4, max_images=8)
    cell = 48 + grids.GAP
    assert grid.shape == (2 * cell + grids.GAP, 4 * cell + grids.GAP, 3)
    for column in range(4):
        for row in range(2):
            middle = grid[row * cell + 24, column * cell + 24]
            assert middle.tolist() == [60 * column] * 3


def test_more_classes_than_cells_still_give_one_row():
    images = torch.zeros(30, 3, 64, 64, dtype=torch.uint8)
    grid = grids.sample_grid(images, torch.arange(30), num_classes=30, max_images=7)
    assert grid.shape == (64 + 2 * grids.GAP, 7 * (64 + grids.GAP) + grids.GAP, 3)


def test_a_class_without_samples_leaves_its_column_empty():
    images = torch.zeros(1, 1, 48, 48, dtype=torch.uint8)
    grid = grids.sample_grid(images, torch.tensor([1]), num_classes=2, max_images=2)
    assert grid[20, 20].tolist() == [grids.BACKGROUND] * 3
    assert grid[20, 20 + 48 + grids.GAP].tolist() == [0, 0, 0]


def test_a_png_holds_the_pixels(tmp_path: Path):
    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    path = grids.save_png(image, tmp_path / "new" / "grid.png")
    assert np.array_equal(np.asarray(Image.open(path)), image)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"file/grid\.png"):
        grids.save_png(np.zeros((2, 2, 3), np.uint8), tmp_path / "file" / "grid.png")
