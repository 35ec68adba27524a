"""The loop on a CUDA device: every method, precisions, resume, memory that really runs out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raysched.distributed.launch import run_training
from raysched.training.run_folder import open_run_folder, read_metrics
from tests.training.runs import ignore_report, rollout_config, run_loop
from tests.training.test_resume import StopAt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs cuda"),
]
SS = "scheduled_sampling__"
OPTIONS: dict[str, dict[str, Any]] = {
    "rollouts": {},
    "accumulation": {"training__gradient_accumulation": 2},
    "guidance, ancestral": {
        f"{SS}guidance_scale": 2.0,
        f"{SS}ancestral": True,
        f"{SS}sampler": "euler",
        "model__label_dropout": 0.2,
    },
    "every state": {f"{SS}reuse": "all", f"{SS}reflexflow": False},
    "posterior mean": {f"{SS}target": "posterior_mean"},
    "average as policy": {f"{SS}policy": "ema"},
    "padding": {f"{SS}bucket": 4},
    "jump with gradient": {f"{SS}grid": "jump", f"{SS}jump_gradient": True},
    "rk4 on DDPM": {"prediction_type": "epsilon", f"{SS}sampler": "rk4"},
    **{
        name: {"exposure": name}
        for name in ("none", "input_perturbation", "self_correction", "defar", "mixflow")
    },
    "dream": {"exposure": "dream", "prediction_type": "epsilon"},
}


def on_gpu(**changes: Any) -> Any:
    return rollout_config(**{"training__device": "cuda", **changes})


def losses(folder: Path) -> list[float]:
    return [point["metrics"]["train/loss"] for point in read_metrics(folder)]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_device_computes_what_the_cpu_computes(name: str, tmp_path: Path) -> None:
    results = {}
    for device in ("cpu", "cuda"):
        config = on_gpu(**OPTIONS[name], training__device=device, training__budget__steps=6)
        results[device] = run_loop(config, tmp_path / device)
    # Draws are made on the CPU: the same rollouts, the same compute, the same losses.
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-2)
    cpu, cuda = (results[device].compute for device in ("cpu", "cuda"))
    for key in ("forward_equivalents", "rollout", "training", "steps"):
        assert cuda[key] == cpu[key]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(precision: str, tmp_path: Path) -> None:
    # fp16's loss scale begins too high and skips steps until it fits: 12 steps are too few to
    # compare curves, but not to see that the weights move and the losses are numbers.
    exact = run_loop(on_gpu(), tmp_path / "fp32")
    half = run_loop(on_gpu(training__precision=precision), tmp_path / precision)
    assert half.status == exact.status == "finished"
    mine, theirs = (losses(tmp_path / name) for name in (precision, "fp32"))
    compared = len(theirs) if precision == "bf16" else 1
    assert mine[:compared] == pytest.approx(theirs[:compared], rel=0.1)
    assert all(map(math.isfinite, mine))
    unmoved = run_loop(
        on_gpu(training__precision=precision, optimizer__learning_rate=1e-12), tmp_path / "still"
    )
    assert half.weights_sha256 != unmoved.weights_sha256
    assert mine[-1] != pytest.approx(losses(tmp_path / "still")[-1], rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_stopped_run_goes_on(precision: str, tmp_path: Path) -> None:
    changes = {"training__precision": precision, "training__checkpoint_every_steps": 3}
    run_loop(on_gpu(**changes), tmp_path / "straight")
    stop = StopAt(tmp_path / "parts", 7)
    assert run_loop(on_gpu(**changes), tmp_path / "parts", tracker=stop).status == "stopped"
    run_loop(on_gpu(**changes), tmp_path / "parts")
    mine, theirs = (losses(tmp_path / name) for name in ("parts", "straight"))
    # cuDNN's backward adds in no fixed order.
    assert mine == pytest.approx(theirs, rel=2e-2 if precision != "fp32" else 1e-3)


def test_a_compiled_network_trains_like_a_plain_one(tmp_path: Path) -> None:
    one_resolution = {"model__block_out_channels": [16]}
    plain = run_loop(on_gpu(**one_resolution), tmp_path / "plain")
    compiled = run_loop(on_gpu(**one_resolution, training__compile=True), tmp_path / "compiled")
    assert compiled.compute["forward_equivalents"] == plain.compute["forward_equivalents"]
    expected = losses(tmp_path / "plain")
    assert losses(tmp_path / "compiled") == pytest.approx(expected, rel=5e-3)


def test_evaluation_and_export_leave_what_a_cpu_can_load(tmp_path: Path) -> None:
    config = on_gpu(evaluation__enabled=True, training__precision="bf16")
    result = run_loop(config, tmp_path / "run")
    assert math.isfinite(result.metrics["quality/q"])
    assert 0 < result.compute["share_evaluation"] < 1
    (weights,) = (tmp_path / "run" / "pipeline").rglob("*.safetensors")
    tensors = load_file(weights)
    assert {t.device.type for t in tensors.values()} == {"cpu"}
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_memory_that_really_runs_out_is_met_by_smaller_micro_batches(tmp_path: Path) -> None:
    config = on_gpu(
        training__batch_size=512,
        training__budget__steps=3,
        model__block_out_channels=[64, 128],
        scaling__retry_out_of_memory=True,
    )
    straight = run_loop(config, tmp_path / "straight")
    needed = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.7 * needed / total)
    try:
        open_run_folder(config, tmp_path / "run", resume=False)
        result = run_training(config, run_dir=tmp_path / "run", report=ignore_report)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.status == "finished"
    assert any("went on at" in note for note in result.notes)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "straight"), rel=2e-3)
    assert result.compute["forward_equivalents"] == straight.compute["forward_equivalents"]


def test_utilisation_is_known_on_known_devices(tmp_path: Path) -> None:
    run_loop(on_gpu(scaling__peak_tflops=10.0), tmp_path)
    point = read_metrics(tmp_path)[-1]["metrics"]
    assert 0 < point["compute/mfu"] < 1
    assert point["compute/share_rollout"] > 0
