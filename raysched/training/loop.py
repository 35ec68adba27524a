"""The training loop: steps, evaluations, checkpoints, and every way to end.

It knows neither Ray nor MLflow: `report` and `tracker` come in as arguments. Started in a folder
that holds checkpoints, it goes on from the newest complete one.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from raysched.config.run import RunConfig
from raysched.errors import RunFailedError, UserError
from raysched.models.weights import weights_sha256
from raysched.training.budget import (
    agree_on_seconds,
    evaluation_due,
    learning_rate_at,
    probe_due,
)
from raysched.training.costs import Costs
from raysched.training.evaluate_step import probe_run, save_final
from raysched.training.evaluations import Evaluations, Moment
from raysched.training.events import LOG_FILE, note_event
from raysched.training.feed import Feed
from raysched.training.files import write_json
from raysched.training.heartbeat import Heartbeat
from raysched.training.initial import pin_base
from raysched.training.keeper import Keeper
from raysched.training.out_of_memory import memory_errors
from raysched.training.protocols import Evaluator, Report, RunStatus, Tracker
from raysched.training.result import RESULT_FILE, RunResult
from raysched.training.run_folder import METRICS_FILE, MetricsLog
from raysched.training.setup import Run, build_run
from raysched.training.spend import compute_summary
from raysched.training.stop import StopOrder, StopWatch
from raysched.training.train_step import StepResult, train_step
from raysched.training.wrapping import whole_weights

log = logging.getLogger(__name__)

# What the ranks tell each other after a step: nothing, stop as resumable, stop as pruned.
SIGNALS: tuple[Literal["stopped", "pruned"] | None, ...] = (None, "stopped", "pruned")


@dataclass
class Progress:
    """What the loop remembers beside the weights; part of every checkpoint.

    Attributes:
        metrics: of the last evaluation, and the last training metrics.
        window: sums of the step metrics since the last logged point.
        window_steps: steps in the window.
        seconds: wall time of the run so far, evaluations included, pauses not.
        pending: moments whose evaluation beside the training is not recorded yet.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    window: dict[str, float] = field(default_factory=dict)
    window_steps: int = 0
    seconds: float = 0.0
    pending: list[dict[str, Any]] = field(default_factory=list)

    def add(self, metrics: dict[str, float]) -> None:
        """Take up the metrics of one step."""
        for key, value in metrics.items():
            self.window[key] = self.window.get(key, 0.0) + value
        self.window_steps += 1

    def flush(self) -> dict[str, float]:
        """Means over the window, which starts anew."""
        means = {key: value / self.window_steps for key, value in self.window.items()}
        self.window, self.window_steps = {}, 0
        self.metrics.update(means)
        return means


def train_loop(
    config: RunConfig,
    *,
    run_dir: Path,
    report: Report,
    tracker: Tracker,
    evaluator: Evaluator | None = None,
    heart: Heartbeat | None = None,
) -> RunResult:
    """Train until the budget is spent, a stop is asked for, or the loss is no number.

    Args:
        config: the resolved run.
        run_dir: the run's folder; its `.stop` file ends the loop.
        report: called on every rank after each evaluation.
        tracker: of rank 0; the others get one that does nothing.
        evaluator: of rank 0, for `evaluation.placement: background`.
        heart: shows whoever watches that this rank gets on.

    Returns:
        The same result on every rank.

    Raises:
        StorageError: a checkpoint can't be written; earlier ones are kept.
    """
    loop = Loop(build_run(config), run_dir, report, tracker, evaluator)
    pin_base(config, run_dir, write=loop.is_main)
    loop.restore()
    try:
        with heart.beating(loop.work) if heart else contextlib.nullcontext():
            status = loop.until_end()
        return loop.finish(status, None)
    except RunFailedError as failure:
        # Inside the loop only numbers that are not finite raise it.
        return loop.finish("failed", str(failure), diverged=True)
    except UserError:
        # Whoever goes on in this process must find the newest checkpoint, and no writer at work.
        loop.keeper.on_disk(failed=True)
        loop.evaluations.close(finished=False)
        loop.keeper.close()
        raise
    finally:
        loop.feed.close()


