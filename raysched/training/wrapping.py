"""A run's weights and optimizer state, whatever the strategy that spreads them over the ranks.

Replicated (one worker, or DDP) every rank has everything. Sharded (FSDP2) every rank has some
rows of each tensor: `local_state` says which, `load_state` takes whole tensors and keeps them, so
that a checkpoint of either kind goes on under the other and with any number of workers.

Legend: N rows of a whole tensor, n of them on this rank, D… further dims.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from raysched.models import sharding
from raysched.models.networks import Denoiser, build_network
from raysched.training.optimizer_state import optimizer_tensors, restore_optimizer
from raysched.training.setup import Run

GROUPS = ("model", "ema", "optimizer")


@dataclass(frozen=True)
class Piece:
    """This rank's rows of a tensor.

    Attributes:
        tensor: (n, D…), not copied, on whatever device it lives; n may be 0.
        offset: its first row within the whole tensor.
        shape: (N, D…) of the whole. What every rank has whole (numbers, buffers, everything of a
            replicated run) has offset 0 and its own shape.
    """

    tensor: Tensor
    offset: int
    shape: tuple[int, ...]


def is_sharded(run: Run) -> bool:
    """Whether the ranks hold different rows, so that each must save its own."""
    return sharding.is_sharded(run.policy)


def local_state(run: Run) -> dict[str, dict[str, Piece]]:
    """What this rank holds of the `model`, `ema` and `optimizer`, by name; nothing is gathered."""
    model = run.policy.state_dict()
    moments = optimizer_tensors(run.optimizer.optimizer, run.parameter_names)
    return {
        "model": {name: _piece(tensor, tensor) for name, tensor in model.items()},
        "ema": {name: _piece(t, model.get(name, t)) for name, t in run.ema.state_dict().items()},
        "optimizer": {
            name: _piece(tensor, _like_parameter(tensor, model[name.rsplit("/", 1)[0]]))
            for name, tensor in moments.items()
        },
    }


@torch.no_grad()
def load_state(run: Run, full: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Take over whole tensors; every rank keeps its rows.

    Args:
        run: this rank's run.
        full: `model`, `ema` and `optimizer`, named as in `local_state`, on the CPU.

    Raises:
        RuntimeError, KeyError: the tensors are not those of this network.
    """
    model = run.policy.state_dict()
    if not is_sharded(run):
        run.policy.load_state_dict(dict(full["model"]))
    else:
        if model.keys() != full["model"].keys():
            raise KeyError(f"weights differ: {sorted(model.keys() ^ full['model'].keys())}")
        for name, tensor in model.items():
            sharding.local(tensor).copy_(sharding.rows_like(full["model"][name], tensor))
    run.ema.load_state_dict(
        {name: sharding.rows_like(t, model.get(name, t)) for name, t in full["ema"].items()}
    )
    restore_optimizer(run.optimizer.optimizer, run.parameter_names, dict(full["optimizer"]))


def whole_weights(run: Run) -> dict[str, Tensor]:
    """The online weights as one process would have them; all ranks must call it together."""
    return sharding.whole_state(run.policy)


@contextmanager
def averaged(run: Run) -> Iterator[Denoiser]:
    """A whole network with the EMA weights, on every rank; all ranks must enter together.

    Replicated it is the policy itself, which has its own weights again after the `with`; so is
    `run.replay`. Sharded it is a copy of the whole network for as long as the `with` lasts.
    """
    if not is_sharded(run):
        with run.ema.applied(run.policy):
            yield run.policy
        return
    model, data = run.policy.state_dict(), run.dataset
    network = build_network(
        run.config.model, data.channels, data.image_size, data.num_classes, seed=run.config.seed
    ).to(run.device)
    with torch.no_grad():
        for name, target in network.state_dict().items():
            target.copy_(sharding.gathered(run.ema.weights()[name], model[name]))
    yield network.requires_grad_(False)


def _piece(tensor: Tensor, like: Tensor) -> Piece:
    return Piece(sharding.local(tensor.detach()), sharding.first_row(like), tuple(like.shape))


def _like_parameter(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The parameter if the optimizer's entry has its rows, else (a count) the entry itself."""
    return parameter if tensor.shape == sharding.local(parameter).shape else tensor
