"""How far the rollout engine is from the limit, and from a loop over samples.

The limit is the same number of sample-forwards in full batches of the micro-batch's size. Three
things are measured in turn within one process, and medians of the paired ratios reported:

  engine           planning, solver tables and rollout of one optimizer step (p = 1)
  full batches     as many sample-forwards, nothing else
  one-sample loop  one sample at a time, one forward per step; timed on a few samples and scaled
  eager batches    full batches of the network called module by module
  prepared batches full batches for which, as in the engine, what depends on times and labels alone
                   is computed beforehand for all forwards at once
  same calls       the same, in calls of the engine's sizes: what max k sequential calls cost over
                   full batches, however they are driven

Engine and full batches both replay the recorded forward (raysched/models/tracing.py), as training
does: `over_full_batches`. The engine knows all its times beforehand and computes their embeddings
once; `over_prepared_batches` gives the full batches that advantage, too. The one-sample loop calls
the network as such loops do, and `one_sample_loop_over_full_batches` is measured against full
batches of the network called likewise: what batching alone would gain. `over_eager_full_batches`
holds the engine against those, too; it is no limit, because recording helps the engine alone.

`overhead_share` is the engine's time with a network that costs nothing over its time with the
real one; `overhead_share_of_step` divides by the whole training step instead.

    python benchmarks/rollout_engine.py --json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raysched.config.run import RunConfig
from raysched.diffusion.curriculum import RolloutPlan, draw_plan
from raysched.diffusion.parameterization import add_noise
from raysched.diffusion.randomness import uniforms
from raysched.diffusion.rollout import CallPlan, LaneNetwork, plan_calls, rollout
from raysched.diffusion.schedules import NoiseSchedule
from raysched.models.networks import build_network
from raysched.models.tracing import TracedForward, trace_forward
from raysched.training.allocator import keep_freed_memory

MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "demo_unet_8x8": ({}, 8),
    "dit_64x4_8x8": ({"kind": "dit"}, 8),
    "unet_0.7M_16x16": ({"block_out_channels": (32, 64), "layers_per_block": 1}, 16),
    # Large enough to keep a GPU busy; not among the defaults.
    "unet_38M_32x32": ({"block_out_channels": (128, 256, 384), "layers_per_block": 2}, 32),
}
DEFAULT_MODELS = tuple(MODELS)[:3]
LOOP_FORWARDS = 40
CLOCK: dict[str, Callable[[], float]] = {"now": time.perf_counter}
RATIOS = (
    "over_full_batches",
    "one_sample_loop_over_engine",
    "one_sample_loop_over_full_batches",
    "over_prepared_batches",
    "same_calls_over_prepared_batches",
    "over_eager_full_batches",
    "overhead_share",
    "overhead_share_of_step",
)


class Job:
    """One optimizer step's rollouts of a model, ready to be timed."""

    def __init__(self, model: str, options: argparse.Namespace, accumulation: int) -> None:
        config, self.size = MODELS[model]
        rollouts = {
            "max_step_offset": options.max_step_offset,
            "probability": 1.0,
            "sampler": options.sampler,
        }
        self.config = RunConfig.model_validate({"model": config, "scheduled_sampling": rollouts})
        self.schedule = NoiseSchedule.from_config(self.config.noise_schedule)
        self.batch, self.accumulation = options.batch, accumulation
        self.device = torch.device(options.device)
        self.network = build_network(self.config.model, 1, self.size, 10).to(self.device)
        self.network.eval()
        self.replay = trace_forward(self.network, (1, self.size, self.size)) or self.network
        count = self.batch * accumulation
        self.indices = torch.arange(count)
        self.target_u = self.schedule.training_u(uniforms(0, "t", 0, self.indices)[:, 0])
        self.x0, self.eps = torch.randn(2, count, 1, self.size, self.size, device=self.device)
        self.labels = torch.arange(count, device=self.device) % 10
        self.times = 1000 * self.target_u.to(self.device, torch.float32)
        self.plan = self._draw(0)
        self.num_forwards = int(self.plan.num_steps.sum())
        self.sizes = self._calls(self.plan).sizes

    def _calls(self, plan: RolloutPlan) -> CallPlan:
        return plan_calls(
            plan,
            self.schedule,
            solver=self.config.scheduled_sampling.sampler,
            prediction_type=self.config.prediction_type,
            capacity=self.batch,
            device=self.device,
        )

    def _draw(self, step: int) -> RolloutPlan:
        return draw_plan(self.config, self.schedule, self.target_u, 0, step, self.indices)

    def engine(self, network: LaneNetwork) -> None:
        """Everything that a training step pays for its rollouts."""
        plan = self._draw(0)
        calls = self._calls(plan)
        source = add_noise(self.x0, self.eps, *self.schedule.alpha_sigma(plan.source_u))
        result = rollout(network, source, calls)
        assert result.num_forwards == self.num_forwards

    @property
    def full_sizes(self) -> list[int]:
        """Rows of full batches; the last one is what is left."""
        return [min(left, self.batch) for left in range(self.num_forwards, 0, -self.batch)]

    @torch.no_grad()
    def full_batches(self, network: Callable[..., Tensor]) -> None:
        """The same number of sample-forwards, at the limit."""
        for size in self.full_sizes:
            rows = slice(0, size)
            times = self.times[rows]
            network(sample=self.x0[rows], timestep=times, class_labels=self.labels[rows])

    @torch.no_grad()
    def prepared_calls(self, sizes: Sequence[int]) -> None:
        """The sample-forwards in calls of such sizes, what times and labels give beforehand."""
        lanes = torch.arange(self.num_forwards, device=self.device) % len(self.times)
        network = RecordedLanes(self)
        given = [torch.split(part, sizes) for part in network.prepare(self.times[lanes], lanes)]
        for call, size in enumerate(sizes):
            known = {"given": tuple(part[call] for part in given)} if given else {}
            lane = lanes[:size]
            network(sample=self.x0[:size], timestep=self.times[lane], lanes=lane, **known)

    @torch.no_grad()
    def one_sample_loop(self) -> float:
        """Seconds for all forwards one sample at a time, scaled up from a few samples."""
        done, start = 0, CLOCK["now"]()
        for i in range(self.x0.shape[0]):
            x, label = self.x0[i : i + 1].clone(), self.labels[i : i + 1]
            for j in range(int(self.plan.num_steps[i])):
                t = self.plan.nodes_u[i, j : j + 2].to(self.device, torch.float32)
                v = self.network(sample=x, timestep=1000 * t[:1], class_labels=label)
                x = x + (t[1] - t[0]) * v
                done += 1
            if done >= LOOP_FORWARDS:
                break
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (CLOCK["now"]() - start) * self.num_forwards / done

    def gradient_step(self) -> None:
        """Forward and backward of all micro-batches, without the optimizer."""
        for part in torch.split(self.indices.to(self.device), self.batch):
            times = self.times[part]
            out = self.network(
                sample=self.x0[part], timestep=times, class_labels=self.labels[part]
            )
            (out - self.eps[part]).square().mean().backward()
        self.network.zero_grad(set_to_none=True)


