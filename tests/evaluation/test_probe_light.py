"""The small probe during training: bounded, counted as evaluation, and without side effects."""

import json
from pathlib import Path

import pytest
import torch

from raysched.diffusion.compute import ComputeMeter
from raysched.diffusion.schedules import NoiseSchedule
from raysched.evaluation.probe_light import (
    FORWARDS_PER_SAMPLE,
    MAX_SAMPLES,
    affordable_samples,
    light_probe,
)
from tests.evaluation.oracles import striped_classes
from tests.evaluation.test_probe import exact_velocity
from tests.training.runs import run_loop, small_config

# 12 steps of 8 samples cost 288 FE; a probe at every 96 may take 0.5 · 96 = 48 forwards ...
TOO_FEW = {"evaluation__probe_every_forward_equivalents": 96.0, "evaluation__probe_share": 0.5}
# ... and at every 144 with the whole share 144: nine samples of 16 forwards.
ENOUGH = {"evaluation__probe_every_forward_equivalents": 144.0, "evaluation__probe_share": 1.0}
ON = {"evaluation__enabled": True, "evaluation__every_forward_equivalents": 1e6}


def points(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    flat = [{**point, **point.get("metrics", {})} for point in found]
    return [p for p in flat if any(key.startswith("exposure/") for key in p)]


def test_the_samples_follow_the_forwards_that_may_be_spent():
    assert affordable_samples(10 * FORWARDS_PER_SAMPLE + 3, 100) == 10
    assert affordable_samples(10 * FORWARDS_PER_SAMPLE - 1, 100) == 9
    assert affordable_samples(1e9, 1000) == MAX_SAMPLES
    assert affordable_samples(1e9, 12) == 12
    assert affordable_samples(7 * FORWARDS_PER_SAMPLE, 100) == 0


def test_a_small_probe_spends_what_it_says_and_sees_a_large_bias():
    dataset, config = striped_classes(num_per_class=100), small_config()
    schedule = NoiseSchedule.from_config(config.noise_schedule)
    found = []
    for bias in (0.0, 2.0):
        meter = ComputeMeter()
        found.append(
            light_probe(
                exact_velocity(bias),
                config=config,
                dataset=dataset,
                schedule=schedule,
                num_samples=40,
                meter=meter,
            )
        )
        assert meter.evaluation == 40 * FORWARDS_PER_SAMPLE
        assert meter.forward_equivalents == 0
    exact, biased = found
    names = {f"exposure/energy/t_{t}" for t in ("0.75", "0.50", "0.25", "0.00")}
    assert {key for key in exact if "energy" in key} == names
    # Planted at t = 0.5: what lies before it is the same, what lies behind it is not.
    assert exact["exposure/energy/t_0.75"] == biased["exposure/energy/t_0.75"]
    assert exact["exposure/energy/t_0.50"] == biased["exposure/energy/t_0.50"]
    assert biased["exposure/energy/t_0.25"] > exact["exposure/energy/t_0.25"] + 0.1
    for k in (1, 2):
        assert biased[f"exposure/drift/k_{k}"] > exact[f"exposure/drift/k_{k}"]
        assert biased[f"exposure/drift_floor/k_{k}"] == exact[f"exposure/drift_floor/k_{k}"] > 0


def test_a_run_logs_probes_within_their_share_and_trains_the_same_weights(tmp_path: Path):
    plain = run_loop(small_config(**ON), tmp_path / "plain")
    probed = run_loop(small_config(**ON, **ENOUGH), tmp_path / "probed")
    assert probed.weights_sha256 == plain.weights_sha256
    found = points(tmp_path / "probed")
    assert [point["step"] for point in found] == [6, 12]
    assert all(point["exposure/num_samples"] == 9 for point in found)
    extra = probed.compute["evaluation"] - plain.compute["evaluation"]
    assert extra == 2 * 9 * FORWARDS_PER_SAMPLE
    assert extra <= probed.compute["forward_equivalents"]
    assert probed.compute["forward_equivalents"] == plain.compute["forward_equivalents"]
    assert points(tmp_path / "plain") == []


def test_a_share_that_pays_for_no_probe_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run_loop(small_config(**ON, **TOO_FEW), tmp_path / "run")
    told = [r.getMessage() for r in caplog.records if "probe_every" in r.getMessage()]
    assert len(told) == 1
    assert "pays for 48 forwards" in told[0]
    assert points(tmp_path / "run") == []


def test_the_probe_leaves_torch_s_generator_alone():
    config, dataset = small_config(), striped_classes()
    before = torch.random.get_rng_state()
    light_probe(
        exact_velocity(),
        config=config,
        dataset=dataset,
        schedule=NoiseSchedule.from_config(config.noise_schedule),
        num_samples=8,
    )
    assert torch.equal(before, torch.random.get_rng_state())
