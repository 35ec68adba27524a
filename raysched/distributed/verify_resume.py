"""`raysched verify-resume`: a user's own proof that a killed run ends like one that was not.

One run goes through. Then every kill gets a run of its own: a child process trains, dies by
SIGKILL at a random moment, a second child goes on by `--resume`, and all of its logged points and
its weights must equal the straight run's, bit for bit. Clocks are left out. As many runs go at
once as the machine has cores for.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from raysched.config.loading import write_yaml
from raysched.config.paths import anchored
from raysched.config.run import RunConfig
from raysched.distributed.child_run import ChildRun, wait_for
from raysched.distributed.resume_verdict import Kill, Verdict, compare_runs
from raysched.errors import ConfigError, RunFailedError, StorageError
from raysched.training.checkpoint import checkpoint_folders
from raysched.training.result import RunResult, read_result
from raysched.training.run_folder import METRICS_FILE, read_metrics

# A child that ends before its kill lands is tried again, so often.
TRIES = 4
# Each run holds the data and a Ray of its own.
MOST_AT_ONCE = 4

Say = Callable[[str], None]


def verify_resume(
    config: RunConfig, *, kills: int, seed: int, out: Path | None, say: Say, first: int = 1
) -> Verdict:
    """Train once, then kill and resume as often as asked, each time a run of its own.

    Args:
        config: the run; tracking and uploads are left out of the proof.
        kills: how many; the first one falls behind a checkpoint, the second one before any.
        seed: of the kills' moments.
        out: folder for the runs, which stay there; default: a temporary one, which stays only
            where a difference was found.
        say: called with a line for every stage.
        first: number of the first kill: a long proof may be made in portions.

    Raises:
        ConfigError: the run's end depends on the clock.
        StorageError: `out` holds something.
        RunFailedError: a run failed, or stood still, by itself.
        KeyboardInterrupt: a signal asked for the end; no child is left.
    """
    begun = time.monotonic()
    _check(config, out)
    folder = _make_folder(out)
    keep = out is not None
    try:
        runs = _Runs(_prepare(config, folder), folder)
        straight = runs.straight()
        say(f"straight run: {straight.compute['steps']:.0f} steps, {straight.weights_sha256[:12]}")
        found = []
        numbers = range(first, first + kills)
        with ThreadPoolExecutor(runs_at_once(config)) as pool:
            # Whatever one of them raises, a stop asked for included, ends the proof.
            kills_made = pool.map(functools.partial(runs.kill, seed=seed), numbers)
            for number, kill in zip(numbers, kills_made, strict=True):
                found.append(kill)
                say(_line(number, numbers[-1], kill))
        verdict = Verdict(tuple(found), straight.weights_sha256, str(folder), 0.0)
        keep = keep or not verdict.holds
    except RunFailedError:
        # Its log is what explains the failure.
        keep = True
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    where = str(folder) if keep else None
    return Verdict(tuple(found), straight.weights_sha256, where, time.monotonic() - begun)


def runs_at_once(config: RunConfig) -> int:
    """How many runs this machine has cores for; one where they would share a GPU or a cluster."""
    scaling = config.scaling
    if scaling.use_gpu or "RAY_ADDRESS" in os.environ:
        return 1
    cores = os.cpu_count() or 1
    each = max(scaling.num_workers, 1) * scaling.cpus_per_worker
    return min(max(cores // each, 1), MOST_AT_ONCE)


def _check(config: RunConfig, out: Path | None) -> None:
    if config.training.budget.seconds is not None:
        raise ConfigError(
            "training.budget.seconds: where a run ends depends on the clock, so no two runs are "
            "alike: give training.budget.forward_equivalents or training.budget.steps"
        )
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"--out: {out}: holds something already; name a new folder")


def _make_folder(out: Path | None) -> Path:
    if out is None:
        return Path(tempfile.mkdtemp(prefix="raysched-verify-resume-"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"--out: {out}: can't be made: {error.strerror}") from error
    return out.absolute()


def _prepare(config: RunConfig, folder: Path) -> RunConfig:
    """Write the config that all runs share."""
    config = anchored(config, Path.cwd())
    alone = config.model_copy(
        update={
            "tracking": config.tracking.model_copy(update={"enabled": False}),
            "training": config.training.model_copy(
                update={"output_dir": None, "storage_path": None}
            ),
        }
    )
    write_yaml(alone, folder / "config.yaml")
    return alone


def _line(number: int, kills: int, kill: Kill) -> str:
    where = "before the first step was logged" if kill.step == 0 else f"after step {kill.step}"
    what = (
        "from the start"
        if kill.resumed_from is None
        else f"from the checkpoint of step {kill.resumed_from}"
    )
    verdict, difference = "identical", kill.difference
    if difference is not None:
        verdict = (
            f"DIFFERS at step {difference.step}: {difference.key} is {difference.got!r}, "
            f"expected {difference.expected!r}"
        )
    return f"kill {number} of {kills}: {where}, went on {what}: {verdict}"


class _Runs:
    """The runs of a proof, in one folder.

    Args:
        config: what they share, as written to `config.yaml` there.
        folder: the folder.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        # What counts as standing still: longer than the run's own watchdog would wait.
        self._stall_s = max(300.0, 1.5 * (config.scaling.hang_timeout_s or 0.0))
        self._straight = folder / "straight"
        self._steps: list[int] = []
        self._step_s = 0.0

    def straight(self) -> RunResult:
        """Train without any kill; the moments of the kills are taken from its log."""
        result = self._to_end(self._straight)
        points = [p for p in read_metrics(self._straight) if "train/loss" in p["metrics"]]
        self._steps = [point["step"] for point in points]
        self._step_s = (points[-1]["seconds"] if points else 1.0) / max(len(points), 1)
        return result

    def kill(self, number: int, seed: int) -> Kill:
        """Train, kill at a random moment, resume, compare."""
        chance = random.Random(f"{seed}/{number}")  # noqa: S311
        for trial in range(1, TRIES + 1):
            run_dir = self._folder / f"kill-{number:02d}"
            shutil.rmtree(run_dir, ignore_errors=True)
            if self._train_and_kill(run_dir, self._moment(number, chance), chance):
                break
            if trial == TRIES:
                raise RunFailedError(
                    f"{run_dir}: the run ended before it could be killed, {TRIES} times over: "
                    "give it more steps"
                )
        step = max((p["step"] for p in read_metrics(run_dir)), default=0)
        left = checkpoint_folders(run_dir)
        resumed_from = int(left[-1].name.removeprefix("step-")) if left else None
        self._to_end(run_dir, "--resume")
        return Kill(step, resumed_from, compare_runs(self._straight, run_dir, number))

    def _moment(self, number: int, chance: random.Random) -> int:
        """The logged step after which the run dies; 0: before the first one."""
        first_save = self._config.training.checkpoint_every_steps
        places = [0, *self._steps[:-1]]
        early = [step for step in places if step < first_save]
        late = [step for step in places if step > first_save]
        # Two kills prove both: a run that goes on from a checkpoint, and one that has none.
        wanted = {1: late, 2: early}.get(number, places)
        return chance.choice(wanted or places)

    def _train_and_kill(self, run_dir: Path, step: int, chance: random.Random) -> bool:
        """Whether the kill came before the run's end."""
        first_save = self._config.training.checkpoint_every_steps
        with self._child(run_dir) as child:

            def reached() -> bool:
                if step == 0:
                    return (run_dir / METRICS_FILE).is_file()
                # A checkpoint is written beside the training, and may be late.
                saved = step < first_save or bool(checkpoint_folders(run_dir))
                return saved and any(point["step"] >= step for point in read_metrics(run_dir))

            wait_for(child, lambda: reached() or child.ended, stall_s=self._stall_s)
            # The moment between two points, in which a checkpoint may be half written.
            until = time.monotonic() + chance.random() * self._step_s
            wait_for(
                child, lambda: time.monotonic() >= until or child.ended, stall_s=self._stall_s
            )
            if child.ended:
                if child.code != 0:
                    raise child.failure("ended by itself")
                return False
            child.kill()
        return True

    def _to_end(self, run_dir: Path, *options: str) -> RunResult:
        with self._child(run_dir, *options) as child:
            wait_for(child, lambda: child.ended, stall_s=self._stall_s)
            result = read_result(run_dir)
            if child.code != 0 or result is None or result.status != "finished":
                raise child.failure("did not finish")
        return result

    def _child(self, run_dir: Path, *options: str) -> ChildRun:
        return ChildRun(self._folder / "config.yaml", run_dir, options)
