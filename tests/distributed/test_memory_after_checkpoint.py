"""Memory that runs out in the middle of a run, where there is a checkpoint to go on from."""

from __future__ import annotations

import pytest

from raysched.distributed.launch import run_training
from raysched.training import loop
from raysched.training.out_of_memory import ADJUSTMENT_FILE
from raysched.training.run_folder import open_run_folder, read_metrics
from tests.training.runs import ignore_report, rollout_config, run_loop

# An allocator's own words; the micro-batch of eight samples never fits after step 5,
# right behind a checkpoint that may not be on the disk yet.
REFUSAL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9999 bytes."
LIMIT_FROM, LARGEST = 5, 4


def test_half_the_micro_batch_goes_on_from_the_checkpoint(tmp_path, monkeypatch):
    config = rollout_config(
        training__budget__steps=12,
        training__batch_size=8,
        training__checkpoint_every_steps=5,
        scaling__retry_out_of_memory=True,
    )
    straight = run_loop(config, tmp_path / "straight")
    step, begun = loop.train_step, []

    def scarce(run, number, feed):
        begun.append(number)
        rows = run.config.training.batch_size // run.config.training.gradient_accumulation
        if number >= LIMIT_FROM and rows > LARGEST:
            raise RuntimeError(REFUSAL)
        return step(run, number, feed)

    monkeypatch.setattr(loop, "train_step", scarce)
    run_dir = tmp_path / "run"
    open_run_folder(config, run_dir, resume=False)
    result = run_training(config, run_dir=run_dir, report=ignore_report)
    assert result.status == "finished"
    assert begun == [*range(6), *range(5, 12)]
    (note,) = result.notes
    assert "8 samples: went on at 4" in note
    assert (run_dir / ADJUSTMENT_FILE).is_file()
    points, expected = (read_metrics(folder) for folder in (run_dir, tmp_path / "straight"))
    assert [p["step"] for p in points] == [p["step"] for p in expected]
    for mine, theirs in zip(points, expected, strict=True):
        loss = theirs["metrics"]["train/loss"]
        assert mine["metrics"]["train/loss"] == pytest.approx(loss, rel=1e-4)
    for key in ("forward_equivalents", "rollout", "training", "steps"):
        assert result.compute[key] == straight.compute[key]
    # A later start, with the user's own settings, knows what was learned.
    begun.clear()
    more = rollout_config(
        training__budget__steps=14, training__batch_size=8, scaling__retry_out_of_memory=True
    )
    open_run_folder(more, run_dir, resume=True)
    again = run_training(more, run_dir=run_dir, report=ignore_report)
    assert (again.status, begun) == ("finished", [12, 13])
