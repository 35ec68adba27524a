"""A pipeline logged as a model: loaded by `mlflow.pyfunc`, it draws the pipeline's own images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raysched.config.loading import load
from raysched.models.export import save_pipeline
from raysched.models.networks import build_network
from raysched.tracking.logged_model import folder_sha256, log_pipeline
from tests.tracking.conftest import Store


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load(None).config
    network = build_network(config.model, 1, 8, 10, seed=3)
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    save_pipeline(folder, network, config, tuple("0123456789"))
    return folder


def test_a_logged_pipeline_draws_the_pipelines_own_images(
    store: Store, pipeline: Path, tracked: object
) -> None:
    import mlflow
    from diffusers import DiffusionPipeline

    tracker, run_id, run_dir = tracked()  # type: ignore[operator]
    tracker.log_model(pipeline, "winner")
    tracker.close("finished")

    (model,) = store.client.search_logged_models([store.handle.experiment_id])
    assert (model.name, model.source_run_id) == ("winner", run_id)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store.handle.uri)
    try:
        loaded = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
    finally:
        mlflow.set_tracking_uri(before)
    drawn = loaded.predict({"class_label": [3, 8]}, params={"num_inference_steps": 4, "seed": 5})

    own = DiffusionPipeline.from_pretrained(pipeline, trust_remote_code=True)
    generator = torch.Generator().manual_seed(5)
    images = own(class_labels=[3, 8], num_inference_steps=4, generator=generator, output_type="np")
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn, (images.images * 255).round().astype(np.uint8))
    assert not (run_dir / "tracking" / "rejected.jsonl").exists()


def test_a_model_sent_twice_is_there_once(store: Store, pipeline: Path, tracked: object) -> None:
    tracker, run_id, _ = tracked("twice")  # type: ignore[operator]
    tracker.close("finished")
    first = log_pipeline(store.client, run_id, pipeline, "winner")
    assert log_pipeline(store.client, run_id, pipeline, "winner") == first
    assert len(store.client.search_logged_models([store.handle.experiment_id])) == 1


def test_an_empty_folder_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no pipeline"):
        folder_sha256(tmp_path)
