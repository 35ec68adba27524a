"""The work of `raysched export`: a run's or a checkpoint's weights as a diffusers pipeline.

A checkpoint that several ranks wrote in pieces becomes one whole network.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raysched.config.paths import user_path
from raysched.errors import StorageError, UserError
from raysched.evaluation.model_source import PIPELINE_INDEX, Weights, load_model
from raysched.models.export import save_pipeline
from raysched.models.weights import weights_sha256


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Args:
        folder: the pipeline's.
        loaded_from: folder of the weights.
        weights: ema or online.
        weights_sha256: digest of the weights that were exported.
        notes: what the user should know.
    """

    folder: Path
    loaded_from: Path
    weights: Weights
    weights_sha256: str
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The same in JSON types."""
        return {
            **asdict(self),
            "folder": str(self.folder),
            "loaded_from": str(self.loaded_from),
            "notes": list(self.notes),
        }


def export_run(
    path: Path | str, out: Path | str | None = None, weights: Weights = "ema"
) -> ExportResult:
    """Save the weights of a run (its newest checkpoint's) or of a checkpoint as a pipeline.

    Args:
        path: folder of the run or of the checkpoint.
        out: the pipeline's folder; default: `pipeline-step-…` in the run's folder.
        weights: averaged or last weights.

    Raises:
        UserError: the path holds no run or checkpoint, or `out` holds something else already.
        StorageError: the folder can't be written.
    """
    model = load_model(Path(path), weights)
    if model.config is None:
        raise UserError(
            f"{path}: is a saved pipeline already (or a run of which only the pipeline is left: "
            f"{model.loaded_from}); copy that folder"
        )
    folder = model.home / f"pipeline-{model.loaded_from.name}"
    if out is not None:
        folder = user_path(str(out), "--out").absolute()
    _check_free(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"--out: {folder}: can't be made: {error.strerror}") from error
    save_pipeline(folder, model.network, model.config, model.class_names)
    return ExportResult(
        folder=folder,
        loaded_from=model.loaded_from,
        weights=weights,
        weights_sha256=weights_sha256(model.network.state_dict()),
        notes=model.notes,
    )


def _check_free(folder: Path) -> None:
    """An older pipeline is replaced, anything else is not."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PIPELINE_INDEX).is_file():
        raise UserError(f"--out: {folder}: holds other files; name a new folder or a pipeline's")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {folder}: is a file; name a folder")
