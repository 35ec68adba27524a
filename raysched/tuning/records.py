"""What is known about the trials of a sweep, and what a sweep ends with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from raysched.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE

TrialStatus = Literal["waiting", "running", "finished", "pruned", "failed", "stopped"]
SweepStatus = Literal["finished", "stopped", "failed"]
Answer = Literal["rollouts_pay", "other_method_pays", "no_clear_winner", "rollouts_do_not_pay"]

# Names of the metrics that a trial reports.
OBJECTIVE = "objective"
METRICS = "metrics"
FURTHER_CURVES = "further_curves"
Q = "quality/q"
Q_LOW = "quality/q_low"
Q_HIGH = "quality/q_high"
Q_EPSILON_SCALED = "quality/q_epsilon_scaled"
FORWARD_EQUIVALENTS = "compute/forward_equivalents"
QUALITY = "quality/"
# These have fields of their own in a record.
OWN_FIELD = frozenset({Q, Q_LOW, Q_HIGH, Q_EPSILON_SCALED})


@dataclass(frozen=True)
class Point:
    """One evaluation of a trial: quality at the compute spent so far.

    Attributes:
        forward_equivalents: compute spent, evaluation excluded.
        q: quality, lower is better.
        metrics: what stands beside q, by name without `quality/`: precision, recall, density,
            coverage, class_accuracy, self_consistency, kid/nfe_5, …; empty in old journals.
    """

    forward_equivalents: float
    q: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class TrialRecord:
    """One trial: what it tries, how far it came, how good it is.

    Attributes:
        number: 0 is the baseline's; the others count from 1 in the order of their proposal.
        baseline: whether it is the teacher-forced run at the same budget.
        assignments: dotted key -> value that differs from the base run.
        status: waiting, running, finished (budget spent), pruned, failed or stopped (resumable).
        q: quality at the last evaluation, lower is better; the mean over seeds once finished.
        q_low: lower end of its bootstrap interval.
        q_high: upper end of its bootstrap interval.
        q_epsilon_scaled: q of the same weights sampled with Epsilon Scaling, which costs no
            training; None before the end or where the evaluation leaves it out.
        forward_equivalents: compute spent per seed, evaluation excluded.
        seconds: training time over all seeds.
        run_dir: the trial's folder.
        error: why it failed, or why it was pruned, in one line.
        diverged: it failed because numbers stopped being finite.
        out_of_memory: it failed because memory ran out.
        fixed_seconds: what it cost beside training, evaluation and checkpoints: waiting for its
            process, imports, data, network, Tune; None where it went on from an earlier session.
        work_seconds: training, evaluation and checkpoints.
        new_process: whether its process was started for it rather than taken over.
        tracking_id: its run in the tracking store, empty without one.
        curve: its evaluations, by compute; those of the first seed.
        further_curves: the evaluations of the other seeds, once it has ended.
        metrics: what stands beside q at the last evaluation, named as in `Point`; means over the
            seeds once it has ended.
        objectives: name -> value of what the sweep asks for, once it has reached its budget.
        censored: names of those whose target was never reached.
    """

    number: int
    baseline: bool = False
    assignments: dict[str, Any] = field(default_factory=dict)
    status: TrialStatus = "waiting"
    q: float | None = None
    q_low: float | None = None
    q_high: float | None = None
    q_epsilon_scaled: float | None = None
    forward_equivalents: float = 0.0
    seconds: float = 0.0
    run_dir: str = ""
    error: str | None = None
    diverged: bool = False
    out_of_memory: bool = False
    fixed_seconds: float | None = None
    work_seconds: float = 0.0
    new_process: bool = False
    tracking_id: str = ""
    curve: list[Point] = field(default_factory=list)
    further_curves: list[list[Point]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    objectives: dict[str, float] = field(default_factory=dict)
    censored: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the trial and of its folder."""
        return trial_name(self.number, baseline=self.baseline)

    @property
    def ended(self) -> bool:
        """Whether nothing is left to run."""
        return self.status in ("finished", "pruned", "failed")

    @property
    def infeasible(self) -> str | None:
        """Why its settings can't be trained, which is a result and not retried; None else."""
        if self.status != "failed":
            return None
        if self.out_of_memory:
            return "out of memory"
        return "diverged" if self.diverged else None

    def as_trial(self) -> dict[str, Any]:
        """What the trial's process is told."""
        return {
            "trial_number": self.number,
            "baseline": self.baseline,
            "assignments": self.assignments,
            "tracking_id": self.tracking_id,
        }

    def add_point(self, point: Point) -> None:
        """Add an evaluation; a resumed trial may repeat the last ones, which replaces them."""
        spent = point.forward_equivalents
        self.curve = [p for p in self.curve if p.forward_equivalents < spent] + [point]
        self.forward_equivalents = spent
        self.q = point.q
        self.metrics = dict(point.metrics)

    def as_json(self) -> dict[str, Any]:
        """All fields and the name as JSON types; what is not finite becomes null."""
        out = asdict(self)
        for name in ("curve", "further_curves", "diverged", "out_of_memory", "tracking_id"):
            del out[name]
        out["infeasible"] = self.infeasible
        numbers = {key: _finite(value) for key, value in out.items() if isinstance(value, float)}
        for name in ("metrics", "objectives"):
            out[name] = {key: _finite(value) for key, value in out[name].items()}
        return {"number": self.number, "name": self.name, **out, **numbers}


