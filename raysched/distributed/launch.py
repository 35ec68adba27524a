"""Running the training loop: in this process, or in Ray Train workers that report back here.

`scaling.num_workers: 0` calls the loop directly. Otherwise a `TorchTrainer` runs it; the
controller's callback puts each evaluation in a queue, and the calling process hands them on in
order (a callback that talks to Tune directly can hang the trial).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from raysched.config.run import RunConfig
from raysched.distributed.evaluation_task import check_background_gpu, make_evaluator
from raysched.distributed.failures import (
    as_user_error,
    fatal,
    note_failures,
    raise_fatal,
    set_fatal,
)
from raysched.distributed.lookout import lookout, stop_order
from raysched.distributed.resources import StoppedWaitingError, check_resources
from raysched.distributed.runtime import ensure_ray
from raysched.errors import StorageError, UserError
from raysched.training.allocator import give_back_freed_memory, keep_freed_memory
from raysched.training.events import note_event
from raysched.training.heartbeat import Heartbeat, clear_beats
from raysched.training.out_of_memory import (
    StepMemoryError,
    halved,
    micro_batch,
    recalled,
    remember,
)
from raysched.training.output import captured
from raysched.training.protocols import NullTracker, Tracker, closed_at_errors
from raysched.training.result import RunResult
from raysched.training.run_folder import WRITER_LOCK, own_run_folder

log = logging.getLogger(__name__)
ReportCallback = Callable[[Mapping[str, float]], None]
# How often the driver looks after its workers while they report nothing.
QUEUE_WAIT_S = 1.0
# How long the workers of a killed driver may need to notice.
WRITER_WAIT_S = 60.0


@dataclass(frozen=True)
class WorkerJob:
    """What a worker is sent: plain data and a picklable maker of the tracker."""

    config: dict[str, Any]
    run_dir: str
    attempt: str
    make_tracker: Callable[[], Tracker] | None
    notes: tuple[str, ...] = ()


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
        ConfigError: the cluster has fewer CPUs or GPUs than asked for.
        RunFailedError: a worker was lost more often than `scaling.max_failures`.
        LostResourcesError: that was with its node, or there was no room for too long.
        DataError, …: what a worker found wrong with what was asked.
        StepMemoryError: memory ran out, and smaller micro-batches are not allowed or possible.
    """
    config = recalled(config, run_dir)
    notes: list[str] = []
    while True:
        job = WorkerJob(
            config=config.model_dump(mode="json"),
            run_dir=str(run_dir),
            attempt=uuid.uuid4().hex,
            make_tracker=make_tracker,
            notes=tuple(notes),
        )
        try:
            result = _run_once(config, job, report)
        except StepMemoryError as error:
            smaller = halved(config)
            if smaller is None:
                raise
            notes.append(
                f"{str(error).partition(':')[0]}: out of memory at micro-batches of "
                f"{micro_batch(config)} samples: went on at {micro_batch(smaller)} "
                f"(training.gradient_accumulation {smaller.training.gradient_accumulation}, the "
                "same global batch)"
            )
        else:
            return replace(result, notes=[*notes, *result.notes])
        _tell(run_dir, notes[-1])
        config = smaller
        remember(config, run_dir)
        give_back_freed_memory()


def _run_once(config: RunConfig, job: WorkerJob, report: ReportCallback) -> RunResult:
    if config.scaling.num_workers == 0:
        return _run_loop(job, report, rank=0)
    ensure_ray()
    run_dir = Path(job.run_dir)
    try:
        asked = functools.partial(stop_order, run_dir)
        check_resources(config.scaling, functools.partial(_tell, run_dir), asked)
        check_background_gpu(config)
        return _run_trainer(config, job, report)
    except StoppedWaitingError:
        order = stop_order(run_dir)
        return RunResult(status=order.status if order else "stopped", output_dir=job.run_dir)
    finally:
        clear_beats(run_dir)


def _tell(run_dir: Path, text: str) -> None:
    """Tell the user now, and the run's log for later."""
    log.warning("%s", text)
    note_event(run_dir, text)


