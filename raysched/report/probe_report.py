"""The work of `raysched probe`: measure, write table and figures, say what they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raysched.errors import RunFailedError, UserError
from raysched.evaluation.bootstrap import Interval
from raysched.evaluation.evaluate import METRIC_LABELS
from raysched.evaluation.model_source import Weights, best_device
from raysched.evaluation.probe import Key, Materials, Measured, ProbeSettings, measure, prepare
from raysched.evaluation.probe_sources import ProbedRun, load_runs
from raysched.evaluation.probe_states import Subject
from raysched.evaluation.probe_words import (
    Comparison,
    Peak,
    compare_runs,
    describe,
    find_peak,
)
from raysched.evaluation.sampling import price_notes
from raysched.report.figures import save_figure
from raysched.report.probe_figures import drift_figure, population_figure, quality_figure
from raysched.tracking.files import log_files
from raysched.training.files import storage_errors
from raysched.training.out_of_memory import memory_for

FOLDER = "probe"
TABLE_FILE = "probe.parquet"
MIN_IMAGES = 8


@dataclass(frozen=True)
class ProbeReport:
    """What a probe wrote and found.

    Args:
        out: the folder.
        figures: topic -> PNG.
        table: the Parquet table: run, statistic, t, k, nfe, value, low, high.
        words: sentences.
        peaks: run -> where it drifts most: in the population, in one step, beyond the floor.
        comparisons: run against run.
        notes: what the user should know.
    """

    out: Path
    figures: dict[str, Path]
    table: Path
    words: tuple[str, ...]
    peaks: dict[str, list[Peak]]
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The same in JSON types."""
        return {
            "out": str(self.out),
            "figures": {topic: str(path) for topic, path in self.figures.items()},
            "table": str(self.table),
            "words": list(self.words),
            "peaks": {run: [asdict(peak) for peak in found] for run, found in self.peaks.items()},
            "comparisons": [comparison.as_json() for comparison in self.comparisons],
            "notes": list(self.notes),
        }

    def as_text(self) -> str:
        """The sentences and the files, for a person."""
        lines = [f"- {word}" for word in self.words]
        return "\n".join([*lines, f"figures and table: {self.out}"])


def probe_runs(
    paths: Sequence[Path],
    *,
    out: Path | None = None,
    settings: ProbeSettings | None = None,
    weights: Weights = "ema",
    log: bool = True,
) -> ProbeReport:
    """Probe runs side by side.

    Args:
        paths: folders of runs, checkpoints or pipelines.
        out: folder of the report; default: `probe/` in the first one's run, with the step behind
            the name where a checkpoint was named.
        settings: how much to measure.
        weights: averaged or last weights.
        log: send the figures to the MLflow runs of those that were tracked.

    Raises:
        UserError: no such models, no common data, or no place to write to.
        RunFailedError: a network's states are not finite, or memory ran out.
    """
    settings = settings or ProbeSettings()
    if settings.max_offset > settings.num_steps:
        raise UserError(
            f"--max-offset: must be at most --steps ({settings.num_steps}), got "
            f"{settings.max_offset}"
        )
    runs, dataset = load_runs(paths, weights)
    if len(dataset.holdout_indices) < MIN_IMAGES:
        raise UserError(
            f"data.holdout_fraction: a probe needs at least {MIN_IMAGES} held-out images, got "
            f"{len(dataset.holdout_indices)}"
        )
    target = out or _default_folder(runs[0], paths[0])
    with _writing(target):
        target.mkdir(parents=True, exist_ok=True)
    with memory_for(f"--num-samples {settings.num_samples}, --num-pairs {settings.num_pairs}"):
        materials = prepare(dataset, settings)
        found = [_measure(run, materials) for run in runs]
    tables = [each.intervals() for each in found]
    comparisons, notes = compare_runs(runs, found)
    labels = [run.label for run in runs]
    with _writing(target):
        table = write_table(dict(zip((r.name for r in runs), tables, strict=True)), target)
        figures = write_figures(labels, tables, target, METRIC_LABELS[settings.metric])
    pairs = zip(labels, found, strict=True)
    words = [w for label, each in pairs for w in describe(label, each, settings.solver)]
    sent = _log(runs, [*figures.values(), table]) if log else []
    return ProbeReport(
        out=target,
        figures=figures,
        table=table,
        words=(*words, *(comparison.sentence for comparison in comparisons)),
        peaks={run.name: _peaks(each) for run, each in zip(runs, found, strict=True)},
        comparisons=tuple(comparisons),
        notes=(
            *(note for run in runs for note in run.source.notes),
            *price_notes("--nfe", settings.nfe, settings.solver),
            *notes,
            *sent,
        ),
    )


def _writing(target: Path) -> AbstractContextManager[None]:
    return storage_errors(target, "writing the probe's report", setting="--out")


def _default_folder(run: ProbedRun, path: Path) -> Path:
    """`probe/` in the run; a checkpoint of it has a folder of its own."""
    home = run.source.home
    own = path.resolve() != home.resolve() and path.name.startswith("step-")
    return home / (f"{FOLDER}-{path.name}" if own else FOLDER)


def write_table(tables: Mapping[str, Mapping[Key, Interval]], folder: Path) -> Path:
    """All numbers in long format: run, statistic, t, k, nfe, value, low, high."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"run": run, **key._asdict(), **vars(end)}
        for run, found in tables.items()
        for key, end in found.items()
    ]
    schema = pa.schema(
        [("run", pa.string()), ("statistic", pa.string()), ("t", pa.float64())]
        + [("k", pa.int64()), ("nfe", pa.int64())]
        + [(name, pa.float64()) for name in ("value", "low", "high")]
    )
    path = folder / TABLE_FILE
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def write_figures(
    labels: Sequence[str], tables: Sequence[Mapping[Key, Interval]], folder: Path, metric: str
) -> dict[str, Path]:
    """One PNG per topic."""
    figures = {
        "population": population_figure(labels, tables),
        "drift": drift_figure(labels, tables),
        "quality": quality_figure(labels, tables, metric),
    }
    return {name: save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()}


def _measure(run: ProbedRun, materials: Materials) -> Measured:
    source = run.source
    subject = Subject(
        source.network.to(best_device()),
        source.schedule,
        source.prediction_type,
        materials.settings.solver,
    )
    try:
        return measure(subject, materials, class_conditional=source.network.class_conditional)
    except RunFailedError as error:
        raise RunFailedError(f"{source.loaded_from}: {error}") from error


def _peaks(measured: Measured) -> list[Peak]:
    return [
        find_peak(measured, "energy"),
        find_peak(measured, "rollout_energy", k=1),
        find_peak(measured, "drift_excess"),
    ]


def _log(runs: Sequence[ProbedRun], files: Sequence[Path]) -> list[str]:
    """Send the files to the runs that were tracked; what fails becomes a note."""
    notes = []
    for folder in {run.run_dir for run in runs if run.run_dir is not None}:
        problem = log_files(folder, files, folder=FOLDER)
        if problem:
            notes.append(f"{folder}: the figures are not in MLflow yet: {problem}")
    return notes
