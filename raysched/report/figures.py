"""Figures of a sweep: what quality costs, and how it grew."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raysched.tuning.display import settings_text
from raysched.tuning.records import TrialRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by everyone.
BASELINE, WINNER, OTHER, FAILED = "#0072B2", "#D55E00", "#7F7F7F", "#CC79A7"
# By the number of panels.
SIZES_INCHES = {1: (7.6, 4.8), 2: (9.6, 4.8)}
DPI = 130
# More names than this hide each other.
MAX_NAMES = 12
MAX_RANKED = 25
LOG_FROM_RATIO = 5


def pareto_figure(
    trials: Sequence[TrialRecord], *, budget: float, label: str, winner: int | None
) -> Figure:
    """Quality against compute with the non-dominated front; beside it who reached the budget.

    Args:
        trials: all trials.
        budget: forward equivalents of a full trial.
        label: name of q for the axes.
        winner: number of the trial to mark.
    """
    figure, (axes, ranking) = _figure(columns=2)
    shown = [t for t in trials if _drawable(t)]
    for trial in shown:
        _draw_point(axes, trial, winner)
    valid = [t for t in shown if t.status != "failed"]
    # The last step is whole, so that trials end a little past the budget: that is no difference.
    front = non_dominated([(min(_spent(t), budget), _q(t)) for t in valid])
    if front:
        # A step: between two trials nothing better than the cheaper one is known.
        x, y = zip(*front, strict=True)
        axes.step([*x, budget * 1.05], [*y, y[-1]], where="post", color="black", lw=1, ls="--")
    _name_points(axes, [t for t in shown if t.status != "finished"], winner)
    ends = [t.q_low for t in shown if t.q_low is not None and math.isfinite(t.q_low)]
    _scale(axes.yaxis, axes.set_yscale, [*ends, *map(_q, shown)])
    axes.set_ylabel(f"{label} (lower is better)")
    axes.set_title("All trials and the non-dominated front", fontsize=10)
    _draw_ranking(ranking, [t for t in shown if t.status == "finished"], winner, label)
    _finish(axes, shown, budget, winner)
    return figure


def curves_figure(
    trials: Sequence[TrialRecord], *, budget: float, label: str, winner: int | None
) -> Figure:
    """Quality at every evaluation against compute, one line per trial.

    Args:
        trials: all trials.
        budget: forward equivalents of a full trial.
        label: name of q for the axis.
        winner: number of the trial to mark.
    """
    figure, (axes,) = _figure(columns=1)
    shown = [t for t in trials if any(math.isfinite(point.q) for point in t.curve)]
    for trial in shown:
        colour, marker = _style(trial, winner)
        special = trial.baseline or trial.number == winner
        points = [point for point in trial.curve if math.isfinite(point.q)]
        axes.plot(
            [point.forward_equivalents for point in points],
            [point.q for point in points],
            color=colour,
            marker=marker,
            markersize=6 if special else 4,
            lw=2 if special else 1,
            ls="-" if trial.status != "pruned" else ":",
            alpha=1.0 if special else 0.8,
            zorder=3 if special else 2,
        )
    values = [point.q for trial in shown for point in trial.curve if math.isfinite(point.q)]
    _scale(axes.yaxis, axes.set_yscale, values)
    axes.set_ylabel(f"{label} (lower is better)")
    axes.set_title("Quality as compute is spent (dotted: stopped early)", fontsize=10)
    _finish(axes, shown, budget, winner)
    return figure


def non_dominated(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, by the first; lower is better."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG."""
    figure.savefig(path, dpi=DPI)
    return path


def _figure(*, columns: int) -> tuple[Figure, Sequence[Axes]]:
    # Not pyplot: it keeps every figure, and picks a backend that may want a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZES_INCHES[columns], layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [3, 2][:columns]
    axes = figure.subplots(1, columns, squeeze=False, gridspec_kw={"width_ratios": ratios})
    for each in axes[0]:
        each.grid(visible=True, color="0.92")
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def _scale(axis: Axis, set_scale: Callable[[str], None], values: Sequence[float]) -> None:
    """A log axis where values span much; KID may be negative, then it stays linear."""
    from matplotlib.ticker import LogFormatter, NullFormatter

    if values and min(values) > 0 and max(values) / min(values) > LOG_FROM_RATIO:
        set_scale("log")
        axis.set_major_formatter(LogFormatter(labelOnlyBase=False))
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        if max(values) / min(values) > 100:
            axis.set_minor_formatter(NullFormatter())


