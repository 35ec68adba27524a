"""An evaluation within a run: EMA weights in, metrics, sample grid and final samples out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raysched.errors import RunFailedError
from raysched.evaluation.crew import ALONE, Crew
from raysched.evaluation.evaluate import Evaluation, evaluate
from raysched.evaluation.grids import sample_grid, save_png
from raysched.evaluation.probe_light import (
    FORWARDS_PER_SAMPLE,
    MIN_SAMPLES,
    affordable_samples,
    light_probe,
)
from raysched.training.budget import picture_step
from raysched.training.files import storage_errors
from raysched.training.protocols import Tracker
from raysched.training.setup import Run
from raysched.training.wrapping import averaged

log = logging.getLogger(__name__)

FINAL_SAMPLES_FILE = "final_samples.safetensors"
PIPELINE_FOLDER = "pipeline"


def evaluate_run(run: Run, run_dir: Path, tracker: Tracker, *, final: bool) -> dict[str, float]:
    """Measure the EMA weights' quality; the first grid of samples goes to the tracker.

    All ranks must call it, and by `evaluation.placement` all of them or rank 0 do the work.

    Args:
        run: the run; only its meter changes.
        run_dir: gets `samples/step-*.png`, and at the end the samples themselves.
        tracker: of rank 0.
        final: the evaluation at the end of the budget, with more samples.

    Returns:
        The metrics; empty on a rank that had no part in it.
    """
    settings = run.config.evaluation
    crew = run_crew(run)
    with run.meter.timed("evaluation"), averaged(run) as network, run.accelerator.autocast():
        if crew.size == 1 and run.rank:
            return {}
        evaluation = evaluate(
            replayed(run, network),
            config=run.config,
            dataset=run.dataset,
            schedule=run.schedule,
            num_samples=settings.final_num_samples if final else settings.num_samples,
            meter=run.meter,
            # The free rival is shown beside the result; during training it would cost half again.
            with_epsilon_scaling=final,
            crew=crew,
        )
    if run.rank == 0:
        _keep(run, run_dir, tracker, evaluation, final=final)
    return evaluation.metrics


def replayed(run: Run, network: nn.Module) -> Callable[..., Tensor]:
    """A run's network as evaluation calls it: recorded where that gives the same bits."""
    recorded = run.replay if network is run.policy else None
    return recorded or network


def run_crew(run: Run) -> Crew:
    """Who makes an evaluation on the spot: all ranks, or rank 0 with `placement: inline`."""
    if run.world_size == 1 or run.config.evaluation.placement == "inline":
        return ALONE

    def exchange(part: Any) -> list[Any]:
        parts: list[Any] = [None] * run.world_size
        torch.distributed.all_gather_object(parts, part)
        return parts

    return Crew(run.rank, run.world_size, exchange)


def _keep(
    run: Run, run_dir: Path, tracker: Tracker, evaluation: Evaluation, *, final: bool
) -> None:
    """Store and track the pictures, and at the end the samples; tell the notes."""
    settings = run.config.evaluation
    for note in evaluation.notes:
        log.warning("step %d: %s", run.step, note)
    samples = evaluation.samples[max(settings.nfe)]
    grid = sample_grid(
        samples,
        evaluation.labels,
        num_classes=run.dataset.num_classes,
        max_images=settings.grid_images,
    )
    with storage_errors(run_dir, "writing samples"):
        save_png(grid, run_dir / "samples" / f"step-{run.step:08d}.png")
        if final:
            tensors = {f"nfe_{nfe}": images for nfe, images in evaluation.samples.items()}
            save_file({**tensors, "labels": evaluation.labels}, run_dir / FINAL_SAMPLES_FILE)
    position = picture_step(run.config, run.fraction, run.meter.forward_equivalents)
    tracker.log_image("samples", grid, step=position)


def probe_run(run: Run) -> dict[str, float]:
    """Exposure bias of the EMA weights, by few enough forwards; empty if none are affordable.

    Each probe may spend its share of one interval's compute, so all of them together never spend
    more than that share of the training's. All ranks must call it; rank 0 does the work.

    Args:
        run: the run; only its meter changes.
    """
    settings = run.config.evaluation
    every = settings.probe_every_forward_equivalents
    assert every is not None, "probes are due only where their interval is given"
    affordable = settings.probe_share * every
    num_samples = affordable_samples(affordable, len(run.dataset.holdout_indices))
    if num_samples == 0:
        if run.rank == 0 and run.meter.forward_equivalents < 2 * every:
            log.warning(
                "evaluation.probe_every_forward_equivalents: a share of %g of %g pays for %d "
                "forwards, a probe takes at least %d (and as many held-out images as samples), "
                "so none is made; raise either",
                settings.probe_share,
                every,
                int(affordable),
                MIN_SAMPLES * FORWARDS_PER_SAMPLE,
            )
        return {}
    with run.meter.timed("evaluation"), averaged(run) as network, run.accelerator.autocast():
        if run.rank:
            return {}
        try:
            return light_probe(
                network,
                config=run.config,
                dataset=run.dataset,
                schedule=run.schedule,
                num_samples=num_samples,
                meter=run.meter,
            )
        except RunFailedError as error:
            # Whether the run goes on is the loss's business, not a diagnostic's.
            log.warning("step %d: no exposure-bias probe: %s", run.step, error)
            return {}


def save_final(run: Run, run_dir: Path) -> None:
    """Write the EMA weights as a diffusers pipeline folder; all ranks must call it."""
    from raysched.models.export import save_pipeline

    with averaged(run) as network, storage_errors(run_dir, "writing the pipeline"):
        if run.rank == 0:
            names = run.dataset.class_names
            save_pipeline(run_dir / PIPELINE_FOLDER, network, run.config, names)
