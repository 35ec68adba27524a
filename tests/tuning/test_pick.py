"""A pick from a sweep's folder alone, by Ray Tune, with a stand-in for training."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from rich.console import Console

from raysched.config.loading import load as load_run
from raysched.config.loading import load_mapping, write_yaml
from raysched.config.sweep import ObjectiveConfig
from raysched.errors import StorageError
from raysched.tuning.folder import open_sweep_folder
from raysched.tuning.journal import Journal
from raysched.tuning.pick import PickResult, run_pick
from raysched.tuning.pick_plan import choose, fresh_seeds, plan_pick
from raysched.tuning.records import Point, TrialRecord
from raysched.tuning.trial import TrialPlan
from tests.tuning.synthetic import OFFSET, known_comparison, load, synthetic_train


def make_sweep(tmp_path, qualities):
    """The folder of a finished sweep: trial number (0: baseline) -> K and q."""
    tmp_path.mkdir(exist_ok=True)
    loaded = load(tmp_path)
    folder = tmp_path / "sweep"
    with open_sweep_folder(folder, loaded.sweep, loaded.base.config):
        journal = Journal(folder)
        plan = TrialPlan(loaded.base.raw, folder, loaded.budget, (0,), None, train=None)
        for number, (k, q) in qualities.items():
            settings = {OFFSET: k} if k else {}
            record = journal.append(
                "suggested", number, baseline=number == 0, assignments=settings
            )
            trial = plan.trial_dir(record.as_trial())
            trial.mkdir(parents=True)
            write_yaml(plan.config(record.as_trial(), 0), trial / "config.yaml")
            journal.append("ended", number, status="finished", q=q, forward_equivalents=1000.0)
    return folder


def pick(folder, train, *, top=2, num_seeds=3, resume=False):
    return run_pick(
        folder, top=top, num_seeds=num_seeds, resume=resume,
        console=Console(file=io.StringIO()), train=train, compare=known_comparison,
    )  # fmt: skip


SWEEP = {0: (0, 0.5), 1: (4, 0.4), 2: (2, 0.2), 3: (6, 0.6), 4: (1, 0.1)}


@pytest.mark.ray
@pytest.mark.slow
def test_a_pick_trains_the_best_and_the_baseline_on_fresh_seeds_and_goes_on_where_it_was(
    tmp_path, ray_session
):
    folder = make_sweep(tmp_path / "there", SWEEP)
    # It needs the folder alone: neither the space's file nor the place where it was made.
    moved = tmp_path / "elsewhere"
    shutil.move(folder, moved)
    shutil.rmtree(tmp_path / "there")
    log = tmp_path / "log"
    train = synthetic_train(log, quality="0.1 * K if K else 0.5")
    result = pick(moved, train)
    assert [t.number for t in result.trials] == [0, 2, 4]
    assert (result.exit_code, result.seeds) == (0, (1, 2, 3))
    assert result.verdict.answer == "rollouts_pay"
    assert result.winner.number == 4
    assert "trial 004 (max_step_offset=1) beats teacher forcing by 0.4" in result.verdict.text
    lines = log.read_text().splitlines()
    assert len(lines) == 9
    assert all("seed 0 " not in line for line in lines)
    winner = load_run(moved / "pick" / "winner.yaml").config
    assert (winner.scheduled_sampling.max_step_offset, winner.seed) == (1, 1)
    assert "trial 002" in (moved / "pick" / "reasons.txt").read_text()
    stored = json.loads((moved / "pick" / "result.json").read_text())
    assert stored["verdict"]["answer"] == "rollouts_pay"

    with pytest.raises(StorageError, match="already holds a pick"):
        pick(moved, train)
    again = pick(moved, train, resume=True)
    assert again.verdict == result.verdict
    assert len(log.read_text().splitlines()) == 9
    more = pick(moved, train, num_seeds=4, resume=True)
    assert more.seeds == (1, 2, 3, 4)
    assert len(log.read_text().splitlines()) == 12
    assert more.verdict.num_seeds == 4
    # Without numbers it goes on with what was asked for last; fewer seeds need no training.
    as_before = pick(moved, train, top=None, num_seeds=None, resume=True)
    assert (as_before.seeds, len(as_before.trials)) == ((1, 2, 3, 4), 3)
    fewer = pick(moved, train, num_seeds=2, resume=True)
    assert (fewer.seeds, fewer.verdict.num_seeds) == ((1, 2), 2)
    assert {len(trial.further_curves) for trial in fewer.trials} == {1}
    assert len(log.read_text().splitlines()) == 12


@pytest.mark.ray
@pytest.mark.slow
def test_a_pick_of_one_seed_keeps_it_when_more_are_asked_for(tmp_path, ray_session):
    folder, log = make_sweep(tmp_path, SWEEP), tmp_path / "log"
    train = synthetic_train(log, quality="0.1 * K if K else 0.5")
    assert pick(folder, train, top=1, num_seeds=1).verdict.indicative
    more = pick(folder, train, top=None, num_seeds=2, resume=True)
    assert [t.number for t in more.trials] == [0, 4]
    assert sorted(line.split(" exposure")[0] for line in log.read_text().splitlines()) == [
        "seed-1 seed 1",
        "seed-1 seed 1",
        "seed-2 seed 2",
        "seed-2 seed 2",
    ]


def test_a_stopped_pick_says_how_to_go_on_and_knows_what_was_asked_for(tmp_path):
    folder = make_sweep(tmp_path, SWEEP)
    first = plan_pick(folder, top=None, num_seeds=None)
    assert (len(first.chosen), first.loaded.sweep.seeds) == (4, (1, 2, 3))
    planned = plan_pick(folder, top=2, num_seeds=5)
    with open_sweep_folder(folder / "pick", planned.loaded.sweep, planned.loaded.base.config):
        pass
    again = plan_pick(folder, top=None, num_seeds=None)
    assert (again.chosen, again.loaded.sweep.seeds) == (planned.chosen, (1, 2, 3, 4, 5))
    stopped = PickResult("stopped", folder / "pick", list(planned.chosen), (1, 2, 3, 4, 5))
    assert stopped.as_text() == (
        f"stopped; go on with: raysched pick {folder} --resume --seeds 5 --top 2"
    )
    (folder / "pick" / "sweep.yaml").write_text("seeds: [one]")
    with pytest.raises(StorageError, match="is damaged"):
        plan_pick(folder, top=None, num_seeds=None)


@pytest.mark.ray
@pytest.mark.slow
def test_a_failed_candidate_is_left_out_and_a_failed_baseline_is_an_error(tmp_path, ray_session):
    folder = make_sweep(tmp_path, SWEEP)
    train = synthetic_train(tmp_path / "log", quality="0.1 * K if K else 0.5", fail_at=1)
    result = pick(folder, train, num_seeds=2)
    assert result.winner.number == 2
    assert result.verdict.indicative
    assert "trial 004 was left out, because it failed" in result.decision.reasons[-1]
    # Asked again, what failed is tried again.
    mended = pick(folder, synthetic_train(tmp_path / "log", quality="0.1 * K if K else 0.5"),
                  num_seeds=2, resume=True)  # fmt: skip
    assert mended.winner.number == 4
    shutil.rmtree(folder / "pick")
    broken = pick(folder, synthetic_train(tmp_path / "log", fail_at=0), num_seeds=1)
    assert (broken.status, broken.exit_code) == ("failed", 1)
    assert "the baseline failed" in broken.error


def test_the_best_of_either_kind_is_among_the_chosen():
    records = [TrialRecord(n, status="finished", q=n / 10) for n in (1, 2, 3, 4)]
    rollouts = {1: False, 2: False, 3: False, 4: True}
    assert [r.number for r in choose(records, rollouts, 2)] == [1, 4]
    assert [r.number for r in choose(records, rollouts, 1)] == [1]
    assert [r.number for r in choose(records, dict.fromkeys(rollouts, True), 3)] == [1, 2, 3]
    assert [r.number for r in choose(records, rollouts, 9)] == [1, 2, 3, 4]


def test_whom_the_sweep_searched_for_is_chosen():
    from raysched.tuning.objectives import sweep_objectives

    config = ObjectiveConfig(several=("quality", "diversity"))
    both = sweep_objectives(config, load_mapping({}, "b").config, 1000.0)
    records = []
    for number, (q, coverage) in enumerate([(0.1, 0.2), (0.2, 0.1), (0.5, 0.9)], start=1):
        record = TrialRecord(number, status="finished")
        record.add_point(Point(1000.0, q, {"coverage": coverage}))
        records.append(record)
    # Trial 2 has a lower q than trial 3, but is beaten in everything.
    rollouts = dict.fromkeys((1, 2, 3), True)
    assert [r.number for r in choose(records, rollouts, 2, both)] == [1, 3]


def test_seeds_are_none_that_the_sweep_used():
    assert fresh_seeds((0, 7, 3), 3) == (8, 9, 10)


def test_trials_are_trained_as_their_own_config_says_even_what_the_base_would_not_tell(tmp_path):
    folder = make_sweep(tmp_path, SWEEP)
    path = folder / "trials" / "004" / "config.yaml"
    config = load_run(path).config
    ss = config.scheduled_sampling.model_copy(update={"reflexflow": False})
    write_yaml(config.model_copy(update={"scheduled_sampling": ss}), path)
    found = plan_pick(folder, top=1, num_seeds=3)
    assert found.configs[4].scheduled_sampling.reflexflow is False
    plan = TrialPlan({}, folder / "pick", 1000.0, (1,), None, train=None, written=found.configs)
    again = plan.config(found.chosen[1].as_trial(), 1)
    # Room for the seeds that may be asked for later.
    assert [path.name for path in plan.run_dirs(found.chosen[1].as_trial())] == ["seed-1"]
    assert (again.scheduled_sampling.reflexflow, again.seed) == (False, 1)


def test_a_folder_without_candidates_is_refused_with_a_reason(tmp_path):
    with pytest.raises(StorageError, match="holds no sweep"):
        plan_pick(tmp_path, top=1, num_seeds=1)
    folder = make_sweep(tmp_path, {0: (0, 0.5)})
    with pytest.raises(StorageError, match="no candidate of this sweep has reached its budget"):
        plan_pick(folder, top=1, num_seeds=1)
