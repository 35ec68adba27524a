"""Checkpoint folders: rows of several ranks, what stays, and errors of the writing thread."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raysched.errors import ConfigError, StorageError
from raysched.models.checkpoint_files import NewerFormatError, read_verified_group
from raysched.models.pickles import PickleError
from raysched.tracking.spool import Spool
from raysched.training import checkpoint as checkpoints
from raysched.training import measure
from raysched.training.background import Background
from raysched.training.checkpoint import (
    Rows,
    Snapshot,
    checkpoint_folders,
    delete_leftovers,
    load_checkpoint,
    load_latest,
    write_snapshot,
)
from raysched.training.keeper import Keeper
from raysched.training.plan import plan_run
from raysched.training.rotation import rotate, steps_to_keep
from raysched.training.run_folder import TRACKING_RECORD
from raysched.training.setup import build_run
from tests.models.manifests import write_manifest
from tests.training.runs import rollout_config, run_loop, small_config

WHOLE = {
    "even": torch.arange(12.0).reshape(4, 3),
    "uneven": torch.arange(5.0),
    "short": torch.arange(2.0).reshape(1, 2),
    "count": torch.tensor(3),
}


def rows_of(rank: int, num_ranks: int) -> dict[str, Rows]:
    """What torch's even chunks give a rank; numbers are rank 0's to write."""
    rows = {}
    for name, tensor in WHOLE.items():
        if tensor.dim() == 0:
            if rank == 0:
                rows[name] = Rows(tensor, 0, ())
            continue
        size = -(-len(tensor) // num_ranks)
        part = tensor[rank * size : (rank + 1) * size]
        if len(part):
            rows[name] = Rows(part, rank * size, tuple(tensor.shape))
    return rows


def snapshot_of(rank: int, num_ranks: int, step: int = 10, token: str = "t") -> Snapshot:
    groups = {group: rows_of(rank, num_ranks) for group in ("model", "ema", "optimizer")}
    state = {"progress": {"metrics": {"quality/q": 0.5}}} if rank == 0 else {}
    return Snapshot(step, groups, state, rank=rank, num_shards=num_ranks, token=token)


def write_all(run_dir: Path, num_ranks: int) -> Path:
    """As the ranks' threads do: rank 0 begins, and waits for the others' rows."""
    threads = [
        threading.Thread(target=write_snapshot, args=(run_dir, snapshot_of(rank, num_ranks)))
        for rank in range(num_ranks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    (folder,) = checkpoint_folders(run_dir)
    return folder


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_rows_of_any_number_of_ranks_are_read_as_whole_tensors(tmp_path, num_ranks):
    folder = write_all(tmp_path, num_ranks)
    read = load_checkpoint(folder)
    assert read.step == 10
    for group in ("model", "ema", "optimizer"):
        assert read.tensors[group].keys() == WHOLE.keys()
        for name, tensor in WHOLE.items():
            assert torch.equal(read.tensors[group][name], tensor)
    assert read_verified_group(folder, "ema")["uneven"].tolist() == [0, 1, 2, 3, 4]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format_version"] == (1 if num_ranks == 1 else 2)
    assert manifest["quality"] == 0.5
    assert len(list(folder.glob("model*.safetensors"))) == num_ranks
    assert not list(folder.glob("rank-*"))


def test_a_missing_or_damaged_part_of_one_rank_is_found(tmp_path):
    folder = write_all(tmp_path, 2)
    part = folder / "ema-00001-of-00002.safetensors"
    data = part.read_bytes()
    part.write_bytes(data[:-4] + b"\0\0\0\1")
    with pytest.raises(StorageError, match=r"ema-00001-of-00002\.safetensors fails its checksum"):
        load_checkpoint(folder)
    part.unlink()
    with pytest.raises(StorageError, match="half-written"):
        load_checkpoint(folder)


def test_rows_that_no_rank_wrote_are_missed(tmp_path):
    folder = write_all(tmp_path, 2)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"]["model"]["even"]["pieces"].pop()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match="rows of even are missing"):
        load_checkpoint(folder)


def test_rows_of_an_earlier_start_are_not_taken_for_those_of_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARD_WAIT_S", 0.1)
    write_snapshot(tmp_path, snapshot_of(1, 2, token="killed"))
    with pytest.raises(StorageError, match="rank 1 wrote no part"):
        write_snapshot(tmp_path, snapshot_of(0, 2, token="new"))
    assert checkpoint_folders(tmp_path) == []
    delete_leftovers(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("quality", "keep", "kept"),
    [
        ([None, None, None, None], (2, 0), {30, 40}),
        ([3.0, 1.0, 2.0, 4.0], (1, 1), {20, 40}),
        ([3.0, 1.0, 1.0, 4.0], (1, 1), {20, 40}),
        ([3.0, 1.0, 1.0, 2.0], (1, 2), {20, 40}),
        ([1.0, 2.0, 3.0, 4.0], (1, 2), {10, 20, 40}),
        ([None, float("nan"), 5.0, None], (1, 3), {30, 40}),
        ([1.0, 2.0, 3.0, 4.0], (9, 0), {10, 20, 30, 40}),
    ],
)
def test_the_last_and_the_best_stay(quality, keep, kept):
    steps = dict(zip((10, 20, 30, 40), quality, strict=True))
    assert steps_to_keep(steps, 40, keep_last=keep[0], keep_best=keep[1]) == kept


def test_checkpoints_after_the_newest_are_of_work_that_was_lost(tmp_path):
    for step in (10, 20, 30):
        write_snapshot(tmp_path, snapshot_of(0, 1, step))
    rotate(tmp_path, 20, keep_last=5, keep_best=0)
    assert [f.name for f in checkpoint_folders(tmp_path)] == ["step-00000010", "step-00000020"]


def test_a_run_keeps_the_checkpoints_of_its_best_evaluations(tmp_path):
    config = small_config(
        evaluation__enabled=True,
        training__budget__steps=12,
        training__checkpoint_every_steps=1,
        training__keep_last=1,
        training__keep_best=2,
    )
    run_loop(config, tmp_path)
    points = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluated = sorted(
        (p["metrics"]["quality/q"], p["step"]) for p in points if "quality/q" in p["metrics"]
    )
    assert len(evaluated) == 4
    best = {step for _, step in evaluated[:2]}
    names = {int(f.name[5:]) for f in checkpoint_folders(tmp_path)}
    assert names == best | {12}


@pytest.mark.parametrize(("keep_best", "num_kept"), [(0, 2), (3, 5), (9, 6)])
def test_the_plan_counts_the_best_checkpoints(monkeypatch, keep_best, num_kept):
    """Four evaluations, so at most four best ones; eight saves."""
    monkeypatch.setattr(measure, "MAX_STEPS", 1)
    config = small_config(
        evaluation__enabled=True, training__budget__steps=40, training__keep_best=keep_best
    )
    plan = plan_run(config)
    assert plan.disk_bytes == num_kept * plan.checkpoint_bytes


def test_an_error_of_the_thread_comes_back_once_and_the_next_job_runs():
    background, done = Background("test"), []

    def fail() -> None:
        raise StorageError("no space")

    background.submit(fail)
    with pytest.raises(StorageError, match="no space"):
        background.drain()
    background.check()
    background.submit(lambda: done.append(1))
    background.drain()
    assert done == [1]


def test_saving_returns_before_the_files_are_written_and_keeps_what_it_copied(
    tmp_path, monkeypatch
):
    from raysched.training import keeper as keeper_module

    go_on = threading.Event()

    def slow(run_dir: Path, snapshot: Snapshot) -> Path:
        assert go_on.wait(30), "the training thread never came back from save"
        return write_snapshot(run_dir, snapshot)

    monkeypatch.setattr(keeper_module, "write_snapshot", slow)
    run = build_run(small_config())
    keeper = Keeper(run, tmp_path)
    weights = {name: tensor.clone() for name, tensor in run.policy.state_dict().items()}
    progress = {"metrics": {"quality/q": 1.0}}
    keeper.save(progress)
    progress["metrics"]["quality/q"] = 2.0
    with torch.no_grad():
        for parameter in run.policy.parameters():
            parameter.add_(1.0)
    assert checkpoint_folders(tmp_path) == []
    go_on.set()
    keeper.on_disk()
    (folder,) = checkpoint_folders(tmp_path)
    read = load_checkpoint(folder)
    assert read.state["progress"]["metrics"]["quality/q"] == 1.0
    assert all(torch.equal(read.tensors["model"][name], weights[name]) for name in weights)


def test_a_full_disk_surfaces_at_the_next_step(tmp_path, monkeypatch):
    from raysched.training import keeper as keeper_module

    def full(run_dir: Path, snapshot: Snapshot) -> Path:
        raise StorageError("no space left")

    monkeypatch.setattr(keeper_module, "write_snapshot", full)
    with pytest.raises(StorageError, match="no space left"):
        run_loop(small_config(training__checkpoint_every_steps=3), tmp_path)
    points = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert points[-1]["step"] < 7


def test_a_checkpoint_says_where_everything_stands(tmp_path):
    record = tmp_path / TRACKING_RECORD
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"run_id": "abc", "experiment": "e"}))
    run_loop(rollout_config(), tmp_path)
    state = load_checkpoint(checkpoint_folders(tmp_path)[-1]).state
    assert state["tracking"] == {"run_id": "abc", "experiment": "e"}
    assert state["position"]["next_sample"] == 12 * 8
    assert state["position"]["curriculum_step"] == 12
    assert state["position"]["budget_fraction"] == 1.0
    assert "counter-based" in state["position"]["random_streams"]
    assert state["meter"]["count"]["training"] == 12 * 8 * 3


def test_the_trackers_record_lies_where_checkpoints_look_for_it(tmp_path):
    assert Spool(tmp_path).record_path == tmp_path / TRACKING_RECORD


def copied_checkpoint(source: Path, run_dir: Path) -> Path:
    """The newest checkpoint of one run, put into the folder of another."""
    folder = checkpoint_folders(source)[-1]
    target = run_dir / "checkpoints" / folder.name
    target.parent.mkdir(parents=True)
    folder.rename(target)
    return target


def test_a_checkpoint_of_another_config_is_refused_with_every_differing_key(tmp_path):
    run_loop(small_config(), tmp_path / "a")
    copied_checkpoint(tmp_path / "a", tmp_path / "b")
    other = small_config(optimizer__learning_rate=0.5, model__layers_per_block=2)
    with pytest.raises(ConfigError) as caught:
        run_loop(other, tmp_path / "b")
    assert "optimizer.learning_rate" in str(caught.value)
    assert "model.layers_per_block" in str(caught.value)
    assert len(caught.value.problems) == 2


def test_weights_of_another_network_are_refused_in_one_message(tmp_path):
    run_loop(small_config(), tmp_path / "a")
    folder = copied_checkpoint(tmp_path / "a", tmp_path / "b")
    other = small_config(model__block_out_channels=[8, 24])
    state = json.loads((folder / "state.json").read_text())
    state["config"] = other.model_dump(mode="json")
    (folder / "state.json").write_text(json.dumps(state))
    write_manifest(folder)
    with pytest.raises(ConfigError, match="its weights are not those of this config's network"):
        run_loop(other, tmp_path / "b")


def test_a_pickle_in_a_checkpoint_is_refused_and_not_passed_over(tmp_path):
    run_loop(small_config(), tmp_path)
    folder = checkpoint_folders(tmp_path)[-1]
    torch.save({"weight": torch.ones(2)}, folder / "model.safetensors")
    write_manifest(folder)
    with pytest.raises(PickleError, match=r"model\.safetensors: refused"):
        load_latest(tmp_path, lambda text: None)


def test_a_folder_of_pickles_among_the_checkpoints_is_refused(tmp_path):
    folder = tmp_path / "checkpoints" / "step-00000005"
    folder.mkdir(parents=True)
    torch.save({}, folder / "model.pt")
    with pytest.raises(PickleError, match=r"model\.pt: refused"):
        load_latest(tmp_path, lambda text: None)


def test_a_later_format_of_rows_is_refused(tmp_path):
    folder = write_all(tmp_path, 2)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 3}))
    with pytest.raises(NewerFormatError):
        load_latest(tmp_path, lambda text: None)


def test_saving_a_step_twice_replaces_it(tmp_path):
    first = snapshot_of(0, 1)
    write_snapshot(tmp_path, first)
    folder = write_snapshot(tmp_path, replace(first, state={"again": True}))
    assert load_checkpoint(folder).state["again"] is True
