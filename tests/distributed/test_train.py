"""`raysched train` in this process: what it does with a folder that holds a finished run."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from raysched.distributed.train import train
from raysched.errors import ConfigError
from raysched.training.result import read_result
from raysched.training.setup import make_accelerator
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


@pytest.mark.parametrize("content", ["", "{bad", "null", "{}", '{"metrics": 3}'])
def test_a_damaged_result_is_passed_over_and_made_anew(tmp_path, content, caplog):
    console = Console(file=io.StringIO(), width=200)
    run_dir = tmp_path / "run"
    place = {"training__output_dir": str(run_dir), "tracking__enabled": False}
    first = train(small_config(**place), resume=False, console=console)
    (run_dir / "result.json").write_text(content)
    assert read_result(run_dir) is None
    assert f"{run_dir / 'result.json'}: damaged" in caplog.text
    again = train(small_config(**place), resume=True, console=console)
    assert again.status == "finished"
    assert again.weights_sha256 == first.weights_sha256
    assert read_result(run_dir) is not None


def test_a_gpu_that_is_not_there_is_refused_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"training\.device: cuda, but PyTorch finds no GPU"):
        make_accelerator(small_config(training__device="cuda"))
    warned = small_config(training__device="cuda", scaling__num_workers=1)
    assert make_accelerator(warned).device.type == "cpu"
