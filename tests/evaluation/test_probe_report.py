"""`raysched probe` on runs side by side: files, table, comparison, and the user's mistakes."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raysched.config.loading import write_yaml
from raysched.config.run import TrackingConfig
from raysched.errors import RunFailedError, StorageError, UserError
from raysched.evaluation.probe import ProbeSettings
from raysched.models.export import save_pipeline
from raysched.models.weights import load_weights, save_weights
from raysched.report.probe_report import ProbeReport, probe_runs
from raysched.tracking import prepare_store, start_run
from raysched.tracking.client import connect
from raysched.tracking.spool import Spool
from tests.evaluation.test_sample_run import tiny_config, tiny_network, write_checkpoint
from tests.models.manifests import write_manifest

FAST = ProbeSettings(
    num_samples=16, num_pairs=8, num_steps=4, max_offset=2, nfe=(1, 2), num_bootstrap=20
)
ROLLOUTS = {"max_step_offset": 3, "probability": 0.5}


def make_run(folder: Path, **changes) -> Path:
    config = tiny_config(folder.parent, **changes)
    folder.mkdir()
    write_yaml(config, folder / "config.yaml")
    write_checkpoint(folder, config, 10, seed=len(changes))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    return make_run(root / "with", scheduled_sampling=ROLLOUTS), make_run(root / "without")


@pytest.fixture(scope="module")
def report(runs: tuple[Path, Path]) -> ProbeReport:
    return probe_runs(list(runs), settings=FAST)


def test_two_runs_give_three_pictures_and_words(report: ProbeReport, runs: tuple[Path, Path]):
    assert report.out == runs[0] / "probe"
    assert sorted(report.figures) == ["drift", "population", "quality"]
    for path in report.figures.values():
        with Image.open(path) as picture:
            assert 900 <= picture.width <= 1700
    (comparison,) = report.comparisons
    assert comparison.run == "with (rollouts, K=3)"
    assert comparison.baseline == "without (no rollouts)"
    assert len(report.words) == 2 * 3 + 1
    assert comparison.sentence in report.as_text()
    assert json.loads(json.dumps(report.as_json()))["comparisons"][0]["verdict"]


def test_the_table_is_long_and_complete(report: ProbeReport):
    table = pq.read_table(report.table)
    columns = ["run", "statistic", "t", "k", "nfe", "value", "low", "high"]
    assert table.column_names == columns
    rows = table.to_pylist()
    assert {row["run"] for row in rows} == {"with", "without"}
    ours = [row for row in rows if row["run"] == "with"]
    count = {s: sum(row["statistic"] == s for row in ours) for s in {r["statistic"] for r in ours}}
    nodes, cells = FAST.num_steps + 1, 4 + 3
    assert count["energy"] == count["energy_floor"] == count["band_0_ratio"] == nodes
    assert count["prediction_norm_ratio"] == nodes - 1
    assert count["drift"] == count["drift_floor"] == count["drift_excess"] == cells
    assert count["rollout_energy"] == count["delta"] == cells
    assert count["q"] == len(FAST.nfe)
    assert all(row["low"] <= row["high"] for row in rows)
    excess = {(r["t"], r["k"]): r["value"] for r in ours if r["statistic"] == "drift_excess"}
    drift = {(r["t"], r["k"]): r["value"] for r in ours if r["statistic"] == "drift"}
    floor = {(r["t"], r["k"]): r["value"] for r in ours if r["statistic"] == "drift_floor"}
    assert all(excess[c] == pytest.approx(drift[c] - floor[c]) for c in drift)


def test_a_second_probe_finds_the_same(report: ProbeReport, runs: tuple[Path, Path], tmp_path):
    again = probe_runs(list(runs), settings=FAST, out=tmp_path, log=False)
    assert again.words == report.words
    assert pq.read_table(again.table).equals(pq.read_table(report.table))


def test_a_pipeline_and_another_noise_schedule_are_measured_beside_runs(runs, tmp_path: Path):
    config = tiny_config(runs[0].parent)
    pipeline = tmp_path / "alone"
    save_pipeline(pipeline, tiny_network(config), config, [str(i) for i in range(10)])
    with pytest.raises(UserError, match="doesn't say which data"):
        probe_runs([pipeline], settings=FAST)
    other = make_run(tmp_path / "cosine", noise_schedule={"kind": "cosine"})
    found = probe_runs([runs[1], other, pipeline], settings=FAST, out=tmp_path / "out")
    assert sorted(found.peaks) == ["alone", "cosine", "without"]
    assert [c.run for c in found.comparisons] == ["alone (training unknown)"]
    (note,) = found.notes
    assert note.startswith("alone and cosine have different noise schedules")


def test_a_checkpoint_has_a_folder_of_its_own_beside_the_run_s(tmp_path: Path):
    run = make_run(tmp_path / "run")
    whole = probe_runs([run], settings=FAST, log=False)
    one = probe_runs([run / "checkpoints" / "step-00000010"], settings=FAST, log=False)
    assert whole.out == run / "probe"
    assert one.out == run / "probe-step-00000010"
    assert (whole.out / "population.png").is_file()
    assert (one.out / "population.png").is_file()


def test_a_place_that_takes_no_report_is_told_before_anything_is_measured(
    runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def measured(*args):
        raise AssertionError("measured first")

    monkeypatch.setattr("raysched.report.probe_report._measure", measured)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file stands where a folder is needed: set --out"):
        probe_runs([runs[0]], settings=FAST, out=tmp_path / "file")


def test_memory_that_runs_out_in_a_probe_is_one_message(runs, monkeypatch: pytest.MonkeyPatch):
    def greedy(*args):
        return torch.empty(2**60)

    monkeypatch.setattr("raysched.report.probe_report._measure", greedy)
    with pytest.raises(RunFailedError, match="memory ran out with --num-samples 16, --num-pairs"):
        probe_runs([runs[0]], settings=FAST)


def test_what_cannot_be_probed_is_told_in_one_message(runs, tmp_path: Path):
    with pytest.raises(UserError, match=rf"^{re.escape(str(runs[0]))}: named twice"):
        probe_runs([runs[0], runs[0]], settings=FAST)
    other = make_run(tmp_path / "other", data={"limit": 100, "cache_dir": str(tmp_path / "c")})
    with pytest.raises(UserError, match="different data"):
        probe_runs([runs[0], other], settings=FAST)
    with pytest.raises(UserError, match="--max-offset"):
        probe_runs([runs[0]], settings=ProbeSettings(num_steps=4, max_offset=5))
    broken = Path(shutil.copytree(runs[1], tmp_path / "broken"))
    weights = broken / "checkpoints" / "step-00000010" / "ema.safetensors"
    state = load_weights(weights)
    save_weights(weights, {name: value * float("nan") for name, value in state.items()})
    write_manifest(weights.parent)
    with pytest.raises(RunFailedError, match=r"step-00000010: .*not finite"):
        probe_runs([broken], settings=FAST)


def test_figures_wait_in_the_spool_while_mlflow_is_away(runs, tmp_path: Path):
    run = Path(shutil.copytree(runs[1], tmp_path / "tracked"))
    handle = prepare_store(TrackingConfig(uri="http://127.0.0.1:9"), tmp_path)
    start_run(handle, "tracked", run_dir=run)
    found = probe_runs([run], settings=FAST)
    assert any("not in MLflow yet" in note and "raysched sync" in note for note in found.notes)
    waiting = [entry.operation["path"] for entry in Spool(run).entries()]
    assert waiting == [
        "probe/population.png",
        "probe/drift.png",
        "probe/quality.png",
        "probe/probe.parquet",
    ]


def test_every_run_is_compared_with_the_plain_one(runs, tmp_path: Path):
    rival = make_run(tmp_path / "rival", exposure="input_perturbation")
    found = probe_runs([*runs, rival], settings=FAST, out=tmp_path / "out", log=False)
    compared = [(each.run.split()[0], each.baseline.split()[0]) for each in found.comparisons]
    assert compared == [("with", "without"), ("rival", "without")]


def test_evaluations_that_rk4_cannot_spend_are_told(runs, tmp_path: Path):
    settings = dataclasses.replace(FAST, solver="rk4", nfe=(1, 8))
    found = probe_runs([runs[0]], settings=settings, out=tmp_path, log=False)
    (note,) = found.notes
    assert note == "--nfe: 8 pays for 2 step(s) of rk4, which take 5 network evaluations."


def test_a_tracked_run_gets_figures_and_table(runs, tmp_path: Path):
    run = Path(shutil.copytree(runs[0], tmp_path / "tracked"))
    handle = prepare_store(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"), tmp_path)
    run_id = start_run(handle, "tracked", run_dir=run)
    found = probe_runs([run, runs[1]], settings=FAST)
    assert not [note for note in found.notes if "MLflow" in note]
    artifacts = connect(handle.uri).list_artifacts(run_id, "probe")
    assert {info.path for info in artifacts} == {
        f"probe/{path.name}" for path in (*found.figures.values(), found.table)
    }
