"""The verdict's comparison from saved samples: real images must beat noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raysched.config.run import RunConfig
from raysched.data.dataset import load_dataset
from raysched.errors import StorageError
from raysched.tuning.compare import compare_with_baseline, metric_name, run_folders
from raysched.tuning.records import TrialRecord
from raysched.tuning.verdict import decide


def save_samples(folder: Path, images: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    labels = torch.arange(len(images)) % 10
    tensors = {"nfe_5": images, "nfe_10": images.flip(0).contiguous(), "labels": labels}
    save_file(tensors, folder / "final_samples.safetensors")


@pytest.fixture
def images() -> torch.Tensor:
    """(120, 1, 8, 8) uint8 training images: other draws of the held-out images' law."""
    dataset = load_dataset(RunConfig().data)
    return torch.from_numpy(dataset.images[dataset.train_indices[:120]])


def noisy(images: torch.Tensor, amount: int) -> torch.Tensor:
    noise = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(0))
    return ((images.int() * (4 - amount) + noise * amount) / 4).to(torch.uint8)


def make_trial(folder: Path, number: int, per_seed: list[torch.Tensor], q: float) -> TrialRecord:
    run_dir = folder / str(number)
    if len(per_seed) == 1:
        save_samples(run_dir, per_seed[0])
    else:
        for seed, images in enumerate(per_seed):
            save_samples(run_dir / f"seed-{seed}", images)
    settings = {"k": number} if number else {}
    return TrialRecord(
        number, baseline=number == 0, status="finished", q=q, run_dir=str(run_dir),
        assignments=settings,
    )  # fmt: skip


@pytest.mark.parametrize("seeds", [1, 3])
def test_cleaner_samples_win_and_noisier_ones_lose(tmp_path, images, seeds):
    levels = {0: 2, 1: 0, 2: 3}
    trials = [
        make_trial(tmp_path, number, [noisy(images, level)] * seeds, q=float(level))
        for number, level in levels.items()
    ]
    config = RunConfig()
    better, worse = compare_with_baseline(trials[0], trials[1:], config=config, seeds=range(seeds))
    assert (better.number, worse.number) == (1, 2)
    assert 0 < better.low < better.difference < better.high
    assert worse.low < worse.difference < worse.high < 0
    found = decide(trials, [better, worse], num_seeds=seeds, metric=metric_name(config))
    assert found.answer == "rollouts_pay"
    assert "trial 001 (k=1) beats teacher forcing" in found.text


def test_the_same_samples_differ_by_nothing(tmp_path, images):
    trials = [make_trial(tmp_path, number, [images], q=1.0) for number in (0, 1)]
    (same,) = compare_with_baseline(trials[0], trials[1:], config=RunConfig(), seeds=(0,))
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)


def test_without_candidates_nothing_is_read():
    assert compare_with_baseline(TrialRecord(0), [], config=RunConfig(), seeds=(0,)) == []


def test_missing_samples_are_named(tmp_path, images):
    baseline = make_trial(tmp_path, 0, [images], q=1.0)
    lost = make_trial(tmp_path, 1, [images], q=1.0)
    (tmp_path / "1" / "final_samples.safetensors").unlink()
    with pytest.raises(StorageError, match="samples can't be read"):
        compare_with_baseline(baseline, [lost], config=RunConfig(), seeds=(0,))
    with pytest.raises(StorageError, match="1 of 2 seeds"):
        compare_with_baseline(baseline, [lost], config=RunConfig(), seeds=(0, 1))


def test_seeds_that_were_not_asked_for_are_not_looked_at(tmp_path, images):
    better, worse = images, noisy(images, 2)
    trials = [
        make_trial(tmp_path, 0, [worse, worse, better], q=1.0),
        make_trial(tmp_path, 1, [better, better, worse], q=1.0),
    ]
    found = compare_with_baseline(trials[0], trials[1:], config=RunConfig(), seeds=(0, 1))
    for run in tmp_path.glob("*/seed-2"):
        (run / "final_samples.safetensors").unlink()
        run.rmdir()
    alone = compare_with_baseline(trials[0], trials[1:], config=RunConfig(), seeds=(0, 1))
    assert found == alone
    with pytest.raises(StorageError, match="2 of 3 seeds"):
        compare_with_baseline(trials[0], trials[1:], config=RunConfig(), seeds=(0, 1, 2))


def test_seeds_are_paired_in_the_order_of_their_numbers(tmp_path):
    for seed in (10, 9, 100):
        (tmp_path / f"seed-{seed}").mkdir()
    names = [path.name for path in run_folders(TrialRecord(1, run_dir=str(tmp_path)))]
    assert names == ["seed-9", "seed-10", "seed-100"]
