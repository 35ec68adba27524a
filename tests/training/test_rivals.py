"""The methods that compete with scheduled sampling: their inputs, their cost, their off state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raysched.diffusion.curriculum import draw_plan
from raysched.diffusion.forecast import step_forecast
from raysched.diffusion.parameterization import add_noise, x0_eps_from_prediction
from raysched.models.weights import weights_sha256
from raysched.training.batch import Batch, draw_batch
from raysched.training.exposure import teacher_forced
from raysched.training.methods import METHODS
from raysched.training.protocols import NullTracker
from raysched.training.setup import Run, build_run
from raysched.training.stop import request_stop
from raysched.training.train_step import sample_losses, train_step
from tests.training.runs import run_loop, small_config

RIVALS = ("input_perturbation", "self_correction", "defar", "mixflow", "dream")
FLOW_ONLY = ("defar", "mixflow")
TYPES = ("epsilon", "v_prediction", "sample", "flow_matching")
BATCH = 32


def rival_run(method: str, **changes: object) -> Run:
    return build_run(small_config(exposure=method, **{"training__batch_size": BATCH, **changes}))


class StopAt(NullTracker):
    """A tracker that asks for a stop after the third step."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def log_metrics(self, metrics, *, step, forward_equivalents):
        if step == 3:
            request_stop(self.run_dir, "stopped", "test")


def column(values: torch.Tensor) -> torch.Tensor:
    """(B,) as fp32 beside images."""
    return values.float().reshape(-1, 1, 1, 1)


def exact_network(run: Run, batch: Batch) -> None:
    """Let the run predict as if it knew each sample's x0 and eps."""

    def predict(sample, timestep, class_labels, **options):
        labels = class_labels.tolist()
        rows = torch.tensor([batch.labels.tolist().index(label) for label in labels])
        return batch.eps[rows] - batch.x0[rows]

    run.predict = predict  # type: ignore[method-assign]


OFF = {
    "input_perturbation": {"input_perturbation__gamma": 0.0},
    "self_correction": {"self_correction__probability": 0.0},
    "mixflow": {"mixflow__gamma": 0.0},
}


@pytest.mark.parametrize("method", OFF)
def test_a_method_of_strength_zero_gives_the_weights_of_plain_training(method):
    ends = []
    for name, changes in (("none", {}), (method, OFF[method]), (method, {})):
        run = rival_run(name, **changes)
        for number in range(3):
            train_step(run, number)
        ends.append((weights_sha256(run.policy.state_dict()), run.meter.forward_equivalents))
    assert ends[1] == ends[0]
    assert ends[2][0] != ends[0][0]


def test_input_perturbation_adds_its_share_of_an_independent_noise():
    run = rival_run("input_perturbation", input_perturbation__gamma=0.3)
    batch = draw_batch(run, 2)
    plain, inputs = teacher_forced(run, batch), METHODS["input_perturbation"](run, batch)
    _, sigma = run.schedule.alpha_sigma(batch.plan.target_u)
    xi = (inputs.sample - plain.sample) / (0.3 * column(sigma))
    assert torch.equal(inputs.target, plain.target)
    assert abs(float(xi.mean())) < 4 / xi.numel() ** 0.5
    assert float(xi.var()) == pytest.approx(1.0, abs=0.15)
    assert abs(float((xi * batch.eps).mean())) < 4 / xi.numel() ** 0.5


