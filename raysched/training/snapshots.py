"""A copy of the EMA weights on disk, and its evaluation by whoever reads it.

`evaluations/step-00000300/` in the run's folder holds `ema.safetensors`, `job.json` (config, step)
and, once it is evaluated, `result.json`. The evaluation is the one that the run itself would make
at that step; `started` says that it has begun, and is touched while the network is called. The
weights go when the result is recorded, the folder at the run's end.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raysched.config.run import RunConfig
from raysched.data.dataset import load_dataset
from raysched.diffusion.compute import ComputeMeter
from raysched.diffusion.schedules import NoiseSchedule
from raysched.evaluation.evaluate import evaluate
from raysched.evaluation.grids import sample_grid, save_png
from raysched.models.networks import build_network
from raysched.models.tracing import trace_forward
from raysched.training.files import storage_errors, write_json

FOLDER = "evaluations"
WEIGHTS_FILE, JOB_FILE, RESULT_FILE = "ema.safetensors", "job.json", "result.json"
STARTED_FILE = "started"
# How often an evaluation shows that it gets on.
SIGN_S = 0.5
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class SnapshotResult:
    """What the evaluation of a snapshot found.

    Attributes:
        metrics: `quality/...` -> value.
        num_forwards: sample-forwards it took.
        seconds: time it took.
        notes: what a reader must know.
    """

    metrics: dict[str, float]
    num_forwards: int
    seconds: float
    notes: list[str]


def snapshot_folder(run_dir: Path, step: int) -> Path:
    """Where the snapshot of a step is."""
    return run_dir / FOLDER / f"step-{step:08d}"


def grid_file(run_dir: Path, step: int) -> Path:
    """The picture of a step's samples."""
    return run_dir / "samples" / f"step-{step:08d}.png"


def write_snapshot(
    run_dir: Path, config: RunConfig, step: int, weights: Mapping[str, Tensor], device: str
) -> Path:
    """Write the EMA weights of a step; `job.json` comes last and makes it whole.

    Args:
        run_dir: the run's folder.
        config: the run.
        step: optimizer steps done.
        weights: of the network, averaged.
        device: where to evaluate, `cpu` or `cuda`.
    """
    folder = snapshot_folder(run_dir, step)
    with storage_errors(folder, "writing the EMA weights for an evaluation"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, folder / WEIGHTS_FILE)
        job = {"step": step, "device": device, "config": config.model_dump(mode="json")}
        write_json(folder / JOB_FILE, job)
    return folder


def _sign_of_life(file: Path, beside: Callable[[], None] | None) -> Callable[[], None]:
    """Something to call often that touches a file now and then, and always calls `beside`."""
    touched = -SIGN_S

    def show() -> None:
        nonlocal touched
        if time.monotonic() - touched >= SIGN_S:
            file.touch()
            touched = time.monotonic()
        if beside is not None:
            beside()

    return show


def evaluate_snapshot(folder: Path, on_forward: Callable[[], None] | None = None) -> None:
    """Evaluate a snapshot; writes `result.json` beside it and the samples' picture.

    Args:
        folder: of the snapshot; its `started` is touched now and then.
        on_forward: called with every call of the network.

    Raises:
        StorageError, OSError: it can't be read, or the result not written.
    """
    (folder / STARTED_FILE).touch()
    begun = time.perf_counter()
    job = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
    config = RunConfig.model_validate(job["config"])
    device = torch.device(job["device"] if torch.cuda.is_available() else "cpu")
    dataset = load_dataset(config.data)
    meter = ComputeMeter(on_forward=_sign_of_life(folder / STARTED_FILE, on_forward))
    network = build_network(
        config.model, dataset.channels, dataset.image_size, dataset.num_classes, seed=config.seed
    )
    network.load_state_dict(load_file(folder / WEIGHTS_FILE))
    network.to(device).eval().requires_grad_(False)
    shape = (dataset.channels, dataset.image_size, dataset.image_size)
    precision = config.training.precision
    replay = trace_forward(network, shape) if precision == "fp32" else None
    lower = contextlib.nullcontext() if replay else _autocast(device, precision)
    with lower:
        found = evaluate(
            replay or network,
            config=config,
            dataset=dataset,
            schedule=NoiseSchedule.from_config(config.noise_schedule),
            num_samples=config.evaluation.num_samples,
            meter=meter,
            with_epsilon_scaling=False,
        )
    grid = sample_grid(
        found.samples[max(config.evaluation.nfe)],
        found.labels,
        num_classes=dataset.num_classes,
        max_images=config.evaluation.grid_images,
    )
    save_png(grid, grid_file(folder.parents[1], job["step"]))
    result = {
        "metrics": found.metrics,
        "num_forwards": meter.evaluation,
        "seconds": time.perf_counter() - begun,
        "notes": list(found.notes),
    }
    write_json(folder / RESULT_FILE, result)


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[None]:
    if precision not in AUTOCAST:
        return contextlib.nullcontext()
    lower: contextlib.AbstractContextManager[None] = torch.autocast(
        device.type, dtype=AUTOCAST[precision]
    )
    return lower


def read_snapshot_result(folder: Path) -> SnapshotResult | None:
    """What the evaluation of a snapshot found; None if there is nothing yet."""
    path = folder / RESULT_FILE
    if not path.is_file():
        return None
    return SnapshotResult(**json.loads(path.read_text(encoding="utf-8")))


def is_whole(folder: Path) -> bool:
    """Whether the snapshot can be evaluated."""
    return (folder / JOB_FILE).is_file()


def has_started(folder: Path) -> bool:
    """Whether somebody evaluates it, or has done so."""
    return last_sign(folder) is not None


def last_sign(folder: Path) -> int | None:
    """A number that changes while its evaluation gets on; None before it has begun."""
    try:
        return (folder / STARTED_FILE).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def forget_start(folder: Path) -> None:
    """Make a snapshot look as if nobody had begun with it."""
    (folder / STARTED_FILE).unlink(missing_ok=True)


def drop_weights(folder: Path) -> None:
    """Free the space of a recorded one; the result stays for a resume from before."""
    (folder / WEIGHTS_FILE).unlink(missing_ok=True)


def delete_other_snapshots(run_dir: Path, keep: set[int]) -> None:
    """Delete what belongs to no pending step."""
    wanted = {snapshot_folder(run_dir, step).name for step in keep}
    for folder in (run_dir / FOLDER).glob("step-*"):
        if folder.name not in wanted:
            shutil.rmtree(folder, ignore_errors=True)
    if not wanted:
        shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
