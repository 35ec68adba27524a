"""The command line: what it accepts, what it prints where, and how it ends."""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raysched.arguments import join_values, split_arguments
from raysched.cli import main
from raysched.errors import ConfigError, RunFailedError
from raysched.outcome import Outcome, report, warn
from raysched.signals import STOP, StopRequest

COMMANDS = ("train", "plan", "tune", "sample", "probe", "show-config", "schema", "doctor", "sync")
HEAVY = ("torch", "ray", "mlflow", "diffusers", "pandas", "matplotlib", "sklearn", "scipy")


def run_python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, cwd=cwd
    )


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text('{"scheduled_sampling_probability": 1.0, "seed": 7}')
    return path


def test_importing_the_commands_loads_nothing_heavy() -> None:
    code = f"import sys, raysched.cli; print([m for m in {HEAVY} if m in sys.modules])"
    assert run_python("-c", code).stdout.strip() == "[]"


def test_loading_a_config_loads_nothing_heavy(config_file: Path) -> None:
    code = (
        "import sys, raysched.cli as c; c.main(['show-config', sys.argv[1], '--json']);"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert run_python("-c", code, str(config_file)).stdout.splitlines()[-1] == "[]"


def test_help_costs_less_than_two_fifths_of_a_cpu_second() -> None:
    def cpu_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    costs = []
    for _ in range(3):
        before = cpu_seconds()
        assert run_python("-m", "raysched", "--help").returncode == 0
        costs.append(cpu_seconds() - before)
    assert min(costs) < 0.4


def test_the_module_is_the_same_program_as_the_script() -> None:
    script = subprocess.run(
        [Path(sys.executable).with_name("raysched"), "--help"], capture_output=True, text=True
    )
    module = run_python("-m", "raysched", "--help")
    assert module.stdout == script.stdout
    assert all(f"\n  {command} " in module.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example_and_json(
    command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    printed = capfd.readouterr().out
    assert f"Example: raysched {command}" in printed
    assert "--json" in printed


USAGE_ERRORS = [
    ([], "a command is needed"),
    (["trainn"], "did you mean train?"),
    (["sample"], "RUN_OR_CHECKPOINT"),
    (["sample", "x", "--sampler", "eular"], "euler"),
    (["sample", "x", "--jsn"], "--json"),
    (["sample", "x", "--num-images", "0"], "--num-images"),
    (["probe"], "RUN"),
    (["probe", "x", "--num-pairs", "2"], "--num-pairs"),
    (["probe", "x", "--steps", "4", "--max-offset", "5"], "--max-offset"),
    (["schema", "rnu"], "rnu"),
    (["tune"], "a SPACE is needed"),
    (["tune", "no-such-space.yaml"], "no-such-space.yaml: no such file"),
    (["train", "no-such-run.yaml"], "no-such-run.yaml: no such file"),
    (["train", "a.yaml", "b.yaml"], "one file is expected, got 2"),
    (["train", "--jsn"], "did you mean --json?"),
    (["train", "--resum", "seed=1"], "did you mean --resume?"),
    (["train", "-x"], "'-x'"),
    (["train", "--resume=yes"], "--resume"),
    (["show-config", "scheduled_sampling.max_step_ofset=3"], "scheduled_sampling.max_step_offset"),
    (["show-config", "--scheduled_sampling_max_step_offset", "-3"], "-3"),
    (["show-config", "--scheduled_sampling_max_step_offset"], "needs a value"),
    (["sync", "no-such-folder"], "no-such-folder"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE_ERRORS, ids=lambda v: str(v)[:40])
def test_a_usage_error_exits_2_with_a_clear_line(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str], fresh_signals: None
) -> None:
    assert main(arguments) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert all(line.startswith("error: ") for line in printed.err.splitlines())
    assert message in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(a, m) for a, m in USAGE_ERRORS if a and "--jsn" not in a],
    ids=lambda v: str(v)[:40],
)
def test_a_usage_error_is_one_json_object_for_machines(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str], fresh_signals: None
) -> None:
    assert main([*arguments, "--json"]) == 2
    printed = capfd.readouterr().out
    assert printed.count("\n") == 1
    content = json.loads(printed)
    assert message in content["error"]
    assert content["problems"]


