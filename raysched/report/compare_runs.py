"""`raysched compare`: runs side by side without a browser, as a table and as pictures."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysched.errors import StorageError
from raysched.report.compared import ComparedRun, differing_keys, gather
from raysched.training.files import storage_errors
from raysched.tuning.display import headers, number_text, value_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

COLUMNS = ("precision", "recall", "class_accuracy")
MAX_SAMPLED = 8


@dataclass(frozen=True)
class RunComparison:
    """The result of `compare_runs`.

    Attributes:
        runs: the best first; those without quality last.
        keys: dotted keys in which they differ.
        files: what was written, name -> path.
        notes: what could not be shown, one line each.
    """

    runs: list[ComparedRun]
    keys: list[str]
    files: dict[str, str]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """JSON types."""
        runs = [run.as_json(self.keys) for run in self.runs]
        return {"runs": runs, "differing": self.keys, "files": self.files}

    def as_text(self, width: int | None = None) -> str:
        """The table, and where the pictures are.

        Args:
            width: in characters; default: the terminal's.
        """
        from rich.console import Console

        console = Console(
            file=io.StringIO(), width=width or shutil.get_terminal_size((100, 24)).columns
        )
        console.print(_tables(self.runs, self.keys, console))
        assert isinstance(console.file, io.StringIO)
        lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
        return "\n".join([*lines, "", *(f"{name}: {path}" for name, path in self.files.items())])


def compare_runs(paths: Sequence[Path], *, out: Path | None = None) -> RunComparison:
    """Read runs and sweeps, and draw what MLflow's comparison page would show.

    Args:
        paths: folders of runs or sweeps.
        out: folder of the pictures; default: `compare/` in the first one.

    Raises:
        UserError: a folder holds nothing to compare.
        StorageError: the pictures can't be written.
    """
    from raysched.report.compare_figures import comparison_figure
    from raysched.report.figures import save_figure
    from raysched.tuning.compare import metric_name

    runs = sorted(gather(paths), key=_rank)
    keys = differing_keys(runs)
    labels = {metric_name(run.config) for run in runs}
    label = labels.pop() if len(labels) == 1 else "q"
    notes = [] if not labels else ["the runs measure quality by different metrics: q can't rank"]
    folder = (out or paths[0] / "compare").absolute()
    files = {}
    with storage_errors(folder, "writing the comparison"):
        folder.mkdir(parents=True, exist_ok=True)
        figure = comparison_figure(runs, keys, f"q: {label}")
        files["figure"] = str(save_figure(figure, folder / "compare.png"))
        sheet = _sheet(runs, folder / "samples.png", notes)
        if sheet is not None:
            files["samples"] = str(sheet)
        comparison = RunComparison(runs, keys, files, tuple(notes))
        table = folder / "compare.json"
        files["table"] = str(table)
        text = json.dumps(comparison.as_json(), indent=1)
        table.write_text(text + "\n", encoding="utf-8")
    return comparison


def _rank(run: ComparedRun) -> float:
    return run.q if run.q is not None and math.isfinite(run.q) else math.inf


def _sheet(runs: Sequence[ComparedRun], path: Path, notes: list[str]) -> Path | None:
    """Samples from the same noise, a block per run; the best runs only."""
    from raysched.evaluation.grids import sample_grid, save_png
    from raysched.report.sheets import MAX_CLASSES, ROWS_PER_BLOCK, stacked
    from raysched.tuning.compare import final_samples

    strips, missing = [], []
    for run in runs[:MAX_SAMPLED]:
        try:
            samples, labels = final_samples(run.folder)
        except StorageError:
            missing.append(run.name)
            continue
        nfe = max(samples)
        columns = min(MAX_CLASSES, int(labels.max()) + 1)
        images = columns * ROWS_PER_BLOCK
        grid = sample_grid(samples[nfe], labels, num_classes=columns, max_images=images)
        quality = "" if run.q is None else f", q {number_text(run.q)}"
        strips.append((f"{run.name}: {nfe} network evaluations{quality}", grid))
    if missing:
        notes.append(f"without samples of the full budget: {', '.join(missing)}")
    if len(runs) > MAX_SAMPLED:
        notes.append(f"samples.png shows the {MAX_SAMPLED} best of {len(runs)} runs")
    return Path(save_png(stacked(strips), path)) if strips else None


def _tables(runs: Sequence[ComparedRun], keys: Sequence[str], console: Console) -> Any:
    from rich.console import Group
    from rich.table import Table

    # The columns beside q give way first where the terminal is narrow.
    unbounded = console.options.update(max_width=500)
    for shown in (COLUMNS, COLUMNS[:2], ()):
        table = _quality_table(runs, shown)
        if console.measure(table, options=unbounded).maximum <= console.width:
            break
    if not keys:
        return Group(table, "", "the runs' settings are the same")
    settings = Table(box=None, pad_edge=False, header_style="bold")
    settings.add_column("run", overflow="fold")
    settings.add_column("settings that differ", overflow="fold")
    names = dict(zip(keys, headers(keys), strict=True))
    for run in runs:
        values = ", ".join(f"{names[k]}={value_text(v)}" for k, v in run.settings(keys).items())
        settings.add_row(run.name, values)
    return Group(table, "", settings)


def _quality_table(runs: Sequence[ComparedRun], metrics: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold")
    for name in ("q [interval]", *metrics, "FE", "seconds", "status"):
        table.add_column(name, justify="right" if name != "status" else "left", no_wrap=True)
    for run in runs:
        values = (run.metrics.get(f"quality/{name}") for name in metrics)
        table.add_row(
            run.name,
            _quality(run),
            *("–" if value is None else f"{value:.3f}" for value in values),
            f"{run.forward_equivalents:,.0f}",
            f"{run.seconds:,.0f}",
            run.status,
        )
    return table


def _quality(run: ComparedRun) -> str:
    if run.q is None:
        return "–"
    low, high = run.metrics.get("quality/q_low"), run.metrics.get("quality/q_high")
    if low is None or high is None:
        return number_text(run.q)
    return f"{number_text(run.q)} [{number_text(low)}, {number_text(high)}]"
