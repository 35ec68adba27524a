"""The probe during training: four places, two rollout lengths, and a bounded number of forwards.

Legend: n samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from raysched.config.rules import PROBE_STEPS
from raysched.config.run import RunConfig
from raysched.data.dataset import ImageDataset
from raysched.diffusion.compute import ComputeMeter
from raysched.diffusion.schedules import NoiseSchedule
from raysched.evaluation import probe_statistics as stats
from raysched.evaluation.probe import Materials, ProbeSettings, closed_form, prepare
from raysched.evaluation.probe_states import Subject, forward_states, roll_grid
from raysched.evaluation.sampling import sampling_nodes

MAX_OFFSET = 2
WALK_NODES = (2, 4, 6, 8)
# Rollouts of two steps from every other node pass the whole path.
ROLLOUT_SOURCES = (0, 2, 4, 6)
FORWARDS_PER_SAMPLE = PROBE_STEPS + MAX_OFFSET * len(ROLLOUT_SOURCES)
MIN_SAMPLES, MAX_SAMPLES = 8, 64


def affordable_samples(max_forwards: float, num_holdout: int) -> int:
    """n for a number of forwards; 0 where too few to say anything.

    Args:
        max_forwards: what the probe may spend.
        num_holdout: held-out images there are.
    """
    n = min(int(max_forwards // FORWARDS_PER_SAMPLE), MAX_SAMPLES, num_holdout)
    return n if n >= MIN_SAMPLES else 0


def light_probe(
    network: Callable[..., Tensor],
    *,
    config: RunConfig,
    dataset: ImageDataset,
    schedule: NoiseSchedule,
    num_samples: int,
    meter: ComputeMeter | None = None,
) -> dict[str, float]:
    """Energy distance at four t, and drift of rollouts of one and two steps with its floor.

    Args:
        network: called by keyword; the caller has put the EMA weights into it.
        config: the run.
        dataset: images and split.
        schedule: the run's noise schedule.
        num_samples: n, from `affordable_samples`.
        meter: counts `FORWARDS_PER_SAMPLE` forwards per sample as evaluation.

    Returns:
        `exposure/energy/t_…`, `exposure/drift/k_…`, `exposure/drift_floor/k_…`.
    """
    materials = _materials(dataset, num_samples, config.evaluation.seed)
    subject = Subject(
        network, schedule, config.prediction_type, batch_size=num_samples, meter=meter
    )
    nodes = sampling_nodes(schedule, PROBE_STEPS)
    states, _ = subject.path(materials.noise, nodes, materials.walk_labels)
    once = torch.ones(1, num_samples, dtype=torch.float64)
    found = {}
    for node in WALK_NODES:
        x_t = forward_states(schedule, nodes[node], materials.x0, materials.eps)
        t = float(schedule.path_time(nodes[node]))
        distance = stats.population_energy(states[node], x_t, once, once)
        found[f"exposure/energy/t_{t:.2f}"] = float(distance)
    floor = closed_form(subject, materials, config.model.class_conditional)
    for name, each in (("drift", subject), ("drift_floor", floor)):
        for k, value in _drift(each, materials, nodes).items():
            found[f"exposure/{name}/k_{k}"] = value
    return {**found, "exposure/num_samples": float(num_samples)}


def _drift(subject: Subject, materials: Materials, nodes: Tensor) -> dict[int, float]:
    """RMS of x_hat_t - x_t by rollout length, mean over pairs and places."""
    rolled = roll_grid(
        subject,
        nodes,
        materials.pair_x0,
        materials.pair_eps,
        materials.pair_labels,
        max_offset=MAX_OFFSET,
        sources=list(ROLLOUT_SOURCES),
    )
    lengths: dict[int, list[Tensor]] = {}
    for (node, k), x_hat in rolled.x_hat.items():
        lengths.setdefault(k, []).append(stats.rms(x_hat - rolled.x_t[node]))
    return {k: float(torch.cat(values).mean()) for k, values in lengths.items()}


@functools.lru_cache(maxsize=2)
def _materials(dataset: ImageDataset, num_samples: int, seed: int) -> Materials:
    """The same images and noise at every probe of a run, so that its course is smooth."""
    settings = ProbeSettings(
        num_samples=num_samples, num_pairs=num_samples, num_bootstrap=1, seed=seed
    )
    return prepare(dataset, settings)
