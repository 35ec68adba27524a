"""Importance: a setting that alone makes the difference gets the share, with its scatter."""

from __future__ import annotations

import random

from raysched.config.sweep import Dimension
from raysched.tuning.importance import importances, left_out, shared_quality
from raysched.tuning.records import Point, TrialRecord

SPACE = {"a": Dimension(uniform=(0.0, 1.0)), "b": Dimension(choice=("x", "y", "z"))}


def trials(count: int) -> list[TrialRecord]:
    generator = random.Random(0)
    made = [TrialRecord(0, baseline=True, curve=[Point(1.0, 9.0)])]
    for number in range(1, count + 1):
        a, b = generator.random(), generator.choice(["x", "y", "z"])
        q = a + 0.01 * generator.random()
        made.append(TrialRecord(number, assignments={"a": a, "b": b}, curve=[Point(1.0, q)]))
    return made


def test_the_setting_that_makes_the_difference_gets_the_share() -> None:
    first, second = importances(trials(30), SPACE)
    assert (first.key, second.key) == ("a", "b")
    assert first.share > 0.8
    assert first.low <= first.share <= first.high <= 1.0
    assert abs(first.share + second.share - 1.0) < 1e-6


def test_fewer_trials_scatter_more() -> None:
    wide, narrow = importances(trials(8), SPACE)[0], importances(trials(60), SPACE)[0]
    assert wide.high - wide.low > narrow.high - narrow.low


def test_too_few_trials_or_no_variance_give_nothing() -> None:
    assert importances(trials(5), SPACE) == []
    same = trials(10)
    for trial in same:
        trial.curve = [Point(1.0, 0.5)]
    assert importances(same, SPACE) == []


def test_quality_is_compared_at_the_last_evaluation_that_all_share() -> None:
    long = TrialRecord(1, curve=[Point(1.0, 0.9), Point(2.0, 0.1)])
    short = TrialRecord(2, curve=[Point(1.0, 0.8)])
    lost = TrialRecord(3, curve=[Point(1.0, float("nan"))])
    assert shared_quality([long, short, lost]) == {1: 0.9, 2: 0.8}


def test_settings_of_some_trials_only_are_named_and_one_alone_has_no_share() -> None:
    made = trials(30)
    space = {**SPACE, "c": Dimension(uniform=(0.0, 1.0), when={"b": "x"})}
    for trial in made:
        if trial.assignments.get("b") == "x":
            trial.assignments["c"] = 0.5
    assert left_out(made, space) == ["c"]
    assert {item.key for item in importances(made, space)} == {"a", "b"}
    # Were "b" alone compared, it would get the whole of a variance that is all of "a".
    assert importances(made, {"b": SPACE["b"], "c": space["c"]}) == []
    for trial in made[1:]:
        trial.assignments["b"] = "y"
    assert importances(made, SPACE) == []