def the_baseline(trials: Iterable[TrialRecord]) -> TrialRecord | None:
    """The teacher-forced trial that the others are compared with: the best that has finished.

    Trial 0 wins a tie, and stands for all before one has finished.
    """
    forced = [trial for trial in trials if trial.baseline]
    done = [t for t in forced if t.status == "finished" and t.q is not None and isfinite(t.q)]
    return min(done or forced, key=lambda t: (t.q if done else 0.0, t.number), default=None)


def further_metrics(reported: Mapping[str, Any]) -> dict[str, float]:
    """What an evaluation reported beside q, named without `quality/`."""
    return {
        key.removeprefix(QUALITY): float(value)
        for key, value in reported.items()
        if key.startswith(QUALITY) and key not in OWN_FIELD and value is not None
    }


def trial_name(number: int, *, baseline: bool) -> str:
    """`000-baseline`, `001`, …"""
    return f"{number:03d}-baseline" if baseline else f"{number:03d}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Verdict:
    """The answer to the question whether rollouts pay.

    Attributes:
        text: the answer in words.
        answer: the same as a keyword.
        difference: q of the baseline minus q of the best candidate; positive: the candidate wins.
        low: lower end of its paired bootstrap interval.
        high: upper end of its paired bootstrap interval.
        p_value: of the best candidate, after Holm's correction over the compared candidates.
        num_seeds: training seeds per trial.
        num_compared: candidates that reached the budget.
        indicative: the seeds don't carry more than a hint.
        candidate: number of the best candidate, which the difference is about.
    """

    text: str
    answer: Answer
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    num_seeds: int = 1
    num_compared: int = 0
    indicative: bool = True
    candidate: int | None = None


@dataclass(frozen=True)
class SweepResult:
    """The end of a sweep.

    Attributes:
        sweep: its name.
        status: finished, stopped (resumable) or failed (the baseline failed).
        folder: its folder.
        trials: all trials, the baseline among them, by number.
        winner: the candidate that beats the baseline by the verdict; else the baseline itself.
        verdict: whether rollouts pay; None for a sweep that was stopped or has no baseline.
        files: what was written, name -> path (or command).
        error: why the sweep failed.
        budget: forward equivalents of every trial.
        pareto: of a search for several objectives: front, hypervolume, reference; else None.
        fixed_cost: seconds per trial beside training and evaluation, see `fixed_cost`.
    """

    sweep: str
    status: SweepStatus
    folder: Path
    trials: list[TrialRecord]
    winner: TrialRecord | None = None
    verdict: Verdict | None = None
    files: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    budget: float = 0.0
    pareto: dict[str, Any] | None = None
    fixed_cost: dict[str, Any] | None = None

    @property
    def baseline(self) -> TrialRecord | None:
        """The teacher-forced trial; of several, where it is tuned, the best."""
        return the_baseline(self.trials)

    @property
    def exit_code(self) -> int:
        """The process exit code that goes with the status."""
        codes = {"finished": EXIT_OK, "stopped": EXIT_RESUMABLE, "failed": EXIT_FAILED}
        return codes[self.status]

    def as_json(self) -> dict[str, Any]:
        """The result as JSON types."""
        baseline, winner = self.baseline, self.winner
        return {
            "sweep": self.sweep,
            "status": self.status,
            "output_dir": str(self.folder),
            "budget_forward_equivalents": self.budget,
            "trials": [trial.as_json() for trial in self.trials],
            "baseline": baseline.as_json() if baseline else None,
            "winner": winner.as_json() if winner else None,
            "verdict": _verdict_json(self.verdict) if self.verdict else None,
            "pareto": self.pareto,
            "fixed_cost": self.fixed_cost,
            "files": self.files,
            "error": self.error,
        }


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    return {
        key: _finite(value) if isinstance(value, float) else value
        for key, value in asdict(verdict).items()
    }
