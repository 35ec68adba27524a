"""Replayed forwards are the network, bit for bit, also after its weights have changed."""

from __future__ import annotations

import pytest
import torch

from raysched.config.run import ModelConfig
from raysched.models.ema import EMA
from raysched.models.networks import build_network
from raysched.models.tracing import trace_forward

MODELS = [{}, {"attention": True}, {"kind": "dit"}, {"class_conditional": False}, {"dropout": 0.3}]


def arguments(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "sample": torch.randn(count, 1, 8, 8, generator=generator),
        "timestep": 1000 * torch.rand(count, generator=generator),
        "class_labels": torch.randint(0, 11, (count,), generator=generator),
    }


@pytest.mark.parametrize("settings", MODELS, ids=str)
def test_a_replay_equals_the_network_for_any_batch_and_any_weights(settings):
    network = build_network(ModelConfig(**settings), 1, 8, 10, seed=0)
    traced = trace_forward(network, (1, 8, 8))
    assert traced is not None
    assert network.training
    network.eval()
    ema = EMA(network, 100.0)
    for _ in range(2):
        for count in (1, 3, 17):
            with torch.no_grad():
                expected = network(**arguments(count))
            assert torch.equal(traced(**arguments(count)), expected)
            many = {name: torch.cat([v, v]) for name, v in arguments(count).items()}
            made = traced.prepare((1, 8, 8), many["timestep"], many["class_labels"])
            assert {len(part) for part in made} == {2 * count}
            given = [part[count:] for part in made]
            garbage = torch.full((count,), torch.nan)
            inputs = {**arguments(count), "timestep": garbage}
            torch.testing.assert_close(traced(**inputs, given=given), expected)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.1)
    with ema.applied(network), torch.no_grad():
        assert torch.equal(traced(**arguments(3)), network(**arguments(3)))


def test_a_replay_has_no_gradient_and_draws_nothing():
    network = build_network(ModelConfig(dropout=0.5), 1, 8, 10, seed=0)
    state = torch.random.get_rng_state()
    traced = trace_forward(network, (1, 8, 8))
    assert traced is not None
    assert not traced(**arguments(2)).requires_grad
    assert torch.equal(torch.random.get_rng_state(), state)


def test_other_precisions_are_left_to_the_network():
    network = build_network(ModelConfig(), 1, 8, 10, seed=0).to(torch.float64)
    assert trace_forward(network, (1, 8, 8)) is None
