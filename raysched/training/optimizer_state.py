"""The optimizer's state under the parameters' names, and back.

`<parameter name>/<entry>` -> tensor, so that it fits a safetensors file and does not depend on
the order of the parameters. Of a sharded parameter's moments every rank has its own rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raysched.models.sharding import local, rows_like, spread_like


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimizer's state on the CPU; of sharded parameters this rank's rows.

    Args:
        optimizer: the optimizer itself, without accelerate's wrapper.
        names: of the parameters, in the optimizer's order.
    """
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{entry}": local(torch.as_tensor(value)).detach().cpu()
        for index, entries in state.items()
        for entry, value in entries.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]
) -> None:
    """Put whole tensors back; the parameter groups stay those of the config.

    Args:
        optimizer: the optimizer itself, without accelerate's wrapper.
        names: of the parameters, in the optimizer's order.
        tensors: named as by `optimizer_tensors`; every rank keeps its own rows of them.
    """
    index_of = {name: index for index, name in enumerate(names)}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, entry = key.rsplit("/", 1)
        parameter = parameters[index_of[name]]
        if value.shape == parameter.shape:  # the step count is a number, the same on all ranks
            value = spread_like(rows_like(value, parameter).clone(), parameter)
        state.setdefault(index_of[name], {})[entry] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