class RecordedLanes:
    """The network as training hands it to the engine."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __call__(
        self, *, sample: Tensor, timestep: Tensor, lanes: Tensor, given: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """Predict; with `given` at the price of what depends on the sample."""
        known = {"given": given} if given else {}
        labels = self._job.labels[lanes]
        out: Tensor = self._job.replay(
            sample=sample, timestep=timestep, class_labels=labels, **known
        )
        return out

    def prepare(self, timestep: Tensor, lanes: Tensor) -> tuple[Tensor, ...]:
        """What depends on times and labels alone."""
        if not isinstance(self._job.replay, TracedForward):
            return ()
        shape, labels = self._job.x0.shape[1:], self._job.labels[lanes]
        return self._job.replay.prepare(shape, timestep, labels)


def seconds(work: Callable[[], Any]) -> float:
    """Time of one call, with what it leaves the device to do."""
    start = CLOCK["now"]()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return CLOCK["now"]() - start


def free_network(*, sample: Tensor, timestep: Tensor, lanes: Tensor) -> Tensor:
    """A network that costs nothing."""
    return sample


def measure(model: str, options: argparse.Namespace, accumulation: int) -> dict[str, Any]:
    """One row: medians over paired repeats."""
    torch.manual_seed(0)
    job = Job(model, options, accumulation)
    ratios: dict[str, list[float]] = {name: [] for name in RATIOS}
    # Longer steps are less noisy, and would take most of the time.
    repeats = max(min(options.repeats, 5), options.repeats // accumulation)
    for repeat in range(repeats + 1):
        limit = seconds(lambda: job.full_batches(job.replay))
        engine = seconds(lambda: job.engine(RecordedLanes(job)))
        same = seconds(lambda: job.prepared_calls(job.sizes))
        prepared = seconds(lambda: job.prepared_calls(job.full_sizes))
        free = seconds(lambda: job.engine(free_network))
        limit = 0.5 * (limit + seconds(lambda: job.full_batches(job.replay)))
        eager = seconds(lambda: job.full_batches(job.network))
        if repeat % 3 <= 1:
            loop = job.one_sample_loop()
        step = seconds(job.gradient_step)
        values = (
            engine / limit,
            loop / engine,
            loop / eager,
            engine / prepared,
            same / prepared,
            engine / eager,
            free / engine,
            free / (engine + step),
        )
        if repeat > 0:  # the first one warms up
            for name, value in zip(RATIOS, values, strict=True):
                ratios[name].append(value)
    return {
        "model": model,
        "parameters": sum(p.numel() for p in nn.Module.parameters(job.network)),
        "batch": options.batch,
        "max_step_offset": options.max_step_offset,
        "accumulation": accumulation,
        "sampler": options.sampler,
        "num_forwards": job.num_forwards,
        **{name: round(statistics.median(values), 4) for name, values in ratios.items()},
    }


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(DEFAULT_MODELS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch", type=int, default=64, help="samples per micro-batch")
    parser.add_argument("--max-step-offset", type=int, default=10)
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--sampler", default="unipc", choices=["unipc", "euler", "dpm"])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--torch-threads", type=int, default=None)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time, for a busy machine; with one torch thread only",
    )
    return parser.parse_args()


def main() -> None:
    """Measure every model and accumulation, then print."""
    options = parse()
    keep_freed_memory()
    if options.torch_threads is not None:
        torch.set_num_threads(options.torch_threads)
    if options.clock == "cpu":
        CLOCK["now"] = time.process_time
    rows = [measure(m, options, a) for m in options.models for a in options.accumulation]
    machine = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "clock": options.clock,
    }
    if options.json:
        print(json.dumps({"rows": rows, **machine, "machine": platform.machine()}))
        return
    shown = [key for key in rows[0] if key not in ("sampler", "batch", "max_step_offset")]
    print("  ".join(shown))
    for row in rows:
        print("  ".join(str(row[key]).rjust(len(key)) for key in shown))


if __name__ == "__main__":
    main()
