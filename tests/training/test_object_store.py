"""s3:// through pyarrow's own client, against an object store in this process."""

from __future__ import annotations

import json
import shutil

import pytest

from raysched.errors import StorageError
from raysched.training.checkpoint import checkpoint_folders
from raysched.training.fetch import check_storage, prepare_storage, stored_run_name
from raysched.training.storage import Storage
from tests.training.object_store import object_store
from tests.training.runs import rollout_config, run_loop, small_config
from tests.training.test_resume import StopAt, same_end

SECRET = "wJalrXUtnFEMIK7MDENG"


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with object_store() as server:
        yield server


@pytest.mark.slow
def test_a_run_goes_on_from_s3_where_its_folder_is_gone(tmp_path, store, monkeypatch):
    monkeypatch.setattr("raysched.training.stop.POLL_S", 0.0)
    config = rollout_config(
        training__storage_path=store.uri.format("runs"),
        training__checkpoint_every_steps=2,
        training__keep_last=2,
    )
    straight = run_loop(config, tmp_path / "straight")
    name = "run-20260101-000000"
    first = tmp_path / "1" / name
    stopped = run_loop(config, first, tracker=StopAt(first, 7))
    assert (stopped.status, stopped.notes) == ("stopped", [])
    shutil.rmtree(first)
    assert stored_run_name(config) == name
    steps = Storage(config.training.storage_path, name).steps()
    assert steps[-1] == 7
    assert len(steps) <= 2
    second, told = tmp_path / "2" / name, []
    prepare_storage(config, second, resume=True, say=told.append)
    assert [f.name for f in checkpoint_folders(second)] == ["step-00000007"]
    same_end(run_loop(config, second), straight)
    result = json.loads(store.objects[f"runs/{name}/result.json"])
    assert result["weights_sha256"] == straight.weights_sha256
    assert f"runs/{name}/pipeline/model_index.json" in store.objects
    everything = b"".join(data for key, data in store.objects.items() if "tensors" not in key)
    assert SECRET.encode() not in everything
    assert SECRET not in " ".join(told)


def test_a_bucket_that_does_not_exist_is_found_before_training(store):
    path = store.uri.format("runs").replace("bucket", "none", 1)
    with pytest.raises(StorageError, match=r"NO_SUCH_BUCKET.*check the path and the credentials"):
        check_storage(small_config(training__storage_path=path))


def test_the_probe_of_a_bucket_leaves_nothing_behind(store):
    check_storage(small_config(training__storage_path=store.uri.format("runs")))
    assert [key for key in store.objects if not key.endswith("/")] == []


@pytest.mark.parametrize("knows_folders", [True, False], ids=["as S3", "as GCS"])
def test_folders_are_found_and_deleted_whether_or_not_the_client_knows_them(
    tmp_path, store, monkeypatch, knows_folders
):
    """pyarrow's GCS client neither lists nor deletes a folder that it has not made itself."""
    monkeypatch.setattr(Storage, "_knows_folders", property(lambda self: knows_folders))
    place = Storage(store.uri.format("runs"), "mine")
    (tmp_path / "x").write_text('{"format_version": 1, "sha256": {}}')
    for step in (7, 9):
        for name in ("x", "manifest.json"):
            place.put_file(tmp_path / "x", f"checkpoints/step-{step:08d}/{name}")
    place.put_file(tmp_path / "x", "config.yaml")
    assert place.run_names(".*") == ["mine"]
    assert (place.steps(), place.newest_step()) == ([7, 9], 9)
    assert sorted(place.files("checkpoints/step-00000009")) == ["manifest.json", "x"]
    place.delete_checkpoint(9)
    assert place.newest_step() == 7
    left = sorted(key for key in store.objects if not key.endswith("/"))
    folder = "runs/mine/checkpoints/step-00000007"
    assert left == [f"{folder}/manifest.json", f"{folder}/x", "runs/mine/config.yaml"]
