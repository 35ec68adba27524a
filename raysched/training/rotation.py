"""Which checkpoints stay: the last ones, and those of the best evaluations."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path

from raysched.errors import UserError
from raysched.models.checkpoint_files import read_manifest
from raysched.training.checkpoint import checkpoint_folders, delete_folders, step_of


def steps_to_keep(
    quality: Mapping[int, float | None], newest: int, *, keep_last: int, keep_best: int
) -> set[int]:
    """Steps whose checkpoints stay.

    Args:
        quality: step -> `quality/q` of the newest evaluation before it (lower is better); None
            before the first one, and of checkpoints that can't be read.
        newest: the step just saved. Later ones were damaged and passed over: they go.
        keep_last: that many newest ones stay.
        keep_best: and those of that many best evaluations: of each, the first checkpoint after
            it, whose weights are nearest to those that were evaluated.
    """
    steps = sorted(step for step in quality if step <= newest)
    first_after: dict[float, int] = {}
    for step in steps:
        q = quality[step]
        if q is not None and math.isfinite(q):
            first_after.setdefault(q, step)
    best = [first_after[q] for q in sorted(first_after)[:keep_best]]
    return {*steps[-keep_last:], *best}


def rotate(
    run_dir: Path,
    newest: int,
    *,
    keep_last: int,
    keep_best: int,
    spare: Collection[Path] = (),
) -> None:
    """Delete a run's checkpoints that need not stay.

    Args:
        run_dir: the run's folder.
        newest: the step just saved.
        keep_last: see `steps_to_keep`.
        keep_best: likewise.
        spare: folders that are in use; they go next time.
    """
    folders = checkpoint_folders(run_dir)
    quality = {step_of(f): _quality(f) if keep_best else None for f in folders}
    kept = steps_to_keep(quality, newest, keep_last=keep_last, keep_best=keep_best)
    delete_folders([f for f in folders if step_of(f) not in kept and f not in spare])


def _quality(folder: Path) -> float | None:
    try:
        value = read_manifest(folder).get("quality")
    except UserError:
        return None  # whoever resumes is told; here it is merely none of the best
    return None if value is None else float(value)