def test_mixflow_feeds_an_interpolant_between_its_own_noise_level_and_gamma_of_the_way_up():
    run = rival_run("mixflow", mixflow__gamma=0.5, noise_schedule__shift=2.0)
    batch = draw_batch(run, 0)
    plain, inputs = teacher_forced(run, batch), METHODS["mixflow"](run, batch)
    # On the linear path x = x0 + sigma (eps - x0).
    velocity = batch.eps - batch.x0
    used = ((inputs.sample - batch.x0) * velocity).flatten(1).sum(1)
    used = (used / velocity.square().flatten(1).sum(1)).double()
    told = batch.plan.target_t
    share = (used - told) / (1 - told)
    assert bool(((share > 0) & (share < 0.5)).all())
    assert float(share.mean()) == pytest.approx(0.25, abs=0.1)
    assert torch.equal(inputs.u, plain.u)
    assert torch.equal(inputs.target, plain.target)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_dream_moves_noise_by_the_models_error_and_stays_consistent_with_x0(prediction_type):
    run = rival_run("dream", prediction_type=prediction_type, dream__power=2.0)
    batch = draw_batch(run, 0)
    plain, inputs = teacher_forced(run, batch), METHODS["dream"](run, batch)
    alpha, sigma = run.schedule.alpha_sigma(plain.u)
    run.policy.eval()
    with torch.no_grad():
        out = run.predict(plain.sample, run.schedule.model_time(plain.u).float(), batch.labels)
    _, eps_pred = x0_eps_from_prediction(prediction_type, out, plain.sample, alpha, sigma)
    moved = batch.eps + column(sigma) ** 2 * (batch.eps - eps_pred)
    torch.testing.assert_close(inputs.sample, add_noise(batch.x0, moved, alpha, sigma))
    # The target at the moved input implies the true x0.
    x0, _ = x0_eps_from_prediction(prediction_type, inputs.target, inputs.sample, alpha, sigma)
    usable = alpha > 0.05
    torch.testing.assert_close(x0[usable], batch.x0[usable], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("noise", ["fresh", "same"])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_self_correction_aims_from_its_noised_estimate_at_the_true_x0(prediction_type, noise):
    run = rival_run(
        "self_correction", prediction_type=prediction_type, self_correction__noise=noise
    )
    batch = draw_batch(run, 0)
    plain, inputs = teacher_forced(run, batch), METHODS["self_correction"](run, batch)
    alpha, sigma = run.schedule.alpha_sigma(plain.u)
    assert 0 < inputs.num_rolled < BATCH
    assert int(inputs.rolled.sum()) == inputs.num_rolled == inputs.num_forwards
    assert bool((sigma[inputs.rolled] >= 0.05).all())
    assert torch.equal(inputs.sample[~inputs.rolled], plain.sample[~inputs.rolled])
    assert torch.equal(inputs.target[~inputs.rolled], plain.target[~inputs.rolled])
    x0, _ = x0_eps_from_prediction(prediction_type, inputs.target, inputs.sample, alpha, sigma)
    usable = inputs.rolled & (alpha > 0.05)
    torch.testing.assert_close(x0[usable], batch.x0[usable], atol=2e-4, rtol=1e-3)
    same = (inputs.sample - column(sigma) * batch.eps)[usable] / column(alpha[usable])
    inside = bool((same.abs() < 1 + 1e-3).all())
    assert inside == (noise == "same")


def test_an_exact_model_makes_self_correction_and_defar_teacher_forcing():
    for method, extra in (
        ("self_correction", {"self_correction__noise": "same"}),
        ("defar", {}),
        ("defar", {"defar__jump_gradient": True}),
    ):
        run = rival_run(method, training__batch_size=8, **extra)
        batch = replace(draw_batch(run, 0), labels=torch.arange(8))
        exact_network(run, batch)
        plain, inputs = teacher_forced(run, batch), METHODS[method](run, batch)
        sample, target = inputs.sample, inputs.target
        if inputs.jump is not None:
            sample, target = inputs.jump.remake(torch.arange(8))
        torch.testing.assert_close(sample, plain.sample, atol=1e-5, rtol=0)
        torch.testing.assert_close(target, plain.target, atol=1e-4, rtol=0)


def test_defar_is_reflexflow_on_a_jump_of_every_sample():
    other = small_config(
        training__batch_size=BATCH,
        scheduled_sampling__max_step_offset=1,
        scheduled_sampling__probability=1.0,
        scheduled_sampling__grid="jump",
        scheduled_sampling__sampler="euler",
        scheduled_sampling__reflexflow_beta1=3.0,
    )
    run = rival_run("defar", defar__beta1=3.0)
    same = build_run(other)
    for number in range(2):
        first, second = train_step(run, number), train_step(same, number)
        assert first == second
    assert run.meter.state_dict()["count"] == same.meter.state_dict()["count"]


def test_the_gradient_through_defars_jump_changes_the_gradient_and_not_the_loss():
    rows, losses, gradients, drifts = torch.arange(BATCH), [], [], []
    for keep in (False, True):
        run = rival_run("defar", defar__jump_gradient=keep)
        inputs = METHODS["defar"](run, draw_batch(run, 0))
        loss = sample_losses(run, inputs, rows)
        loss.sum().backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in run.policy.parameters()]))
        drifts.append(float(inputs.drift if inputs.jump is None else inputs.jump.drift))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-4)
    assert float((gradients[0] - gradients[1]).norm()) > 0.01 * float(gradients[0].norm())


