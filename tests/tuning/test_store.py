"""A sweep in a real MLflow store: what its parent, its trials and their seeds show there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raysched.tracking import MlflowTracker, recorded_run
from raysched.tracking.client import connect
from raysched.tuning.records import Point, SweepResult, TrialRecord, Verdict
from raysched.tuning.store import final_metrics, open_store, pareto_front
from raysched.tuning.trial import TrialPlan
from tests.tuning.synthetic import OFFSET, load


def trial(number: int, folder: Path, **values: Any) -> TrialRecord:
    name = f"{number:03d}" + ("" if number else "-baseline")
    settings = {OFFSET: number} if number else {}
    return TrialRecord(
        number, baseline=not number, assignments=settings, run_dir=str(folder / name), **values
    )


def open_sweep(tmp_path: Path, seeds: list[int]) -> tuple[Any, TrialPlan]:
    overrides = {
        "tracking.uri": f"sqlite:///{tmp_path}/store.db",
        "scaling.num_workers": 0,
        "training.batch_size": 10,
        "scheduled_sampling.probability": 0.5,
    }
    loaded = load(tmp_path, overrides=overrides, seeds=seeds)
    folder = tmp_path / "sweep"
    folder.mkdir()
    store = open_store(loaded, folder, budget=1000.0)
    assert store is not None
    plan = TrialPlan(loaded.base.raw, folder, 1000.0, tuple(seeds), store.handle, train=None)  # type: ignore[arg-type]
    return store, plan


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
def test_parent_children_and_seeds_are_nested_and_comparable(tmp_path: Path) -> None:
    store, plan = open_sweep(tmp_path, [4, 7])
    folder = tmp_path / "sweep"
    records = [trial(0, folder / "trials"), trial(2, folder / "trials")]
    for record in records:
        record.tracking_id = store.open_run(record, plan)
    for seed, run_dir in zip((4, 7), plan.run_dirs(records[1].as_trial()), strict=True):
        tracker = MlflowTracker(store.handle, recorded_run(run_dir), run_dir, send=False)
        tracker.log_metrics({"quality/q": float(seed)}, step=9, forward_equivalents=500)
        tracker.close("finished")
        point = {"step": 9 + seed, "forward_equivalents": 500 + seed, "seconds": 1.0}
        line = json.dumps({**point, "metrics": {"quality/q": float(seed), "train/loss": 1.0}})
        (run_dir / "metrics.jsonl").write_text(line + "\n")
        (run_dir / "result.json").write_text(
            '{"status": "finished", "output_dir": "", "metrics": {}}'
        )
    for record, spent, q in ((records[0], 900.0, 0.5), (records[1], 1000.0, 0.25)):
        record.status, record.forward_equivalents, record.q = "finished", spent, q
        record.curve = [Point(spent, q)]
        store.close_run(record)
    verdict = Verdict("rollouts pay", "rollouts_pay")
    store.finish(
        SweepResult("sweep", "finished", folder, records, winner=records[1], verdict=verdict)
    )

    client = connect(store.handle.uri)
    runs = {r.info.run_name: r for r in client.search_runs([store.handle.experiment_id])}
    parent, child, seed = (runs[n] for n in ("sweep", "002 sweep", "seed-7 002 sweep"))
    assert len(runs) == 7
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert seed.data.tags["mlflow.parentRunId"] == child.info.run_id
    kinds = {name: run.data.tags["raysched.kind"] for name, run in runs.items()}
    assert (kinds["sweep"], kinds["002 sweep"], kinds["seed-7 002 sweep"]) == (
        "sweep",
        "trial",
        "seed",
    )
    # The same parameters in every child, the baseline's own values too.
    assert {name: runs[name].data.params for name in ("000-baseline sweep", "002 sweep")} == {
        "000-baseline sweep": {OFFSET: "0"},
        "002 sweep": {OFFSET: "2"},
    }
    assert seed.data.params == {OFFSET: "2", "seed": "7"}
    assert seed.data.metrics["quality/q"] == 7.0
    assert child.data.metrics["objective/q"] == 0.25
    # The child shows the mean over its seeds, against steps and against compute.
    for key, place in (("quality/q", 14), ("by_fe/quality/q", 506)):
        history = client.get_metric_history(child.info.run_id, key)
        assert [(metric.step, metric.value) for metric in history] == [(place, 5.5)]
    assert "train/loss" not in child.data.metrics
    assert child.data.metrics["objective/forward_equivalents"] == 1000.0
    assert {r.info.status for r in runs.values() if "000" not in r.info.run_name} == {"FINISHED"}
    assert child.data.tags["raysched.pareto"] == "true"
    assert child.data.tags["raysched.winner"] == "true"
    assert runs["000-baseline sweep"].data.tags["raysched.winner"] == "false"
    assert parent.data.tags["verdict.answer"] == "rollouts_pay"
    assert "raysched.version" in child.data.tags
    files = [info.path for info in client.list_artifacts(parent.info.run_id)]
    assert "packages.txt" in files
    text = Path(client.download_artifacts(parent.info.run_id, "packages.txt")).read_text()
    assert "torch==" in text


def test_a_seed_that_died_is_shown_as_failed(tmp_path: Path) -> None:
    store, plan = open_sweep(tmp_path, [0, 1])
    record = trial(3, tmp_path / "sweep" / "trials")
    record.tracking_id = store.open_run(record, plan)
    record.status, record.error = "failed", "its process died"
    store.close_run(record)
    store.close()
    client = connect(store.handle.uri)
    runs = {r.info.run_name: r for r in client.search_runs([store.handle.experiment_id])}
    assert runs["003 sweep"].info.status == "FAILED"
    assert runs["003 sweep"].data.tags["raysched.reason"] == "its process died"
    assert {runs[f"seed-{s} 003 sweep"].info.status for s in (0, 1)} == {"FAILED"}
    assert "objective/q" not in runs["003 sweep"].data.metrics


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(10, 1.0), (20, 0.5), (30, 0.7)], {0, 1}),
        ([(10, 1.0), (10, 1.0)], {0, 1}),
        ([(10, 1.0), (10, 0.9)], {1}),
        ([(10, float("nan")), (20, 0.9)], {1}),
        ([], set()),
    ],
)
def test_the_front_holds_whom_nobody_beats_in_both(
    tmp_path: Path, points: list[tuple[float, float]], front: set[int]
) -> None:
    records = [
        trial(n, tmp_path, status="finished", forward_equivalents=spent, q=q)
        for n, (spent, q) in enumerate(points)
    ]
    assert pareto_front(records) == front


def test_a_failed_trial_is_never_on_the_front(tmp_path: Path) -> None:
    failed = trial(1, tmp_path, status="failed", forward_equivalents=1.0, q=0.0)
    assert pareto_front([failed]) == set()
    assert final_metrics(failed)["objective/q"] == 0.0


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
def test_a_pick_of_one_seed_has_a_run_for_it_below_its_trial(tmp_path: Path) -> None:
    store, plan = open_sweep(tmp_path, [4])
    record = trial(2, tmp_path / "sweep" / "trials")
    given = replace(plan, written={2: plan.config(record.as_trial(), 4)})
    record.tracking_id = store.open_run(record, given)
    (run_dir,) = given.run_dirs(record.as_trial())
    store.close()
    assert run_dir.name == "seed-4"
    assert recorded_run(run_dir) not in (None, record.tracking_id)
