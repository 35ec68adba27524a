"""Uploads beside training, and going on from them where the run's folder is gone."""

from __future__ import annotations

import io
import json
import shutil
import threading
from pathlib import Path

import pytest
from rich.console import Console

from raysched.config.loading import load_mapping, write_yaml
from raysched.config.storage_uri import below
from raysched.distributed.train import train
from raysched.errors import ConfigError, StorageError
from raysched.training import fetch, storage, upload
from raysched.training.checkpoint import checkpoint_folders, load_checkpoint
from raysched.training.events import read_events
from raysched.training.fetch import check_storage, prepare_storage, stored_run_name
from raysched.training.run_folder import TRACKING_RECORD, read_metrics
from raysched.training.stop import request_stop
from raysched.training.storage import Storage, answer_of, explain
from raysched.training.upload import Uploader
from tests.training.runs import rollout_config, run_loop, small_config
from tests.training.test_resume import StopAt, same_end, start, without_times

LIMIT_S = 30.0


def stored_config(place: Path, **changes):
    usual = {"training__checkpoint_every_steps": 4, "training__log_every_steps": 1}
    return rollout_config(training__storage_path=str(place), **{**usual, **changes})


def names_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def said(*lines: str) -> None:
    """Told to nobody."""


def test_a_finished_run_lies_in_the_store_as_in_its_folder(tmp_path):
    run_dir = tmp_path / "runs" / "mine"
    result = run_loop(stored_config(tmp_path / "store", training__keep_last=2), run_dir)
    assert result.notes == []
    stored = tmp_path / "store" / "mine"
    names = names_below(stored)
    assert {"config.yaml", "metrics.jsonl", "result.json", "pipeline/model_index.json"} <= names
    for name in names:
        assert (stored / name).read_bytes() == (run_dir / name).read_bytes()
    assert [f.name for f in checkpoint_folders(stored)] == ["step-00000008", "step-00000012"]
    assert load_checkpoint(checkpoint_folders(stored)[-1]).step == 12


def test_a_run_goes_on_where_its_folder_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("raysched.training.stop.POLL_S", 0.0)
    config = stored_config(tmp_path / "store")
    straight = run_loop(config, tmp_path / "straight")
    first = tmp_path / "machine-1" / "mine"
    record = first / TRACKING_RECORD
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"run_id": "abc"}))
    assert run_loop(config, first, tracker=StopAt(first, 6)).status == "stopped"
    shutil.rmtree(tmp_path / "machine-1")
    second, told = tmp_path / "machine-2" / "mine", []
    prepare_storage(config, second, resume=True, say=told.append)
    assert told == [f"fetched step 6 of mine from {tmp_path / 'store'}"]
    assert json.loads((second / TRACKING_RECORD).read_text()) == {"run_id": "abc"}
    same_end(run_loop(config, second), straight)
    points, expected = (read_metrics(p) for p in (second, tmp_path / "straight"))
    assert without_times(points) == without_times(expected)


def test_the_store_is_asked_only_for_what_is_newer_than_the_folder(tmp_path):
    config = stored_config(tmp_path / "store")
    run_loop(config, tmp_path / "mine")
    told: list[str] = []
    prepare_storage(config, tmp_path / "mine", resume=True, say=told.append)
    assert told == []
    shutil.rmtree(checkpoint_folders(tmp_path / "mine")[-1])
    prepare_storage(config, tmp_path / "mine", resume=True, say=told.append)
    assert [line.split(" of ")[0] for line in told] == ["fetched step 12"]


def test_half_uploaded_and_damaged_checkpoints_are_passed_over(tmp_path):
    config = stored_config(tmp_path / "store", training__keep_last=3)
    run_loop(config, tmp_path / "mine")
    *_, damaged, half = checkpoint_folders(tmp_path / "store" / "mine")
    (half / "manifest.json").unlink()
    (damaged / "ema.safetensors").write_bytes(b"x" * 100)
    fresh, told = tmp_path / "other" / "mine", []
    prepare_storage(config, fresh, resume=True, say=told.append)
    assert "damaged checkpoint: ema.safetensors" in told[0]
    assert told[1].startswith("fetched step 4")
    assert [f.name for f in (fresh / "checkpoints").iterdir()] == ["step-00000004"]


def test_a_damaged_checkpoint_in_the_folder_is_fetched_again(tmp_path):
    config, run_dir = stored_config(tmp_path / "store"), tmp_path / "mine"
    straight = run_loop(config, run_dir)
    newest = checkpoint_folders(run_dir)[-1]
    (newest / "model.safetensors").write_bytes(b"x" * 100)
    told: list[str] = []
    prepare_storage(config, run_dir, resume=True, say=told.append)
    assert [line.split(" of ")[0] for line in told] == ["fetched step 12"]
    assert load_checkpoint(newest).step == 12
    same_end(run_loop(config, run_dir), straight)