COSTS = {
    "none": ({}, lambda rolled: 0),
    "input_perturbation": ({}, lambda rolled: 0),
    "mixflow": ({}, lambda rolled: 0),
    "dream": ({}, lambda rolled: BATCH),
    "self_correction": ({"self_correction__probability": 0.6}, lambda rolled: rolled),
    "defar": ({}, lambda rolled: 2 * rolled),
}
CASES = [(method, changes, cost) for method, (changes, cost) in COSTS.items()] + [
    ("defar", {"defar__alpha": 0.0}, lambda rolled: rolled),
    ("defar", {"defar__jump_gradient": True}, lambda rolled: 4 * rolled),
    ("defar", {"defar__jump_gradient": True, "defar__alpha": 0.0}, lambda rolled: 3 * rolled),
]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("method", "changes", "cost"), CASES)
def test_forward_equivalents_are_exact_and_counted_where_the_network_runs(
    method, changes, cost, accumulation, monkeypatch
):
    run = rival_run(method, **changes, training__gradient_accumulation=accumulation)
    batch = draw_batch(run, 0)
    _, sigma = run.schedule.alpha_sigma(batch.plan.target_u)
    rolled = int((batch.plan.rolled & (sigma >= 0.05)).sum())
    rolled = batch.plan.num_rolled if method == "defar" else rolled
    seen = {True: 0, False: 0}
    forward, predict = run.policy.forward, run.predict

    def count(sample, *, gradient):
        # Predictions without gradient may bypass the module's own forward.
        if torch.is_grad_enabled() == gradient:
            seen[gradient] += len(sample)
            assert len(sample) <= BATCH // accumulation

    def counted_forward(*args, **kwargs):
        count(kwargs["sample"], gradient=True)
        return forward(*args, **kwargs)

    def counted_predict(sample, *args, **kwargs):
        count(sample, gradient=False)
        return predict(sample, *args, **kwargs)

    monkeypatch.setattr(run.policy, "forward", counted_forward)
    monkeypatch.setattr(run, "predict", counted_predict)
    train_step(run, 0)
    assert run.meter.rollout == cost(rolled)
    assert run.meter.training == 3 * BATCH
    assert run.meter.forward_equivalents == seen[False] + 3 * seen[True]


@pytest.mark.parametrize("method", RIVALS)
def test_the_forecast_knows_what_a_method_costs(method):
    run = rival_run(method, training__batch_size=64)
    for number in range(4):
        train_step(run, number)
    expected = 4 * step_forecast(run.config, 0).total
    assert run.meter.forward_equivalents == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("method", RIVALS)
def test_accumulation_changes_the_weights_only_by_rounding(method):
    weights = []
    for accumulation in (1, 4):
        run = rival_run(method, training__gradient_accumulation=accumulation)
        for number in range(2):
            train_step(run, number)
        weights.append(torch.cat([p.detach().flatten() for p in run.policy.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-4)


@pytest.mark.parametrize("method", RIVALS)
def test_what_a_sample_gets_does_not_depend_on_the_rank_that_trains_it(method):
    run = rival_run(method)
    whole = draw_batch(run, 1)
    rows = torch.arange(1, BATCH, 2)
    part = whole.select(rows)
    results = []
    for batch in (whole, part):
        inputs = METHODS[run.config.exposure](run, batch)
        sample, target = inputs.sample, inputs.target
        if inputs.jump is not None:
            sample, target = inputs.jump.remake(torch.arange(len(batch.x0)))
        results.append((sample.detach(), target))
    (all_samples, all_targets), (samples, targets) = results
    torch.testing.assert_close(all_samples[rows], samples, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(all_targets[rows], targets, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["self_correction", "defar"])
def test_a_resumed_run_of_a_method_ends_with_the_weights_of_a_straight_one(
    tmp_path, method, monkeypatch
):
    monkeypatch.setattr("raysched.training.stop.POLL_S", 0.0)
    config = small_config(exposure=method, training__budget__steps=5)
    straight = run_loop(config, tmp_path / "straight")
    run_dir = tmp_path / "stopped"
    assert run_loop(config, run_dir, tracker=StopAt(run_dir)).status == "stopped"
    resumed = run_loop(config, run_dir)
    assert resumed.weights_sha256 == straight.weights_sha256
    assert resumed.compute["forward_equivalents"] == straight.compute["forward_equivalents"]


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("method", [m for m in RIVALS if m not in FLOW_ONLY])
def test_every_prediction_type_trains_with_a_method(method, prediction_type):
    run = rival_run(method, prediction_type=prediction_type)
    losses = [train_step(run, number).loss for number in range(2)]
    assert all(0 < loss < 100 for loss in losses)


def test_the_rivals_draw_from_streams_of_their_own():
    plain = rival_run("none")
    for method in RIVALS:
        run = rival_run(method)
        first, second = draw_batch(plain, 3), draw_batch(run, 3)
        assert torch.equal(first.eps, second.eps)
        assert torch.equal(first.labels, second.labels)
        assert torch.equal(first.plan.target_u, second.plan.target_u)
    drawn = draw_plan(run.config, run.schedule, first.plan.target_u, 0, 3, first.sample_indices)
    assert drawn.num_rolled == 0  # dream makes no rollouts
