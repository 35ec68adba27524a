"""Finding and loading a trained model: a run's folder, a checkpoint's, or a saved pipeline's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from raysched.config.loading import load
from raysched.config.run import NoiseScheduleConfig, PredictionType, RunConfig
from raysched.data.dataset import load_dataset
from raysched.diffusion.schedules import NoiseSchedule
from raysched.errors import StorageError, UserError
from raysched.models.checkpoint_files import MANIFEST_FILE, read_verified_group
from raysched.models.ema import NUM_SAMPLES_KEY
from raysched.models.export import load_network
from raysched.models.networks import Denoiser, build_network
from raysched.models.pickles import refuse_pickle, refuse_pickled_folder

Weights = Literal["ema", "online"]
GROUP_OF: dict[Weights, str] = {"ema": "ema", "online": "model"}
CONFIG_FILE, PIPELINE_INDEX = "config.yaml", "model_index.json"
BETA_KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


@dataclass(frozen=True, eq=False)
class ModelSource:
    """A model that can be sampled from.

    Args:
        network: in eval mode, on the CPU.
        schedule: the noise schedule that it was trained on.
        prediction_type: what it predicts.
        shape: (C, H, W) of its images.
        class_names: one per class.
        loaded_from: the folder of the weights.
        home: the folder of the run, or of the pipeline, where pictures go.
        notes: what the user should know, e.g. a damaged checkpoint that was passed over.
        config: of the run that the weights come from; None of a saved pipeline.
    """

    network: Denoiser
    schedule: NoiseSchedule
    prediction_type: PredictionType
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    loaded_from: Path
    home: Path
    notes: tuple[str, ...] = ()
    config: RunConfig | None = None


def load_model(path: Path, weights: Weights = "ema") -> ModelSource:
    """Load the model that lies at a path.

    Args:
        path: folder of a run, of a checkpoint (`checkpoints/step-...`) or of a pipeline.
        weights: averaged or last weights; a pipeline has the averaged ones only.

    Returns:
        The model.

    Raises:
        UserError: the path holds nothing of the kind, or nothing that can be read.
        PickleError: it is a pickle, or a folder of pickles.
    """
    if path.is_file():
        refuse_pickle(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "doesn't exist"
        raise UserError(
            f"{path}: {what}; name the folder of a run, of one of its checkpoints "
            "(RUN/checkpoints/step-...) or of a saved pipeline"
        )
    if (path / PIPELINE_INDEX).is_file():
        return _from_pipeline(path, weights, home=path)
    if (path / CONFIG_FILE).is_file():
        return _from_run(path, weights)
    if any(any(path.glob(f"{group}*.safetensors")) for group in GROUP_OF.values()):
        return _from_checkpoint(path.resolve(), path.resolve().parent.parent, weights)
    refuse_pickled_folder(path)
    raise UserError(
        f"{path}: holds no run (no {CONFIG_FILE}), no checkpoint (no "
        f"{GROUP_OF[weights]}.safetensors) and no pipeline (no {PIPELINE_INDEX})"
    )


def _from_run(run_dir: Path, weights: Weights) -> ModelSource:
    """The newest checkpoint that can be read; without one, the run's pipeline."""
    notes: list[str] = []
    for folder in sorted((run_dir / "checkpoints").glob("step-[0-9]*"), reverse=True):
        try:
            return _from_checkpoint(folder, run_dir, weights, notes)
        except StorageError as error:
            notes.append(f"{error}; using what was saved before it")
    pipeline = run_dir / "pipeline"
    if weights == "ema" and (pipeline / PIPELINE_INDEX).is_file():
        return _from_pipeline(pipeline, weights, home=run_dir, notes=notes)
    reason = f" that can be read ({'; '.join(notes)})" if notes else ""
    raise UserError(
        f"{run_dir}: has no checkpoint{reason} yet; train on with "
        f"`raysched train {run_dir / CONFIG_FILE} --resume training.output_dir={run_dir}`"
    )


def _from_checkpoint(
    folder: Path, run_dir: Path, weights: Weights, notes: list[str] | None = None
) -> ModelSource:
    if not (folder / MANIFEST_FILE).is_file():
        refuse_pickled_folder(folder)
        raise StorageError(f"{folder}: half-written checkpoint: {MANIFEST_FILE} is missing")
    if not (run_dir / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder}: the checkpoint's run is gone: {run_dir / CONFIG_FILE} is missing; put "
            "the checkpoint back to RUN/checkpoints, or sample from the run's pipeline folder"
        )
    state = read_verified_group(folder, GROUP_OF[weights])
    config = load(run_dir / CONFIG_FILE).config
    dataset = load_dataset(config.data)
    network = build_network(
        config.model, dataset.channels, dataset.image_size, dataset.num_classes
    )
    state.pop(NUM_SAMPLES_KEY, None)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{folder}: the weights don't fit the network of {run_dir / CONFIG_FILE} on its data "
            f"({dataset.num_classes} classes): config or data have changed since: {error}"
        ) from error
    return ModelSource(
        network=network.eval(),
        schedule=NoiseSchedule.from_config(config.noise_schedule),
        prediction_type=config.prediction_type,
        shape=(dataset.channels, dataset.image_size, dataset.image_size),
        class_names=dataset.class_names,
        loaded_from=folder,
        home=run_dir,
        notes=tuple(notes or ()),
        config=config,
    )


def _from_pipeline(
    folder: Path, weights: Weights, *, home: Path, notes: list[str] | None = None
) -> ModelSource:
    if weights != "ema":
        raise UserError(
            f"{folder}: a pipeline holds the averaged weights only; sample it with "
            "`--weights ema`, or name a checkpoint"
        )
    network = load_network(folder)
    index = json.loads((folder / PIPELINE_INDEX).read_text(encoding="utf-8"))
    settings: Any = network.backbone.config
    size = int(settings.sample_size)
    noise = noise_config(folder, index["prediction_type"])
    return ModelSource(
        network=network,
        schedule=NoiseSchedule.from_config(noise),
        prediction_type=index["prediction_type"],
        shape=(int(settings.in_channels), size, size),
        class_names=tuple(index["class_names"]),
        loaded_from=folder,
        home=home,
        notes=tuple(notes or ()),
    )


def noise_config(folder: Path, prediction_type: PredictionType) -> NoiseScheduleConfig:
    """The noise schedule of a saved pipeline, from its scheduler's settings.

    Args:
        folder: the pipeline's.
        prediction_type: what its network predicts.

    Returns:
        The section of a run's config.

    Raises:
        StorageError: the settings are missing, or of a schedule that raysched doesn't know.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if "beta_schedule" not in saved:
            values = {"kind": "flow", "shift": float(saved["shift"])}
        else:
            values = {
                "kind": BETA_KINDS[saved["beta_schedule"]],
                "num_train_timesteps": int(saved["num_train_timesteps"]),
                "beta_start": float(saved["beta_start"]),
                "beta_end": float(saved["beta_end"]),
            }
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(f"{path}: can't read the noise schedule: {error}") from error
    run = RunConfig.model_validate({"prediction_type": prediction_type, "noise_schedule": values})
    return run.noise_schedule


def best_device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
