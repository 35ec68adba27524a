"""Early stopping over known curves: counted by hand, and bounds that hold for all."""

from __future__ import annotations

import pytest

from raysched.config.sweep import EarlyStoppingConfig
from raysched.tuning.replay import expected_saving, replay

ASHA = EarlyStoppingConfig()


def curve(q: float) -> list[tuple[float, tuple[float, ...]]]:
    return [(250.0 * part, (q + (4 - part),)) for part in (1, 2, 3, 4)]


def test_one_at_a_time_and_best_first_all_others_get_the_grace_period_only():
    curves = {n: curve(n / 10) for n in (1, 2, 3, 4)}
    spent, survivors = replay(curves, ASHA, 1000.0, concurrent=1)
    assert spent == {1: 1000, 2: 250, 3: 250, 4: 250}
    assert survivors == [1]


def test_worst_first_nobody_is_stopped_and_all_is_spent():
    curves = {n: curve(-n / 10) for n in (1, 2, 3, 4)}
    spent, survivors = replay(curves, ASHA, 1000.0, concurrent=1)
    assert (sum(spent.values()), len(survivors)) == (4000, 4)


def test_two_at_a_time_are_judged_in_the_order_of_their_compute():
    curves = {1: curve(0.1), 2: curve(0.9), 3: curve(0.8)}
    spent, survivors = replay(curves, ASHA, 1000.0, concurrent=2)
    assert survivors == [1]
    assert sum(spent.values()) == 1000 + 250 + 250


def test_without_early_stopping_everything_is_spent():
    none = EarlyStoppingConfig(kind="none")
    spent, survivors = replay({1: curve(1.0), 2: curve(2.0)}, none, 1000.0, concurrent=2)
    assert (sum(spent.values()), survivors) == (2000, [1, 2])
    saving = expected_saving(none, num_trials=4, num_losses=1, evaluations=4, concurrent=2)
    assert (saving.low, saving.mean, saving.high, saving.survivors) == (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("kind", ["asha", "hyperband", "median", "mo_asha"])
def test_a_saving_lies_between_the_grace_period_and_everything(kind):
    early = EarlyStoppingConfig(kind=kind, grace_fraction=0.25)
    losses = 2 if kind == "mo_asha" else 1
    saving = expected_saving(early, num_trials=12, num_losses=losses, evaluations=8, concurrent=2)
    assert 0.25 <= saving.low <= saving.mean <= saving.high <= 1.0 + 1e-5
    assert 0 < saving.survivors < 1


def test_a_stricter_rule_saves_more():
    shares = [
        expected_saving(
            EarlyStoppingConfig(reduction_factor=factor),
            num_trials=16, num_losses=1, evaluations=8, concurrent=2,
        ).mean
        for factor in (2.0, 4.0)
    ]  # fmt: skip
    assert shares[1] < shares[0]
