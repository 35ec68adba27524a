"""A trained pipeline as a logged model of a run, from which `mlflow.pyfunc` draws images."""

from __future__ import annotations

import hashlib
import importlib.metadata
import tempfile
import warnings
from pathlib import Path
from typing import Any

CODE = Path(__file__).with_name("pyfunc_code.py")
DIGEST_TAG = "raysched.pipeline_sha256"
PACKAGES = ("diffusers", "numpy", "safetensors", "torch")
PARAMETERS = {"num_inference_steps": 10, "guidance_scale": 1.0, "seed": 0}


def log_pipeline(client: Any, run_id: str, pipeline: Path, name: str) -> str:
    """Log a pipeline folder as a model of a run, once.

    Args:
        client: an MLflow client.
        run_id: the run that the model belongs to.
        pipeline: a folder that `raysched.models.export.save_pipeline` wrote.
        name: of the model; `runs:/RUN_ID/NAME` and `models:/MODEL_ID` load it.

    Returns:
        The model's id.

    Raises:
        FileNotFoundError: the folder holds no pipeline.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    digest = folder_sha256(pipeline)
    run = client.get_run(run_id)
    experiment = run.info.experiment_id
    model = _found(client, experiment, run_id, name, digest)
    if model is None:
        model = client.create_logged_model(
            experiment, name=name, source_run_id=run_id, tags={DIGEST_TAG: digest}
        )
    if model.status != LoggedModelStatus.READY:
        with tempfile.TemporaryDirectory(prefix="raysched-model-") as temporary:
            folder = Path(temporary) / "model"
            _save(folder, pipeline, model.model_id)
            client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    linked = run.outputs.model_outputs if run.outputs is not None else ()
    if all(output.model_id != model.model_id for output in linked):
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return str(model.model_id)


def folder_sha256(folder: Path) -> str:
    """Digest of the names and contents of a folder's files.

    Raises:
        FileNotFoundError: it isn't there, or empty.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise FileNotFoundError(f"{folder}: holds no pipeline")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _found(client: Any, experiment: str, run_id: str, name: str, digest: str) -> Any:
    """The model of an earlier attempt, whose answer got lost."""
    models = client.search_logged_models([experiment], filter_string=f"name = '{name}'")
    for model in models:
        if model.source_run_id == run_id and model.tags.get(DIGEST_TAG) == digest:
            return model
    return None


def _save(folder: Path, pipeline: Path, model_id: str) -> None:
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    signature = ModelSignature(
        inputs=Schema([ColSpec("long", "class_label")]),
        outputs=Schema([TensorSpec(_uint8(), (-1, -1, -1, -1))]),
        params=ParamSchema(
            [
                ParamSpec(key, "double" if isinstance(value, float) else "long", value)
                for key, value in PARAMETERS.items()
            ]
        ),
    )
    # MLflow wants the schema as type hints, which can't tell a table from a list here, and says so
    # past every filter: what it says is collected and dropped.
    with warnings.catch_warnings(record=True):
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=str(CODE),
            artifacts={"pipeline": str(pipeline)},
            signature=signature,
            input_example={"class_label": [0, 1]},
            pip_requirements=_requirements(),
            mlflow_model=Model(model_id=model_id),
        )


def _uint8() -> Any:
    import numpy as np

    return np.dtype(np.uint8)


def _requirements() -> list[str]:
    """What the model's code imports; a build's local label (`+cpu`) is no version of the index."""
    versions = {name: importlib.metadata.version(name) for name in (*PACKAGES, "mlflow")}
    return [f"{name}=={version.partition('+')[0]}" for name, version in versions.items()]
