"""Evaluations as Ray tasks beside the training's workers.

A task asks for no CPU (workers and trials may hold them all, and would wait for the task), with
`scaling.use_gpu` for one GPU. Where no place is found the worker makes the evaluation itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raysched.config.run import RunConfig
from raysched.errors import ConfigError
from raysched.training.protocols import EvaluationEnd, Evaluator


class RayEvaluator:
    """An `Evaluator` of one Ray task at a time.

    Args:
        num_threads: torch threads, those of a worker for the same numbers.
        use_gpu: evaluate on a GPU.
    """

    def __init__(self, num_threads: int, *, use_gpu: bool) -> None:
        import ray

        # Not in the workers' placement group: that one is full.
        self._task = ray.remote(_evaluate).options(
            num_cpus=0,
            num_gpus=1 if use_gpu else 0,
            max_retries=0,
            scheduling_strategy="DEFAULT",
        )
        self._num_threads = num_threads
        self._running: Any = None

    def start(self, folder: Path) -> None:
        """Hand a snapshot to a new task."""
        from raysched.training.snapshots import forget_start

        forget_start(folder)
        self._running = self._task.remote(str(folder), self._num_threads)

    def poll(self, timeout_s: float) -> EvaluationEnd | None:
        """How the task ended; None while it runs."""
        import ray

        assert self._running is not None, "poll follows start"
        ready, _ = ray.wait([self._running], timeout=timeout_s)
        if not ready:
            return None
        try:
            ray.get(ready[0])
        except Exception as error:  # noqa: BLE001 - whatever ended the task, the worker takes over
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return EvaluationEnd(lines[-1])
        finally:
            self._running = None
        return EvaluationEnd()

    def close(self) -> None:
        """Stop the task."""
        import ray

        if self._running is not None:
            ray.cancel(self._running, force=True)
            self._running = None


def make_evaluator(config: RunConfig) -> Evaluator | None:
    """Who evaluates beside a run's training: a Ray task, without Ray a process; None: nobody."""
    if config.evaluation.placement != "background" or not config.evaluation.enabled:
        return None
    scaling = config.scaling
    if scaling.num_workers:
        return RayEvaluator(scaling.cpus_per_worker, use_gpu=scaling.use_gpu)
    from raysched.training.evaluation_process import ProcessEvaluator

    return ProcessEvaluator(scaling.cpus_per_worker)


def check_background_gpu(config: RunConfig) -> None:
    """Refuse evaluations beside the training where the workers take every GPU.

    Raises:
        ConfigError: says how many there are and what to use instead.
    """
    import ray

    scaling, settings = config.scaling, config.evaluation
    if not settings.enabled or settings.placement != "background" or not scaling.use_gpu:
        return
    have = int(ray.cluster_resources().get("GPU", 0))
    if have <= scaling.num_workers:
        raise ConfigError(
            "evaluation.placement: background needs one GPU beside those of the "
            f"{scaling.num_workers} workers, the cluster has {have}: use ranks, or lower "
            "scaling.num_workers"
        )


def _evaluate(folder: str, num_threads: int) -> None:
    import torch

    from raysched.training.snapshots import evaluate_snapshot

    torch.set_num_threads(num_threads)
    evaluate_snapshot(Path(folder))
