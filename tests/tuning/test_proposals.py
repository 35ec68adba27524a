import math

import optuna
import pytest
from optuna.trial import TrialState

from raysched.config.sweep import Dimension, SearchConfig
from raysched.tuning.proposals import Proposals
from raysched.tuning.records import Point, TrialRecord

K, P, S = "scheduled_sampling.max_step_offset", "scheduled_sampling.probability", "sampler"
SPACE = {
    K: Dimension(randint=(1, 11)),
    P: Dimension(uniform=(0.1, 0.9)),
    S: Dimension(choice=("euler", "unipc", ["a", 1])),
}


def ended(number: int, settings: dict, status: str = "finished", **fields) -> TrialRecord:
    return TrialRecord(number, assignments=settings, status=status, **fields)


def test_every_proposal_lies_in_the_space_whatever_the_algorithm():
    for algorithm in ("tpe", "random"):
        proposals = Proposals(SPACE, SearchConfig(algorithm=algorithm, startup_trials=2))
        for number in range(1, 15):
            settings = proposals.ask(number)
            assert settings is not None
            assert 1 <= settings[K] < 11
            assert 0.1 <= settings[P] <= 0.9
            assert settings[S] in SPACE[S].values
            proposals.tell(ended(number, settings, q=settings[P]))


def test_the_users_points_come_first_and_what_they_leave_open_is_drawn():
    points = ({K: 7, P: 0.5, S: ["a", 1]}, {K: 3})
    proposals = Proposals(SPACE, SearchConfig(points=points))
    assert proposals.ask(1) == points[0]
    second = proposals.ask(2)
    assert second is not None
    assert second[K] == 3
    assert set(second) == set(SPACE)


def test_tpe_finds_the_better_half_of_a_simple_slope_more_often_than_chance():
    space = {P: Dimension(uniform=(0.0, 1.0))}
    proposals = Proposals(space, SearchConfig(algorithm="tpe", startup_trials=5))
    drawn = []
    for number in range(1, 41):
        settings = proposals.ask(number)
        drawn.append(settings[P])
        proposals.tell(ended(number, settings, q=settings[P]))
    assert sum(value < 0.25 for value in drawn[10:]) > 20


def test_a_grid_is_tried_completely_and_once():
    space = {K: Dimension(grid=(1, 2, 3)), S: Dimension(choice=("euler", "dpm"))}
    proposals = Proposals(space, SearchConfig(algorithm="grid"))
    tried = [proposals.ask(number) for number in range(1, 7)]
    assert len({(t[K], t[S]) for t in tried}) == 6
    assert proposals.ask(7) is None


def test_settings_are_never_proposed_twice_and_an_exhausted_space_ends_the_search():
    space = {K: Dimension(choice=(1, 2)), S: Dimension(choice=("euler", "dpm"))}
    proposals = Proposals(space, SearchConfig(algorithm="random"))
    tried = [proposals.ask(number) for number in range(1, 6)]
    assert tried[4] is None
    assert len({(t[K], t[S]) for t in tried[:4]}) == 4


def test_settings_that_the_run_model_refuses_are_drawn_again():
    proposals = Proposals(SPACE, SearchConfig(), allowed=lambda s: s[K] >= 9)
    assert all(proposals.ask(number)[K] >= 9 for number in range(1, 5))


def test_a_pruned_trial_is_told_as_pruned_with_its_evaluations_not_as_a_low_value():
    proposals = Proposals(SPACE, SearchConfig())
    settings = proposals.ask(1)
    curve = [Point(100.0, 0.5), Point(200.0, 0.4)]
    proposals.tell(ended(1, settings, "pruned", q=0.4, curve=curve))
    (trial,) = proposals.study.trials
    assert trial.state is TrialState.PRUNED
    assert trial.intermediate_values == {100: 0.5, 200: 0.4}


@pytest.mark.parametrize("q", [math.nan, math.inf, None])
def test_a_trial_that_diverged_is_told_a_finite_penalty_worse_than_all_seen(q):
    proposals = Proposals(SPACE, SearchConfig())
    for number, value in ((1, 0.2), (2, 0.6)):
        proposals.tell(ended(number, proposals.ask(number), q=value))
    proposals.tell(ended(3, proposals.ask(3), "failed", q=q, diverged=True))
    told = proposals.study.trials[-1]
    assert told.state is TrialState.COMPLETE
    assert told.value == pytest.approx(1.0)
    assert proposals.ask(4) is not None