def test_a_damaged_checkpoint_is_not_uploaded_by_the_next_start(tmp_path):
    config, run_dir = stored_config(tmp_path / "store"), tmp_path / "mine"
    straight = run_loop(config, run_dir)
    shutil.rmtree(tmp_path / "store")
    (checkpoint_folders(run_dir)[-1] / "model.safetensors").write_bytes(b"x" * 100)
    same_end(run_loop(config, run_dir), straight)
    for folder in checkpoint_folders(tmp_path / "store" / "mine"):
        load_checkpoint(folder)


def test_a_stored_run_of_another_config_is_refused_before_anything_is_fetched(tmp_path):
    run_loop(stored_config(tmp_path / "store"), tmp_path / "mine")
    other = stored_config(tmp_path / "store", optimizer__learning_rate=0.5)
    fresh = tmp_path / "other" / "mine"
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate"):
        prepare_storage(other, fresh, resume=True, say=said)
    assert checkpoint_folders(fresh) == []


def test_a_new_run_never_overwrites_a_stored_one(tmp_path):
    config = stored_config(tmp_path / "store")
    run_loop(config, tmp_path / "mine")
    with pytest.raises(StorageError, match="already holds a run mine: go on with it by --resume"):
        prepare_storage(config, tmp_path / "other" / "mine", resume=False, say=said)


def test_the_newest_stored_run_of_a_name_is_found(tmp_path):
    config = stored_config(tmp_path / "store", name="digits")
    assert stored_run_name(config) is None
    run_loop(config, tmp_path / "digits-20260102-000000")
    for name in ("digits-20260101-000000", "digits-20260103-000000", "digits-other"):
        (tmp_path / "store" / name).mkdir()
    assert stored_run_name(config) == "digits-20260102-000000"


def test_a_finished_run_is_uploaded_by_the_next_resume(tmp_path):
    run_loop(rollout_config(), tmp_path / "mine")
    told: list[str] = []
    upload.upload_finished(stored_config(tmp_path / "store"), tmp_path / "mine", told.append)
    assert told == []
    stored = tmp_path / "store" / "mine"
    assert load_checkpoint(checkpoint_folders(stored)[-1]).step == 12
    assert (stored / "result.json").is_file()


def test_the_command_goes_on_where_the_folder_of_all_runs_is_gone(tmp_path, monkeypatch):
    """Without a folder's name: the newest stored run of the config's name is meant."""
    monkeypatch.chdir(tmp_path)
    constant = {"optimizer__schedule": "constant", "optimizer__warmup_fraction": 0.0}

    def config_of(steps: int):
        # A relative path: of the command's working directory.
        return stored_config(
            Path("store"), training__budget__steps=steps, tracking__enabled=False, **constant
        )

    straight = run_loop(config_of(12), tmp_path / "straight")
    console = Console(file=io.StringIO())
    first = train(config_of(8), resume=False, console=console)
    assert first.status == "finished"
    shutil.rmtree(tmp_path / "runs")
    resumed = train(config_of(12), resume=True, console=console)
    assert Path(resumed.output_dir).name == Path(first.output_dir).name
    assert f"fetched step 8 of {Path(first.output_dir).name}" in console.file.getvalue()
    assert resumed.weights_sha256 == straight.weights_sha256
    shutil.rmtree(tmp_path / "store")
    assert train(config_of(12), resume=True, console=console).status == "finished"
    assert checkpoint_folders(tmp_path / "store" / Path(first.output_dir).name)


def test_a_store_that_cannot_be_written_is_found_before_training(tmp_path):
    (tmp_path / "file").touch()
    write_yaml(small_config(), tmp_path / "config.yaml")
    process = start(tmp_path / "mine", f"training.storage_path={tmp_path / 'file' / 'x'}")
    out, err = process.communicate(timeout=90)
    assert process.returncode == 2
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "training.storage_path" in line
    assert not (tmp_path / "mine").exists()


