"""Rollout options in a training step: what is trained on, what it costs, what happens to NaN."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from raysched.diffusion.parameterization import add_noise, anchored_target
from raysched.diffusion.reuse import passed_states
from raysched.training.batch import draw_batch
from raysched.training.exposure import scheduled_sampling, teacher_forced
from raysched.training.setup import Run, build_run
from raysched.training.targets import global_rows, reference_rows
from raysched.training.train_step import sample_losses, train_step
from tests.training.runs import rollout_config, run_loop, small_config

EVERYTHING = {
    "scheduled_sampling__t_min": 0.1,
    "scheduled_sampling__t_max": 0.9,
    "scheduled_sampling__source_t_max": 0.95,
    "scheduled_sampling__offset_start": 1,
    "scheduled_sampling__offset_ramp_steps": 4,
    "scheduled_sampling__stratified": True,
    "scheduled_sampling__guidance_scale": 1.5,
    "scheduled_sampling__sampler": "euler",
    "scheduled_sampling__ancestral": True,
    "scheduled_sampling__reuse": "all",
    "scheduled_sampling__target": "posterior_mean",
    "scheduled_sampling__posterior_reference": 32,
    "scheduled_sampling__policy": "ema",
    "scheduled_sampling__dropout": True,
    "scheduled_sampling__bucket": 4,
    "model__dropout": 0.1,
}


def option_run(**options) -> Run:
    changes = {f"scheduled_sampling__{key}": value for key, value in options.items()}
    return build_run(rollout_config(**changes))


def test_all_options_at_probability_zero_leave_plain_training_bit_for_bit(tmp_path):
    off = run_loop(small_config(exposure="none", model__dropout=0.1), tmp_path / "off")
    config = rollout_config(**EVERYTHING, scheduled_sampling__probability=0.0)
    zero = run_loop(config, tmp_path / "zero")
    assert zero.weights_sha256 == off.weights_sha256
    assert zero.compute["forward_equivalents"] == off.compute["forward_equivalents"]


def test_all_options_together_train_and_resume_bit_for_bit(tmp_path):
    config = rollout_config(**EVERYTHING, training__budget__steps=8)
    straight = run_loop(config, tmp_path / "straight")
    assert straight.status == "finished"
    assert straight.metrics["rollout/fraction"] > 0
    stop = tmp_path / "parts" / ".stop"

    class Stopper:
        def log_metrics(self, metrics, *, step, forward_equivalents):
            if step == 4:
                stop.write_text(json.dumps({"status": "stopped", "reason": "test"}))

        def log_image(self, *args, **kwargs):
            pass

        def log_artifact(self, *args, **kwargs):
            pass

        def set_tags(self, tags):
            pass

        def close(self, status, timeout_s=10.0):
            pass

    assert run_loop(config, tmp_path / "parts", tracker=Stopper()).status == "stopped"
    assert run_loop(config, tmp_path / "parts").weights_sha256 == straight.weights_sha256


# Options, forwards per rollout step, forwards per clean prediction.
COSTS = [
    ({"guidance_scale": 2.0}, 2, 1),
    ({"guidance_scale": 2.0, "sampler": "rk4"}, 8, 1),
    ({"sampler": "euler", "ancestral": True}, 1, 1),
    ({"target": "posterior_mean"}, 1, 1),
    ({"policy": "ema", "dropout": True}, 1, 1),
    ({"grid": "jump", "jump_gradient": True}, 3, 1),
    ({"grid": "jump", "jump_gradient": True, "reflexflow_alpha": 0.0}, 3, 0),
    ({"stratified": True, "t_min": 0.2, "source_t_max": 0.9}, 1, 1),
]


@pytest.mark.parametrize(("options", "price", "clean"), COSTS)
def test_forward_equivalents_follow_the_definition(options, price, clean):
    run = option_run(**options)
    plans = [draw_batch(run, step).plan for step in range(2)]
    for step in range(2):
        train_step(run, step)
    rollout = sum(price * int(p.num_steps.sum()) + clean * p.num_rolled for p in plans)
    assert rollout > 0
    assert run.meter.rollout == rollout
    assert run.meter.training == 2 * 3 * 8


@pytest.mark.parametrize("reuse", ["last", "all", 2])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_reused_states_cost_three_each_and_are_counted_where_they_are_trained(reuse, accumulation):
    changes = {"scheduled_sampling__reuse": reuse, "scheduled_sampling__max_step_offset": 6}
    run = build_run(rollout_config(**changes, training__gradient_accumulation=accumulation))
    sizes, predict = [], run.predict

    def watch(module, args, kwargs):
        if module.training:
            sizes.append(len(kwargs["sample"]))

    def watched(sample, timestep, class_labels, **options):
        sizes.append(len(sample))
        return predict(sample, timestep, class_labels, **options)

    run.policy.register_forward_pre_hook(watch, with_kwargs=True)
    run.predict = watched
    extra, expected = 0, 0
    for step in range(3):
        plan = draw_batch(run, step).plan
        most = {"last": plan.num_steps.clamp_max(1), "all": plan.num_steps}.get(
            reuse, plan.num_steps.clamp_max(2)
        )
        extra += int((most - 1).clamp_min(0).sum())
        expected += int(plan.num_steps.sum()) + plan.num_rolled
        train_step(run, step)
    assert (extra > 0) is (reuse != "last")
    assert run.meter.training == 3 * (3 * 8 + extra)
    assert run.meter.rollout == expected
    assert max(sizes) <= 8 // accumulation
    assert sum(sizes) == run.meter.rollout + run.meter.training // 3
    assert run.ema.num_samples == 3 * 8


def test_a_reused_state_is_trained_on_at_its_own_time_towards_its_own_data():
    run = option_run(reuse="all", max_step_offset=6, sampler="euler", reflexflow=False)
    batch = draw_batch(run, 0)
    # A network that knows everything: rollouts stay on the straight line to the data.
    states = passed_states(batch.plan, run.schedule, run.config.scheduled_sampling)
    velocity = (batch.eps - batch.x0).clone()

    def knowing(sample, timestep, class_labels, **options):
        found = []
        for row, time in zip(sample, timestep / 1000, strict=True):
            path = (1 - time) * batch.x0 + time * batch.eps
            nearest = (path - row).flatten(1).norm(dim=1).argmin()
            found.append(velocity[nearest])
        return torch.stack(found)

    run.predict = knowing
    inputs = scheduled_sampling(run, batch)
    extra = slice(8, None)
    assert len(inputs.sample) == 8 + len(states) > 8
    assert torch.equal(inputs.u[extra], states.u)
    assert torch.equal(inputs.batch_rows[extra], states.samples)
    alpha, sigma = run.schedule.alpha_sigma(states.u)
    rows = states.samples
    on_path = add_noise(batch.x0[rows], batch.eps[rows], alpha, sigma)
    torch.testing.assert_close(inputs.sample[extra], on_path, rtol=0, atol=1e-5)
    torch.testing.assert_close(inputs.target[extra], velocity[rows], rtol=0, atol=1e-3)
    assert torch.equal(inputs.labels[extra], batch.labels[rows])
    assert torch.equal(inputs.x0[extra], batch.x0[rows])


def test_the_loss_is_the_mean_over_all_rows_and_so_is_its_gradient():
    run = option_run(reuse="all", max_step_offset=6, reflexflow=False)
    inputs = scheduled_sampling(run, draw_batch(run, 0))
    run.network.train()
    expected = sample_losses(run, inputs, torch.arange(len(inputs.sample))).mean()
    expected.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in run.policy.parameters()))
    run.optimizer.zero_grad()
    result = train_step(run, 0)
    assert result.loss == pytest.approx(expected.item(), rel=1e-4)
    assert result.grad_norm == pytest.approx(norm, rel=1e-3)


def test_posterior_means_take_images_of_the_same_class_and_never_the_own_one_twice():
    run = option_run(
        target="posterior_mean", posterior_reference=64, max_step_offset=1, reflexflow=False
    )
    batch = draw_batch(run, 0)
    inputs, plain = scheduled_sampling(run, batch), teacher_forced(run, batch)
    drawn = reference_rows(run, 0)
    assert torch.equal(drawn, reference_rows(run, 0))
    assert not torch.equal(drawn, reference_rows(run, 1))
    images, labels = run.dataset.images_at(drawn), run.dataset.labels_at(drawn)
    checked = 0
    for row in torch.nonzero(batch.plan.rolled)[:, 0].tolist():
        alpha, sigma = (v[None] for v in run.schedule.alpha_sigma(batch.plan.target_u[row]))
        if float(sigma) < 0.05:
            continue
        same = labels == batch.labels[row]
        if int(batch.labels[row]) == run.dataset.num_classes:
            same = torch.ones_like(same)
        same &= drawn != batch.dataset_rows[row]
        pool = torch.cat([batch.x0[row : row + 1], images[same]]).double()
        distance = (inputs.sample[row].double() - alpha * pool).flatten(1).square().sum(dim=1)
        weights = torch.softmax(-distance / (2 * sigma**2), dim=0)
        mean = (weights[:, None, None, None] * pool).sum(dim=0, keepdim=True).float()
        state = inputs.sample[row : row + 1]
        expected = anchored_target("flow_matching", mean, state, alpha, sigma, plain.target[:1])
        torch.testing.assert_close(inputs.target[row : row + 1], expected, rtol=1e-3, atol=1e-3)
        checked += 1
    assert checked


def test_every_class_of_a_batch_has_references_however_rare_it_is():
    run = option_run(target="posterior_mean", posterior_reference=20, max_step_offset=1)
    train = torch.as_tensor(run.dataset.train_indices)
    labels = np.zeros(len(run.dataset.labels), dtype=np.int64)
    labels[train[3::40]] = 9  # a few images of the last class, all others of the first
    run.dataset = dataclasses.replace(run.dataset, labels=labels)
    rare_steps = 0
    for step in range(25):
        drawn = reference_rows(run, step)
        assert len(drawn) == len(drawn.unique()) == 20
        present = set(run.dataset.labels_at(global_rows(run, step)).tolist())
        assert present <= set(run.dataset.labels_at(drawn).tolist())
        assert torch.equal(drawn, reference_rows(run, step))
        rare_steps += 9 in present
    assert rare_steps > 0


def test_the_policy_may_be_the_average_and_may_keep_its_dropout():
    samples = {}
    for name, options in {
        "online": {},
        "ema": {"policy": "ema"},
        "dropout": {"dropout": True},
    }.items():
        changes = {f"scheduled_sampling__{key}": value for key, value in options.items()}
        run = build_run(rollout_config(**changes, model__dropout=0.5))
        with torch.no_grad():
            for parameter in run.policy.parameters():
                parameter.add_(0.05)
        batch = draw_batch(run, 0)
        samples[name] = scheduled_sampling(run, batch).sample
        assert torch.equal(samples[name], scheduled_sampling(run, batch).sample)
        if name == "ema":
            run.ema.copy_to(run.policy)
            torch.testing.assert_close(samples[name], scheduled_sampling(run, batch).sample)
    assert not torch.equal(samples["online"], samples["ema"])
    assert not torch.equal(samples["online"], samples["dropout"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_average_that_rolls_out_follows_the_training(precision):
    config = rollout_config(scheduled_sampling__policy="ema", training__precision=precision)
    run = build_run(config)
    batch = draw_batch(run, 0)
    for step in range(3):
        train_step(run, step)
        averaged = scheduled_sampling(run, batch).sample
        with run.ema.applied(run.policy):
            expected = run.predict(batch.x0, batch.plan.target_u.float(), batch.labels)
        got = run.predict(batch.x0, batch.plan.target_u.float(), batch.labels, average=True)
        assert not torch.equal(
            got, run.predict(batch.x0, batch.plan.target_u.float(), batch.labels)
        )
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2 * float(got.abs().max()))
        assert bool(averaged.isfinite().all())


def test_ancestral_rollouts_differ_by_sample_and_step_and_repeat():
    run = option_run(sampler="euler", ancestral=True)
    batch = draw_batch(run, 0)
    first = scheduled_sampling(run, batch).sample
    assert torch.equal(first, scheduled_sampling(run, batch).sample)
    still = option_run(sampler="euler")
    assert not torch.equal(first, scheduled_sampling(still, draw_batch(still, 0)).sample)


def test_an_ancestral_rollout_that_no_target_fits_stays_teacher_forced():
    options = {"sampler": "euler", "ancestral": True, "t_max": 0.2, "reuse": "all", "grid": 20}
    changes = {f"scheduled_sampling__{key}": value for key, value in options.items()}
    changes["noise_schedule__timestep_sampling"] = "uniform"
    run = build_run(rollout_config(**changes, training__batch_size=256))
    batch = draw_batch(run, 0)
    inputs, plain = scheduled_sampling(run, batch), teacher_forced(run, batch)
    sigma = run.schedule.alpha_sigma(batch.plan.target_u)[1]
    astray = batch.plan.rolled & (sigma < 0.05)
    assert 0 < int(astray.sum()) < batch.plan.num_rolled
    size = len(batch.x0)
    assert torch.equal(inputs.sample[:size][astray], plain.sample[astray])
    assert torch.equal(inputs.target[:size][astray], plain.target[astray])
    assert torch.equal(inputs.rolled[:size], batch.plan.rolled & ~astray)
    moved = (inputs.sample[:size] != plain.sample).flatten(1).any(dim=1)
    assert torch.equal(moved, batch.plan.rolled & ~astray)


def spoil(run: Run, spoilt: set[int], batch) -> None:
    """Let the network answer NaN for some samples, in rollouts only."""
    predict = run.predict
    marked = torch.zeros(2 * len(batch.x0), dtype=torch.bool)
    marked[sorted(spoilt)] = True

    def broken(sample, timestep, class_labels, **options):
        out = predict(sample, timestep, class_labels, **options)
        source = add_noise(batch.x0, batch.eps, *run.schedule.alpha_sigma(batch.plan.source_u))
        for row, state in enumerate(sample):
            same = (source - state).flatten(1).abs().amax(dim=1) == 0
            if bool((same & marked[: len(batch.x0)]).any()):
                out[row] = torch.nan
        return out

    run.predict = broken


@pytest.mark.parametrize("reuse", ["last", "all"])
def test_a_rollout_that_ends_in_nan_falls_back_to_teacher_forcing(reuse):
    run = option_run(reuse=reuse, max_step_offset=4, probability=1.0)
    batch = draw_batch(run, 0)
    victim = int(batch.plan.num_steps.argmax())
    healthy = scheduled_sampling(run, batch)
    spoil(run, {victim}, batch)
    inputs, plain = scheduled_sampling(run, batch), teacher_forced(run, batch)
    assert inputs.failed.tolist() == [row == victim for row in range(8)]
    assert torch.equal(inputs.sample[victim], plain.sample[victim])
    assert torch.equal(inputs.target[victim], plain.target[victim])
    assert not bool(inputs.rolled[victim])
    others = inputs.batch_rows != victim
    assert torch.equal(inputs.sample[others], healthy.sample[others])
    assert torch.equal(inputs.target[others], healthy.target[others])
    assert bool(inputs.sample.isfinite().all() & inputs.target.isfinite().all())
    losses = sample_losses(run, inputs, torch.arange(len(inputs.sample)))
    assert bool(losses.isfinite().all())
    result = train_step(run, 0)
    assert not result.failed
    assert result.rollout["rollout/fallbacks"] == pytest.approx(1 / batch.plan.num_rolled)


@pytest.mark.parametrize(("share", "fails"), [(0.1, True), (0.9, False)])
def test_too_many_fallbacks_name_the_samples(share, fails):
    run = option_run(max_step_offset=4, probability=1.0, max_fallback_share=share)
    batch = draw_batch(run, 0)
    victims = torch.nonzero(batch.plan.rolled)[:3, 0].tolist()
    spoil(run, set(victims), batch)
    result = train_step(run, 0)
    assert result.failed is fails
    if fails:
        assert result.fallback_samples == tuple(victims)
        assert f"those of samples {victims[0]}, {victims[1]}" in result.describe_failure()


def test_a_network_that_returns_nan_in_rollouts_stops_the_run_with_a_name(tmp_path, monkeypatch):
    def broken(self, sample, timestep, class_labels, **options):
        return torch.full_like(sample, torch.nan)

    monkeypatch.setattr(Run, "predict", broken)
    result = run_loop(rollout_config(), tmp_path / "run")
    assert result.status == "failed"
    assert "step 1: the network returned no finite number in 100%" in result.error
    assert "those of samples " in result.error


def gradient(run: Run) -> torch.Tensor:
    sample_losses(
        run, scheduled_sampling(run, draw_batch(run, 0)), torch.arange(8)
    ).sum().backward()
    return torch.cat([p.grad.flatten() for p in run.policy.parameters()])


def test_the_gradient_through_the_jump_is_the_slope_of_the_loss():
    # The original target does not move with the latent. Anchored ones and the drift do,
    # and are constants to the gradient all the same.
    options = {"grid": "jump", "probability": 1.0, "target": "original"}
    options |= {"reflexflow_alpha": 0.0, "reflexflow_beta1": 0.0}
    run = option_run(**options, jump_gradient=True)
    slope, batch = gradient(run), draw_batch(run, 0)
    direction, values = slope / slope.norm(), []
    for sign in (1.0, -2.0):
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(run.policy.parameters()) + sign * 1e-3 * direction,
            run.policy.parameters(),
        )
        inputs = scheduled_sampling(run, batch)
        values.append(float(sample_losses(run, inputs, torch.arange(8)).detach().sum()))
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(float(slope.norm()), rel=0.02)
    detached = gradient(option_run(**options))
    assert float((detached - slope).norm()) > 0.05 * float(slope.norm())