def test_all_mistakes_are_listed_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["show-config", "sede=3", "training.batch_size=0", "--json"]) == 2
    printed = capfd.readouterr()
    assert len(json.loads(printed.out)["problems"]) == 2
    assert printed.err.count("error: ") == 2


def test_the_order_of_tokens_does_not_matter(
    config_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    groups = [
        [str(config_file)],
        ["--scheduled_sampling_max_step_offset", "10"],
        ["--scheduled_sampling_reflexflow=false"],
        ["training.budget.steps=3"],
        ["--json"],
    ]
    for order in itertools.permutations(groups):
        assert main(["show-config", *itertools.chain(*order)]) == 0
        shown = json.loads(capfd.readouterr().out)
        assert shown["seed"] == 7
        assert shown["scheduled_sampling"]["max_step_offset"] == 10
        assert shown["scheduled_sampling"]["reflexflow"] is False
        assert shown["training"]["budget"]["steps"] == 3


def test_an_override_may_be_negative_and_a_flag_may_stand_alone() -> None:
    joined = join_values(["train", "--seed", "-3", "--scheduled_sampling_reflexflow", "x.yaml"])
    assert joined == ["train", "--seed=-3", "--scheduled_sampling_reflexflow", "x.yaml"]
    joined = join_values(["train", "--scheduled_sampling_reflexflow", "false", "--json"])
    assert joined == ["train", "--scheduled_sampling_reflexflow=false", "--json"]


def test_other_commands_keep_their_tokens() -> None:
    assert join_values(["sample", "run", "--nfe", "5"]) == ["sample", "run", "--nfe", "5"]


def test_a_folder_with_an_equals_sign_is_a_file() -> None:
    path, overrides = split_arguments(["runs/lr=0.1/config.yaml", "seed=1", "--name=x"])
    assert path == "runs/lr=0.1/config.yaml"
    assert overrides == ["seed=1", "--name=x"]


def test_show_config_prints_yaml_that_loads_to_the_same(
    config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["show-config", str(config_file), "--prediction_type", "v_prediction"]) == 0
    again = tmp_path / "again.yaml"
    again.write_text(capfd.readouterr().out)
    assert main(["show-config", str(again), "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["prediction_type"] == "v_prediction"
    assert shown["seed"] == 7


def test_a_setting_without_effect_warns_on_stderr_only(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["show-config", "scheduled_sampling.max_step_offset=4", "--json"]) == 0
    printed = capfd.readouterr()
    json.loads(printed.out)
    assert printed.err.startswith("warning: ")


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_schema_is_a_json_schema_with_descriptions(
    kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["schema", kind]) == 0
    plain = json.loads(capfd.readouterr().out)
    assert main(["schema", kind, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == plain
    assert plain["type"] == "object"
    assert plain["properties"]["name"]["description"]


def test_stdout_holds_one_json_object_whatever_libraries_print(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def noisy() -> Outcome:
        print("from Python")
        os.write(1, b"from C\n")
        subprocess.run(["echo", "from a child"], check=True)
        warn(["odd"])
        return Outcome({"metrics": {"a": math.nan, "b": [math.inf, 1.5]}}, text="for a person")

    assert report(noisy, as_json=True) == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out) == {"metrics": {"a": None, "b": [None, 1.5]}}
    for line in ("from Python", "from C", "from a child", "warning: odd"):
        assert line in printed.err
    assert "for a person" not in printed.out + printed.err


def test_stdout_is_a_persons_again_after_a_json_command(capfd: pytest.CaptureFixture[str]) -> None:
    report(lambda: Outcome({}), as_json=True)
    report(lambda: Outcome({}, text="for a person"), as_json=False)
    assert capfd.readouterr().out == "{}\nfor a person\n"


def test_nothing_follows_the_json_object_when_the_process_ends() -> None:
    code = (
        "import atexit, os, sys; atexit.register(os.write, 1, b'late');"
        "sys.argv = ['raysched', 'schema', '--json'];"
        "from raysched.cli import main; sys.exit(main())"
    )
    done = run_python("-c", code)
    assert done.returncode == 0
    json.loads(done.stdout)
    assert "late" in done.stderr


def _raise(error: BaseException) -> Outcome:
    raise error


@pytest.mark.parametrize(
    ("error", "exit_code", "lines"),
    [
        (ConfigError(["a: wrong", "b: wrong"]), 2, ["error: a: wrong", "error: b: wrong"]),
        (RunFailedError("loss is NaN at step 3"), 1, ["error: loss is NaN at step 3"]),
        (KeyboardInterrupt(), 130, ["error: interrupted"]),
        (SystemExit(1), 1, ["error: a library ended the process with code 1"]),
    ],
)
def test_an_error_has_its_exit_code_and_no_traceback(
    error: BaseException, exit_code: int, lines: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert report(lambda: _raise(error), as_json=False) == exit_code
    assert capfd.readouterr().err.splitlines() == lines


def test_an_unexpected_error_is_one_line_and_a_traceback_file(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert report(lambda: _raise(ZeroDivisionError("by zero\nmore")), as_json=True) == 1
    printed = capfd.readouterr()
    (log,) = tmp_path.glob("raysched-error-*.log")
    assert str(log) in json.loads(printed.out)["error"]
    assert printed.err.count("\n") == 1
    assert "Traceback" in log.read_text()


def test_the_traceback_is_shown_when_asked_for(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSCHED_DEBUG", "1")
    assert report(lambda: _raise(ZeroDivisionError("by zero")), as_json=False) == 1
    assert "Traceback" in capfd.readouterr().err


def test_a_reader_that_leaves_early_causes_no_noise() -> None:
    command = f"{sys.executable} -m raysched schema | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert len(done.stdout) == 10
    assert done.stderr == ""


NOISY_WORK = """
import logging, warnings
from raysched.outcome import Outcome, report

def work():
    logging.getLogger("raysched.tracking").warning("the server is away")
    warnings.warn_explicit("cache damaged", UserWarning, "x.py", 1, module="raysched.data")
    warnings.warn_explicit("old call", FutureWarning, "y.py", 1, module="torch.nn")
    return Outcome({})

report(work, as_json=False)
"""


def test_the_packages_warnings_are_plain_lines_and_libraries_are_muted() -> None:
    # In a process of its own: pytest takes warnings away from whoever shows them.
    lines = run_python("-c", NOISY_WORK).stderr.splitlines()
    assert lines == ["warning: the server is away", "warning: cache damaged"]


def test_the_first_signal_asks_and_the_second_interrupts(fresh_signals: None) -> None:
    stop, heard = StopRequest(), list[str]()
    stop.register(heard.append)
    stop.install()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested
    assert heard == ["SIGTERM"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_late_listener_hears_of_the_stop_at_once(fresh_signals: None) -> None:
    stop, heard = StopRequest(), list[str]()
    stop.install()
    signal.raise_signal(signal.SIGINT)
    stop.register(heard.append)
    assert heard == ["SIGINT"]


@pytest.mark.parametrize("command", ["train", "tune"])
def test_a_signal_before_training_begins_exits_75(
    command: str,
    capfd: pytest.CaptureFixture[str],
    fresh_signals: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space = Path(__file__).parents[1] / "tune_spaces" / "digits_rollout.yaml"
    monkeypatch.setattr(STOP, "signal_name", "SIGTERM")
    arguments = [str(space)] if command == "tune" else []
    assert main([command, *arguments, "--json"]) == 75
    printed = capfd.readouterr()
    assert json.loads(printed.out)["status"] == "stopped"


def test_a_lost_terminal_stops_resumably_unless_it_is_ignored(fresh_signals: None) -> None:
    stop = StopRequest()
    stop.install()
    signal.raise_signal(signal.SIGHUP)
    assert stop.signal_name == "SIGHUP"
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop.install()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full", ">&- 2>&-"])
@pytest.mark.parametrize("option", ["", "--json"])
def test_a_stdout_that_takes_nothing_ends_without_a_traceback(
    redirection: str, option: str
) -> None:
    command = f"'{sys.executable}' -m raysched show-config {option} {redirection}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    full = "full" in redirection
    assert done.returncode == (1 if full else 0)
    assert done.stderr == ("error: stdout can't be written: No space left on device\n" * full)


def test_work_goes_on_when_the_reader_of_its_lines_leaves() -> None:
    code = (
        "from raysched.sweep_commands import console; c = console(False); c.print('one');"
        "input(); [c.print(f'line {n}') for n in range(3)];"
        "import sys; print('done', file=sys.stderr)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "one\n"
        process.stdout.close()
        process.stdout = None
        _, stderr = process.communicate("\n", timeout=60)
    assert (process.returncode, stderr) == (0, "done\n")
