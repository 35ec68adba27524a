import pytest

from raysched.config.space import load_sweep
from raysched.errors import ConfigError, StorageError
from raysched.tuning.folder import open_sweep_folder, sweep_folder
from tests.tuning.synthetic import OFFSET, load, write_space


def make(loaded, folder):
    with open_sweep_folder(folder, loaded.sweep, loaded.base.config):
        pass


def test_a_folder_that_holds_a_sweep_is_refused_without_resume(tmp_path):
    loaded = load(tmp_path)
    folder = sweep_folder(loaded.sweep, resume=False)
    make(loaded, folder)
    with pytest.raises(StorageError, match=r"already holds a sweep.*--resume"):
        sweep_folder(loaded.sweep, resume=False)
    assert sweep_folder(loaded.sweep, resume=True) == folder


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(StorageError, match="holds no sweep"):
        sweep_folder(load(tmp_path).sweep, resume=True)
    with pytest.raises(StorageError, match="no sweep named synthetic"):
        sweep_folder(load(tmp_path, output_dir=None).sweep, resume=True, root=tmp_path)


def test_without_a_name_every_sweep_gets_its_own_and_resume_means_the_newest(tmp_path):
    loaded = load(tmp_path, output_dir=None)
    folders = []
    for _ in range(3):
        folders.append(sweep_folder(loaded.sweep, resume=False, root=tmp_path))
        make(loaded, folders[-1])
    assert len(set(folders)) == 3
    assert all(f.parent == tmp_path / "runs" and f.name.startswith("synthetic-") for f in folders)
    assert sweep_folder(loaded.sweep, resume=True, root=tmp_path) == folders[-1]


def test_a_resumed_sweep_may_ask_for_more_trials_but_not_for_another_space(tmp_path):
    folder = tmp_path / "sweep"
    make(load(tmp_path), folder)
    make(load(tmp_path, search={"num_samples": 40, "seed": 1}), folder)
    with pytest.raises(ConfigError, match=f"space.{OFFSET}"):
        make(load(tmp_path, space={OFFSET: {"choice": [1, 2]}}), folder)
    with pytest.raises(ConfigError, match=r"the run's optimizer\.learning_rate"):
        make(load_sweep(write_space(tmp_path), ["optimizer.learning_rate=0.5"]), folder)


def test_what_was_asked_is_kept_in_files_that_load_again(tmp_path):
    from raysched.config.loading import load as load_run

    loaded = load(tmp_path)
    folder = tmp_path / "sweep"
    make(loaded, folder)
    assert load_run(folder / "base.yaml").config == loaded.base.config
    assert load_sweep(folder / "sweep.yaml").sweep.space == loaded.sweep.space


def test_two_drivers_never_run_one_sweep_at_once(tmp_path):
    loaded = load(tmp_path)
    folder = tmp_path / "sweep"
    with (
        open_sweep_folder(folder, loaded.sweep, loaded.base.config),
        pytest.raises(StorageError, match="another process is running"),
    ):
        make(loaded, folder)
    make(loaded, folder)


def test_an_earlier_request_to_stop_is_forgotten(tmp_path):
    folder = tmp_path / "sweep"
    make(load(tmp_path), folder)
    (folder / ".stop").touch()
    make(load(tmp_path), folder)
    assert not (folder / ".stop").exists()
