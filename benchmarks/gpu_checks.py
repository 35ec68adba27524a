"""What only a CUDA device can show; prints one JSON object, and needs neither Ray nor MLflow.

  synchronisation  calls that make the host wait: within the calls of a rollout (an error there
                   is a failure), while its calls are planned, and in a whole training step
  bf16             self-made latents of a network in bf16 against the fp32 engine's, over the
                   engine's move, at k = 10; beside it a loop whose state is bf16
  engine           `rollout_engine.py` on the device: planning and rollout over full batches
  step             `training_step.py` on the device: a step with rollouts over its parts
  training         the digits by the loop, in fp32 and bf16, and a resume from the checkpoint in
                   the middle: losses and weights against the run that went straight on
  compile          training.compile, whose gradients are compared with the eager ones first:
                   seconds until that is done, and a step's time over the eager step's

The aims of engine and step are for two CPU cores. A small network on a GPU is bound by kernel
launches, whatever its rows: max k calls then cost max k/mean k times what full batches do.

    python benchmarks/gpu_checks.py > gpu.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rollout_engine
import torch
import training_step
from torch import Tensor

from raysched.config.loading import load, load_mapping
from raysched.config.run import RunConfig
from raysched.diffusion import rollout as rollout_module
from raysched.diffusion.curriculum import plan_from_steps
from raysched.diffusion.parameterization import add_noise, broadcast
from raysched.diffusion.rollout import plan_calls, rollout
from raysched.errors import ConfigError
from raysched.training import exposure
from raysched.training.loop import train_loop
from raysched.training.protocols import NullTracker
from raysched.training.run_folder import holds_run, open_run_folder
from raysched.training.setup import Run, build_run
from raysched.training.train_step import train_step

DIGITS = Path(__file__).parents[1] / "configs" / "digits_flow.yaml"
LOCAL = ["scaling.num_workers=0", "tracking.enabled=false", "training.device=cuda"]
ROLLOUTS: dict[str, dict[str, Any]] = {
    "unipc": {},
    "unipc_reflexflow_reuse": {"reflexflow": True, "reuse": "all"},
    "euler_guided": {"sampler": "euler", "guidance_scale": 2.0},
    "rk4": {"sampler": "rk4"},
    "ancestral": {"sampler": "euler", "ancestral": True},
    "bucket_8": {"bucket": 8},
}


def make_run(
    rollouts: dict[str, Any], model: dict[str, Any] | None = None, **training: Any
) -> Run:
    """A run on the digits with rollouts of up to ten steps for every sample."""
    defaults = {"max_step_offset": 10, "probability": 1.0, "reflexflow": False}
    config = {
        "scheduled_sampling": {**defaults, **rollouts},
        "training": {"batch_size": 64, "device": "cuda", **training},
        "scaling": {"num_workers": 0},
        "tracking": {"enabled": False},
        "model": model or {},
    }
    return build_run(load_mapping(config, "gpu_checks").config)


@contextmanager
def sync_mode(mode: str) -> Iterator[None]:
    """Warn of, or raise at, whatever makes the host wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def count_syncs(work: Callable[[], Any]) -> int:
    """How often a piece of work waits for the device."""
    with warnings.catch_warnings(record=True) as caught, sync_mode("warn"):
        warnings.simplefilter("always")
        work()
    return sum("synchroniz" in str(warning.message) for warning in caught)


def synchronisation() -> dict[str, Any]:
    """Host waits, per kind of rollout."""
    rows: dict[str, Any] = {}
    run_calls, make_calls = rollout_module._run, exposure.plan_rollout
    for precision in ("fp32", "bf16"):
        for name, settings in ROLLOUTS.items():
            run = make_run(settings, precision=precision)
            for step in range(3):  # allocations, lazy initialisation
                train_step(run, step)
            planned: list[int] = []

            def strictly(*args: Any) -> Any:
                with sync_mode("error"):
                    return run_calls(*args)

            def counted(*args: Any, planned: list[int] = planned, **kwargs: Any) -> Any:
                made: list[Any] = []
                planned.append(count_syncs(lambda: made.append(make_calls(*args, **kwargs))))
                return made[0]

            row: dict[str, Any] = {"whole_step": count_syncs(lambda r=run: train_step(r, 3))}
            rollout_module._run, exposure.plan_rollout = strictly, counted
            try:
                train_step(run, 4)
                row["within_calls"] = 0
            except RuntimeError as error:
                row["within_calls"] = str(error).splitlines()[0]
            finally:
                rollout_module._run, exposure.plan_rollout = run_calls, make_calls
            row["planning"] = planned[0] if planned else None
            rows[f"{name}_{precision}"] = row
    passed = all(
        row["within_calls"] == 0 and row["planning"] is not None and row["planning"] <= 1
        for row in rows.values()
    )
    return {"rows": rows, "passed": passed}