def _q(trial: TrialRecord) -> float:
    assert trial.q is not None, "only trials with a quality are drawn"
    return trial.q


def _spent(trial: TrialRecord) -> float:
    """The compute at which q was measured; a pruned trial trains on for a few steps."""
    return trial.curve[-1].forward_equivalents if trial.curve else trial.forward_equivalents


def _draw_point(axes: Axes, trial: TrialRecord, winner: int | None) -> None:
    colour, marker = _style(trial, winner)
    special = trial.baseline or trial.number == winner
    axes.errorbar(
        _spent(trial),
        _q(trial),
        yerr=_error_bar(trial),
        fmt=marker,
        color=colour,
        markersize=8 if special else 5,
        capsize=3,
        elinewidth=1,
        zorder=3 if special else 2,
    )


def _draw_ranking(
    axes: Axes, finished: Sequence[TrialRecord], winner: int | None, label: str
) -> None:
    """The trials that reached the budget, best at the top, with their intervals."""
    ranked = sorted(finished, key=_q)[:MAX_RANKED]
    for row, trial in enumerate(ranked):
        colour, marker = _style(trial, winner)
        axes.errorbar(
            _q(trial), row, xerr=_error_bar(trial), fmt=marker, color=colour, capsize=3, ms=7
        )
    names = [trial.name.removeprefix("000-") for trial in ranked]
    axes.set_yticks(range(len(ranked)), names)
    axes.set_ylim(max(len(ranked), 1) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.tick_params(axis="x", labelsize=8)
    axes.locator_params(axis="x", nbins=5)
    axes.set_title("At the full budget", fontsize=10)


def _drawable(trial: TrialRecord) -> bool:
    return trial.q is not None and math.isfinite(trial.q) and trial.forward_equivalents > 0


def _style(trial: TrialRecord, winner: int | None) -> tuple[str, str]:
    if trial.baseline:
        return BASELINE, "s"
    if trial.number == winner:
        return WINNER, "*"
    return (FAILED, "x") if trial.status == "failed" else (OTHER, "o")


def _error_bar(trial: TrialRecord) -> list[list[float]] | None:
    if trial.q is None or trial.q_low is None or trial.q_high is None:
        return None
    ends = (trial.q - trial.q_low, trial.q_high - trial.q)
    return [[max(0.0, end) if math.isfinite(end) else 0.0] for end in ends]


def _name_points(axes: Axes, shown: Sequence[TrialRecord], winner: int | None) -> None:
    """Numbers beside the points; those of equal compute alternate between left and right."""
    if len(shown) > MAX_NAMES:
        shown = [t for t in shown if t.baseline or t.number == winner]
    by_quality = sorted(shown, key=lambda t: (round(_spent(t), -3), _q(t)))
    for index, trial in enumerate(by_quality):
        left = index % 2 == 1
        axes.annotate(
            f"{trial.number:03d}",
            (_spent(trial), _q(trial)),
            xytext=(-8 if left else 8, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=8,
            color=_style(trial, winner)[0],
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )


def _finish(axes: Axes, shown: Sequence[TrialRecord], budget: float, winner: int | None) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel("compute, forward equivalents")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.axvline(budget, color="0.8", lw=1, zorder=0)
    axes.set_xlim(0, budget * 1.08)
    entries = {}
    for trial in shown:
        if trial.baseline:
            name = "teacher forcing (baseline)"
        elif trial.number == winner:
            name = f"{trial.number:03d} winner: {settings_text(trial)}"
        else:
            name = "failed" if trial.status == "failed" else "other trials"
        colour, marker = _style(trial, winner)
        entries[_wrapped(name)] = Line2D([], [], color=colour, marker=marker, ls="", markersize=7)
    if entries:
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside lower center",
            fontsize=8,
            ncols=min(3, len(entries)),
            frameon=False,
        )


def _wrapped(text: str, width: int = 44) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
