"""Batches made one step ahead: the same as those made in the step, and no thread left behind."""

from __future__ import annotations

import threading
import weakref
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch

from raysched.models.weights import weights_sha256
from raysched.training import exposure
from raysched.training import feed as feed_module
from raysched.training.batch import draw_batch
from raysched.training.exposure import plan_ahead
from raysched.training.feed import Feed, prepared_batch
from raysched.training.setup import build_run
from raysched.training.train_step import train_step
from tests.training.runs import GRADIENT_JUMP, rollout_config, run_loop, small_config

METHODS: dict[str, dict[str, Any]] = {
    "plain": {"exposure": "none"},
    "reflexflow": {},
    "reused states under guidance": {
        "scheduled_sampling__reuse": "all",
        "scheduled_sampling__guidance_scale": 2.0,
    },
    "ancestral": {
        "scheduled_sampling__sampler": "euler",
        "scheduled_sampling__ancestral": True,
    },
    "ramp": {"scheduled_sampling__prob_end": 0.8, "scheduled_sampling__ramp_steps": 4},
    "jump with gradient": GRADIENT_JUMP,
    "defar": {"exposure": "defar"},
    "self_correction": {"exposure": "self_correction"},
}


def config_of(name: str) -> Any:
    changes = METHODS[name]
    return small_config(**changes) if "exposure" in changes else rollout_config(**changes)


def feed_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "raysched-feed"]


def same(a: Any, b: Any) -> bool:
    """Equal in every tensor, bit for bit, however deep it lies."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if is_dataclass(a):
        return type(a) is type(b) and all(
            same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)
        )
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", METHODS)
def test_steps_fed_ahead_are_those_that_make_their_own_batch(name):
    ends = []
    for fed in (False, True):
        run = build_run(config_of(name))
        feed = Feed(run) if fed else None
        results = [train_step(run, step, feed) for step in range(6)]
        if feed is not None:
            feed.close()
        ends.append(
            (results, run.meter.state_dict()["count"], weights_sha256(run.policy.state_dict()))
        )
    assert ends[0] == ends[1]


@pytest.mark.parametrize("name", METHODS)
def test_what_was_made_ahead_is_what_the_step_would_make(name):
    run = build_run(config_of(name))
    feed = Feed(run)
    before = torch.get_rng_state()
    try:
        for step in range(3):
            feed.order(step)
            assert same(feed.take(step), prepared_batch(run, step))
    finally:
        feed.close()
    assert torch.equal(before, torch.get_rng_state())


def test_only_whole_rollouts_are_planned_ahead():
    planned = {}
    for name in METHODS:
        run = build_run(config_of(name))
        planned[name] = plan_ahead(run, draw_batch(run, 3)) is not None
    rolled = ("reflexflow", "reused states under guidance", "ancestral", "ramp", "defar")
    assert {name for name, whether in planned.items() if whether} == set(rolled)
    run = build_run(config_of("ramp"))
    assert plan_ahead(run, draw_batch(run, 0)) is None  # its chance is still 0


def test_the_thread_has_one_core_and_leaves_the_others_theirs(monkeypatch):
    seen, real, before = [], draw_batch, torch.get_num_threads()

    def watched(run: Any, step: int) -> Any:
        seen.append(torch.get_num_threads())
        return real(run, step)

    monkeypatch.setattr(feed_module, "draw_batch", watched)
    torch.set_num_threads(2)
    feed = Feed(build_run(rollout_config()))
    try:
        feed.order(0)
        feed.take(0)
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join(timeout=30.0)
        assert seen == [1, 2]
        assert torch.get_num_threads() == 2
    finally:
        feed.close()
        torch.set_num_threads(before)


def test_a_step_that_nobody_foresaw_is_made_on_the_spot():
    run = build_run(rollout_config())
    feed = Feed(run)
    try:
        feed.order(5)
        assert feed.take(3).step == 3
        assert feed.take(4).step == 4
    finally:
        feed.close()


def test_an_error_of_the_thread_is_raised_by_the_step_that_wanted_the_batch(monkeypatch):
    run, real = build_run(rollout_config()), draw_batch

    def broken(run: Any, step: int) -> Any:
        if step == 2:
            raise MemoryError("the third batch")
        return real(run, step)

    monkeypatch.setattr(feed_module, "draw_batch", broken)
    feed = Feed(run)
    try:
        for step in range(2):
            assert not train_step(run, step, feed).failed
        with pytest.raises(MemoryError, match="the third batch"):
            train_step(run, 2, feed)
        feed.order(3)
        assert feed.take(3).step == 3
    finally:
        feed.close()
    assert not feed_threads()


def test_a_slow_batch_is_waited_for_and_a_dead_thread_is_not(monkeypatch):
    ready, real = threading.Event(), draw_batch

    def slow(run: Any, step: int) -> Any:
        assert ready.wait(30.0)
        return real(run, step)

    looks: list[float] = []
    monkeypatch.setattr(feed_module, "draw_batch", slow)
    monkeypatch.setattr(feed_module, "LOOK_S", 0.01)
    feed = Feed(build_run(rollout_config()))
    get = feed._made.get

    class Watched:
        """The queue, which lets the batch be made at the third look."""

        put = feed._made.put

        def get(self, timeout: float) -> Any:
            looks.append(timeout)
            if len(looks) == 3:
                ready.set()
            return get(timeout=timeout if len(looks) < 3 else 30.0)

    feed._made = Watched()  # type: ignore[assignment]
    feed.order(7)
    assert feed.take(7).step == 7
    assert len(looks) == 3
    feed.order(8)
    assert feed.take(8).step == 8
    thread = feed._thread
    assert thread is not None
    feed._orders.put(None)
    thread.join(timeout=30.0)
    feed.order(9)
    with pytest.raises(RuntimeError, match="the thread that makes batches is gone"):
        feed.take(9)
    assert not feed_threads()


def test_the_plan_of_a_step_is_gone_before_its_backward_pass(monkeypatch):
    run = build_run(config_of("ancestral"))
    feed, alive, seen = Feed(run), [], []
    backward, rolled = run.accelerator.backward, exposure.roll_out

    def watched(*args: Any, **kwargs: Any) -> Any:
        alive.append(weakref.ref(args[3].calls))
        return rolled(*args, **kwargs)

    def counted(loss: torch.Tensor) -> None:
        seen.append(alive[-1]() is not None)
        backward(loss)

    monkeypatch.setattr(exposure, "roll_out", watched)
    monkeypatch.setattr(run.accelerator, "backward", counted)
    try:
        for step in range(4):
            train_step(run, step, feed)
    finally:
        feed.close()
    assert len(seen) == 4
    assert not any(seen)


@pytest.mark.parametrize("learning_rate", [1e-3, 1e30])
def test_a_run_leaves_no_thread_behind_however_it_ends(tmp_path, learning_rate):
    config = rollout_config(optimizer__learning_rate=learning_rate)
    result = run_loop(config, tmp_path / "run")
    assert result.status == ("finished" if learning_rate < 1 else "failed")
    assert not feed_threads()
