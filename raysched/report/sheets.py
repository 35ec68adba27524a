"""Samples of several trials from the same noise, one block of rows per trial.

Legend: n images, C channels, H and W pixels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raysched.tuning.display import number_text, settings_text
from raysched.tuning.records import TrialRecord

if TYPE_CHECKING:
    from torch import Tensor

ROWS_PER_BLOCK = 2
MAX_CLASSES = 10
MARGIN, LINE_HEIGHT, FONT_SIZE = 10, 18, 14
MIN_WIDTH, CHARACTER_WIDTH = 420, 8
Block = tuple[TrialRecord, Mapping[int, "Tensor"], "Tensor"]


def sample_sheet(blocks: Sequence[Block]) -> NDArray[np.uint8]:
    """A sheet: per trial and NFE a titled block, a column per class; equal noise stands in line.

    Args:
        blocks: trial, its samples (NFE -> (n, C, H, W) uint8) and the (n,) labels.

    Returns:
        (height, width, 3) uint8.
    """
    from raysched.evaluation.grids import sample_grid

    strips = []
    for nfe in sorted(blocks[0][1]):
        for trial, samples, labels in blocks:
            columns = min(MAX_CLASSES, int(labels.max()) + 1)
            grid = sample_grid(
                samples[nfe],
                labels,
                num_classes=columns,
                max_images=columns * ROWS_PER_BLOCK,
            )
            strips.append((_title(trial, nfe), grid))
    return stacked(strips)


def _title(trial: TrialRecord, nfe: int) -> str:
    name = "teacher forcing" if trial.baseline else f"trial {trial.name}: {settings_text(trial)}"
    quality = "" if trial.q is None else f", q {number_text(trial.q)}"
    return f"{nfe} network evaluations, {name}{quality}"


def stacked(strips: Sequence[tuple[str, NDArray[np.uint8]]]) -> NDArray[np.uint8]:
    """Titled pictures (h, w, 3) one below the other, as one (height, width, 3) uint8."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=FONT_SIZE)
    widest = max(MIN_WIDTH, *(grid.shape[1] for _, grid in strips))
    wrapped = [textwrap.wrap(title, widest // CHARACTER_WIDTH) for title, _ in strips]
    rows = sum(len(lines) for lines in wrapped)
    height = MARGIN + rows * LINE_HEIGHT + sum(grid.shape[0] + 2 * MARGIN for _, grid in strips)
    sheet = Image.new("RGB", (widest + 2 * MARGIN, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for lines, (_, grid) in zip(wrapped, strips, strict=True):
        for line in lines:
            draw.text((MARGIN, top), line, fill="black", font=font)
            top += LINE_HEIGHT
        sheet.paste(Image.fromarray(grid), (MARGIN, top + MARGIN // 2))
        top += grid.shape[0] + 2 * MARGIN
    return np.asarray(sheet, dtype=np.uint8).copy()
