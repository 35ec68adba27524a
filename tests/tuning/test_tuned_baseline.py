"""Where a search tunes more than the rollout, plain training is tuned by as many trials."""

from __future__ import annotations

import functools

import pytest
from ray.tune.search import Searcher

from raysched.config.structure import Structure
from raysched.config.sweep import Dimension
from raysched.tuning.journal import Journal
from raysched.tuning.records import TrialRecord, the_baseline
from raysched.tuning.search import allowed
from raysched.tuning.searcher import TrialSearcher
from raysched.tuning.trial import TrialPlan
from tests.tuning.synthetic import OFFSET, load, synthetic_train
from tests.tuning.test_sweep import run

RATE, BATCH = "optimizer.learning_rate", "training.batch_size"
SPACE = {OFFSET: {"choice": [1, 2, 3, 4]}, RATE: {"loguniform": [1e-4, 1e-2]}}


def test_what_plain_training_has_too_is_what_no_method_is_needed_for():
    space = {
        "exposure": Dimension(choice=("defar", "scheduled_sampling")),
        OFFSET: Dimension(randint=(1, 5), when={"exposure": "scheduled_sampling"}),
        RATE: Dimension(loguniform=(1e-4, 1e-2)),
        BATCH: Dimension(choice=(16, 32), when={"exposure": "defar"}),
        "optimizer.warmup_fraction": Dimension(uniform=(0.0, 0.1), when={RATE: {"min": 0.001}}),
    }
    shared = Structure(space, {}).beside_the_method()
    assert list(shared.space) == [RATE, "optimizer.warmup_fraction"]


def test_a_search_of_the_method_alone_leaves_the_baseline_as_it_is(tmp_path):
    assert not load(tmp_path).tunes_baseline
    assert load(tmp_path, space=SPACE).tunes_baseline


def test_a_tuned_baseline_has_its_settings_and_no_rollouts(tmp_path):
    loaded = load(tmp_path, space=SPACE)
    plan = TrialPlan(loaded.base.raw, tmp_path, 1000.0, (0,), store=None, train=None)
    trial = {"trial_number": 2, "baseline": True, "assignments": {RATE: 0.005}}
    config = plan.config(trial, seed=0)
    assert (config.optimizer.learning_rate, config.exposure) == (0.005, "none")
    assert config.scheduled_sampling.max_step_offset == 0


def test_the_best_of_the_baselines_that_finished_is_the_one_to_beat():
    trials = [
        TrialRecord(0, baseline=True, status="finished", q=0.5),
        TrialRecord(1, status="finished", q=0.1),
        TrialRecord(2, baseline=True, status="finished", q=0.3),
        TrialRecord(4, baseline=True, status="failed", q=0.2),
    ]
    assert the_baseline(trials).number == 2
    assert the_baseline([TrialRecord(0, baseline=True, status="failed")]).number == 0
    assert the_baseline([]) is None


def test_teacher_forced_trials_are_not_given_what_the_run_model_refuses(tmp_path):
    accumulation = "training.gradient_accumulation"
    # Each value goes with the base's, which is 10 and 1; 12 samples are no five equal parts.
    space = {
        OFFSET: {"choice": [1, 2]},
        BATCH: {"choice": [10, 12]},
        accumulation: {"choice": [1, 5]},
    }
    loaded = load(tmp_path, space=space, search={"num_samples": 5})
    (tmp_path / "sweep").mkdir()
    journal = Journal(tmp_path / "sweep")
    plan = TrialPlan(loaded.base.raw, tmp_path / "sweep", 1000.0, (0,), store=None, train=None)

    def open_run(record):
        # With a tracking store, a trial's config is made where it is suggested.
        plan.config(record.as_trial(), 0)
        return ""

    searcher = TrialSearcher(
        loaded.sweep,
        journal,
        folder=plan.folder,
        structure=loaded.structure,
        shared=loaded.structure.beside_the_method(),
        allowed=functools.partial(allowed, plan),
        open_run=open_run,
    )
    while searcher.suggest("") != Searcher.FINISHED:
        pass
    forced = [r.assignments for r in journal.ordered() if r.baseline and r.number]
    assert sorted((s[BATCH], s[accumulation]) for s in forced) == [(10, 1), (10, 5), (12, 1)]


@pytest.mark.ray
def test_as_many_teacher_forced_trials_as_candidates_are_trained_also_when_extended(
    tmp_path, ray_session
):
    train = synthetic_train(tmp_path / "log")

    def space(num_samples):
        search = {"num_samples": num_samples, "max_concurrent": 1}
        return load(tmp_path, space=SPACE, search=search, early_stopping={"kind": "none"})

    first, _ = run(space(2), train)
    assert [trial.baseline for trial in first.trials] == [True, False, True, False]
    assert first.trials[2].assignments.keys() == {RATE}
    assert first.trials[2].name == "002-baseline"
    assert {trial.status for trial in first.trials} == {"finished"}
    second, _ = run(space(3), train, resume=True)
    assert sum(trial.baseline for trial in second.trials) == 3
    assert len(second.trials) == 6
    assert second.trials[:4] == first.trials
