"""Running the training loop: in this process, or in Ray Train workers that report back here.

`scaling.num_workers: 0` calls the loop directly. Otherwise a `TorchTrainer` runs it; the
controller's callback puts each evaluation in a queue, and the calling process hands them on in
order (a callback that talks to Tune directly can hang the trial).
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raysched.config.run import RunConfig
from raysched.distributed.runtime import cluster_cpus, ensure_ray
from raysched.errors import ConfigError, RunFailedError, UserError
from raysched.training.protocols import Evaluator, NullTracker, Tracker
from raysched.training.result import RunResult
from raysched.training.run_folder import WRITER_LOCK, own_run_folder

ReportCallback = Callable[[Mapping[str, float]], None]
FATAL_FILE = ".fatal"
# How often the caller looks whether the trainer's thread has ended.
QUEUE_WAIT_S = 0.25
# How long the workers of a killed driver may need to notice.
WRITER_WAIT_S = 60.0


@dataclass(frozen=True)
class WorkerJob:
    """What a worker is sent: plain data and a picklable maker of the tracker."""

    config: dict[str, Any]
    run_dir: str
    attempt: str
    make_tracker: Callable[[], Tracker] | None


def run_training(
    config: RunConfig,
    *,
    run_dir: Path,
    report: ReportCallback,
    make_tracker: Callable[[], Tracker] | None = None,
) -> RunResult:
    """Train until the budget is spent or a stop is asked for; goes on from the last checkpoint.

    Args:
        config: the resolved run.
        run_dir: its folder, opened by `open_run_folder`, on storage that all workers share.
        report: called here, in order, with the metrics of each evaluation.
        make_tracker: makes the tracker of rank 0, in its process.

    Returns:
        The result; failures of the run itself are in it (`status`, `error`).

    Raises:
        ConfigError: the cluster has fewer CPUs than asked for.
        RunFailedError: a worker was lost more often than `scaling.max_failures`.
    """
    job = WorkerJob(
        config=config.model_dump(mode="json"),
        run_dir=str(run_dir),
        attempt=uuid.uuid4().hex,
        make_tracker=make_tracker,
    )
    if config.scaling.num_workers == 0:
        return _run_loop(job, report, rank=0)
    ensure_ray()
    check_resources(config)
    return _run_trainer(config, job, report)


def check_resources(config: RunConfig) -> None:
    """Refuse a run that the cluster could never place, instead of waiting for it in silence.

    Raises:
        ConfigError: says what is missing and how to ask for less.
    """
    scaling = config.scaling
    need, have = scaling.num_workers * scaling.cpus_per_worker, cluster_cpus()
    if need > have:
        raise ConfigError(
            f"scaling: {scaling.num_workers} workers × {scaling.cpus_per_worker} CPUs need {need} "
            f"CPUs, the cluster has {have:g}: lower scaling.num_workers or scaling.cpus_per_worker"
        )


def _run_trainer(config: RunConfig, job: WorkerJob, report: ReportCallback) -> RunResult:
    from ray.util.queue import Queue

    queue = Queue(actor_options={"num_cpus": 0})
    trainer = _make_trainer(config, job, queue)
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread below
            outcome["error"] = error

    thread = threading.Thread(target=fit, name="raysched-trainer", daemon=True)
    thread.start()
    try:
        _relay(queue, thread, report)
    finally:
        queue.shutdown(force=True)
    if "error" in outcome:
        raise _as_user_error(outcome["error"], Path(job.run_dir)) from outcome["error"]
    return RunResult(**outcome["result"].return_value)


def _relay(queue: Any, thread: threading.Thread, report: ReportCallback) -> None:
    from ray.util.queue import Empty

    while True:
        alive = thread.is_alive()
        try:
            report(queue.get(timeout=QUEUE_WAIT_S))
        except Empty:
            if not alive:
                return


def _make_trainer(config: RunConfig, job: WorkerJob, queue: Any) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchTrainer

    class Relay(UserCallback):  # type: ignore[misc]
        """Puts rank 0's metrics of every report into the queue."""

        def after_report(self, run_context: Any, metrics: list[Any], checkpoint: Any) -> None:
            queue.put(metrics[0])

    scaling = config.scaling
    return TorchTrainer(
        _worker,
        train_loop_config={"job": job, "threads": scaling.cpus_per_worker},
        scaling_config=ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker={
                "CPU": scaling.cpus_per_worker,
                **({"GPU": 1} if scaling.use_gpu else {}),
            },
        ),
        run_config=RunConfig(
            # The same (storage_path, name) would mean resume to Ray Train; ours resumes itself.
            name=job.attempt,
            storage_path=str(Path(job.run_dir) / "ray"),
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            callbacks=[Relay()],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _worker(settings: dict[str, Any]) -> dict[str, Any]:
    """One Ray Train worker: the loop with Ray's report, and fatal errors kept for the driver."""
    import ray.train

    from raysched.training.result import RunResult as Result

    job: WorkerJob = settings["job"]
    fatal = Path(job.run_dir) / FATAL_FILE
    if fatal.is_file() and fatal.read_text(encoding="utf-8").startswith(job.attempt):
        # Ray Train starts the group again after any error; a user's mistake stays one.
        message = fatal.read_text(encoding="utf-8").partition("\n")[2]
        return asdict(Result(status="failed", output_dir=job.run_dir, error=message))
    context = ray.train.get_context()
    try:
        result = _run_loop(
            job,
            lambda metrics: ray.train.report(dict(metrics)),
            rank=context.get_world_rank(),
            threads=settings["threads"],
        )
    except UserError as error:
        fatal.write_text(f"{job.attempt}\n{error}", encoding="utf-8")
        raise
    return asdict(result)


def _run_loop(
    job: WorkerJob, report: ReportCallback, *, rank: int, threads: int | None = None
) -> RunResult:
    import torch

    from raysched.training.allocator import keep_freed_memory
    from raysched.training.loop import train_loop

    config = RunConfig.model_validate(job.config)
    # More threads than CPUs cost 5-10x; a known number also makes sums reproducible.
    torch.set_num_threads(threads or config.scaling.cpus_per_worker)
    keep_freed_memory()
    run_dir, is_main = Path(job.run_dir), rank == 0
    # Workers of a killed driver may live on for some seconds: two must never write.
    owned = own_run_folder(run_dir, lock=WRITER_LOCK, timeout_s=WRITER_WAIT_S)
    with owned if is_main else contextlib.nullcontext():
        tracker = job.make_tracker() if job.make_tracker and is_main else NullTracker()
        evaluator = _make_evaluator(config) if is_main else None
        return train_loop(
            config, run_dir=run_dir, report=report, tracker=tracker, evaluator=evaluator
        )


def _make_evaluator(config: RunConfig) -> Evaluator | None:
    """Who evaluates beside the training: a Ray task, without Ray a process."""
    if config.evaluation.placement != "background" or not config.evaluation.enabled:
        return None
    scaling = config.scaling
    if scaling.num_workers:
        from raysched.distributed.evaluation_task import RayEvaluator

        return RayEvaluator(scaling.cpus_per_worker, use_gpu=scaling.use_gpu)
    from raysched.training.evaluation_process import ProcessEvaluator

    return ProcessEvaluator(scaling.cpus_per_worker)


def _as_user_error(error: BaseException, run_dir: Path) -> BaseException:
    """A clear message for what the workers raised; interrupts pass through."""
    if isinstance(error, UserError | KeyboardInterrupt | SystemExit):
        return error
    reasons = [str(e) for e in getattr(error, "worker_failures", {}).values()] or [str(error)]
    first = reasons[0].strip().splitlines()
    log = run_dir / "worker-error.txt"
    log.write_text("\n\n".join(reasons) + os.linesep, encoding="utf-8")
    return RunFailedError(
        f"{run_dir}: the workers failed: {first[-1] if first else type(error).__name__} "
        f"(all of it in {log}); what was computed is kept: go on with --resume"
    )
