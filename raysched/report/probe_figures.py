"""Figures of the exposure-bias probe: populations along the path, maps of drift, quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raysched.evaluation.bootstrap import Interval
from raysched.evaluation.probe import Key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

Found = Mapping[Key, Interval]

# Okabe and Ito's colours: told apart by everyone; run by run, the same in all figures.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FLOOR_COLOUR = "0.6"
WIDTH_INCHES = 10.0
BANDS = ("mean and lowest", "low frequencies", "middle frequencies", "highest frequencies")
NOISE_TO_DATA = "path time t   (sampling runs to the right: 1 = noise, 0 = data)"


def population_figure(labels: Sequence[str], found: Sequence[Found]) -> Figure:
    """Sampled against forward states: energy distance, norms, spread and band energies.

    Args:
        labels: of the runs.
        found: their numbers with intervals.
    """
    bands = sorted({k.statistic for each in found for k in each if k.statistic.startswith("band")})
    # Half the longest rollout: the whole one fits on half of the path only.
    k = (max(key.k or 0 for key in found[0]) + 1) // 2
    figure, cells = _figure(2, 4, (11.0, 6.6))
    energy, norm, spread, delta = cells[0]
    for run, each in enumerate(found):
        _line(energy, run, _series(each, "energy"))
        _line(norm, run, _series(each, "prediction_norm_ratio"))
        _line(spread, run, _series(each, "spread_excess", k))
        _line(delta, run, _series(each, "delta", k), band=False)
    _dashed(energy, _series(found[0], "energy_floor")[[0, 3]])
    _dashed(spread, _series(found[0], "spread_excess_floor", k)[:2])
    _dashed(delta, _series(found[0], "delta_floor", k)[:2])
    delta.set_yscale("log")
    energy.set_title("energy distance,\nsampled to forward")
    norm.set_title("prediction norm,\nsampled / forward")
    spread.set_title(f"noise spread minus forward's,\n{k}-step rollouts")
    delta.set_title(f"δ of ADM-ES,\n{k}-step rollouts")
    for axes, band in zip(cells[1], bands, strict=False):
        for run, each in enumerate(found):
            _line(axes, run, _series(each, band))
        axes.set_title(f"power, {BANDS[int(band.split('_')[1])]},\nsampled / forward")
    for axes, level in zip([*cells[1], norm, spread], (1, 1, 1, 1, 1, 0), strict=True):
        axes.axhline(level, color="0.35", lw=1, zorder=1.5)
    for axes in [*cells[0], *cells[1]]:
        _time_axis(axes)
    for axes in cells[1][len(bands) :]:
        axes.set_axis_off()
    figure.supxlabel(NOISE_TO_DATA, fontsize=10)
    _legend(figure, labels, floor="floor: chance (energy) or the closed-form denoiser")
    return figure


def drift_figure(labels: Sequence[str], found: Sequence[Found]) -> Figure:
    """Maps over target time and rollout length: drift, its excess, and populations.

    Args:
        labels: of the runs.
        found: their numbers with intervals.
    """
    columns = (
        ("drift", "RMS drift"),
        ("drift_excess", "RMS drift beyond the floor"),
        ("rollout_energy", "energy distance to forward"),
    )
    rows = len(found) + 1
    figure, cells = _figure(rows, 3, (WIDTH_INCHES, 1.2 + 2.1 * rows), grid=False)
    for column, (statistic, title) in enumerate(columns):
        maps = [_map(each, statistic) for each in found]
        if f"{statistic}_floor" in {key.statistic for key in found[0]}:
            maps.append(_map(found[0], f"{statistic}_floor"))
        norm = _norm(statistic, [grid for _, _, grid in maps])
        shown = [cells[row][column] for row in range(len(maps))]
        for axes, content in zip(shown, maps, strict=True):
            image = _draw_map(axes, content, norm)
        extend = "both" if statistic == "drift_excess" else "neither"
        figure.colorbar(image, ax=shown, shrink=0.9, pad=0.02, extend=extend).ax.tick_params(
            labelsize=8
        )
        cells[0][column].set_title(title)
    cells[-1][1].set_axis_off()
    for row, label in enumerate([*labels, "closed-form floor"]):
        cells[row][0].set_ylabel(f"{label}\nrollout steps k", fontsize=9)
    figure.supxlabel("t on arrival   (1 = noise, 0 = data)", fontsize=10)
    return figure


def quality_figure(labels: Sequence[str], found: Sequence[Found], metric: str) -> Figure:
    """Quality against the number of network evaluations.

    Args:
        labels: of the runs.
        found: their numbers with intervals.
        metric: name of q for the axis.
    """
    figure, ((axes,),) = _figure(1, 1, (7.6, 4.8))
    ticks: list[int] = []
    for run, each in enumerate(found):
        keys = sorted((k for k in each if k.statistic == "q"), key=lambda key: key.nfe or 0)
        # Side by side where intervals would cover each other.
        ticks = [key.nfe or 0 for key in keys]
        shift = 1 + 0.03 * (run - (len(found) - 1) / 2)
        ends = [each[key] for key in keys]
        axes.errorbar(
            [nfe * shift for nfe in ticks],
            [end.value for end in ends],
            yerr=[
                [max(0.0, end.value - end.low) for end in ends],
                [max(0.0, end.high - end.value) for end in ends],
            ],
            color=COLOURS[run % len(COLOURS)],
            marker=MARKERS[run % len(MARKERS)],
            capsize=3,
            lw=1.5,
        )
    axes.axhline(0, color="0.3", lw=0.8)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(nfe) for nfe in ticks])
    axes.minorticks_off()
    axes.set_xlabel("network evaluations per sample (NFE)")
    axes.set_ylabel(f"{metric} (lower is better)")
    axes.set_title("Quality against network evaluations")
    _legend(figure, labels)
    return figure


def _figure(
    rows: int, columns: int, size: tuple[float, float], *, grid: bool = True
) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    cells: list[list[Axes]] = [list(row) for row in figure.subplots(rows, columns, squeeze=False)]
    for axes in (each for row in cells for each in row):
        axes.title.set_fontsize(10)
        axes.tick_params(labelsize=8)
        if grid:
            axes.grid(visible=True, color="0.92")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    return figure, cells


def _series(found: Found, statistic: str, k: int | None = None) -> NDArray[np.float64]:
    """(4, T): t, value, low, high; by falling t."""
    rows = [
        (key.t, *vars(end).values())
        for key, end in found.items()
        if key.statistic == statistic and key.k == k
    ]
    return np.array(sorted(rows, reverse=True), dtype=np.float64).reshape(-1, 4).T


def _line(axes: Axes, run: int, series: NDArray[np.float64], *, band: bool = True) -> None:
    t, value, low, high = series
    colour = COLOURS[run % len(COLOURS)]
    marker = MARKERS[run % len(MARKERS)]
    axes.plot(t, value, color=colour, marker=marker, markersize=3, lw=1.5)
    if band:
        axes.fill_between(t, low, high, color=colour, alpha=0.18, lw=0)


def _dashed(axes: Axes, line: NDArray[np.float64]) -> None:
    axes.plot(line[0], line[1], color=FLOOR_COLOUR, lw=1.5, ls="--", zorder=1)


def _time_axis(axes: Axes) -> None:
    axes.set_xlim(1.02, -0.02)
    axes.set_xticks([1, 0.75, 0.5, 0.25, 0], ["1", ".75", ".5", ".25", "0"])


Map = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def _map(found: Found, statistic: str) -> Map:
    """Target times (falling), step counts, and values (K, T), NaN where there is no rollout."""
    cells = {(k.t, k.k): end.value for k, end in found.items() if k.statistic == statistic}
    times = sorted({float(t) for t, _ in cells if t is not None}, reverse=True)
    steps = sorted({int(k) for _, k in cells if k is not None})
    grid = np.array([[cells.get((t, k), np.nan) for t in times] for k in steps])
    return np.array(times), np.array(steps, dtype=np.float64), grid


def _norm(statistic: str, grids: Sequence[NDArray[np.float64]]) -> Normalize:
    """Common colours of all maps of a statistic."""
    from matplotlib.colors import Normalize, PowerNorm

    high = max(max(float(np.nanmax(grid)) for grid in grids), 1e-9)
    if statistic == "drift_excess":
        # Far below the floor, near the data, the colours saturate: what matters lies above it.
        typical = max(float(np.nanmedian(np.abs(grid))) for grid in grids)
        reach = max(high, 0.1 * typical)
        return Normalize(-reach, reach)
    if statistic == "rollout_energy":
        # Square roots: models far apart are seen together. Estimates below 0 are chance.
        return PowerNorm(0.5, vmin=0.0, vmax=high, clip=True)
    return Normalize(0.0, high)


def _draw_map(axes: Axes, content: Map, norm: Normalize) -> QuadMesh:
    times, steps, grid = content
    colours = "RdBu_r" if norm.vmin else "viridis"
    image = axes.pcolormesh(times, steps, grid, shading="nearest", cmap=colours, norm=norm)
    axes.set_facecolor("0.93")
    axes.invert_xaxis()
    return image


def _legend(figure: Figure, labels: Sequence[str], floor: str | None = None) -> None:
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=COLOURS[run % len(COLOURS)], marker=MARKERS[run % len(MARKERS)])
        for run in range(len(labels))
    ]
    names = list(labels)
    if floor is not None:
        lines.append(Line2D([], [], color=FLOOR_COLOUR, ls="--"))
        names.append(floor)
    figure.legend(
        lines,
        names,
        loc="outside upper center",
        fontsize=9,
        ncols=min(3, len(names)),
        frameon=False,
    )