class Loop:
    """One rank's run of the loop."""

    def __init__(
        self,
        run: Run,
        run_dir: Path,
        report: Report,
        tracker: Tracker,
        evaluator: Evaluator | None = None,
    ) -> None:
        self.run, self.run_dir, self.report, self.tracker = run, run_dir, report, tracker
        self.progress = Progress()
        self.stop = StopWatch(run_dir)
        self.keeper = Keeper(run, run_dir)
        self.costs = Costs(run)
        self.feed = Feed(run)
        self.evaluations = Evaluations(run, run_dir, tracker, evaluator, self._publish)
        self._started = time.monotonic()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and tracks."""
        return self.run.rank == 0

    @property
    def seconds(self) -> float:
        """Wall time of the run, earlier parts included."""
        return self.progress.seconds + time.monotonic() - self._started

    def work(self) -> tuple[int, str]:
        """Steps done, and a word that changes with every network call that is counted."""
        meter = self.run.meter
        spent = f"{meter.forward_equivalents}/{meter.evaluation}/{self.evaluations.looks}"
        return self.run.step, f"{self.run.step}/{spent}"

    def restore(self) -> None:
        """Go on from the newest complete checkpoint, if there is one."""
        checkpoint = self.keeper.restore()
        if checkpoint is not None:
            self.progress = Progress(**checkpoint.state["progress"])
            if self.is_main:
                note_event(self.run_dir, f"went on from step {self.run.step}")
        pending = [Moment(**moment) for moment in self.progress.pending]
        self.evaluations.restore(pending)
        if self.is_main:
            again = {moment.step for moment in pending}
            self.points = MetricsLog(self.run_dir, last_step=self.run.step, again=again)
        self.costs.restart()

    def until_end(self) -> RunStatus:
        """Step until the budget is spent or a stop is asked for."""
        run, training = self.run, self.run.config.training
        while run.fraction < 1.0:
            request = self._agree_on_stop()
            if request is not None:
                self.save()
                return request
            self.evaluations.collect()
            before = (run.fraction, run.meter.forward_equivalents)
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate_at(run.config.optimizer, before[0])
            with memory_errors(run.config, run.step + 1):
                step = train_step(run, run.step, self.feed)
            self._take(step)
            self.keeper.check()
            after = (run.fraction, run.meter.forward_equivalents)
            if run.step % training.log_every_steps == 0 or after[0] >= 1.0:
                self._log(self.progress.flush())
            if probe_due(run.config, before[1], after[1]):
                self._probe()
            if evaluation_due(run.config, before, after):
                self.evaluations.make(self._moment(), final=after[0] >= 1.0)
            if run.step % training.checkpoint_every_steps == 0 and after[0] < 1.0:
                self.save()
        self.evaluations.collect(everything=True)
        self.save()
        return "finished"

    def save(self) -> None:
        """Write a checkpoint, unless this step has one already."""
        pending = [asdict(moment) for moment in self.evaluations.pending]
        self.keeper.save({**vars(self.progress), "seconds": self.seconds, "pending": pending})

    def finish(self, status: RunStatus, error: str | None, *, diverged: bool = False) -> RunResult:
        """Write what a finished run leaves behind, close the tracker, and sum up."""
        self.keeper.on_disk(failed=status == "failed")
        self.evaluations.close(finished=status == "finished")
        if status == "finished":
            save_final(self.run, self.run_dir)
        result = RunResult(
            status=status,
            output_dir=str(self.run_dir),
            metrics=dict(self.progress.metrics),
            compute={
                **compute_summary(self.run, self.run_dir, self.seconds),
                **self.costs.total(),
            },
            weights_sha256=weights_sha256(whole_weights(self.run)),
            error=error,
            diverged=diverged,
        )
        if self.is_main:
            write_json(self.run_dir / RESULT_FILE, result.as_json())
            for name in (METRICS_FILE, RESULT_FILE, LOG_FILE):
                if (self.run_dir / name).is_file():
                    self.tracker.log_artifact(self.run_dir / name, "logs")
            self.tracker.close(status)
        return replace(result, notes=[*result.notes, *self.keeper.close(status)])

    def _take(self, result: StepResult) -> None:
        if result.failed:
            saved = self.keeper.saved_step
            folder = f"step-{saved:08d}" if saved >= 0 else "none yet"
            raise RunFailedError(
                f"{self.run_dir}: step {self.run.step + 1}: {result.describe_failure()}; the last "
                f"good checkpoint is kept ({folder}). Lower optimizer.learning_rate, set "
                "optimizer.max_grad_norm, or use training.precision: bf16 or fp32"
            )
        self.run.step += 1
        if self.run.world_size > 1 and self.run.config.training.budget.seconds is not None:
            agree_on_seconds(self.run.meter, self.run.device)
        self.progress.add(result.metrics())

    def _agree_on_stop(self) -> Literal["stopped", "pruned"] | None:
        request: StopOrder | None = self.stop.requested() if self.is_main else None
        if self.run.world_size == 1:
            return request.status if request else None
        # All ranks must leave the loop after the same step, or the next gradient sync hangs.
        code = torch.tensor([SIGNALS.index(request.status) if request else 0])
        code = code.to(self.run.device)
        torch.distributed.broadcast(code, src=0)
        return SIGNALS[int(code.item())]

    def _log(self, metrics: dict[str, float]) -> None:
        run = self.run
        metrics = {**metrics, **{f"compute/{k}": v for k, v in run.meter.summary().items()}}
        metrics |= {f"compute/{k}": v for k, v in self.costs.window().items()}
        metrics["compute/fraction"] = run.fraction
        metrics["train/learning_rate"] = run.optimizer.param_groups[0]["lr"]
        self._record(metrics, self._moment())

    def _moment(self) -> Moment:
        run = self.run
        return Moment(run.step, run.meter.forward_equivalents, run.fraction, self.seconds)

    def _record(self, metrics: dict[str, float], moment: Moment) -> None:
        if not self.is_main:
            return
        step, spent = moment.step, moment.forward_equivalents
        self.points.append(metrics, step=step, forward_equivalents=spent, seconds=moment.seconds)
        self.tracker.log_metrics(metrics, step=step, forward_equivalents=spent)

    def _probe(self) -> None:
        metrics = probe_run(self.run)
        if metrics:
            self.progress.metrics.update(metrics)
            self._record(metrics, self._moment())

    def _publish(self, metrics: dict[str, float], moment: Moment) -> None:
        """Record and report an evaluation at the moment that it belongs to."""
        if self.is_main and metrics:
            self.progress.metrics.update(metrics)
            self._record(metrics, moment)
        everything: dict[str, Any] = {
            **metrics,
            "step": moment.step,
            "compute/forward_equivalents": moment.forward_equivalents,
            "compute/fraction": moment.fraction,
        }
        with self.run.meter.timed("evaluation"):
            self.report(everything)
