"""Schedules along u, training times, and the compute meter."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from raysched.config.run import NoiseScheduleConfig, ScheduleKind
from raysched.diffusion.compute import ComputeMeter, forward_flops
from raysched.diffusion.schedules import NoiseSchedule


def schedule_of(kind: str, **options: Any) -> NoiseSchedule:
    return NoiseSchedule.from_config(NoiseScheduleConfig(kind=kind, **options))


@pytest.mark.parametrize("kind", get_args(ScheduleKind))
def test_the_path_is_clean_at_zero_and_ever_noisier(kind: str) -> None:
    schedule = schedule_of(kind)
    alpha, sigma = schedule.alpha_sigma(torch.arange(1001, dtype=torch.float64) / 1000)
    assert (float(alpha[0]), float(sigma[0])) == (1.0, 0.0)
    assert alpha.dtype == torch.float64
    assert bool((torch.diff(sigma / alpha.clamp_min(1e-12)) > 0).all())
    power = alpha + sigma if kind == "flow" else alpha**2 + sigma**2
    torch.testing.assert_close(power, torch.ones_like(power))


def test_the_network_gets_the_index_or_a_thousand_times_t() -> None:
    assert schedule_of("linear").model_time(torch.tensor([0.001, 0.5, 1.0])).tolist() == [
        0,
        499,
        999,
    ]
    shifted = schedule_of("flow", shift=3.0).model_time(torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(shifted, torch.tensor([750.0, 1000.0], dtype=torch.float64))


def test_indices_survive_the_way_through_u_for_any_number_of_timesteps() -> None:
    for count in (2, 7, 1000, 100_000):
        schedule = schedule_of("linear", num_train_timesteps=count)
        index = torch.arange(0, count, max(count // 500, 1))
        assert torch.equal(schedule.index((index + 1).double() / count), index)


def test_uniform_training_times_cover_every_index_equally() -> None:
    schedule = schedule_of("cosine", num_train_timesteps=50)
    r = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    counts = torch.bincount(schedule.index(schedule.training_u(r)), minlength=50)
    assert counts.tolist() == [100] * 50
    assert torch.equal(schedule_of("flow").training_u(r), r)


def test_logit_normal_times_have_their_median_in_the_middle_and_thin_ends() -> None:
    r = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    u = schedule_of("flow", timestep_sampling="logit_normal").training_u(r)
    assert abs(float(u.median()) - 0.5) < 1e-3
    # P(u < 0.1) = Phi(logit(0.1)) = Phi(-2.197) = 0.0140
    assert abs(float((u < 0.1).double().mean()) - 0.0140) < 5e-4


def test_fractional_indices_invert_the_noise_ratio() -> None:
    schedule = schedule_of("scaled_linear")
    ratio = schedule.table[1][1:] / schedule.table[0][1:]
    index = schedule.index_at_ratio(ratio)
    torch.testing.assert_close(index, torch.arange(1000, dtype=torch.float64), rtol=0, atol=1e-6)
    middle = (ratio[10] * ratio[11]).sqrt()[None]
    torch.testing.assert_close(schedule.index_at_ratio(middle), torch.tensor([10.5]).double())


def test_the_meter_keeps_evaluation_out_of_the_budget_and_survives_a_checkpoint() -> None:
    meter = ComputeMeter()
    meter.forward("rollout", 10)
    meter.forward("evaluation", 1000)
    meter.gradient(4)
    meter.add_seconds("rollout", 1.5)
    with meter.timed("training"):
        pass
    assert (meter.rollout, meter.training, meter.evaluation) == (10, 12, 1000)
    assert meter.forward_equivalents == 22
    restored = ComputeMeter()
    restored.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    assert restored.summary() == meter.summary()
    assert restored.seconds("rollout") == 1.5


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 5, bias=False)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return self.linear(sample.flatten(1))


def test_flops_of_a_forward_are_those_of_its_products() -> None:
    assert forward_flops(OneLayer(), (3, 2, 2)) == 2 * 12 * 5
