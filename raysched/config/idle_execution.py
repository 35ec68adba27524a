"""Settings of data, workers, evaluation and tracking that have no effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from raysched.config.rules import Check
from raysched.config.run import RunConfig

EVALUATION = tuple(f"evaluation.{f}" for f in type(RunConfig().evaluation).model_fields)[1:]


@dataclass(frozen=True)
class Idle:
    """Settings that have no effect.

    Args:
        affected: the settings.
        causes: the settings that make them so.
        reason: why, if they have no effect.
        quiet: say nothing if the command line is the cause and the file holds the settings.
    """

    affected: tuple[str, ...]
    causes: tuple[str, ...]
    reason: Check
    quiet: bool = False


def when(condition: Callable[[RunConfig], bool], text: str) -> Check:
    """A reason that holds under a condition."""
    return lambda c: text if condition(c) else None


IDLE_EXECUTION: tuple[Idle, ...] = (
    Idle(
        ("data.path",),
        ("data.source",),
        when(lambda c: c.data.source == "digits", "the digits are built in"),
    ),
    Idle(
        ("data.grayscale",),
        ("data.source",),
        when(lambda c: c.data.source != "image_folder", "these images have one channel"),
    ),
    Idle(
        ("scaling.max_failures", "scaling.resource_timeout_s"),
        ("scaling.num_workers",),
        when(lambda c: c.scaling.num_workers == 0, "scaling.num_workers is 0: there is no Ray"),
        quiet=True,
    ),
    Idle(
        ("scaling.hang_timeout_s",),
        ("scaling.num_workers", "evaluation.placement"),
        when(
            lambda c: c.scaling.num_workers == 0 and c.evaluation.placement != "background",
            "scaling.num_workers is 0 and no evaluation is beside the training: nobody watches",
        ),
        quiet=True,
    ),
    Idle(
        ("scaling.strategy",),
        ("scaling.num_workers",),
        when(lambda c: c.scaling.num_workers < 2, "there is only one worker"),
        quiet=True,
    ),
    Idle(
        ("scaling.retry_out_of_memory",),
        ("training.batch_size", "training.gradient_accumulation", "scaling.num_workers"),
        when(
            lambda c: (
                c.training.batch_size
                <= c.training.gradient_accumulation * max(c.scaling.num_workers, 1)
            ),
            "a micro-batch is one sample already",
        ),
    ),
    Idle(
        EVALUATION,
        ("evaluation.enabled",),
        when(lambda c: not c.evaluation.enabled, "evaluation.enabled is false"),
        quiet=True,
    ),
    Idle(
        ("evaluation.probe_share",),
        ("evaluation.probe_every_forward_equivalents",),
        when(
            lambda c: c.evaluation.probe_every_forward_equivalents is None,
            "probe_every_forward_equivalents is not set: there are no probes while training",
        ),
    ),
    Idle(
        ("evaluation.placement",),
        ("scaling.num_workers",),
        when(
            lambda c: c.evaluation.placement == "ranks" and c.scaling.num_workers < 2,
            "there is only one worker",
        ),
        quiet=True,
    ),
    Idle(
        ("training.keep_best",),
        ("evaluation.enabled",),
        when(
            lambda c: not c.evaluation.enabled,
            "evaluation.enabled is false, so no checkpoint is better than another",
        ),
    ),
    Idle(
        ("training.storage_timeout_s",),
        ("training.storage_path",),
        when(lambda c: c.training.storage_path is None, "training.storage_path is null"),
    ),
    Idle(
        ("tracking.uri", "tracking.experiment"),
        ("tracking.enabled",),
        when(lambda c: not c.tracking.enabled, "tracking.enabled is false"),
        quiet=True,
    ),
)