def bf16() -> dict[str, Any]:
    """Error of x_hat over the fp32 engine's move, k = 10 on the grid of 1000."""
    fp32 = make_run({}, precision="fp32")
    for step in range(200):
        train_step(fp32, step)
    half = make_run({}, precision="bf16")
    half.policy.load_state_dict(fp32.policy.state_dict())
    count, size = 256, fp32.dataset.image_size
    rows = torch.as_tensor(fp32.dataset.train_indices[:count])
    x0 = fp32.dataset.images_at(rows).to(fp32.device)
    labels = fp32.dataset.labels_at(rows).to(fp32.device)
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(count, 1, size, size, generator=generator).to(fp32.device)
    target_u = torch.linspace(0.01, 0.98, count, dtype=torch.float64)
    plan = plan_from_steps(fp32.schedule, target_u, torch.full((count,), 10), 1000)
    source = add_noise(x0, eps, *fp32.schedule.alpha_sigma(plan.source_u))
    made = {}
    for name, run in (("fp32", fp32), ("bf16", half)):
        run.policy.eval()

        def network(*, sample: Tensor, timestep: Tensor, lanes: Tensor, run: Run = run) -> Tensor:
            return run.predict(sample, timestep, labels[lanes])

        calls = plan_calls(
            plan,
            run.schedule,
            solver="unipc",
            prediction_type="flow_matching",
            capacity=64,
            device=run.device,
        )
        made[name] = rollout(network, source, calls).x_hat
    state, move = source.bfloat16(), made["fp32"] - source
    with torch.no_grad():
        for j in range(10):  # a loop that keeps its state in the network's precision
            here, there = plan.nodes_u[:, j], plan.nodes_u[:, j + 1]
            times = (1000 * here).to(half.device, torch.float32)
            v = half.predict(state, times, labels)
            state = (state + broadcast(there - here, state) * v).bfloat16()
    size_of_move = float(move.norm())
    relative = float((made["bf16"] - made["fp32"]).norm()) / size_of_move
    lost = float((state.float() - made["fp32"]).norm()) / size_of_move
    return {"engine": relative, "bf16_state": lost, "passed": relative <= 0.02}


def engine() -> dict[str, Any]:
    """The engine over full batches, on the device."""
    options = argparse.Namespace(
        device="cuda", batch=64, max_step_offset=10, sampler="unipc", repeats=5
    )
    return {
        "rows": [
            rollout_engine.measure(model, options, accumulation)
            for model in rollout_engine.MODELS
            for accumulation in (1, 4)
        ]
    }


def step() -> dict[str, Any]:
    """A whole training step over its parts, the demo's network and a wider one."""
    rows = []
    for name, model in (("demo", {}), ("wide", {"block_out_channels": [256, 512]})):
        options = argparse.Namespace(batch=64, max_step_offset=10, repeats=10, model=model)
        rows += [{**training_step.measure(options, a), "model": name} for a in (1, 4)]
    return {"rows": rows}


def digits(precision: str, *settings: str) -> RunConfig:
    """The shipped config for the digits, 100 steps without evaluation."""
    return load(
        DIGITS,
        [
            *LOCAL,
            f"training.precision={precision}",
            "training.budget.forward_equivalents=null",
            "training.budget.steps=100",
            "training.checkpoint_every_steps=50",
            "training.log_every_steps=1",
            "evaluation.enabled=false",
            *settings,
        ],
    ).config


def training() -> dict[str, Any]:
    """The loop in fp32 and bf16, straight on and resumed in the middle."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "bf16"):
            straight, resumed = Path(folder, precision), Path(folder, precision + "-resumed")
            start = time.perf_counter()
            whole = _trained(digits(precision), straight)
            seconds = time.perf_counter() - start
            # As if it had been killed after its checkpoint at step 50.
            shutil.copytree(straight, resumed)
            shutil.rmtree(resumed / "checkpoints" / "step-00000100")
            (resumed / "result.json").unlink()
            again = _trained(digits(precision), resumed)
            a, b = _losses(straight), _losses(resumed)
            rows[precision] = {
                "status": [whole.status, again.status],
                "first_loss": a[0],
                "last_loss": a[-1],
                "seconds": seconds,
                "bitwise": whole.weights_sha256 == again.weights_sha256,
                "largest_loss_difference": max(abs(x - y) for x, y in zip(a, b, strict=True)),
            }
            shutil.rmtree(straight)
    passed = all(
        row["status"] == ["finished", "finished"] and row["largest_loss_difference"] < 0.05
        for row in rows.values()
    )
    return {"rows": rows, "passed": passed}


def compiled() -> dict[str, Any]:
    """Networks through torch.compile: refused, or how fast."""
    rows = {}
    for name, model in {"unet": {}, "dit": {"kind": "dit"}}.items():
        row: dict[str, Any] = {}
        steps = {}
        for on in (False, True):
            start = time.perf_counter()
            try:
                run = make_run({}, compile=on, model=model)
            except ConfigError as error:
                row["refused"] = str(error)
                continue
            row["seconds_to_compile"] = round(time.perf_counter() - start, 1)
            spent = []
            for step in range(25):
                spent.append(training_step.seconds(lambda run=run, s=step: train_step(run, s)))
            steps[on] = sorted(spent[5:])[10]
        if len(steps) == 2:
            row["compiled_over_eager"] = round(steps[True] / steps[False], 3)
        rows[name] = row
    return {"rows": rows, "passed": all("refused" not in row for row in rows.values())}


def _trained(config: RunConfig, folder: Path) -> Any:
    open_run_folder(config, folder, resume=holds_run(folder))
    return train_loop(config, run_dir=folder, report=lambda _: None, tracker=NullTracker())


def _losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    points = [json.loads(line)["metrics"] for line in lines]
    return [p["train/loss"] for p in points if "train/loss" in p]


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "synchronisation": synchronisation,
    "bf16": bf16,
    "training": training,
    "engine": engine,
    "step": step,
    "compile": compiled,
}


def main() -> None:
    """Make the checks in turn; one that breaks says why, and the others go on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(json.dumps({"skipped": "no CUDA device here: nothing was checked"}))
        return
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name in options.checks:
        start = time.perf_counter()
        try:
            found[name] = CHECKS[name]()
        except Exception as error:  # noqa: BLE001
            traceback.print_exc(file=sys.stderr)
            found[name] = {"error": f"{type(error).__name__}: {error}", "passed": False}
        found[name]["check_seconds"] = round(time.perf_counter() - start, 1)
        print(f"{name}: {found[name]['check_seconds']} s", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
