"""Sampling from what a run leaves behind, and the messages where there is nothing to sample."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raysched.config.loading import load_mapping, write_yaml
from raysched.config.run import RunConfig
from raysched.errors import RunFailedError, StorageError, UserError
from raysched.evaluation.model_source import load_model, noise_config
from raysched.evaluation.sample_run import sample_run
from raysched.models.ema import EMA
from raysched.models.export import save_pipeline
from raysched.models.networks import build_network
from raysched.models.weights import save_weights
from tests.models.manifests import write_manifest


def tiny_config(folder: Path, **changes) -> RunConfig:
    settings = {
        "model": {"block_out_channels": [8], "norm_num_groups": 4},
        "data": {"cache_dir": str(folder / "cache")},
        **changes,
    }
    return load_mapping(settings, "test").config


def tiny_network(config: RunConfig, seed: int = 0) -> torch.nn.Module:
    return build_network(config.model, 1, 8, 10, seed=seed)


def write_checkpoint(run_dir: Path, config: RunConfig, step: int, seed: int) -> Path:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    network = tiny_network(config, seed)
    save_weights(folder / "model.safetensors", network.state_dict())
    save_weights(folder / "ema.safetensors", EMA(tiny_network(config, seed + 1), 10).state_dict())
    write_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def made_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(folder)
    write_yaml(config, folder / "config.yaml")
    write_checkpoint(folder, config, 10, seed=0)
    write_checkpoint(folder, config, 20, seed=2)
    return folder


@pytest.fixture
def run_dir(made_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_run, tmp_path / "run"))


def test_a_run_gives_a_picture_of_its_newest_averaged_weights(run_dir: Path):
    found = sample_run(run_dir, num_images=20, nfe=2)
    assert found.loaded_from.name == "step-00000020"
    assert found.grid == run_dir / "samples" / "euler-nfe_2-seed_0.png"
    with Image.open(found.grid) as picture:
        assert picture.size == (10 * 50 + 2, 2 * 50 + 2)
    assert json.loads(json.dumps(found.as_json()))["grid"] == str(found.grid)


def test_weights_and_seed_and_checkpoint_change_the_picture_and_repeating_does_not(run_dir: Path):
    def pixels(name: str, source: Path = run_dir, **changes) -> np.ndarray:
        target = run_dir / f"{name}.png"
        sample_run(source, num_images=10, nfe=2, out=target, **changes)
        return np.asarray(Image.open(target))

    first = pixels("a")
    assert np.array_equal(first, pixels("b"))
    assert not np.array_equal(first, pixels("c", seed=1))
    assert not np.array_equal(first, pixels("d", weights="online"))
    older = run_dir / "checkpoints" / "step-00000010"
    assert not np.array_equal(first, pixels("e", source=older))


def test_single_images_of_one_class_are_written_beside_the_picture(run_dir: Path):
    found = sample_run(
        str(run_dir), num_images=3, nfe=1, class_label=7, out=str(run_dir / "x"), save_images=True
    )
    assert [path.name for path in found.images] == [f"{i:05d}-class_7.png" for i in range(3)]
    with Image.open(found.images[0]) as image:
        assert image.size == (8, 8)


def test_a_pipeline_folder_alone_gives_the_same_images_as_its_checkpoint(
    run_dir: Path, tmp_path: Path
):
    model = load_model(run_dir)
    config = tiny_config(run_dir)
    save_pipeline(tmp_path / "elsewhere", model.network, config, [str(i) for i in range(10)])
    a = sample_run(run_dir, num_images=10, nfe=3, out=tmp_path / "a.png")
    b = sample_run(tmp_path / "elsewhere", num_images=10, nfe=3, out=tmp_path / "b.png")
    assert np.array_equal(np.asarray(Image.open(a.grid)), np.asarray(Image.open(b.grid)))
    with pytest.raises(UserError, match="averaged weights only"):
        sample_run(tmp_path / "elsewhere", weights="online")


@pytest.mark.parametrize(
    ("prediction_type", "noise"),
    [
        ("epsilon", {"kind": "scaled_linear", "num_train_timesteps": 500, "beta_end": 0.03}),
        ("v_prediction", {"kind": "cosine"}),
        ("flow_matching", {"kind": "flow", "shift": 2.5}),
    ],
)
def test_the_noise_schedule_is_read_back_from_a_pipeline(tmp_path: Path, prediction_type, noise):
    config = tiny_config(tmp_path, prediction_type=prediction_type, noise_schedule=noise)
    save_pipeline(tmp_path / "pipeline", tiny_network(config), config, list("0123456789"))
    assert noise_config(tmp_path / "pipeline", prediction_type) == config.noise_schedule


def test_a_damaged_checkpoint_is_passed_over_with_a_note(run_dir: Path):
    newest = run_dir / "checkpoints" / "step-00000020"
    (newest / "ema.safetensors").write_bytes(b"cut short")
    found = sample_run(run_dir, num_images=2, nfe=1)
    assert found.loaded_from.name == "step-00000010"
    assert len(found.notes) == 1
    assert "step-00000020" in found.notes[0]
    (newest / "manifest.json").unlink()
    with pytest.raises(StorageError, match="half-written"):
        sample_run(newest)


def test_what_is_no_model_is_told_in_one_message(tmp_path: Path, run_dir: Path):
    with pytest.raises(UserError, match="nowhere: doesn't exist"):
        sample_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file"):
        sample_run(run_dir / "config.yaml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        sample_run(tmp_path / "empty")
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(UserError, match=r"has no checkpoint yet; train on with .*--resume"):
        sample_run(run_dir)


def test_a_checkpoint_away_from_its_run_says_what_is_missing(run_dir: Path, tmp_path: Path):
    moved = shutil.copytree(run_dir / "checkpoints" / "step-00000020", tmp_path / "a" / "b" / "c")
    with pytest.raises(UserError, match=r"the checkpoint's run is gone: .*config\.yaml"):
        sample_run(moved)


def test_weights_of_another_network_are_refused(run_dir: Path):
    config = tiny_config(run_dir, model={"block_out_channels": [16], "norm_num_groups": 4})
    write_yaml(config, run_dir / "config.yaml")
    with pytest.raises(UserError, match="don't fit the network"):
        sample_run(run_dir)


def test_an_unknown_class_is_told_with_those_that_exist(run_dir: Path):
    with pytest.raises(UserError, match=r"must be in 0\.\.9, got 10; classes: 0: "):
        sample_run(run_dir, class_label=10)


def test_classes_and_guidance_are_refused_where_the_model_knows_none(tmp_path: Path):
    model = {"block_out_channels": [8], "norm_num_groups": 4, "class_conditional": False}
    config = tiny_config(tmp_path, model=model)
    save_pipeline(tmp_path / "p", tiny_network(config), config, list("0123456789"))
    for changes in ({"class_label": 1}, {"guidance_scale": 2.0}):
        with pytest.raises(UserError, match="knows no classes"):
            sample_run(tmp_path / "p", **changes)
    assert sample_run(tmp_path / "p", num_images=3, nfe=1).grid.is_file()


def test_a_diverged_checkpoint_is_reported_instead_of_drawn(run_dir: Path):
    folder = run_dir / "checkpoints" / "step-00000020"
    config = tiny_config(run_dir)
    weights = {
        k: torch.full_like(v, torch.nan) for k, v in tiny_network(config).state_dict().items()
    }
    save_weights(folder / "ema.safetensors", weights)
    write_manifest(folder)
    with pytest.raises(RunFailedError, match="not finite"):
        sample_run(folder, num_images=2, nfe=1)
