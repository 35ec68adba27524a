"""One optimizer step: what it trains on, what it counts, what leaves it unchanged."""

from __future__ import annotations

import pytest
import torch

from raysched.diffusion.losses import plain_loss
from raysched.training.batch import draw_batch
from raysched.training.exposure import scheduled_sampling, teacher_forced
from raysched.training.setup import build_run
from raysched.training.train_step import sample_losses, train_step
from tests.training.runs import ROLLOUT, rollout_config, run_loop, small_config


@pytest.mark.parametrize("reflexflow", [True, False])
def test_probability_zero_gives_the_weights_of_a_run_without_scheduled_sampling(
    tmp_path, reflexflow
):
    off = run_loop(small_config(exposure="none"), tmp_path / "off")
    zero = rollout_config(
        scheduled_sampling__probability=0.0, scheduled_sampling__reflexflow=reflexflow
    )
    assert run_loop(zero, tmp_path / "zero").weights_sha256 == off.weights_sha256
    on = run_loop(rollout_config(), tmp_path / "on")
    assert on.weights_sha256 != off.weights_sha256


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("sampler", ["euler", "unipc", "dpm", "rk4"])
def test_forward_equivalents_follow_the_definition(sampler, alpha):
    config = rollout_config(
        scheduled_sampling__sampler=sampler, scheduled_sampling__reflexflow_alpha=alpha
    )
    run = build_run(config)
    plans = [draw_batch(run, step).plan for step in range(3)]
    for step in range(3):
        train_step(run, step)
    price = 4 if sampler == "rk4" else 1
    rollout = sum(price * int(p.num_steps.sum()) + (alpha != 0) * p.num_rolled for p in plans)
    assert run.meter.rollout == rollout
    assert run.meter.training == 3 * 3 * 8
    assert run.meter.forward_equivalents == rollout + 3 * 3 * 8


def test_samples_that_are_not_rolled_out_keep_their_input_bit_for_bit():
    run = build_run(rollout_config(training__batch_size=32))
    batch = draw_batch(run, 0)
    x_t, inputs = teacher_forced(run, batch).sample, scheduled_sampling(run, batch)
    plain = ~inputs.rolled
    assert 0 < inputs.num_rolled < 32
    assert torch.equal(inputs.sample[plain], x_t[plain])
    moved = (inputs.sample - x_t)[inputs.rolled].flatten(1).abs().amax(dim=1)
    assert bool((moved > 1e-3).all())


def test_a_rollout_sees_the_weights_of_the_moment_and_no_dropout():
    run = build_run(rollout_config(model__dropout=0.5, training__batch_size=32))
    batch = draw_batch(run, 0)
    first = scheduled_sampling(run, batch).sample
    assert torch.equal(first, scheduled_sampling(run, batch).sample)
    with torch.no_grad():
        for parameter in run.policy.parameters():
            parameter.add_(0.05)
    assert not torch.equal(first, scheduled_sampling(run, batch).sample)


def test_accumulation_changes_the_weights_only_by_rounding():
    results = []
    for accumulation in (1, 4):
        run = build_run(rollout_config(training__gradient_accumulation=accumulation))
        for step in range(3):
            train_step(run, step)
        results.append(torch.cat([p.detach().flatten() for p in run.policy.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-4)


def test_the_loss_of_plain_samples_is_plain_also_beside_rolled_ones():
    run = build_run(rollout_config(training__batch_size=32))
    batch = draw_batch(run, 0)
    inputs, teacher = scheduled_sampling(run, batch), teacher_forced(run, batch)
    rows = torch.arange(32)
    run.network.eval()
    mixed = sample_losses(run, inputs, rows)
    timestep = run.schedule.model_time(batch.plan.target_u).float()
    with torch.no_grad():
        prediction = run.network(
            sample=teacher.sample, timestep=timestep, class_labels=batch.labels
        )
    plain = plain_loss(prediction, teacher.target)
    torch.testing.assert_close(mixed[~inputs.rolled], plain[~inputs.rolled])
    assert bool(((mixed - plain)[inputs.rolled].abs() > 1e-3).all())


@pytest.mark.parametrize("target", ["original", "anchored"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_matching"])
def test_every_prediction_type_trains_with_rollouts(tmp_path, prediction_type, target):
    flat = {k.replace(".", "__"): v for k, v in ROLLOUT.items() if "reflexflow" not in k}
    config = small_config(
        **flat,
        prediction_type=prediction_type,
        scheduled_sampling__target=target,
        training__budget__steps=3,
    )
    result = run_loop(config, tmp_path / "run")
    assert result.status == "finished"
    assert result.metrics["rollout/fraction"] > 0
    assert 0 < result.metrics["train/loss"] < 100


def test_bf16_trains_close_to_fp32(tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        config = rollout_config(training__precision=precision, training__budget__steps=4)
        losses[precision] = run_loop(config, tmp_path / precision).metrics["train/loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]
