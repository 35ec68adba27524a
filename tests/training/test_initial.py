"""Warm start: another run's weights, fresh optimizer and average, a base that may not change."""

import json

import pytest
import torch
from safetensors.torch import load_file

from raysched.config.loading import load_mapping
from raysched.errors import ConfigError
from raysched.models.networks import build_network
from raysched.training.initial import (
    INIT_FILE,
    base_weights,
    initialise,
    pin_base,
    shared_base,
)
from raysched.training.loop import train_loop
from raysched.training.protocols import NullTracker

SMALL = {
    "data": {"limit": 64},
    "model": {"block_out_channels": [8], "norm_num_groups": 4},
    "training": {"budget": {"steps": 2}, "batch_size": 8},
    "evaluation": {"enabled": False},
    "tracking": {"enabled": False},
    "scaling": {"num_workers": 0},
}


def config(**values):
    return load_mapping({**SMALL, **values}, "test").config


def train(folder, **values):
    folder.mkdir(exist_ok=True)
    return train_loop(
        config(**values), run_dir=folder, report=lambda _: None, tracker=NullTracker()
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    (folder / "config.yaml").write_text("{}")
    train(folder)
    return folder


def fresh(**model):
    run = config(**({"model": {**SMALL["model"], **model}} if model else {}))
    return build_network(run.model, 1, 8, 10, seed=9)


@pytest.mark.parametrize(("kind", "file"), [("ema", "ema"), ("online", "model")])
def test_a_run_begins_with_the_chosen_weights_of_its_base(base, kind, file):
    network = fresh()
    initialise(network, config(init_from=str(base), init_weights=kind))
    (folder,) = (base / "checkpoints").iterdir()
    stored = load_file(folder / f"{file}.safetensors")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, stored[name]), name
    assert base_weights(folder, kind).keys() == network.state_dict().keys()


def test_the_pipeline_of_a_run_is_a_base_with_averaged_weights_only(base):
    pipeline, run = base_weights(base / "pipeline", "ema"), base_weights(base, "ema")
    assert all(torch.equal(pipeline[name], run[name]) for name in run)
    with pytest.raises(ConfigError, match="ema weights only"):
        base_weights(base / "pipeline", "online")


def test_another_network_is_refused_with_the_first_differences(base):
    with pytest.raises(ConfigError, match=r"another network: .* there and .* here.* more"):
        initialise(fresh(block_out_channels=[16]), config(init_from=str(base)))


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no run with a checkpoint"):
        initialise(fresh(), config(init_from=str(tmp_path)))


def test_compute_starts_at_zero_and_a_base_that_changed_is_refused(base, tmp_path):
    changing = tmp_path / "base"
    (changing / "checkpoints").mkdir(parents=True)
    for folder in (base / "checkpoints").iterdir():
        (changing / "checkpoints" / folder.name).symlink_to(folder)
    run = tmp_path / "run"
    result = train(run, init_from=str(changing))
    assert result.compute["forward_equivalents"] == 2 * 3 * 8
    assert len(json.loads((run / INIT_FILE).read_text())["weights_sha256"]) == 64
    pin_base(config(init_from=str(changing)), run, write=True)
    for folder in (changing / "checkpoints").iterdir():
        folder.unlink()
    other = tmp_path / "other"
    train(other, seed=5)
    for folder in (other / "checkpoints").iterdir():
        (changing / "checkpoints" / folder.name).symlink_to(folder)
    with pytest.raises(ConfigError, match="have changed"):
        pin_base(config(init_from=str(changing)), run, write=True)


def test_the_trials_of_a_sweep_begin_with_one_checkpoint_whatever_its_run_writes_later(
    base, tmp_path
):
    growing, sweep = tmp_path / "base", tmp_path / "sweep"
    (first,) = (base / "checkpoints").iterdir()
    (growing / "checkpoints").mkdir(parents=True)
    (growing / "checkpoints" / first.name).symlink_to(first)
    asked = config(init_from=str(growing))
    begun = shared_base(asked, sweep)
    assert begun.init_from == str(growing / "checkpoints" / first.name)
    sweep.mkdir()
    pin_base(begun, sweep, write=True)
    (growing / "checkpoints" / "step-00000009").symlink_to(first)
    assert shared_base(asked, tmp_path / "new").init_from.endswith("step-00000009")
    # A sweep that goes on keeps to its own, and says so if that is gone.
    assert shared_base(asked, sweep) == begun
    (growing / "checkpoints" / first.name).unlink()
    with pytest.raises(ConfigError, match=r"is gone, and the trials in .* began with it"):
        shared_base(asked, sweep)


def test_a_sweep_whose_trials_could_not_begin_with_the_base_is_refused(base, tmp_path):
    assert shared_base(config(), tmp_path).init_from is None
    with pytest.raises(ConfigError, match="holds no run with a checkpoint"):
        shared_base(config(init_from=str(tmp_path / "runs")), tmp_path)
    other = {**SMALL["model"], "block_out_channels": [16]}
    with pytest.raises(ConfigError, match="another network"):
        shared_base(config(init_from=str(base), model=other), tmp_path)
