"""An evaluation as a whole: names, ranks, repeatability, divergence, comparison of trials."""

import math

import numpy as np
import pytest
import torch

from raysched.config.run import RunConfig
from raysched.diffusion.compute import ComputeMeter
from raysched.diffusion.schedules import NoiseSchedule
from raysched.evaluation import evaluate as module
from raysched.evaluation.reference import build_reference, thinned
from tests.evaluation.oracles import class_images, knowing_x0, striped_classes

DATA = striped_classes()


def config_of(**evaluation) -> RunConfig:
    settings = {"nfe": (2, 4), "num_bootstrap": 40, "batch_size": 16, **evaluation}
    return RunConfig.model_validate({"evaluation": settings})


def run(network=None, config=None, num_samples=40, **changes) -> module.Evaluation:
    config = config or config_of()
    schedule = NoiseSchedule.from_config(config.noise_schedule)
    network = network or knowing_x0(class_images(), schedule, "flow_matching")
    return module.evaluate(
        network,
        config=config,
        dataset=DATA,
        schedule=schedule,
        num_samples=num_samples,
        **changes,
    )


def grey(*, sample, timestep, class_labels):
    return sample / (timestep[:, None, None, None] / 1000.0)


def broken_below_half(*, sample, timestep, class_labels):
    # Only the finer grid of nfe 4 visits t = 0.25.
    time = timestep[:, None, None, None]
    return torch.where(time < 400, torch.nan, sample / (time / 1000.0))


def test_the_names_of_the_metrics_are_those_that_are_promised():
    distances = ("kid", "energy_distance", "sliced_wasserstein", "frechet_distance")
    expected = {f"quality/{name}/nfe_{nfe}" for name in distances for nfe in (2, 4)}
    expected |= {f"quality/{name}" for name in ("q", "q_low", "q_high", "q_epsilon_scaled")}
    expected |= {f"quality/{name}" for name in ("precision", "recall", "density", "coverage")}
    expected |= {f"quality/{n}" for n in ("class_accuracy", "self_consistency", "nonfinite")}
    found = run()
    assert set(found.metrics) == expected
    assert all(type(value) is float and math.isfinite(value) for value in found.metrics.values())


def test_q_is_the_mean_of_the_chosen_metric_and_lies_in_its_interval():
    found = run(config=config_of(metric="energy_distance")).metrics
    parts = [found[f"quality/energy_distance/nfe_{nfe}"] for nfe in (2, 4)]
    assert found["quality/q"] == pytest.approx(sum(parts) / 2)
    assert found["quality/q_low"] < found["quality/q"] < found["quality/q_high"]


def test_class_means_score_adherence_without_diversity_and_beat_grey_images():
    means, nothing = run().metrics, run(grey).metrics
    assert means["quality/class_accuracy"] == 1.0
    assert means["quality/precision"] == 1.0
    assert means["quality/recall"] < 0.2
    assert nothing["quality/class_accuracy"] == pytest.approx(0.5)
    assert means["quality/q"] < nothing["quality/q"]
    assert means["quality/self_consistency"] == pytest.approx(0.0, abs=1e-5)


def test_samples_are_pixels_per_nfe_for_balanced_labels():
    found = run(num_samples=10)
    assert {nfe: (x.shape, x.dtype) for nfe, x in found.samples.items()} == {
        nfe: (torch.Size([10, 1, 4, 4]), torch.uint8) for nfe in (2, 4)
    }
    assert found.labels.tolist() == [0, 1] * 5
    assert found.metric_label == "KID"
    bright_left = found.samples[4][0, 0, 0].tolist()
    assert bright_left == pytest.approx([191, 191, 64, 64], abs=1)


def test_forwards_are_counted_as_evaluation_only():
    meter = ComputeMeter()
    run(num_samples=40, meter=meter)
    # Two NFEs, plain and Epsilon-Scaled, and 4 x 2 for the self-consistency.
    assert meter.evaluation == 40 * (2 + 4) * 2 + 40 * 8
    assert meter.forward_equivalents == 0
    plain = ComputeMeter()
    found = run(num_samples=40, meter=plain, with_epsilon_scaling=False)
    assert plain.evaluation == 40 * (2 + 4) + 40 * 8
    assert "quality/q_epsilon_scaled" not in found.metrics


def test_two_evaluations_of_one_network_agree_bitwise():
    first, second = run(), run()
    assert first.metrics == second.metrics
    assert all(torch.equal(first.samples[nfe], second.samples[nfe]) for nfe in (2, 4))


def test_a_diverged_network_is_reported_and_nothing_crashes():
    found = run(broken_below_half)
    assert found.metrics["quality/q"] == math.inf
    assert found.metrics["quality/q_high"] == math.inf
    assert found.metrics["quality/kid/nfe_4"] == math.inf
    assert math.isfinite(found.metrics["quality/kid/nfe_2"])
    assert found.metrics["quality/nonfinite"] == 0.5
    assert found.metrics["quality/self_consistency"] == math.inf
    assert not any(math.isnan(value) for value in found.metrics.values())
    assert any("nfe 4 are not finite" in note for note in found.notes)


def test_an_unconditional_model_has_no_class_accuracy():
    config = config_of().model_dump()
    config["model"]["class_conditional"] = False
    found = run(grey, config=RunConfig.model_validate(config))
    assert "quality/class_accuracy" not in found.metrics


def test_what_makes_a_number_weak_is_noted():
    found = run(config=config_of(sampler="rk4"), num_samples=20)
    assert any("Frechet distance is unreliable: 20 images for 16" in n for n in found.notes)
    assert any("2 pays for 1 step(s) of rk4" in note for note in found.notes)
    assert run(num_samples=40).notes == ()


def test_a_comparison_from_saved_samples_agrees_with_what_the_trials_reported():
    config = config_of()
    means, nothing = run(config=config), run(grey, config=config)
    found = module.compare([(means.samples, nothing.samples)], config=config, dataset=DATA)
    reported = means.metrics["quality/q"] - nothing.metrics["quality/q"]
    assert found.difference == pytest.approx(reported)
    assert found.high < 0.0
    assert found.share_a_better == 1.0


def test_trials_at_different_nfes_cannot_be_compared():
    found = run()
    fewer = {2: found.samples[2]}
    with pytest.raises(ValueError, match=r"nfe \[2, 4\] and \[2\]"):
        module.compare([(found.samples, fewer)], config=config_of(), dataset=DATA)


def test_the_reference_is_the_held_out_split_and_is_made_once():
    cpu = torch.device("cpu")
    reference = build_reference(DATA, "auto", 5, cpu)
    expected = DATA.images_at(DATA.holdout_indices).flatten(1)
    torch.testing.assert_close(reference.holdout.float(), expected)
    assert len(reference.train) == len(DATA.train_indices)
    assert build_reference(DATA, "auto", 5, cpu) is reference


def test_thinning_keeps_the_spread_of_the_indices():
    assert thinned(np.arange(100), 5).tolist() == [0, 25, 50, 74, 99]
    assert thinned(np.arange(4), 5).tolist() == [0, 1, 2, 3]


def test_mixed_precision_around_an_evaluation_leaves_the_measurement_in_float64():
    expected = run().metrics
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run().metrics
    assert found == expected
