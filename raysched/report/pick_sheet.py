"""The contact sheet of a pick: the same noise through every candidate, one row each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raysched.training.files import storage_errors
from raysched.tuning.compare import final_samples, run_folders
from raysched.tuning.display import number_text, settings_text
from raysched.tuning.records import TrialRecord

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 12
LABEL_HEIGHT, MARGIN = 20, 8
MIN_CELL, GAP = 48, 2


def write_pick_sheet(trials: Sequence[TrialRecord], folder: Path) -> dict[str, str]:
    """Draw the first seed's samples at the most network evaluations, a row per trial.

    Args:
        trials: those that were trained to the end, the baseline among them.
        folder: of the pick.

    Returns:
        contact_sheet -> path; empty where a run left no samples.
    """
    from raysched.evaluation.grids import save_png

    rows = []
    for trial in trials:
        run_dir = run_folders(trial)[0]
        if (run_dir / "final_samples.safetensors").is_file():
            samples, _ = final_samples(run_dir)
            rows.append((_title(trial, max(samples)), samples[max(samples)][:COLUMNS]))
    if not rows:
        return {}
    with storage_errors(folder, "writing the contact sheet"):
        return {"contact_sheet": str(save_png(contact_sheet(rows), folder / "contact_sheet.png"))}


def contact_sheet(rows: Sequence[tuple[str, Tensor]]) -> NDArray[np.uint8]:
    """One titled row of images per entry; column i starts from the same noise in all of them.

    Args:
        rows: title and (n, C, H, W) uint8 images.

    Returns:
        (height, width, 3) uint8.
    """
    from PIL import Image, ImageDraw, ImageFont

    from raysched.evaluation.grids import enlarged

    edge = max(rows[0][1].shape[-2:])
    scale = max(1, -(-MIN_CELL // edge))
    height, width = (length * scale for length in rows[0][1].shape[-2:])
    step = LABEL_HEIGHT + height + MARGIN
    size = (2 * MARGIN + COLUMNS * (width + GAP), MARGIN + len(rows) * step)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for index, (title, images) in enumerate(rows):
        top = MARGIN + index * step
        draw.text((MARGIN, top), title, fill="black", font=font)
        for column, image in enumerate(images):
            place = (MARGIN + column * (width + GAP), top + LABEL_HEIGHT)
            sheet.paste(Image.fromarray(enlarged(image, scale)), place)
    return np.asarray(sheet, dtype=np.uint8).copy()


def _title(trial: TrialRecord, nfe: int) -> str:
    name = "teacher forcing" if trial.baseline else f"{trial.name}: {settings_text(trial)}"
    quality = "" if trial.q is None else f" (q {number_text(trial.q)}, {nfe} evaluations)"
    return f"{name}{quality}"
