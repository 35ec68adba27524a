"""`raysched doctor`: each thing that can be wrong is named, with what to do about it."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from raysched import doctor
from raysched.distributed.health import cluster_problem


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    check = doctor.check_folder("output folder", tmp_path / "file" / "runs", "set it")
    assert check.status == "problem"
    assert check.advice == "set it"
    assert str(tmp_path / "file") in check.found


def test_a_folder_that_would_be_made_is_fine_and_nothing_is_left_behind(tmp_path: Path) -> None:
    assert doctor.check_folder("output folder", tmp_path / "a" / "b", "set it").status == "ok"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free_gib", "status"), [(0.5, "problem"), (3, "warn"), (50, "ok")])
def test_little_disk_space_is_told(
    free_gib: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=int(free_gib * doctor.GIB), total=100 * doctor.GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check = doctor.check_disk(tmp_path)
    assert check.status == status
    assert bool(check.advice) == (status != "ok")


@pytest.mark.parametrize(("gib", "status"), [(1, "problem"), (3, "warn"), (8, "ok")])
def test_little_memory_is_told(gib: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_available_memory", lambda: gib * doctor.GIB)
    assert doctor.check_memory().status == status


def test_small_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=0, total=64 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert doctor.check_shared_memory().status == "warn"


def test_a_package_outside_its_range_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_packages().status == "ok"
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.0" if name == "numpy" else real(name)
    )
    check = doctor.check_packages()
    assert check.status == "problem"
    assert "numpy 1.0" in check.found


def test_a_check_that_breaks_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> doctor.Check:
        raise ImportError("libfoo.so is missing")

    check = doctor._guarded(broken)
    assert check.status == "problem"
    assert "libfoo.so is missing" in check.found


def test_an_mlflow_server_that_is_away_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Port 9 (discard) is closed on any machine that runs tests.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    check = doctor.check_store(tmp_path)
    assert check.status == "warn"
    assert "does not answer" in check.found


def test_a_store_that_is_no_database_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").write_text("this is not SQLite, " * 50)
    check = doctor.check_store(tmp_path)
    assert check.status == "problem"
    assert "mlflow.db" in check.found


@pytest.mark.slow
def test_a_cluster_that_is_away_is_named_within_the_limit() -> None:
    assert cluster_problem("127.0.0.1:6399", timeout_s=3.0) is not None


@pytest.mark.slow
def test_the_doctor_ends_in_time_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "raysched", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert {"python", "packages", "torch", "ray", "mlflow store", "disk"} <= checks.keys()
    assert checks["mlflow store"]["status"] == "ok"
    assert list(tmp_path.iterdir()) == []
