"""The commands about sweeps and about what things will cost; `raysched.cli` registers them.

Thin like all commands: each parses, calls one function of the package, and hands back an outcome.
What all commands share, the console and how a run's or sweep's end is told, is here too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from raysched.arguments import split_arguments
from raysched.commands import Json, Work
from raysched.outcome import Outcome, mute, stopped_early, usage_failure, warn
from raysched.signals import STOP

if TYPE_CHECKING:
    from rich.console import Console

    from raysched.config.run import RunConfig
    from raysched.training.result import RunResult
    from raysched.tuning.pick import PickResult
    from raysched.tuning.records import SweepResult

Resume = Annotated[bool, typer.Option("--resume", help="Go on where an earlier start stopped.")]


def tune(
    tokens: Annotated[list[str] | None, typer.Argument(metavar="SPACE|KEY=VALUE")] = None,
    resume: Resume = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: begin failed trials again.")
    ] = False,
    as_json: Json = False,
) -> Work:
    """Search the settings that SPACE names, and compare the winner with plain training.

    A finished sweep is extended by --resume with a larger search.num_samples (--num-samples 40).
    Trials whose numbers diverged or whose memory ran out are results, never begun again.
    """

    def work() -> Outcome:
        STOP.install()
        from raysched.config.space import load_sweep

        path, overrides = split_arguments(tokens or [])
        if path is None:
            return usage_failure("a SPACE is needed, such as tune_spaces/digits_rollout.yaml")
        if retry_failed and not resume:
            return usage_failure("--retry-failed goes with --resume: a new sweep has no trials")
        loaded = load_sweep(path, overrides)
        warn(list(loaded.warnings))
        if STOP.requested:
            return stopped_early()
        from raysched.report import print_summary, write_report
        from raysched.tuning.sweep import run_sweep

        shown = console(as_json)
        result = run_sweep(
            loaded, resume=resume, console=shown, retry_failed=retry_failed,
            write_report=write_report,
        )  # fmt: skip
        print_summary(result, shown)
        return end_of(result)

    return work


def pick(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="The sweep's folder.")],
    top: Annotated[
        int | None, typer.Option(min=1, help="Candidates beside the baseline; default: 3.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Fresh seeds of each; default: 3.")
    ] = None,
    resume: Resume = False,
    as_json: Json = False,
) -> Work:
    """Train a sweep's best again on fresh seeds, and say who beats plain training.

    With --resume, --top and --seeds are those of the pick that is there, unless they are given.
    """

    def work() -> Outcome:
        STOP.install()
        from pathlib import Path

        from raysched.report.pick_sheet import write_pick_sheet
        from raysched.tuning.pick import run_pick

        result = run_pick(
            Path(sweep), top=top, num_seeds=seeds, resume=resume,
            console=console(as_json), write_sheet=write_pick_sheet,
        )  # fmt: skip
        return end_of(result, result.as_text())

    return work


def plan(
    tokens: Annotated[list[str] | None, typer.Argument(metavar="CONFIG|SPACE|KEY=VALUE")] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0.0, help="SPACE: price of the machine or cluster.")
    ] = None,
    corners: Annotated[
        int, typer.Option(min=1, help="SPACE: corners whose steps are measured, at most.")
    ] = 8,
    as_json: Json = False,
) -> Work:
    """Say what a run or a sweep will cost, before it is started.

    Real steps are made: of the run, or at the corners of the sweep's space. Out come compute,
    time, memory, disk and, given a price, money.
    """

    def work() -> Outcome:
        path, overrides = split_arguments(tokens or [])
        from raysched.config.parsing import is_space

        if path is not None and is_space(path):
            return _plan_space(path, overrides, price_per_hour, corners, as_json=as_json)
        if price_per_hour is not None:
            return usage_failure("--price-per-hour goes with a SPACE, such as tune_spaces/…")
        config = load_run(tokens)
        from raysched.training.plan import plan_run, print_plan

        forecast = plan_run(config)
        if not as_json:
            print_plan(forecast, console(as_json))
        return Outcome(forecast.as_json())

    return work


def _plan_space(
    path: str, overrides: list[str], price: float | None, corners: int, *, as_json: bool
) -> Outcome:
    from raysched.config.space import load_sweep

    loaded = load_sweep(path, overrides)
    warn(list(loaded.warnings))
    from raysched.tuning.plan_text import print_sweep_plan
    from raysched.tuning.sweep_plan import plan_sweep

    forecast = plan_sweep(loaded, price_per_hour=price, max_corners=corners)
    if not as_json:
        print_sweep_plan(forecast, console(as_json))
    return Outcome(forecast.as_json())


def load_run(tokens: list[str] | None) -> RunConfig:
    """The run that a command line names, its warnings shown."""
    from raysched.config.loading import load

    loaded = load(*split_arguments(tokens or []))
    warn(list(loaded.warnings))
    return loaded.config


def console(as_json: bool) -> Console:
    """Where a command talks: stdout, or stderr where that is for JSON."""
    from rich.console import Console

    class Lasting(Console):
        """Work goes on when its reader leaves (`| head`): hours of training may be behind it."""

        def on_broken_pipe(self) -> None:
            self.quiet = True
            mute(self.file.fileno())

    return Lasting(stderr=as_json, soft_wrap=True)


def end_of(result: RunResult | SweepResult | PickResult, text: str = "") -> Outcome:
    """A run's or a sweep's end; its error is told on stderr as well."""
    payload = result.as_json()
    if result.error is None:
        return Outcome(payload, text, result.exit_code)
    problems = (result.error,)
    return Outcome({**payload, "problems": problems}, text, result.exit_code, problems)
