"""torch.compile: the same losses, the names of the plain module, and a compiler that is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from raysched.config.run import RunConfig
from raysched.errors import ConfigError
from raysched.models.networks import Denoiser
from raysched.training.setup import build_run
from raysched.training.train_step import train_step
from tests.training.runs import rollout_config


def tiny(**changes: Any) -> RunConfig:
    settings = {"model__block_out_channels": [4, 8], "training__gradient_accumulation": 2}
    return rollout_config(**{**settings, **changes})


def compile_by(monkeypatch: pytest.MonkeyPatch, backend: str | Callable[..., Any]) -> None:
    def compile_backbone(self: Denoiser, options: object) -> None:
        self.backbone.compile(backend=backend)
        self._is_compiled = True

    torch._dynamo.reset()
    monkeypatch.setattr(Denoiser, "compile_backbone", compile_backbone)


def test_weights_and_averages_have_the_names_of_the_plain_module(monkeypatch):
    compile_by(monkeypatch, "aot_eager")
    plain, compiled = (build_run(tiny(training__compile=on)) for on in (False, True))
    assert compiled.policy.backbone._compiled_call_impl is not None
    assert compiled.average.backbone._compiled_call_impl is not None
    assert compiled.replay is None
    assert compiled.policy.state_dict().keys() == plain.policy.state_dict().keys()
    assert compiled.ema.state_dict().keys() == plain.ema.state_dict().keys()
    assert compiled.parameter_names == plain.parameter_names


@pytest.mark.slow
def test_compiled_steps_and_rollouts_give_the_same_losses_without_compiling_again():
    torch._dynamo.reset()
    counters.clear()
    losses = {}
    for on in (False, True):
        run = build_run(tiny(training__compile=on))
        losses[on] = [train_step(run, step).loss for step in range(2)]
        graphs = counters["stats"]["unique_graphs"]
        losses[on] += [train_step(run, step).loss for step in range(2, 6)]
        assert counters["stats"]["unique_graphs"] - graphs <= 1
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)
    # Training, rollouts, and rollouts of a single row.
    assert 2 <= counters["stats"]["unique_graphs"] <= 3


def test_no_compiler_is_one_message_before_training():
    expected = pytest.raises(
        ConfigError, match=r"training.compile: .* C\+\+ compiler .* set train"
    )
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}), expected:
        build_run(tiny(training__compile=True))


def test_fsdp_refuses_to_compile():
    with pytest.raises(ConfigError, match=r"training.compile.* must be false with .* fsdp"):
        tiny(training__compile=True, scaling__strategy="fsdp", scaling__num_workers=2)


@pytest.mark.parametrize(
    "changes", [{"model__block_out_channels": [8, 16]}, {"model__kind": "dit"}]
)
def test_right_gradients_of_any_network_are_let_through(changes, monkeypatch):
    compile_by(monkeypatch, "aot_eager")
    run = build_run(tiny(training__compile=True, **changes))
    assert all(p.grad is None for p in run.policy.parameters())


@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_lost_gradients_are_refused_before_training(factor, monkeypatch):
    def losing(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., list[Tensor]]:
        return lambda *given: [out.detach() + factor * out for out in graph(*given)]

    compile_by(monkeypatch, losing)
    with pytest.raises(
        ConfigError, match=r"compiled gradient of backbone\S+ is off by (9|100|inf)"
    ):
        build_run(tiny(training__compile=True))