def test_a_store_that_does_not_answer_is_not_waited_for(tmp_path):
    never = threading.Event()
    with pytest.raises(StorageError, match=r"s3://b: writing failed: no answer within 0.05 s"):
        answer_of(never.wait, "s3://b", "writing", 0.05)
    never.set()


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI@bucket/x", "must not hold credentials"),
        ("s3://bucket/x?secret_key=wJalrXUtnFEMI", "must not hold credentials"),
        ("ftp://host/x", "must be a folder or begin with one of"),
        ("s3:///x", "must name a bucket"),
        ("file://host/x", "must be file:// and an absolute path"),
        (" ", "must be text, not empty"),
    ],
)
def test_a_storage_path_that_cannot_work_is_refused_without_showing_secrets(path, rule):
    with pytest.raises(ConfigError, match=rule) as caught:
        load_mapping({"training": {"storage_path": path}}, "c.yaml")
    assert "wJalrXUtnFEMI" not in str(caught.value)
    assert len(caught.value.problems) == 1


def test_other_paths_pass_and_options_stay_at_the_end_of_a_uri():
    for path in ("bk", "/data/bk", "file:///data", "s3://b/x?region=eu-1", "gs://anonymous@b/x"):
        load_mapping({"training": {"storage_path": path}}, "c.yaml")
    assert below("s3://b/x/?region=eu-1", "y") == "s3://b/x/y?region=eu-1"
    assert below("/data/bk?", "y") == "/data/bk?/y"


