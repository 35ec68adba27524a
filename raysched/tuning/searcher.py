"""Ray Tune's searcher: the baseline first, then unfinished trials, points and proposals."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from raysched.config.structure import Structure
from raysched.config.sweep import SearchConfig, SweepConfig
from raysched.tuning.journal import Journal
from raysched.tuning.objectives import Objectives
from raysched.tuning.proposals import Proposals, quality_loss
from raysched.tuning.records import OBJECTIVE, TrialRecord, trial_name


class TrialSearcher(Searcher):  # type: ignore[misc]
    """Suggests `{"trial_number", "baseline", "assignments", "tracking_id"}` and journals it.

    The baseline is trial 0 and no point of the space, so the sampler never hears of it. Where the
    space holds settings that plain training has, too, as many teacher-forced trials as candidates
    are searched over those, by a sampler of their own, in turn with the candidates. How a trial
    ended is told by `raysched.tuning.monitor`, which sees errors too.

    Args:
        sweep: the sweep's config.
        journal: the sweep's journal; what it holds of an earlier session is not suggested again,
            except for trials that had not ended, which come first.
        folder: the folder of the trials' folders.
        structure: which settings go together; default: all.
        shared: the settings that plain training is tuned over; None: it is not.
        objectives: what a trial is worth; default: its q.
        allowed: whether the run model accepts the settings; told by `baseline` for which kind.
        open_run: opens a trial's run in the tracking store and returns its id.
        stopping: whether the sweep was asked to stop.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        journal: Journal,
        *,
        folder: Path,
        structure: Structure | None = None,
        shared: Structure | None = None,
        objectives: Objectives | None = None,
        allowed: Callable[..., bool] = lambda _, *, baseline: True,
        open_run: Callable[[TrialRecord], str] = lambda _: "",
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="min")
        past = journal.ordered()
        self.proposals = Proposals(
            structure or sweep.space,
            sweep.search,
            losses=objectives.losses if objectives else quality_loss,
            num_losses=len(objectives.each) if objectives else 1,
            allowed=partial(allowed, baseline=False),
            past=past,
        )
        self._shared = shared
        if shared is not None:
            # Teacher forcing is pruned by nobody and judged by the same numbers.
            plain = sweep.search.model_copy(update={"points": _points(sweep.search, shared)})
            forced = [replace(r, baseline=False) for r in past if r.baseline and r.number]
            self.forced = Proposals(
                shared,
                plain,
                losses=objectives.losses if objectives else quality_loss,
                num_losses=len(objectives.each) if objectives else 1,
                allowed=partial(allowed, baseline=True),
                past=forced,
            )
        self._journal = journal
        self._folder = folder
        self._num_samples = sweep.search.num_samples
        self._open_run = open_run
        self._stopping = stopping
        self._unfinished = [record for record in past if not record.ended]
        self._asked_at: dict[int, float] = {}
        for record in self._unfinished:
            if not record.baseline:
                self.proposals.ask_again(record)
            elif record.number and shared is not None:
                self.forced.ask_again(record)

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles what it was given; its snapshots are never read, the journal is.
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial's config, or Tune's mark that there is none."""
        record = None if self._stopping() else self._next()
        if record is None:
            return str(Searcher.FINISHED)
        if not record.curve:
            self._asked_at[record.number] = time.monotonic()
        return record.as_trial()

    def fixed_seconds(self, number: int, work: float) -> float | None:
        """What a trial that has just ended cost beside its work, from proposal to end.

        Args:
            number: the trial's.
            work: seconds of training, evaluation and checkpoints.

        Returns:
            Seconds; None for one that went on with an earlier session's work, or did none.
        """
        asked = self._asked_at.pop(number, None)
        return time.monotonic() - asked - work if asked is not None and work else None

    def requeue(self, record: TrialRecord) -> None:
        """Suggest a trial once more, which Ray lost with its node."""
        self._asked_at.pop(record.number, None)
        self._unfinished.append(record)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: the monitor tells the sampler, from the trial's last report or its error."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing but a mark: the journal is what a resumed sweep reads."""
        Path(checkpoint_path).write_text(str(self._journal.path), encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""

    def _next(self) -> TrialRecord | None:
        if self._unfinished:
            return self._unfinished.pop(0)
        records = self._journal.records
        baselines = sum(record.baseline for record in records.values())
        if not baselines:
            return self._suggested(TrialRecord(0, baseline=True))
        number, candidates = max(records) + 1, len(records) - baselines
        if self._shared is not None and baselines < min(candidates + 1, self._num_samples):
            assignments = self.forced.ask(number)
            # A small space of its own may be used up sooner.
            if assignments is not None:
                return self._suggested(TrialRecord(number, True, assignments))
        if candidates >= self._num_samples:
            return None
        assignments = self.proposals.ask(number)
        if assignments is None:
            return None
        return self._suggested(TrialRecord(number, assignments=assignments))

    def tell(self, record: TrialRecord) -> None:
        """Tell the sampler that proposed a trial how it ended; trial 0 was proposed by none."""
        if not record.baseline:
            self.proposals.tell(record)
        elif record.number and self._shared is not None:
            self.forced.tell(record)

    def _suggested(self, record: TrialRecord) -> TrialRecord:
        record.run_dir = str(self._folder / trial_name(record.number, baseline=record.baseline))
        return self._journal.append(
            "suggested",
            record.number,
            baseline=record.baseline,
            assignments=record.assignments,
            run_dir=record.run_dir,
            tracking_id=self._open_run(record),
        )


def _points(search: SearchConfig, shared: Structure) -> tuple[dict[str, Any], ...]:
    """The user's first points, as far as plain training has their settings."""
    cut = [{k: v for k, v in point.items() if k in shared.space} for point in search.points]
    return tuple(point for n, point in enumerate(cut) if point and point not in cut[:n])
