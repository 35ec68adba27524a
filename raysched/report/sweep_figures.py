"""Further figures of a sweep: what matters, who survived, fidelity against diversity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from raysched.report.compare_figures import draw_parallel, shades_by_quality
from raysched.report.compared import ComparedRun
from raysched.report.figures import BASELINE, DPI, OTHER, WINNER
from raysched.tuning.display import headers
from raysched.tuning.importance import Importance
from raysched.tuning.records import TrialRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAIRS = (("precision", "recall"), ("density", "coverage"))
# Ends at compute that differ by less belong to the same rung.
SAME_RUNG = 0.04


def importance_figure(found: Sequence[Importance]) -> Figure:
    """Bars with the 10th to the 90th percentile over resampled trials."""
    figure, (axes,) = _figure(7.6, 0.9 + 0.42 * len(found), 1)
    shown = list(reversed(found))
    names = headers([item.key for item in shown])
    below = [max(0.0, item.share - item.low) for item in shown]
    above = [max(0.0, item.high - item.share) for item in shown]
    axes.barh(names, [i.share for i in shown], xerr=[below, above], color=BASELINE, capsize=3)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the variance of q (bars: 10th to 90th percentile)")
    return figure


def survival_figure(trials: Sequence[TrialRecord], *, budget: float) -> Figure:
    """How many candidates came how far.

    Args:
        trials: all trials.
        budget: forward equivalents of a full trial.
    """
    figure, (axes,) = _figure(7.6, 3.2, 1)
    candidates = [t for t in trials if not t.baseline and t.curve]
    ends = sorted(t.curve[-1].forward_equivalents / budget for t in candidates)
    rungs = _rungs([point.forward_equivalents / budget for t in candidates for point in t.curve])
    alive = [sum(end >= rung - SAME_RUNG for end in ends) for rung in rungs]
    bars = axes.bar([f"{rung:.0%}" for rung in rungs], alive, color=OTHER)
    axes.bar_label(bars, fontsize=9)
    axes.set_xlabel("share of the budget")
    axes.set_ylabel("candidates evaluated there")
    axes.set_ylim(0, max(alive, default=1) * 1.15)
    return figure


def fidelity_figure(runs: Sequence[ComparedRun], *, winner: str | None) -> Figure:
    """Fidelity against diversity: precision by recall, and density by coverage.

    Args:
        runs: with the metrics of their last evaluation.
        winner: name of the run to mark.
    """
    figure, panels = _figure(9.6, 4.2, len(PAIRS))
    for axes, (fidelity, diversity) in zip(panels, PAIRS, strict=True):
        for run in runs:
            x = run.metrics.get(f"quality/{diversity}", math.nan)
            y = run.metrics.get(f"quality/{fidelity}", math.nan)
            if math.isfinite(x) and math.isfinite(y):
                baseline = run.name.endswith("-baseline")
                colour = BASELINE if baseline else WINNER if run.name == winner else OTHER
                axes.plot(x, y, "s" if baseline else "o", color=colour, ms=8 if baseline else 6)
                axes.annotate(run.name, (x, y), xytext=(5, 4), textcoords="offset points", size=8)
        if not axes.lines:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.4")
            axes.set(xticks=[], yticks=[])
        axes.set_xlabel(f"{diversity} (diversity, higher is better)")
        axes.set_ylabel(f"{fidelity} (fidelity, higher is better)")
        axes.margins(0.15)
    return figure


def objectives_figure(
    trials: Sequence[TrialRecord], front: Sequence[int], directions: Mapping[str, str]
) -> Figure:
    """The trials in the plane of every two objectives, those that no other one beats in black.

    Args:
        trials: all trials; those with all objectives are drawn.
        front: numbers of the non-dominated ones.
        directions: objective -> min or max.
    """
    pairs = list(itertools.combinations(directions, 2))
    figure, panels = _figure(min(4.8 * len(pairs), 14.4), 4.4, len(pairs))
    shown = [t for t in trials if directions.keys() <= t.objectives.keys()]
    for axes, (across, up) in zip(panels, pairs, strict=True):
        for trial in shown:
            x, y = trial.objectives[across], trial.objectives[up]
            on_front = trial.number in front
            axes.plot(
                x, y, "s" if trial.baseline else "o",
                color=BASELINE if trial.baseline else "black" if on_front else OTHER,
                markerfacecolor=None if on_front else "white", ms=8 if trial.baseline else 6,
            )  # fmt: skip
            axes.annotate(
                f"{trial.number:03d}", (x, y), xytext=(6, 3), textcoords="offset points", size=8
            )
        for name, set_label in ((across, axes.set_xlabel), (up, axes.set_ylabel)):
            better = "lower" if directions[name] == "min" else "higher"
            set_label(f"{name} ({better} is better)")
        axes.margins(0.12)
    return figure


def parallel_figure(runs: Sequence[ComparedRun], keys: Sequence[str], label: str) -> Figure:
    """Settings and q as parallel coordinates."""
    figure, (axes,) = _figure(min(13.0, max(8.0, 1.05 * (len(keys) + 2))), 4.8, 1)
    draw_parallel(axes, runs, keys, shades_by_quality(runs), label)
    return figure


def _rungs(places: Sequence[float]) -> list[float]:
    """Places that many ends share, by rank; those close together are one."""
    rungs: list[float] = []
    for place in sorted(places):
        if not rungs or place - rungs[-1] > SAME_RUNG:
            rungs.append(place)
    return rungs


def _figure(width: float, height: float, columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in panels:
        axes.grid(visible=True, color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
