"""The commands that send work to a cluster and look after it; `raysched.cli` registers them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raysched.arguments import join_values, split_arguments
from raysched.commands import Json, Work
from raysched.outcome import Outcome, usage_failure, warn

if TYPE_CHECKING:
    from raysched.distributed.submit import Job

# They look at this machine, or at jobs.
LOCAL_COMMANDS = frozenset({"submit", "jobs", "ui", "schema", "show-config"})
SUBMIT_EXAMPLE = (
    "Example: raysched submit tune tune_spaces/digits_rollout.yaml --address http://127.0.0.1:8265"
)
Address = Annotated[
    str | None,
    typer.Option(help="URL of the job server; default: $RAY_ADDRESS, or 127.0.0.1:8265."),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The submission id.")]
jobs = typer.Typer(help="Look after submitted jobs.", no_args_is_help=True)


def submit(
    context: typer.Context,
    tokens: Annotated[list[str], typer.Argument(metavar="COMMAND ARGS...")],
    address: Address = None,
    submission_id: Annotated[
        str | None,
        typer.Option(help="Key of this submission; default: made of the name and the content."),
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(help="Name of a variable to send, repeatable.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Further file or folder to send, repeatable.")
    ] = None,
    root: Annotated[
        str | None, typer.Option(help="Folder on the cluster that holds runs/, shared by nodes.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Don't wait for the job's end.")
    ] = False,
    any_version: Annotated[
        bool, typer.Option("--any-version", help="Go on if Ray or Python differ there.")
    ] = False,
    as_json: Json = False,
) -> Work:
    """Run a command as a job of a Ray cluster; end with the job's exit code.

    Only what the job needs is sent: the package's source if this is a clone, and the config files.
    The same submission again finds its job rather than starting a second.
    """
    parent: Any = context.parent.command if context.parent else None
    commands: dict[str, Any] = getattr(parent, "commands", {})
    names = commands.keys() - LOCAL_COMMANDS
    joined = join_values(tokens)
    settings = _settings(context, commands[joined[0]], joined) if joined[0] in names else []

    def work() -> Outcome:
        if tokens[0] not in names:
            return usage_failure(f"can't submit {tokens[0]}; there are {', '.join(sorted(names))}")
        from raysched.distributed.job_server import server_address
        from raysched.distributed.submit import Extras, prepare

        url = server_address(address)
        config, overrides = split_arguments(settings)
        files = Extras(tuple(env or ()), tuple(include or ()), root)
        job = prepare(joined, config, overrides, files, submission_id)
        if dry_run:
            return Outcome({**job.as_json(), "status": "dry_run"}, job.as_text())
        warn(list(job.notes))
        return _sent(job, url, any_version=any_version, detach=detach, as_json=as_json)

    return work


def _settings(context: typer.Context, command: Any, tokens: list[str]) -> list[str]:
    """Config file and settings among a command's tokens, without its options.

    Parsed as the job will do it, so that mistakes in the options show here.
    """
    parsed = command.make_context(tokens[0], tokens[1:], parent=context.parent)
    return list(parsed.params.get("tokens") or [])


def _sent(job: Job, url: str, *, any_version: bool, detach: bool, as_json: bool) -> Outcome:
    """Send a job, or find it, and stay with it unless `detach`."""
    from raysched.distributed.job_server import JobServer
    from raysched.distributed.jobs import attend, goes_on
    from raysched.distributed.submit import check_versions, send

    server = JobServer(url)
    differing = check_versions(server.connect())
    warn([*server.warnings, *(differing if any_version else [])])
    if differing and not any_version:
        return usage_failure(
            f"versions differ: {'; '.join(differing)}; install the same on both sides, or say "
            "--any-version"
        )
    found, is_new = send(server, job)
    said = "submitted" if is_new else "found, from an earlier submission"
    print(f"job {found}: {said}", file=sys.stderr, flush=True)
    payload = {"submission_id": found, "started": is_new, "address": server.address}
    if detach:
        return Outcome({**payload, "status": "RUNNING"}, goes_on(server, found))
    code, status = attend(server, found, sys.stderr if as_json else sys.stdout)
    return Outcome({**payload, "status": status}, f"job {found}: {status}", code)


@jobs.command(name="list", epilog="Example: raysched jobs list --address http://127.0.0.1:8265")
def list_jobs(address: Address = None, as_json: Json = False) -> Work:
    """List the jobs of a cluster, the newest first."""

    def work() -> Outcome:
        import time

        server = _connected(address)
        rows = []
        for job in server.jobs():
            about = {key: job.get(key) for key in ("submission_id", "status", "start_time")}
            # The runtime environment has values of variables.
            rows.append({**about, "entrypoint": job.get("entrypoint")})
        lines = []
        for row in rows:
            seconds = (row["start_time"] or 0) / 1000
            began = time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
            lines.append(
                f"{row['submission_id']:<40} {row['status']:<9} {began}  {row['entrypoint']}"
            )
        return Outcome({"jobs": rows}, "\n".join(lines) or "no jobs")

    return work


@jobs.command(epilog="Example: raysched jobs logs digits-rollout-0123456789ab")
def logs(job_id: JobId, address: Address = None, as_json: Json = False) -> Work:
    """Print a job's logs and follow them to its end; end with the job's exit code."""

    def work() -> Outcome:
        from raysched.distributed.jobs import attend, find_job

        server = _connected(address)
        find_job(server, job_id)
        code, status = attend(server, job_id, sys.stderr if as_json else sys.stdout)
        payload = {"submission_id": job_id, "status": status}
        return Outcome(payload, f"job {job_id}: {status}", code)

    return work


@jobs.command(epilog="Example: raysched jobs stop digits-rollout-0123456789ab")
def stop(job_id: JobId, address: Address = None, as_json: Json = False) -> Work:
    """Ask a job to write a checkpoint and end; `--resume` goes on with what it left."""

    def work() -> Outcome:
        from raysched.distributed.jobs import find_job

        server = _connected(address)
        find_job(server, job_id)
        stopped = server.stop(job_id)
        text = f"job {job_id}: {'asked to stop' if stopped else 'had ended before'}"
        return Outcome({"submission_id": job_id, "stopped": stopped}, text)

    return work


def _connected(address: str | None) -> Any:
    from raysched.distributed.job_server import JobServer, server_address

    server = JobServer(server_address(address))
    server.connect()
    warn(server.warnings)
    return server
