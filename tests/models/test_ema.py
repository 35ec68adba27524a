import math

import pytest
import torch
from torch import nn

from raysched.models.ema import EMA
from raysched.models.weights import load_weights, save_weights


def constant_model(value, dtype=torch.float32):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def test_after_one_half_life_half_of_the_old_average_is_left():
    ema = EMA(constant_model(1.0), half_life_samples=1000.0)
    ema.num_samples = 1_000_000  # far beyond the warm-up
    model = constant_model(0.0)
    for _ in range(10):
        ema.update(model, 100)
    for average in ema.weights().values():
        if average.is_floating_point() and average.shape == (3, 2):
            torch.testing.assert_close(average, torch.full((3, 2), 0.5), rtol=1e-5, atol=0)


def test_the_same_samples_in_other_batches_decay_alike():
    decays = []
    for batch in (10, 50, 100):
        ema = EMA(constant_model(1.0), half_life_samples=300.0)
        ema.num_samples = 10_000
        decays.append(math.prod(ema.decay(batch) for _ in range(600 // batch)))
    assert decays == pytest.approx([0.25] * 3, rel=1e-9)


def test_an_early_average_is_not_stuck_at_the_initial_weights():
    ema = EMA(constant_model(1.0), half_life_samples=1e9)
    share = 1.0
    for _ in range(20):
        share *= ema.decay(64)
        ema.update(constant_model(0.0), 64)
    assert share < 1e-6
    assert ema.weights()["0.weight"].abs().max() < 1e-6


def test_warm_up_ends_where_the_half_life_is_a_tenth_of_the_samples_seen():
    ema = EMA(constant_model(1.0), half_life_samples=100.0)
    ema.num_samples = 990
    assert ema.decay(10) == pytest.approx(0.5 ** (10 / 100))
    ema.num_samples = 490
    assert ema.decay(10) == pytest.approx(0.5 ** (10 / 50))


def test_the_average_is_fp32_even_of_a_bf16_model():
    ema = EMA(constant_model(1.0, torch.bfloat16), half_life_samples=1e4)
    ema.num_samples = 10**9
    ema.update(constant_model(0.0, torch.bfloat16), 1)
    average = ema.weights()["0.weight"]
    assert average.dtype == torch.float32
    # bf16 would have rounded this back to 1.
    torch.testing.assert_close(average, torch.full((3, 2), 0.5**1e-4), rtol=1e-6, atol=0)


def test_buffers_are_copied_and_not_averaged():
    model = constant_model(1.0)
    ema = EMA(model, half_life_samples=1e9)
    model(torch.randn(5, 2, generator=torch.Generator().manual_seed(0)))
    ema.update(model, 5)
    state = ema.weights()
    assert torch.equal(state["1.running_mean"], model[1].running_mean)
    assert int(state["1.num_batches_tracked"]) == 1


def test_applied_lends_the_averaged_weights_and_gives_back_even_after_an_error():
    model = constant_model(1.0)
    ema = EMA(model, half_life_samples=100.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    seen = []

    def fail_inside():
        with ema.applied(model):
            seen.append(model[0].weight.detach().clone())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert (seen[0] == 1.0).all()
    assert (model[0].weight == 3.0).all()
    assert model[0].weight.requires_grad


def test_copy_to_writes_every_weight_for_good():
    ema, model = EMA(constant_model(1.0), 100.0), constant_model(3.0)
    ema.copy_to(model)
    assert all((parameter == 1.0).all() for parameter in model.parameters())


def test_a_state_survives_a_file_and_continues_bit_for_bit(tmp_path):
    straight = EMA(constant_model(1.0), half_life_samples=500.0)
    for value in (0.3, 0.7):
        straight.update(constant_model(value), 64)
    save_weights(tmp_path / "ema.safetensors", straight.state_dict())
    resumed = EMA(constant_model(9.0), half_life_samples=500.0)
    resumed.load_state_dict(load_weights(tmp_path / "ema.safetensors"))
    assert resumed.num_samples == 128
    for ema in (straight, resumed):
        ema.update(constant_model(0.1), 64)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)


def test_a_state_of_another_network_is_refused():
    ema = EMA(constant_model(1.0), 100.0)
    state = ema.state_dict()
    del state["0.bias"]
    with pytest.raises(KeyError, match=r"0\.bias"):
        ema.load_state_dict(state)


def test_an_update_of_no_samples_changes_nothing():
    ema = EMA(constant_model(1.0), 100.0)
    ema.update(constant_model(0.0), 0)
    assert (ema.weights()["0.weight"] == 1.0).all()
    assert ema.num_samples == 0