def test_messages_hide_what_the_environment_keeps_secret(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    error = OSError("signature for wJalrXUtnFEMI at s3://key:other@b is wrong")
    assert explain(error) == "signature for *** at s3://key:***@b is wrong"


class Gate:
    """A store whose uploads of checkpoints wait for a signal, or fail."""

    def __init__(self, real: Storage, monkeypatch) -> None:
        self.open, self.reached, self.failures = threading.Event(), threading.Event(), 0
        self.uploaded: list[str] = []
        put = real.put_folder

        def slow(local: Path, name: str, last: str) -> None:
            self.reached.set()
            assert self.open.wait(LIMIT_S), "the gate was never opened"
            if self.failures:
                self.failures -= 1
                raise OSError("connection reset")
            put(local, name, last)
            self.uploaded.append(Path(name).name)

        monkeypatch.setattr(real, "put_folder", slow)


@pytest.fixture
def three_checkpoints(tmp_path):
    run_loop(rollout_config(training__checkpoint_every_steps=4, training__keep_last=3), tmp_path)
    return checkpoint_folders(tmp_path)


def uploader_of(run_dir: Path, real: Storage, told: list[str], keep_last: int = 9) -> Uploader:
    return Uploader(real, run_dir, keep_last=keep_last, keep_best=0, warn=told.append)


def test_what_waits_is_overtaken_by_what_is_newer_and_what_is_under_way_is_spared(
    tmp_path, three_checkpoints, monkeypatch
):
    real = Storage(str(tmp_path / "store"), "mine")
    gate, told = Gate(real, monkeypatch), []
    uploader = uploader_of(tmp_path, real, told)
    uploader.add(three_checkpoints[0])
    assert gate.reached.wait(LIMIT_S), "the upload never began"
    uploader.add(three_checkpoints[1])
    uploader.add(three_checkpoints[2])
    with uploader.spared() as spared:
        assert spared == {three_checkpoints[0], three_checkpoints[2]}
    gate.open.set()
    assert uploader.finish(LIMIT_S) == []
    assert gate.uploaded == ["step-00000004", "step-00000012", "pipeline"]
    assert told == []


def test_a_failing_upload_is_told_once_and_tried_again(tmp_path, three_checkpoints, monkeypatch):
    monkeypatch.setattr(upload, "FIRST_RETRY_S", 0.01)
    real = Storage(str(tmp_path / "store"), "mine")
    gate, told = Gate(real, monkeypatch), []
    gate.failures = 3
    gate.open.set()
    uploader = uploader_of(tmp_path, real, told)
    uploader.add(three_checkpoints[2])
    assert uploader.finish(LIMIT_S) == []
    assert "step-00000012" in gate.uploaded
    (line,) = told
    assert "uploading failed (connection reset). Training goes on" in line


def test_a_store_that_stays_away_neither_stops_a_run_nor_its_end(tmp_path, monkeypatch):
    def away(self: Storage, local: Path, name: str) -> None:
        raise OSError("unreachable")

    monkeypatch.setattr(Storage, "put_file", away)
    config = stored_config(tmp_path / "store", training__storage_timeout_s=0.1)
    result = run_loop(config, tmp_path / "mine")
    assert result.status == "finished"
    (note,) = result.notes
    assert note.startswith("not uploaded to training.storage_path within 0.1 s: unreachable")
    assert "checkpoints/step-00000012" in note
    assert "result.json" in note
    assert any("uploading failed" in line for line in read_events(tmp_path / "mine"))


def test_what_an_earlier_start_could_not_upload_is_uploaded_by_the_next(tmp_path):
    plain = rollout_config(training__checkpoint_every_steps=4)
    run_loop(plain, tmp_path / "mine")
    config = stored_config(tmp_path / "store")
    assert run_loop(config, tmp_path / "mine").status == "finished"
    assert checkpoint_folders(tmp_path / "store" / "mine")[-1].name == "step-00000012"


def test_old_checkpoints_leave_the_store_and_the_best_stay(tmp_path):
    config = stored_config(
        tmp_path / "store",
        evaluation__enabled=True,
        training__checkpoint_every_steps=1,
        training__keep_last=1,
        training__keep_best=1,
    )
    run_loop(config, tmp_path / "mine")
    stored, local = (checkpoint_folders(p) for p in (tmp_path / "store/mine", tmp_path / "mine"))
    assert stored[-1].name == local[-1].name == "step-00000012"
    # Uploads of checkpoints that were overtaken never happened; what is there is as good.
    assert 1 <= len(stored) <= 2


def test_a_stop_ends_with_the_checkpoint_in_the_store(tmp_path):
    config = stored_config(tmp_path / "store")
    run_dir = tmp_path / "mine"

    class StopNow(StopAt):
        def log_metrics(self, metrics, *, step, forward_equivalents):
            if step == 2:
                request_stop(run_dir, "stopped", "test")

    result = run_loop(config, run_dir, tracker=StopNow(run_dir, 2))
    assert result.status == "stopped"
    step = int(result.compute["steps"])
    assert checkpoint_folders(tmp_path / "store" / "mine")[-1].name == f"step-{step:08d}"
    assert json.loads((tmp_path / "store/mine/result.json").read_text())["status"] == "stopped"


def test_the_probe_of_the_store_leaves_nothing_behind(tmp_path):
    check_storage(small_config(training__storage_path=str(tmp_path / "store")))
    assert list((tmp_path / "store").iterdir()) == []


def test_a_download_that_fails_is_one_message(tmp_path, monkeypatch):
    config = stored_config(tmp_path / "store")
    run_loop(config, tmp_path / "mine")

    def broken(self: Storage, name: str, local: Path) -> None:
        raise OSError("connection reset")

    monkeypatch.setattr(storage.Storage, "get_file", broken)
    with pytest.raises(StorageError, match=r"fetching config\.yaml failed: connection reset"):
        prepare_storage(config, tmp_path / "other" / "mine", resume=True, say=said)
    assert fetch.DOWNLOAD_S > 3600


def test_an_upload_that_is_cut_short_leaves_nothing_that_looks_whole(
    tmp_path, three_checkpoints, monkeypatch
):
    real = Storage(str(tmp_path / "store"), "mine")
    put, newest = real.put_file, three_checkpoints[2]
    name = "checkpoints/step-00000012"
    files = sorted(path.name for path in newest.iterdir())
    for broken in files:

        def cut(local: Path, place: str, broken: str = broken) -> None:
            if local.name == broken:
                raise OSError("connection reset")
            put(local, place)

        monkeypatch.setattr(real, "put_file", cut)
        with pytest.raises(OSError, match="connection reset"):
            real.put_folder(newest, name, "manifest.json")
        assert real.newest_step() is None
    monkeypatch.setattr(real, "put_file", put)
    real.put_folder(newest, name, "manifest.json")
    assert real.newest_step() == 12


def test_a_store_that_lets_nothing_be_deleted_still_gets_every_checkpoint(
    tmp_path, three_checkpoints, monkeypatch
):
    def kept(self: Storage, step: int) -> None:
        raise OSError("access denied")

    monkeypatch.setattr(Storage, "delete_checkpoint", kept)
    told: list[str] = []
    for folder in three_checkpoints:
        uploader = uploader_of(
            tmp_path, Storage(str(tmp_path / "store"), "mine"), told, keep_last=1
        )
        uploader.add(folder)
        assert uploader.finish(LIMIT_S) == []
    assert len(checkpoint_folders(tmp_path / "store" / "mine")) == 3
    assert len(told) == 2
    assert "old checkpoints can't be deleted there (access denied) and stay" in told[0]


def test_a_stopped_run_waits_for_its_uploads_within_its_grace(tmp_path, monkeypatch):
    def away(self: Storage, local: Path, name: str) -> None:
        raise OSError("unreachable")

    monkeypatch.setattr(Storage, "put_file", away)
    monkeypatch.setattr("raysched.training.stop.POLL_S", 0.0)
    config = stored_config(tmp_path / "store", scaling__grace_s=0.2)
    result = run_loop(config, tmp_path / "mine", tracker=StopAt(tmp_path / "mine", 3))
    assert result.status == "stopped"
    assert "within 0.1 s: unreachable" in result.notes[0]