def test_penalties_do_not_raise_each_other_also_after_a_resume():
    proposals = Proposals(SPACE, SearchConfig())
    past = [ended(1, proposals.ask(1), q=0.2), ended(2, proposals.ask(2), q=0.6)]
    past += [ended(n, proposals.ask(n), "failed", diverged=True) for n in (3, 4, 5)]
    for record in past:
        proposals.tell(record)
    resumed = Proposals(SPACE, SearchConfig(), past=past)
    for study in (proposals.study, resumed.study):
        assert [t.value for t in study.trials] == pytest.approx([0.2, 0.6, 1.0, 1.0, 1.0])


def test_a_trial_that_failed_for_another_reason_is_no_evidence_about_its_settings():
    proposals = Proposals(SPACE, SearchConfig())
    proposals.tell(ended(1, proposals.ask(1), q=0.2))
    proposals.tell(ended(2, proposals.ask(2), "failed"))
    assert proposals.study.trials[-1].state is TrialState.FAIL


def test_a_first_trial_that_diverged_is_told_as_soon_as_there_is_something_to_be_worse_than():
    proposals = Proposals(SPACE, SearchConfig())
    first = proposals.ask(1)
    proposals.tell(ended(1, first, "failed", diverged=True, q=math.nan))
    assert proposals.study.trials[0].state is TrialState.RUNNING
    proposals.tell(ended(2, proposals.ask(2), q=0.2))
    told = proposals.study.trials[0]
    assert told.state is TrialState.COMPLETE
    assert 0.2 < told.value < math.inf


def test_memory_that_ran_out_is_told_like_a_divergence_also_after_a_resume():
    proposals = Proposals(SPACE, SearchConfig())
    past = [
        ended(1, proposals.ask(1), "failed", out_of_memory=True),
        ended(2, proposals.ask(2), q=0.2),
        ended(3, proposals.ask(3), q=0.6),
    ]
    for record in past:
        proposals.tell(record)
    assert [trial.value for trial in proposals.study.trials[1:]] == [0.2, 0.6]
    assert proposals.study.trials[0].value > 0.2
    resumed = Proposals(SPACE, SearchConfig(), past=past)
    values = sorted(trial.value for trial in resumed.study.trials)
    assert values == pytest.approx([0.2, 0.6, 1.0])


def test_an_earlier_session_is_replayed_and_its_draws_are_not_repeated():
    search = SearchConfig(algorithm="random", seed=3)
    first = Proposals(SPACE, search)
    past = [ended(n, first.ask(n), q=0.1 * n) for n in (1, 2, 3)]
    past[2].status, past[2].curve = "pruned", [Point(50.0, 0.3)]
    resumed = Proposals(SPACE, search, past=[TrialRecord(0, baseline=True), *past])
    states = [trial.state for trial in resumed.study.trials]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED]
    assert [t.value for t in resumed.study.trials[:2]] == [0.1, 0.2]
    assert resumed.ask(4) not in [record.assignments for record in past]


def test_an_unfinished_trial_keeps_its_number_and_settings_and_is_told_at_its_end():
    record = TrialRecord(2, assignments={K: 4, P: 0.3, S: "euler"})
    proposals = Proposals(SPACE, SearchConfig(), past=[record])
    proposals.ask_again(record)
    record.status, record.q = "finished", 0.25
    proposals.tell(record)
    (trial,) = proposals.study.trials
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.25)
    assert trial.params[K] == 4


def test_points_that_an_earlier_session_used_up_are_not_completed_anew():
    search = SearchConfig(points=({K: 3}, {K: 5}), algorithm="random")
    first = Proposals(SPACE, search)
    past = ended(1, first.ask(1), q=0.5)
    assert Proposals(SPACE, search, past=[past]).ask(2)[K] == 5


def test_nothing_is_printed_and_nothing_warned(capsys, recwarn):
    proposals = Proposals(SPACE, SearchConfig(points=({K: 7},)))
    proposals.tell(ended(1, proposals.ask(1), q=0.5))
    proposals.tell(ended(2, proposals.ask(2), "failed"))
    captured = capsys.readouterr()
    assert (captured.out, captured.err, list(recwarn)) == ("", "", [])
    assert optuna.logging.get_verbosity() >= optuna.logging.ERROR
