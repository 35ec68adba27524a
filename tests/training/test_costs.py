"""Where the time of a run goes: shares, speed, utilisation."""

from __future__ import annotations

import pytest
import torch

from raysched.diffusion.compute import ComputeMeter, forward_flops
from raysched.training.costs import SHARES, Costs, is_timing, sample_flops
from raysched.training.peaks import PEAKS, known_peak
from raysched.training.run_folder import read_metrics
from raysched.training.setup import build_run
from tests.training.runs import rollout_config, run_loop, small_config


def test_the_shares_of_the_wall_time_make_one_in_every_point_and_in_the_result(tmp_path):
    config = rollout_config(evaluation__enabled=True, scaling__peak_tflops=0.01)
    result = run_loop(config, tmp_path)
    points = [p["metrics"] for p in read_metrics(tmp_path) if "train/loss" in p["metrics"]]
    assert len(points) == 12
    found = [{k.removeprefix("compute/"): v for k, v in p.items()} for p in points]
    for numbers in (*found, result.compute):
        shares = [numbers[f"share_{name}"] for name in (*SHARES, "other")]
        assert min(shares) >= 0.0
        assert sum(shares) == pytest.approx(1.0, abs=1e-6)
        assert numbers["fe_per_second"] > numbers["samples_per_second"] > 0
        assert 0 < numbers["mfu"] < 1
        assert "rank_spread" not in numbers
    for name in ("rollout", "forward", "backward", "optimizer", "data", "evaluation"):
        assert result.compute[f"share_{name}"] > 0, name


def test_a_device_without_a_known_peak_has_no_utilisation(tmp_path):
    assert "mfu" not in run_loop(small_config(training__budget__steps=1), tmp_path).compute


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_of_training_time_and_what_no_timer_covers_is_other(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    run = build_run(small_config(scaling__peak_tflops=1e-6))
    costs = Costs(run)
    run.step = 5
    run.meter.gradient(40)
    for phase, seconds in {"forward": 1.0, "backward": 2.0, "evaluation": 4.0}.items():
        with run.meter.timed(phase):
            clock.now += seconds
    clock.now += 3.0
    found = costs.window()
    assert found["fe_per_second"] == pytest.approx(120 / 6)
    assert found["samples_per_second"] == pytest.approx(40 / 6)
    assert found["share_forward"] == pytest.approx(0.1)
    assert found["share_evaluation"] == pytest.approx(0.4)
    assert found["share_other"] == pytest.approx(0.3)
    assert found["mfu"] == pytest.approx(120 / 6 * sample_flops(run) / 1e6)
    clock.now += 1.0
    assert costs.window()["share_other"] == pytest.approx(1.0)
    assert costs.total()["share_forward"] == pytest.approx(1 / 11)


def test_the_flops_of_a_sample_are_counted_without_the_weights():
    run = build_run(small_config())
    shape = (run.dataset.channels, run.dataset.image_size, run.dataset.image_size)
    assert sample_flops(run) == forward_flops(run.policy.eval(), shape)


def test_peaks_are_found_by_the_device_s_name():
    assert known_peak("NVIDIA H200", "bf16") == pytest.approx(989.4e12)
    assert known_peak("NVIDIA H100 PCIe", "bf16") == pytest.approx(756e12)
    assert known_peak("NVIDIA A100-SXM4-80GB", "tf32") == pytest.approx(156e12)
    assert known_peak("NVIDIA A10G", "bf16") is None
    assert known_peak("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16") is None
    assert known_peak("Tesla V100-SXM2-16GB", "bf16") is None
    assert known_peak("Tesla V100-SXM2-16GB", "fp16") == pytest.approx(125e12)
    assert len({pattern for pattern, *_ in PEAKS}) == len(PEAKS)


def test_what_depends_on_the_clock_is_told_from_what_does_not():
    timed = ["compute/fe_per_second", "compute/share_data", "compute/rollout_seconds"]
    assert all(is_timing(name) for name in [*timed, "compute/mfu", "compute/rank_spread"])
    fixed = ["compute/forward_equivalents", "compute/fraction", "train/loss", "quality/q"]
    assert not any(is_timing(name) for name in fixed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs cuda")
def test_cuda_phases_are_timed_on_the_device():
    device = torch.device("cuda")
    meter, a = ComputeMeter(device), torch.randn(4096, 4096, device=device)
    with meter.timed("training"), meter.timed("forward"):
        for _ in range(20):
            a @ a
    torch.cuda.synchronize()
    with meter.timed("backward"):
        torch.cuda._sleep(1)
    torch.cuda.synchronize()
    assert meter.seconds("forward") > 100 * 1e-6
    assert meter.seconds("training") >= meter.seconds("forward")
    assert meter.seconds("backward") < meter.seconds("forward")
