"""Saving a trained network as a folder that diffusers loads, and reading it back.

The folder holds `model_index.json`, `scheduler/`, `unet/` or `transformer/` (safetensors) and
`pipeline.py`, a copy of the class that runs it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raysched.config.run import NoiseScheduleConfig, RunConfig
from raysched.errors import ConfigError, StorageError
from raysched.models.networks import Denoiser, wrap_backbone
from raysched.models.pickles import refuse_pickled_folder

# The network gets 1000 t on a flow path, whatever T is.
FLOW_TIME_SCALE = 1000
_BETA_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
}


def build_scheduler(config: NoiseScheduleConfig, prediction_type: str) -> Any:
    """The diffusers scheduler that walks this noise schedule by Euler's method (DDIM).

    Args:
        config: the run's `noise_schedule` section.
        prediction_type: what the network predicts.
    """
    if config.kind == "flow":
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
            FlowMatchEulerDiscreteScheduler,
        )

        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=FLOW_TIME_SCALE, shift=config.shift
        )
    if prediction_type == "flow_matching":
        raise ConfigError(
            "prediction_type: flow_matching needs noise_schedule.kind: flow, "
            f"got {config.kind}; use epsilon, v_prediction or sample"
        )
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    # Its first order is DDIM, and unlike DDIMScheduler it walks any list of indices.
    return DPMSolverMultistepScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=_BETA_SCHEDULES[config.kind],
        prediction_type=prediction_type,
        solver_order=1,
        algorithm_type="dpmsolver++",
        final_sigmas_type="zero",
        timestep_spacing="trailing",
    )


def build_pipeline(network: Denoiser, config: RunConfig, class_names: Sequence[str]) -> Any:
    """The pipeline of a run, around the network itself (its weights aren't copied)."""
    from raysched.models.pipeline import ClassPipeline

    component = "unet" if config.model.kind == "unet" else "transformer"
    pipeline = ClassPipeline(
        scheduler=build_scheduler(config.noise_schedule, config.prediction_type),
        prediction_type=config.prediction_type,
        class_names=list(class_names),
        class_conditional=config.model.class_conditional,
        **{component: network.backbone},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(
    folder: Path, network: Denoiser, config: RunConfig, class_names: Sequence[str]
) -> None:
    """Save the network, as it is now, as a pipeline folder; an older one is replaced.

    Args:
        folder: where; appears whole or not at all.
        network: with the weights to save (the EMA's, as a rule).
        config: of the run.
        class_names: one per class.

    Raises:
        StorageError: the folder can't be written.
    """
    from safetensors import SafetensorError

    from raysched.models import pipeline as pipeline_module

    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        build_pipeline(network, config, class_names).save_pretrained(
            str(partial), safe_serialization=True
        )
        source = Path(str(pipeline_module.__file__))
        shutil.copyfile(source, partial / "pipeline.py")
        index = partial / "model_index.json"
        described = json.loads(index.read_text(encoding="utf-8"))
        # [module, class] makes diffusers take the class from the folder's own file.
        described["_class_name"] = [source.stem, pipeline_module.ClassPipeline.__name__]
        index.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    # safetensors has an error of its own for a full disk.
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"{folder}: can't write the pipeline: {error}") from error


def load_network(folder: Path) -> Denoiser:
    """The network of a saved pipeline folder, in eval mode.

    Raises:
        StorageError: the folder holds no pipeline, or a damaged one.
        PickleError: its weights are pickles.
    """
    index = folder / "model_index.json"
    try:
        described = json.loads(index.read_text(encoding="utf-8"))
        backbone = _load_backbone(folder, described)
        num_classes = len(described["class_names"])
        conditional = bool(described["class_conditional"])
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(f"{folder}: holds no usable pipeline: {error}") from error
    return wrap_backbone(backbone, num_classes, conditional).eval()


def _load_backbone(folder: Path, described: dict[str, Any]) -> Any:
    if described.get("unet", [None])[0] is not None:
        from diffusers.models.unets.unet_2d import UNet2DModel

        refuse_pickled_folder(folder / "unet")
        return UNet2DModel.from_pretrained(str(folder / "unet"), use_safetensors=True)
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    refuse_pickled_folder(folder / "transformer")
    return DiTTransformer2DModel.from_pretrained(str(folder / "transformer"), use_safetensors=True)
