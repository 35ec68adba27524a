"""Warm start: weights of another run in place of random ones; optimizer and average begin anew.

`init_from` names a run's folder (its newest whole checkpoint), a checkpoint or a saved pipeline;
`init_weights` which of its weights. Only safetensors are read. The compute that the base has spent
is not counted. The digest of the weights stands in the run's `init.json`: a resumed run whose base
has changed since is refused. A sweep names one checkpoint there, for all of its trials.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from torch import Tensor, nn

from raysched.config.run import RunConfig
from raysched.data.dataset import load_dataset
from raysched.errors import ConfigError, StorageError
from raysched.models.checkpoint_files import read_verified_group
from raysched.models.ema import NUM_SAMPLES_KEY
from raysched.models.export import load_network
from raysched.models.networks import build_network
from raysched.models.weights import weights_sha256
from raysched.training.checkpoint import checkpoint_folders
from raysched.training.files import storage_errors, write_json

log = logging.getLogger(__name__)
INIT_FILE = "init.json"
MAX_NAMED = 3


def initialise(network: nn.Module, config: RunConfig) -> None:
    """Put the base's weights into a network that was just built; nothing without `init_from`.

    Raises:
        ConfigError: the base's network is another one; the first differing weights are named.
        StorageError: nothing that can be read lies there.
    """
    if config.init_from is None:
        return
    weights = base_weights(Path(config.init_from), config.init_weights)
    _check_shapes(network.state_dict(), weights, config.init_from)
    network.load_state_dict(weights)


def shared_base(config: RunConfig, folder: Path) -> RunConfig:
    """A sweep's base run with `init_from` as the one checkpoint that all its trials begin with.

    A base that is still training would give later trials other weights than the first ones. That
    the weights fit is checked here, before anything is started.

    Args:
        config: the base run, its paths absolute.
        folder: the sweep's; its `init.json` names what an earlier session began with.

    Raises:
        ConfigError: nothing that can be begun with lies there, or another network.
        StorageError: it is damaged.
    """
    if config.init_from is None:
        return config
    pinned, source = folder / INIT_FILE, config.init_from
    if pinned.is_file():
        source = json.loads(pinned.read_text(encoding="utf-8"))["init_from"]
        if not Path(source).is_dir():
            raise ConfigError(
                f"init_from: {source}: is gone, and the trials in {folder} began with it: bring "
                "it back, or begin a new sweep"
            )
    place, weights = _read_base(Path(source), config.init_weights)
    data = load_dataset(config.data)
    network = build_network(config.model, data.channels, data.image_size, data.num_classes)
    _check_shapes(network.state_dict(), weights, source)
    return config.model_copy(update={"init_from": str(place)})


def pin_base(config: RunConfig, run_dir: Path, *, write: bool) -> None:
    """Record which weights a run starts from, or check that they are still the same.

    Args:
        config: the run.
        run_dir: its folder.
        write: whether this process records (rank 0).

    Raises:
        ConfigError: the run in the folder began with other weights.
    """
    if config.init_from is None:
        return
    digest = weights_sha256(base_weights(Path(config.init_from), config.init_weights))
    path = run_dir / INIT_FILE
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))["weights_sha256"]
        if known != digest:
            raise ConfigError(
                f"init_from: {config.init_from}: its {config.init_weights} weights have changed "
                f"since the run in {run_dir} began (sha256 {known[:12]}…, now {digest[:12]}…): "
                "begin a new run, or name the checkpoint that was used"
            )
        return
    if write:
        log.info(
            "init_from: %s weights of %s; the compute that they cost is not counted",
            config.init_weights,
            config.init_from,
        )
        with storage_errors(path, "writing what the run starts from"):
            content = {"init_from": config.init_from, "init_weights": config.init_weights}
            write_json(path, {**content, "weights_sha256": digest})


def base_weights(path: Path, kind: str) -> dict[str, Tensor]:
    """The weights at a path: a run's, a checkpoint's or a pipeline's.

    Raises:
        ConfigError: the path holds none of them, or a pipeline is asked for online weights.
        StorageError: they are damaged.
    """
    return _read_base(path, kind)[1]


def _read_base(path: Path, kind: str) -> tuple[Path, dict[str, Tensor]]:
    """The pipeline or checkpoint that a path stands for, and its weights."""
    if (path / "model_index.json").is_file():
        if kind != "ema":
            raise ConfigError(f"init_from: {path}: a pipeline has ema weights only, got {kind}")
        return path, dict(load_network(path).state_dict())
    folders = [path] if (path / "manifest.json").is_file() else checkpoint_folders(path)
    if not folders:
        raise ConfigError(
            f"init_from: {path}: holds no run with a checkpoint, no checkpoint and no pipeline: "
            "name the folder of one, as in init_from=runs/NAME"
        )
    problems = []
    for folder in reversed(folders):
        try:
            weights = read_verified_group(folder, "ema" if kind == "ema" else "model")
        except StorageError as error:
            problems.append(str(error))
            continue
        weights.pop(NUM_SAMPLES_KEY, None)
        return folder, weights
    raise StorageError(f"init_from: no checkpoint can be read: {'; '.join(problems)}")


def _check_shapes(own: dict[str, Tensor], base: dict[str, Tensor], path: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in base.items()}
    wrong = [
        f"{name} is {found.get(name, 'missing')} there and {shapes.get(name, 'missing')} here"
        for name in [*shapes, *(n for n in found if n not in shapes)]
        if shapes.get(name) != found.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
        raise ConfigError(
            f"init_from: {path}: another network: {'; '.join(wrong[:MAX_NAMED])}{more}; set "
            "model.* and data as in the base run's config.yaml"
        )
