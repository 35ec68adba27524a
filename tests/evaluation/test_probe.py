"""The probe finds what was planted, and nothing where there is nothing."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from raysched.config.run import NoiseScheduleConfig, PredictionType, SolverName
from raysched.data.dataset import ImageDataset
from raysched.diffusion.compute import ComputeMeter
from raysched.diffusion.schedules import NoiseSchedule
from raysched.errors import RunFailedError
from raysched.evaluation.empirical_denoiser import EmpiricalDenoiser
from raysched.evaluation.probe import Key, Measured, ProbeSettings, measure, prepare
from raysched.evaluation.probe_states import Subject, forward_states, roll_grid
from raysched.evaluation.probe_words import compare, describe, find_peak
from raysched.evaluation.sampling import sampling_nodes
from tests.evaluation.oracles import class_images, striped_classes

NOISE = 0.2
SETTINGS = ProbeSettings(
    num_samples=120,
    num_pairs=60,
    num_steps=20,
    max_offset=3,
    nfe=(4,),
    solver="dpm",
    num_bootstrap=60,
)
PLANTED_T, ARRIVAL_T = 0.5, 0.45


def flow() -> NoiseSchedule:
    return NoiseSchedule.from_config(NoiseScheduleConfig())


def stripes() -> ImageDataset:
    return striped_classes(num_per_class=100, noise=NOISE)


def exact_velocity(bias: float = 0.0) -> Callable[..., Tensor]:
    """The exact network of the stripes' law, a Gaussian per class; a bias at t = 0.5 if wanted."""

    def network(*, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        t = (timestep.double() / 1000)[:, None, None, None]
        mean = class_images().double()[class_labels]
        x, alpha = sample.double(), 1 - t
        gain = alpha * NOISE**2 / (alpha**2 * NOISE**2 + t**2)
        x0 = mean + gain * (x - alpha * mean)
        planted = bias * ((t - PLANTED_T).abs() < 0.01)
        return ((x - x0) / t + planted).to(sample.dtype)

    return network


def probe(network: Callable[..., Tensor], settings: ProbeSettings = SETTINGS) -> Measured:
    subject = Subject(network, flow(), "flow_matching", settings.solver, meter=ComputeMeter())
    return measure(subject, prepare(stripes(), settings), class_conditional=True)


@pytest.fixture(scope="module")
def exact() -> Measured:
    return probe(exact_velocity())


@pytest.fixture(scope="module")
def biased() -> Measured:
    return probe(exact_velocity(bias=2.0))


def test_the_exact_network_of_the_data_s_law_is_not_distinguishable_from_it(exact: Measured):
    assert not find_peak(exact, "energy").clear
    words = describe("exact", exact, SETTINGS)
    assert "not distinguishable from forward states anywhere" in words[0]
    found = exact.intervals()
    norms = [found[key] for key in exact.select("prediction_norm_ratio")]
    assert len(norms) == SETTINGS.num_steps
    assert all(0.95 < end.value < 1.05 for end in norms)
    bands = [found[key] for key in exact.select("band_3_ratio")]
    assert sum(end.low <= 1 <= end.high for end in bands) >= 0.8 * len(bands)


def test_a_planted_bias_is_found_at_its_place_in_numbers_and_words(biased: Measured):
    for statistic in ("rollout_energy", "drift_excess"):
        peak = find_peak(biased, statistic, k=1)
        assert peak.clear
        assert peak.t == pytest.approx(ARRIVAL_T)
    excess = biased.replicates[Key("drift", peak.t, 1)][0]
    assert float(excess) == pytest.approx(2.0 / SETTINGS.num_steps, rel=0.05)
    walk = find_peak(biased, "energy")
    assert walk.clear
    assert walk.begins_t == pytest.approx(ARRIVAL_T)
    words = describe("biased", biased, SETTINGS)
    assert "leave the law of forward states from t = 0.45 down" in words[0]
    assert "drift most on arriving at t = 0.45" in words[1]


def test_the_biased_network_is_said_to_drift_more_and_a_copy_to_be_indistinguishable(
    exact: Measured, biased: Measured
):
    found = compare("biased", biased, "exact", exact)
    assert found.verdict == "more"
    assert found.differences["energy"].low > 0
    assert "biased drifts more than exact" in found.sentence
    assert compare("exact", exact, "biased", biased).verdict == "less"
    again = compare("copy", exact, "exact", exact)
    assert again.verdict == "not distinguishable"
    assert again.differences["energy"].value == 0
    assert "Indicative" in again.sentence


@pytest.mark.parametrize(
    ("prediction_type", "kind", "solver"),
    [
        ("flow_matching", "flow", "euler"),
        ("epsilon", "linear", "euler"),
        ("v_prediction", "cosine", "unipc"),
        ("sample", "linear", "rk4"),
    ],
)
def test_the_empirical_denoiser_itself_has_no_excess_over_its_floor(
    prediction_type: PredictionType, kind: str, solver: SolverName
):
    schedule = NoiseSchedule.from_config(NoiseScheduleConfig(kind=kind))
    settings = replace(SETTINGS, num_steps=5, num_samples=20, num_pairs=16, solver=solver)
    materials = prepare(stripes(), settings)
    model = EmpiricalDenoiser(materials.images, materials.image_labels, schedule, prediction_type)
    subject = Subject(model, schedule, prediction_type, solver)
    found = measure(subject, materials, class_conditional=True)
    excess = torch.stack(list(found.select("drift_excess").values()))
    drift = torch.stack(list(found.select("drift").values()))
    assert float(excess.abs().max()) < 2e-4
    assert float(drift.max()) > 0.05
    for ours, floor in (("rollout_energy", "rollout_energy_floor"), ("delta", "delta_floor")):
        for key, value in found.select(ours).items():
            assert torch.allclose(value, found.replicates[Key(floor, key.t, key.k)], atol=2e-4)


def test_the_posterior_mean_is_the_weighted_mean_of_the_images_of_the_class():
    images = torch.tensor([-1.0, 1.0, 0.2]).reshape(3, 1, 1, 1)
    model = EmpiricalDenoiser(images, torch.tensor([0, 0, 1]), flow())
    x = torch.tensor([0.3, 0.3, 0.3]).reshape(3, 1, 1, 1)
    found = model(
        sample=x, timestep=torch.full((3,), 500.0), class_labels=torch.tensor([0, 1, 2])
    ).flatten()
    # Equal squares of the first two: odds exp(alpha x (1 - -1)/sigma²) = exp(1.2).
    assert float(found[0]) == pytest.approx(torch.tanh(torch.tensor(0.6)).item(), abs=1e-6)
    assert float(found[1]) == pytest.approx(0.2)
    logits = (0.5 * 0.3 * images - 0.125 * images**2).flatten() / 0.25
    everyone = float((torch.softmax(logits, 0) * images.flatten()).sum())
    assert float(found[2]) == pytest.approx(everyone, abs=1e-6)


def test_a_chain_shows_the_rollouts_of_all_lengths_from_its_source():
    schedule, network = flow(), exact_velocity()
    materials = prepare(stripes(), SETTINGS)
    nodes = sampling_nodes(schedule, 10)
    x0, eps, labels = materials.pair_x0, materials.pair_eps, materials.pair_labels
    for solver in ("euler", "dpm", "unipc", "rk4"):
        subject = Subject(network, schedule, "flow_matching", solver, batch_size=25)
        rolled = roll_grid(subject, nodes, x0, eps, labels, max_offset=4, sources=[2, 8])
        assert sorted(rolled.x_hat) == [(3, 1), (4, 2), (5, 3), (6, 4), (9, 1), (10, 2)]
        for (node, k), x_hat in rolled.x_hat.items():
            start = forward_states(schedule, nodes[node - k], x0, eps)
            alone, _ = subject.path(start, nodes[node - k : node + 1], labels)
            assert torch.allclose(x_hat, alone[-1], atol=1e-6)


def test_all_forwards_are_counted_as_evaluation():
    meter = ComputeMeter()
    settings = replace(SETTINGS, num_samples=20, num_pairs=16, num_steps=4, solver="euler")
    subject = Subject(exact_velocity(), flow(), "flow_matching", "euler", meter=meter)
    measure(subject, prepare(stripes(), settings), class_conditional=True)
    walks, at_forward, samples = 20 * 4, 20 * 4, 20 * 4
    rollouts = 16 * (3 + 3 + 2 + 1)
    assert meter.evaluation == walks + at_forward + samples + rollouts
    assert meter.forward_equivalents == 0


def test_a_diverged_network_is_told_in_one_message():
    def network(*, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return torch.full_like(sample, torch.nan)

    with pytest.raises(RunFailedError, match="not finite"):
        probe(network)