def _run_trainer(config: RunConfig, job: WorkerJob, report: ReportCallback) -> RunResult:
    import ray
    from ray.exceptions import RayActorError
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On this node: it must outlive those of the workers.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    trainer = _make_trainer(config, job, queue)
    run_dir = Path(job.run_dir)
    look = lookout(config.scaling, run_dir, job.attempt, functools.partial(_tell, run_dir))
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread below
            outcome["error"] = error
        finally:
            # A queue that is gone (then its actor is None) has ended the wait for it as well.
            with contextlib.suppress(RayActorError, AttributeError):
                queue.put(None)

    thread = threading.Thread(target=fit, name="raysched-trainer", daemon=True)
    thread.start()
    try:
        _relay(queue, thread, report, look)
    finally:
        queue.shutdown(force=True)
    raise_fatal(run_dir, job.attempt)
    if "error" in outcome:
        raise as_user_error(outcome["error"], run_dir) from outcome["error"]
    return RunResult(**outcome["result"].return_value)


def _relay(
    queue: Any, thread: threading.Thread, report: ReportCallback, look: Callable[[], None]
) -> None:
    """Hand on what the workers report, until the trainer's thread puts None or is dead."""
    from ray.util.queue import Empty

    while True:
        alive = thread.is_alive()
        try:
            metrics = queue.get(timeout=QUEUE_WAIT_S)
        except Empty:
            look()
            if not alive:
                return
            continue
        if metrics is None:
            return
        report(metrics)


def _make_trainer(config: RunConfig, job: WorkerJob, queue: Any) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchTrainer

    class Relay(UserCallback):  # type: ignore[misc]
        """Puts rank 0's metrics of every report into the queue; keeps an eye on failures."""

        def after_report(self, run_context: Any, metrics: list[Any], checkpoint: Any) -> None:
            queue.put(metrics[0])

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Any]) -> None:
            note_failures(config, Path(job.run_dir), job.attempt, worker_exceptions)

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
    kind, message = fatal(Path(job.run_dir), job.attempt)
    if kind:
        # Ray Train starts the group again after any error; a user's mistake stays one.
        return asdict(Result(status="failed", output_dir=job.run_dir, error=message))
    rank = ray.train.get_context().get_world_rank()
    try:
        with captured(Path(job.run_dir) / f"output-{rank}.txt"):
            result = _run_loop(
                job,
                lambda metrics: ray.train.report(dict(metrics)),
                rank=rank,
                threads=settings["threads"],
                heart=_make_heart(job, rank),
            )
    except UserError as error:
        set_fatal(Path(job.run_dir), job.attempt, error)
        # Others wait for this rank, until their group is ended by an error of Ray Train's; alone,
        # another start would only meet the same.
        if ray.train.get_context().get_world_size() > 1:
            raise
        result = Result(status="failed", output_dir=job.run_dir, error=str(error))
    return asdict(result)


def _run_loop(
    job: WorkerJob,
    report: ReportCallback,
    *,
    rank: int,
    threads: int | None = None,
    heart: Heartbeat | None = None,
) -> RunResult:
    import torch

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
        if job.notes:
            accumulation = config.training.gradient_accumulation
            tracker.set_tags(
                {"raysched.out_of_memory": f"gradient_accumulation {accumulation} was needed"}
            )
        # A group of workers may begin again: the driver notes how that ends.
        may_begin_again = config.scaling.num_workers > 0
        try:
            with contextlib.nullcontext() if may_begin_again else closed_at_errors(tracker):
                return train_loop(
                    config,
                    run_dir=run_dir,
                    report=report,
                    tracker=tracker,
                    evaluator=make_evaluator(config) if is_main else None,
                    heart=heart,
                )
        except StorageError as error:
            # Other ranks would wait for this one; alone, a full disk is how the run ended.
            if config.scaling.num_workers:
                raise
            return RunResult(status="failed", output_dir=job.run_dir, error=str(error))


def _make_heart(job: WorkerJob, rank: int) -> Heartbeat | None:
    import ray

    timeout = RunConfig.model_validate(job.config).scaling.hang_timeout_s
    if timeout is None:
        return None
    return Heartbeat(
        Path(job.run_dir),
        rank,
        attempt=job.attempt,
        node=ray.get_runtime_context().get_node_id(),
        interval_s=min(timeout / 4, 5.0),
    )
