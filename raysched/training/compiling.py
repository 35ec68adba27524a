"""torch.compile of a run's network: whether this machine can, how, and whether it does it right.

The backbone is compiled in place, so that gradient steps, rollouts and DDP's wrapper call the
same compiled code, and checkpoints name the weights of the plain module. Generated code is not
taken on trust: inductor has been seen to lose the gradients of whole blocks of a UNet without a
word, so a run's compiled gradients are compared with the eager ones before it trains.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from raysched.errors import ConfigError
from raysched.models.networks import Denoiser

# One code object serves training and rollouts, with and without gradient, one row and many, and
# the averaged twin. Past the limit torch would go on uncompiled.
RECOMPILE_LIMIT = 64
# With torch 2.13 on the CPU inductor's change to channels-last convolutions loses the gradients of
# every UNet block below the first resolution.
CPU_OPTIONS = {"layout_optimization": False}
# Of a parameter's gradient, between compiled and eager code; rounding is far below, a lost
# gradient is 1.
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.2, torch.float16: 0.2}


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
    network.compile_backbone(CPU_OPTIONS if device.type == "cpu" else None)


def check_gradients(
    network: nn.Module,
    inputs: Mapping[str, Tensor],
    autocast: Callable[[], AbstractContextManager[None]],
    precision: torch.dtype,
) -> None:
    """Compare compiled gradients with eager ones; it compiles what training will call.

    Args:
        network: compiled, in DDP's wrapper if there is one; all ranks must call it together.
        inputs: of a forward, as training gives them.
        autocast: the run's precision, entered around each forward.
        precision: that it computes in.

    Raises:
        ConfigError: they differ.
    """
    was_training = network.training
    eager: dict[str, Tensor] = {}
    compiled: dict[str, Tensor] = {}
    # Dropout would draw differently in generated code.
    network.train(not any(m.p for m in network.modules() if isinstance(m, nn.Dropout)))
    for stance, found in (("force_eager", eager), ("default", compiled)):
        with torch.compiler.set_stance(stance), autocast():
            prediction = network(**inputs)
        (prediction.float() - inputs["sample"]).square().mean().backward()
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                given = parameter.grad
                found[name] = torch.zeros_like(parameter) if given is None else given.float()
                parameter.grad = None
    network.train(was_training)
    # A gradient that is nothing beside the others' is all rounding.
    whole = torch.stack([gradient.norm() for gradient in eager.values()]).norm()
    errors = {n: (compiled[n] - g).norm() / (g.norm() + 1e-3 * whole) for n, g in eager.items()}
    # NaN compares with nothing: it must not hide behind a number.
    error, name = max((float(e.nan_to_num(nan=math.inf)), n) for n, e in errors.items())
    if error > TOLERANCE[precision]:
        raise ConfigError(
            f"training.compile: the compiled gradient of {name} is off by {error:.1%} of "
            "the eager one: this torch's compiler does not fit the network; set training.compile: "
            "false"
        )


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
