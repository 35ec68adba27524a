"""The commands that look at trained models; `raysched.cli` registers them.

Thin like all commands: each parses, calls one function of the package, and hands back an outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import typer

from raysched.arguments import split_arguments
from raysched.errors import EXIT_FAILED, EXIT_OK
from raysched.outcome import Outcome, warn
from raysched.signals import STOP

SolverName = Literal["euler", "unipc", "dpm", "rk4"]
Work = Callable[[], Outcome]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, all else on stderr.")
]


def sample(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run's folder or a checkpoint's.")
    ],
    num_images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 40,
    nfe: Annotated[int, typer.Option(min=1, help="Network evaluations per image.")] = 10,
    sampler: Annotated[SolverName, typer.Option(help="The solver.")] = "euler",
    guidance_scale: Annotated[
        float, typer.Option(min=0.0, help="Classifier-free guidance; 1 is off.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    class_label: Annotated[
        int | None, typer.Option(min=0, help="One class for all images; default: all in turn.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="The PNG; default: in the run's folder.")] = None,
    weights: Annotated[
        Literal["ema", "online"], typer.Option(help="Averaged or last weights.")
    ] = "ema",
    save_images: Annotated[
        bool, typer.Option("--save-images", help="Write every image by itself, too.")
    ] = False,
    as_json: Json = False,
) -> Work:
    """Generate images from a trained model and store them as one picture."""

    def work() -> Outcome:
        from raysched.evaluation.sample_run import sample_run

        result = sample_run(
            source,
            num_images=num_images,
            nfe=nfe,
            sampler=sampler,
            guidance_scale=guidance_scale,
            seed=seed,
            class_label=class_label,
            out=out,
            weights=weights,
            save_images=save_images,
        )
        warn(list(result.notes))
        return Outcome(result.as_json(), f"{result.num_images} images: {result.grid}")

    return work


def probe(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs or checkpoints.")
    ],
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder; default: probe/ in the first run, probe-STEP/ of a checkpoint."
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=8, help="States sampled from noise.")] = 400,
    num_pairs: Annotated[int, typer.Option(min=8, help="Rollouts per place on the path.")] = 128,
    steps: Annotated[int, typer.Option(min=2, help="Steps of the path's grid.")] = 20,
    max_offset: Annotated[
        int | None, typer.Option(min=1, help="Longest rollout, in steps; 10, or all --steps.")
    ] = None,
    nfe: Annotated[
        list[int] | None, typer.Option(min=1, help="Network evaluations, repeatable.")
    ] = None,
    sampler: Annotated[SolverName, typer.Option(help="The solver.")] = "euler",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 1234,
    weights: Annotated[
        Literal["ema", "online"], typer.Option(help="Averaged or last weights.")
    ] = "ema",
    log: Annotated[bool, typer.Option(help="Add the figures to the runs in MLflow.")] = True,
    as_json: Json = False,
) -> Work:
    """Show where on the path models drift, and which of several drifts less."""

    def work() -> Outcome:
        from pathlib import Path

        from raysched.evaluation.probe import ProbeSettings
        from raysched.report.probe_report import probe_runs

        settings = ProbeSettings(
            num_samples=num_samples,
            num_pairs=num_pairs,
            num_steps=steps,
            max_offset=min(ProbeSettings.max_offset, steps) if max_offset is None else max_offset,
            nfe=tuple(sorted(set(nfe))) if nfe else ProbeSettings.nfe,
            solver=sampler,
            seed=seed,
        )
        folder = Path(out) if out else None
        paths = [Path(run) for run in runs]
        result = probe_runs(paths, out=folder, settings=settings, weights=weights, log=log)
        warn(list(result.notes))
        return Outcome(result.as_json(), result.as_text())

    return work


def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run's folder or a checkpoint's.")
    ],
    out: Annotated[
        str | None, typer.Option(help="The pipeline's folder; default: in the run's folder.")
    ] = None,
    weights: Annotated[
        Literal["ema", "online"], typer.Option(help="Averaged or last weights.")
    ] = "ema",
    as_json: Json = False,
) -> Work:
    """Save a checkpoint, also one of several ranks, as a diffusers pipeline."""

    def work() -> Outcome:
        from raysched.evaluation.export_run import export_run

        result = export_run(source, out, weights)
        warn(list(result.notes))
        return Outcome(result.as_json(), f"pipeline: {result.folder}")

    return work


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs or sweeps.")
    ],
    out: Annotated[
        str | None, typer.Option(help="Folder of the pictures; default: compare/ in the first.")
    ] = None,
    as_json: Json = False,
) -> Work:
    """Compare runs without a browser: settings that differ, quality, compute, samples."""

    def work() -> Outcome:
        from pathlib import Path

        from raysched.report.compare_runs import compare_runs

        result = compare_runs([Path(run) for run in runs], out=Path(out) if out else None)
        warn(list(result.notes))
        return Outcome(result.as_json(), result.as_text())

    return work


def html_report(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="The sweep's folder.")],
    out: Annotated[
        str | None, typer.Option(help="Folder of the page; default: report/ in the sweep's.")
    ] = None,
    as_json: Json = False,
) -> Work:
    """Put a sweep on one HTML page: verdict, trials, figures, samples; no network needed."""

    def work() -> Outcome:
        from pathlib import Path

        from raysched.report.html import write_page

        page = write_page(Path(sweep), out=Path(out) if out else None)
        warn(list(page.notes))
        return Outcome(page.as_json(), page.text)

    return work


def ui(
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="A run's or sweep's folder; default: runs/ here."),
    ] = None,
    uri: Annotated[str | None, typer.Option(help="The MLflow store; default: the run's.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 finds a free one.")] = 5000,
    as_json: Json = False,
) -> Work:
    """Open MLflow's pages on the store of a run, until Ctrl-C."""

    def work() -> Outcome:
        STOP.install()
        import sys
        from pathlib import Path

        from raysched.config.paths import work_root
        from raysched.tracking.ui import find_page, serve

        def ready(url: str) -> None:
            print(f"MLflow: {url} (Ctrl-C ends it)", file=sys.stderr, flush=True)

        page = find_page(Path(run) if run else None, uri, work_root())
        url = serve(page, host=host, port=port, ready=ready, asked_to_stop=lambda: STOP.requested)
        return Outcome({"url": url})

    return work


def verify_resume(
    tokens: Annotated[list[str] | None, typer.Argument(metavar="CONFIG|KEY=VALUE")] = None,
    kills: Annotated[int, typer.Option(min=1, help="Runs to kill and resume.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the kills' moments.")] = 0,
    out: Annotated[
        str | None, typer.Option(help="New folder that keeps the runs; default: none are kept.")
    ] = None,
    as_json: Json = False,
) -> Work:
    """Prove that a killed run ends like one that was not: train, kill, resume, compare.

    Every kill is a run of its own, ended by SIGKILL at a random moment (the second one before its
    first checkpoint). Losses, metrics and weights must equal those of an uninterrupted run.
    """

    def work() -> Outcome:
        STOP.install()
        from pathlib import Path

        from raysched.config.loading import load

        loaded = load(*split_arguments(tokens or []))
        warn(list(loaded.warnings))
        from raysched.distributed.verify_resume import verify_resume as prove

        verdict = prove(
            loaded.config,
            kills=kills,
            seed=seed,
            out=Path(out) if out else None,
            say=lambda line: print(line, flush=True),
        )
        code = EXIT_OK if verdict.holds else EXIT_FAILED
        return Outcome(verdict.as_json(), verdict.as_text(), code)

    return work
