"""Figures of a comparison: settings as parallel coordinates, quality against compute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raysched.report.compared import ComparedRun, numeric
from raysched.report.figures import DPI
from raysched.tuning.display import headers, value_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More lines than this are told apart by colour alone.
MAX_NAMED = 12
COLOURS = "viridis_r"
LOG_FROM_RATIO = 20.0


def comparison_figure(runs: Sequence[ComparedRun], keys: Sequence[str], label: str) -> Figure:
    """Above, the differing settings and q as parallel coordinates; below, q against compute.

    Args:
        runs: at least one.
        keys: dotted keys of the settings to show.
        label: name of q.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = max(8.0, 1.5 * (len(keys) + 2))
    figure = Figure(figsize=(min(width, 22.0), 8.4), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1)
    colours = shades_by_quality(runs)
    draw_parallel(above, runs, keys, colours, label)
    _draw_curves(below, runs, colours, label)
    return figure


def draw_parallel(
    axes: Axes,
    runs: Sequence[ComparedRun],
    keys: Sequence[str],
    colours: Sequence[Any],
    label: str,
) -> None:
    """One vertical line per setting and one for q; each run is a line across those it uses."""
    settings = [run.settings(keys) for run in runs]
    columns: list[list[Any]] = [[values.get(key) for values in settings] for key in keys]
    qualities = [run.q if run.q is not None else math.nan for run in runs]
    names = [*headers(keys), label]
    heights = [
        _positions(axes, place, column) for place, column in enumerate([*columns, qualities])
    ]
    for index, colour in enumerate(colours):
        points = [(x, column[index]) for x, column in enumerate(heights)]
        shown = [(x, y) for x, y in points if math.isfinite(y)]
        axes.plot(*zip(*shown, strict=True), color=colour, lw=1.6, alpha=0.85)
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=20, ha="right")
    axes.set_xlim(-0.3, len(names) - 0.4)
    axes.set_ylim(-0.06, 1.06)
    axes.set_yticks([])
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.set_title("Settings that differ, and quality (dark is better)", fontsize=10)


def _positions(axes: Axes, place: int, values: Sequence[Any]) -> list[float]:
    """Heights in [0, 1] of a column's values, with the column's line and labels drawn."""
    axes.axvline(place, color="0.75", lw=1, zorder=0)
    numbers = [numeric(value) for value in values]
    if all(
        number is not None or value is None for number, value in zip(numbers, values, strict=True)
    ):
        return _numeric_positions(axes, place, numbers)
    known = dict.fromkeys(value_text(value) for value in values if value is not None)
    heights = {text: row / max(1, len(known) - 1) for row, text in enumerate(known)}
    for text, height in heights.items():
        _label(axes, place, height, text)
    return [math.nan if value is None else heights[value_text(value)] for value in values]


def _numeric_positions(axes: Axes, place: int, values: Sequence[float | None]) -> list[float]:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return [math.nan] * len(values)
    low, high = min(finite), max(finite)
    log = low > 0 and high / low > LOG_FROM_RATIO
    scale = math.log if log else float
    span = scale(high) - scale(low)
    _label(axes, place, 0.0 if span else 0.5, f"{low:.4g}")
    if span:
        _label(axes, place, 1.0, f"{high:.4g}")

    def position(value: float | None) -> float:
        if value is None or not math.isfinite(value):
            return math.nan
        return (scale(value) - scale(low)) / span if span else 0.5

    return [position(value) for value in values]


def _label(axes: Axes, place: int, height: float, text: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
    axes.annotate(
        text,
        (place, height),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8,
        va="center",
        bbox=box,
        zorder=5,
    )


def _draw_curves(
    axes: Axes, runs: Sequence[ComparedRun], colours: Sequence[Any], label: str
) -> None:
    from matplotlib.ticker import EngFormatter

    for run, colour in zip(runs, colours, strict=True):
        points = [point for point in run.curve if math.isfinite(point.q)]
        if points:
            x = [point.forward_equivalents for point in points]
            y = [point.q for point in points]
            axes.plot(x, y, color=colour, marker="o", ms=4, lw=1.4, label=run.name)
    values = [p.q for run in runs for p in run.curve if math.isfinite(p.q)]
    if values and min(values) > 0 and max(values) / min(values) > LOG_FROM_RATIO:
        axes.set_yscale("log")
    axes.grid(visible=True, color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("compute, forward equivalents")
    axes.set_ylabel(f"{label} (lower is better)")
    axes.set_title("Quality against compute", fontsize=10)
    if values and len(runs) <= MAX_NAMED:
        axes.legend(fontsize=8, frameon=False)


def shades_by_quality(runs: Sequence[ComparedRun]) -> list[Any]:
    """By rank of q: the best is the darkest; grey where there is no quality yet."""
    from matplotlib import colormaps

    known = sorted({run.q for run in runs if run.q is not None and math.isfinite(run.q)})
    shades = colormaps[COLOURS]
    colours: list[Any] = []
    for run in runs:
        if run.q is None or not math.isfinite(run.q):
            colours.append("0.7")
        else:
            colours.append(shades(1.0 - 0.85 * known.index(run.q) / max(1, len(known) - 1)))
    return colours
