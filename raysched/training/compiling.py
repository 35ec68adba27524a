"""torch.compile of a run's network: whether this machine can, and how.

The backbone is compiled in place, so that gradient steps, rollouts and DDP's wrapper call the
same compiled code, and checkpoints name the weights of the plain module.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch

from raysched.errors import ConfigError
from raysched.models.networks import Denoiser

# One code object serves training and rollouts, with and without gradient, one row and many, and
# the averaged twin. Past the limit torch would go on uncompiled.
RECOMPILE_LIMIT = 64


def compile_network(network: Denoiser, device: torch.device) -> None:
    """Compile a network in place; it happens at the first calls, and takes up to minutes.

    Args:
        network: its weights and their names stay as they are.
        device: where it lives.

    Raises:
        ConfigError: this machine lacks what the compiler calls.
    """
    check_compiler(device)
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    network.compile_backbone()


def check_compiler(device: torch.device) -> None:
    """Find out before training whether generated code can be built for a device.

    Raises:
        ConfigError: no C++ compiler, no Python headers, or no Triton.
    """
    missing = _missing_for_gpu() if device.type == "cuda" else _missing_for_cpu()
    if missing:
        raise ConfigError(
            f"training.compile: torch.compile needs {missing} on the machines of the workers; "
            "install it, or set training.compile: false"
        )


def _missing_for_gpu() -> str | None:
    from torch.utils._triton import has_triton

    return None if has_triton() else "Triton and a GPU that it supports"


def _missing_for_cpu() -> str | None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler (g++, or the one that the variable CXX names)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's C headers (the package python3-dev or the like)"
    return None
