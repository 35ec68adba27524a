"""The commands: each parses, calls one function of the package, and hands back an outcome.

Nothing heavy is imported before a command runs, and the parser only chooses what to run: errors,
signals and streams are handled once, in `raysched.outcome`.
"""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from raysched.arguments import join_values
from raysched.commands import (
    Json,
    Work,
    compare,
    export,
    html_report,
    probe,
    sample,
    ui,
    verify_resume,
)
from raysched.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE
from raysched.job_commands import SUBMIT_EXAMPLE, jobs, submit
from raysched.outcome import Outcome, report, stopped_early, usage_failure
from raysched.signals import STOP
from raysched.sweep_commands import Resume, console, end_of, load_run, pick, plan, tune

if TYPE_CHECKING:
    from raysched.training.result import RunResult

# click's base class of everything that is wrong with a command line.
UsageProblem: type[Exception] = typer.BadParameter.__bases__[0]

OVERRIDES = {"ignore_unknown_options": True, "allow_extra_args": True}
app = typer.Typer(
    name="raysched",
    help="Train diffusion and flow-matching models with rollouts, search the rollout settings, "
    "and learn whether they pay.",
    epilog="Example: raysched train configs/digits_flow.yaml training.budget.steps=300",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command(
    context_settings=OVERRIDES,
    epilog="Example: raysched train configs/digits_flow.yaml "
    "scheduled_sampling.max_step_offset=0 --prediction_type flow_matching",
)
def train(
    tokens: Annotated[list[str] | None, typer.Argument(metavar="CONFIG|KEY=VALUE")] = None,
    resume: Resume = False,
    as_json: Json = False,
) -> Work:
    """Train once. Without CONFIG, a file, all settings have their defaults.

    Settings on the command line replace the file's: training.budget.steps=300, or the flat
    --scheduled_sampling_max_step_offset 10.
    """

    def work() -> Outcome:
        STOP.install()
        config = load_run(tokens)
        if STOP.requested:
            return stopped_early()
        from raysched.distributed.train import train as train_once

        result = train_once(config, resume=resume, console=console(as_json))
        return end_of(result, _train_text(result))

    return work


app.command(
    context_settings=OVERRIDES,
    epilog="Example: raysched tune tune_spaces/digits_rollout.yaml search.num_samples=4",
)(tune)
app.command(epilog="Example: raysched pick runs/digits-rollout-20260101-120000 --top 2")(pick)
app.command(
    context_settings=OVERRIDES,
    epilog="Example: raysched plan tune_spaces/digits_rollout.yaml --price-per-hour 2.50",
)(plan)
app.command(epilog="Example: raysched sample runs/digits_flow-20260101-120000 --class-label 3")(
    sample
)
app.command(epilog="Example: raysched export runs/digits_flow-20260101-120000 --out my-pipeline")(
    export
)
app.command(epilog="Example: raysched probe runs/with-rollouts runs/without-rollouts")(probe)
app.command(epilog="Example: raysched compare runs/digits-rollout-20260101-120000")(compare)
app.command(name="report", epilog="Example: raysched report runs/digits-rollout-20260101-120000")(
    html_report
)
app.command(epilog="Example: raysched ui runs/digits-rollout-20260101-120000")(ui)
app.command(
    name="verify-resume",
    context_settings=OVERRIDES,
    epilog="Example: raysched verify-resume configs/digits_flow.yaml --kills 2",
)(verify_resume)


@app.command(
    name="show-config",
    context_settings=OVERRIDES,
    epilog="Example: raysched show-config configs/digits_flow.yaml "
    "--scheduled_sampling_reflexflow=false",
)
def show_config(
    tokens: Annotated[list[str] | None, typer.Argument(metavar="FILE|KEY=VALUE")] = None,
    as_json: Json = False,
) -> Work:
    """Print a run's settings as they will be used, defaults and overrides included."""

    def work() -> Outcome:
        from raysched.config.loading import dump, to_yaml

        resolved = dump(load_run(tokens))
        return Outcome(resolved, to_yaml(resolved).rstrip("\n"))

    return work


@app.command(epilog="Example: raysched schema run > run.schema.json")
def schema(
    kind: Annotated[Literal["run", "sweep"], typer.Argument(help="Which files.")] = "run",
    as_json: Json = False,
) -> Work:
    """Print the JSON schema of run or sweep files, for editors."""

    def work() -> Outcome:
        import json

        from raysched.config import schema as schemas

        makers = {"run": schemas.run_schema, "sweep": schemas.sweep_schema}
        payload = makers[kind]()
        return Outcome(payload, json.dumps(payload, indent=2))

    return work


@app.command(epilog="Example: raysched doctor --json")
def doctor(as_json: Json = False) -> Work:
    """Check this machine: versions, devices, Ray, the MLflow store, disk and memory."""

    def work() -> Outcome:
        from raysched.doctor import examine

        checks = examine()
        failed = any(check.status == "problem" for check in checks)
        payload = {
            "status": "problem" if failed else "ok",
            "checks": [check.as_json() for check in checks],
        }
        text = "\n".join(check.as_line() for check in checks)
        return Outcome(payload, text, exit_code=EXIT_FAILED if failed else EXIT_OK)

    return work


@app.command(epilog="Example: raysched sync runs/digits_flow-20260101-120000")
def sync(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's folder.")],
    as_json: Json = False,
) -> Work:
    """Send the points of a run that MLflow has not got, because its server was away."""

    def work() -> Outcome:
        from dataclasses import asdict
        from pathlib import Path

        from raysched.tracking.sync import sync as send

        result = send(Path(run))
        payload = asdict(result)
        text = "\n".join(f"{key}: {value}" for key, value in payload.items() if key != "problems")
        unsent = result.problems or result.num_remaining
        return Outcome(payload, text, EXIT_RESUMABLE if unsent else EXIT_OK, result.problems)

    return work


app.command(context_settings=OVERRIDES, epilog=SUBMIT_EXAMPLE)(submit)
app.add_typer(jobs, name="jobs")


def main(argv: list[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: its tokens without the program's name; default: those of this process.

    Returns:
        0 done, 1 failed, 2 usage, 75 stopped but resumable, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments and "--help" not in arguments
    exit_code = report(lambda: _parsed(arguments)(), as_json=as_json)
    if as_json and argv is None:
        # What libraries say while the process ends must not follow the JSON object.
        os.dup2(2, 1)
    return exit_code


def _parsed(arguments: list[str]) -> Work:
    """What the command line asks for; the parser's own output (`--help`) is already printed."""
    command = typer.main.get_command(app)
    names = list(getattr(command, "commands", {}))
    first = arguments[0] if arguments else ""
    if not first.startswith("-") and first not in names:
        nearest = get_close_matches(first, names, 1)
        problem = f"no such command: {first}" if first else "a command is needed"
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(names)}"
        return lambda: usage_failure(f"{problem}; {hint}")
    try:
        chosen = command.main(join_values(arguments), prog_name="raysched", standalone_mode=False)
    except UsageProblem as problem:
        message: str = problem.format_message()  # type: ignore[attr-defined]
        return lambda: usage_failure(message)
    if callable(chosen):
        return lambda: chosen()
    return lambda: Outcome({}, exit_code=int(chosen or 0))


def _train_text(result: RunResult) -> str:
    """The last lines of `train` for a person."""
    lines = [f"status: {result.status}", f"folder: {result.output_dir}"]
    if "quality/q" in result.metrics:
        lines.append(f"quality (lower is better): {result.metrics['quality/q']:.5g}")
    if "forward_equivalents" in result.compute:
        lines.append(f"forward equivalents: {result.compute['forward_equivalents']:,.0f}")
    lines.append(f"weights_sha256: {result.weights_sha256}")
    return "\n".join([*lines, "go on with --resume"] if result.status == "stopped" else lines)
