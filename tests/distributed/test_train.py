"""`raysched train` in this process: what it does with a folder that holds a finished run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from raysched.distributed.train import train
from raysched.errors import ConfigError
from tests.training.runs import small_config


def test_a_finished_run_is_only_read_and_other_settings_are_refused_by_name(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    place = {"training__output_dir": str(tmp_path / "run"), "tracking__enabled": False}
    first = train(small_config(**place), resume=False, console=console)
    assert first.status == "finished"
    again = train(small_config(**place, evaluation__nfe=[3]), resume=True, console=console)
    assert again.weights_sha256 == first.weights_sha256
    assert "this run is finished already" in console.file.getvalue()
    changed = small_config(**place, optimizer__learning_rate=0.5, training__batch_size=4)
    with pytest.raises(ConfigError) as refused:
        train(changed, resume=True, console=console)
    assert [problem.split(": ")[1] for problem in refused.value.problems] == [
        "optimizer.learning_rate",
        "training.batch_size",
    ]
