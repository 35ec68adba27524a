"""The evaluations of a run: by the workers on the spot, or beside the training.

Beside the training, the EMA weights of the moment are written to a snapshot, an evaluator works on
one snapshot after the other, and results are recorded and reported at the step that they belong
to, in order. An evaluation that fails there, or hangs, is made by rank 0 at once; what has not
begun when the budget ends is, too. At most `MAX_PENDING` wait: then training waits for the oldest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from raysched.training.budget import picture_step
from raysched.training.evaluate_step import evaluate_run
from raysched.training.protocols import Evaluator, Tracker
from raysched.training.setup import Run
from raysched.training.snapshots import (
    delete_other_snapshots,
    drop_weights,
    evaluate_snapshot,
    grid_file,
    has_started,
    is_whole,
    last_sign,
    read_snapshot_result,
    snapshot_folder,
    write_snapshot,
)
from raysched.training.wrapping import averaged

log = logging.getLogger(__name__)

MAX_PENDING = 3
# How often a result is looked for while training goes on, and while nothing else is to be done.
POLL_S, WAIT_S = 0.2, 0.5
# How long training waits for an evaluation to begin, while there is training to do.
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Moment:
    """Where in the run an evaluation belongs.

    Attributes:
        step: optimizer steps done.
        forward_equivalents: compute spent.
        fraction: share of the budget spent.
        seconds: wall time of the run.
    """

    step: int
    forward_equivalents: int
    fraction: float
    seconds: float


# Records and reports an evaluation; called on every rank, with metrics on rank 0.
Publish = Callable[[dict[str, float], Moment], None]


class Evaluations:
    """One rank's view of the run's evaluations; the pending ones are the same on all ranks.

    Args:
        run: this rank's run.
        run_dir: the run's folder.
        tracker: of rank 0.
        evaluator: works beside the training; None: nobody does.
        publish: see `Publish`.

    Attributes:
        pending: evaluations that are not recorded yet, oldest first.
        looks: rises while one is waited for or made; a sign of life.
    """

    def __init__(
        self,
        run: Run,
        run_dir: Path,
        tracker: Tracker,
        evaluator: Evaluator | None,
        publish: Publish,
    ) -> None:
        self._run, self._run_dir, self._tracker, self._publish = run, run_dir, tracker, publish
        self._evaluator = evaluator
        self._beside = run.config.evaluation.placement == "background"
        self._working: Path | None = None
        self._next_look = self._since = self._signed = 0.0
        self._sign: int | None = None
        self.pending: list[Moment] = []
        self.looks = 0

    def restore(self, pending: list[Moment]) -> None:
        """Take up what a checkpoint says was pending."""
        self.pending = list(pending)
        if self._run.rank == 0 and (self._run_dir / "evaluations").is_dir():
            delete_other_snapshots(self._run_dir, {moment.step for moment in pending})

    def make(self, moment: Moment, *, final: bool) -> None:
        """Evaluate the EMA weights as they are now, or have it done; all ranks must call it."""
        if self._beside and not final:
            self._hand_over(moment)
            return
        self.collect(everything=True)
        self._publish(evaluate_run(self._run, self._run_dir, self._tracker, final=final), moment)

    def collect(self, *, everything: bool = False) -> None:
        """Record what is ready; all ranks must call it.

        Args:
            everything: wait for all that is pending.
        """
        # Short waits with an agreement after each: no collective takes as long as an evaluation.
        while self.pending:
            if self._agree(self._is_ready(wait=everything, patient=False)):
                self._record_oldest()
            elif not everything:
                return

    def close(self, *, finished: bool) -> None:
        """Stop what runs beside; the snapshots of an unfinished run stay for its resume."""
        if self._run.rank:
            return
        if self._evaluator is not None:
            self._evaluator.close()
        if self.pending:
            steps = ", ".join(str(moment.step) for moment in self.pending)
            log.warning("evaluations of step %s are still to be made: --resume makes them", steps)
        if finished:
            delete_other_snapshots(self._run_dir, set())

    def _hand_over(self, moment: Moment) -> None:
        run = self._run
        with run.meter.timed("evaluation"), averaged(run) as network:
            if run.rank == 0:
                write_snapshot(
                    self._run_dir, run.config, run.step, network.state_dict(), run.device.type
                )
        self.pending.append(moment)
        while len(self.pending) > MAX_PENDING:
            if self._agree(self._is_ready(wait=True, patient=True)):
                self._record_oldest()
        self.collect()

    def _agree(self, ready: bool) -> bool:
        """Rank 0's view on every rank; only while something is pending."""
        self._look()
        if self._run.world_size == 1:
            return ready
        flag = torch.tensor([int(ready)], device=self._run.device)
        torch.distributed.broadcast(flag, src=0)
        return bool(flag.item())

    def _is_ready(self, *, wait: bool, patient: bool) -> bool:
        """Whether the oldest is done; starts it, and makes it here if that has failed."""
        if self._run.rank or (not wait and time.monotonic() < self._next_look):
            return False
        self._next_look = time.monotonic() + POLL_S
        folder = snapshot_folder(self._run_dir, self.pending[0].step)
        if self._working is None:
            if read_snapshot_result(folder) is not None or not is_whole(folder):
                return True  # found by an earlier process, or lost, which is told
            if self._evaluator is None:
                return self._make_here(folder)
            self._evaluator.start(folder)
            self._working, self._sign = folder, None
            self._since = self._signed = time.monotonic()
        assert self._evaluator is not None
        with self._run.meter.timed("evaluation"):
            end = self._evaluator.poll(WAIT_S if wait else 0.0)
        if end is None:
            if self._has_no_place(folder, wait=wait, patient=patient) or self._hangs(folder):
                self._evaluator.close()
                return self._make_here(folder)
            return False
        self._working = None
        if end.error is None and read_snapshot_result(folder) is not None:
            return True
        log.warning(
            "step %d: the evaluation beside the training failed (%s); the worker makes it now",
            self.pending[0].step,
            end.error or "no result",
        )
        return self._make_here(folder)

    def _has_no_place(self, folder: Path, *, wait: bool, patient: bool) -> bool:
        """Take back what has not begun and is waited for: the workers may hold all there is."""
        if not wait or has_started(folder):
            return False
        return not (patient and time.monotonic() - self._since < PATIENCE_S)

    def _hangs(self, folder: Path) -> bool:
        """Whether what has begun has made no network call for `scaling.hang_timeout_s`."""
        limit, sign = self._run.config.scaling.hang_timeout_s, last_sign(folder)
        if sign != self._sign:
            self._sign, self._signed = sign, time.monotonic()
        if sign is None or limit is None or time.monotonic() - self._signed <= limit:
            return False
        log.warning(
            "step %d: the evaluation beside the training has not got on for %g s "
            "(scaling.hang_timeout_s); it is ended, and the worker makes it now",
            self.pending[0].step,
            limit,
        )
        return True

    def _make_here(self, folder: Path) -> bool:
        self._working = None
        with self._run.meter.timed("evaluation"):
            evaluate_snapshot(folder, self._look)
        return True

    def _look(self) -> None:
        self.looks += 1

    def _record_oldest(self) -> None:
        moment = self.pending.pop(0)
        metrics: dict[str, float] = {}
        if self._run.rank == 0:
            folder = snapshot_folder(self._run_dir, moment.step)
            result = read_snapshot_result(folder)
            if result is None:
                log.warning(
                    "step %d: its evaluation is lost: the snapshot %s is gone", moment.step, folder
                )
            else:
                metrics = result.metrics
                self._run.meter.forward("evaluation", result.num_forwards)
                self._run.meter.add_seconds("background", result.seconds)
                for note in result.notes:
                    log.warning("step %d: %s", moment.step, note)
                self._log_grid(moment)
                drop_weights(folder)
        self._publish(metrics, moment)

    def _log_grid(self, moment: Moment) -> None:
        import numpy as np
        from PIL import Image

        position = picture_step(self._run.config, moment.fraction, moment.forward_equivalents)
        with Image.open(grid_file(self._run_dir, moment.step)) as image:
            self._tracker.log_image("samples", np.asarray(image), step=position)
