"""From a config to everything that a training step needs, on one rank."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from raysched.config.run import RunConfig
from raysched.data.dataset import ImageDataset, load_dataset
from raysched.diffusion.compute import ComputeMeter
from raysched.diffusion.randomness import generator
from raysched.diffusion.schedules import NoiseSchedule
from raysched.errors import ConfigError
from raysched.models.ema import EMA
from raysched.models.networks import Denoiser, build_network
from raysched.models.sharding import local
from raysched.models.tracing import TracedForward, trace_forward
from raysched.training.budget import fraction_spent
from raysched.training.compiling import check_gradients, compile_network
from raysched.training.initial import initialise
from raysched.training.strategies import check_wrapping, shard, wants_shards


@dataclass
class Run:
    """One rank's training: what is fixed, and what a step changes.

    Attributes:
        config: the resolved run.
        dataset: images, labels and the split.
        schedule: alpha and sigma along the path.
        network: the module that gets gradients; DDP's wrapper with several ranks.
        policy: the same weights without the wrapper: no gradient sync, no buffer broadcast.
        ema: averaged weights.
        optimizer: AdamW, as accelerate wraps it.
        accelerator: precision, gradient sync, clipping.
        meter: compute spent by all ranks together.
        step: optimizer steps done.
    """

    config: RunConfig
    dataset: ImageDataset
    schedule: NoiseSchedule
    network: nn.Module
    policy: Denoiser
    ema: EMA
    optimizer: Any
    accelerator: Any
    meter: ComputeMeter
    step: int = 0

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def rank(self) -> int:
        """This process among the workers, 0 first."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Number of workers."""
        return int(self.accelerator.num_processes)

    @property
    def micro_batch_size(self) -> int:
        """Rows of this rank's micro-batches: the most that a call gets, padding left out."""
        training = self.config.training
        return -(-training.batch_size // (self.world_size * training.gradient_accumulation))

    @property
    def parameter_names(self) -> list[str]:
        """Names of the trained parameters, in the optimizer's order."""
        return [name for name, p in self.policy.named_parameters() if p.requires_grad]

    @property
    def fraction(self) -> float:
        """Share of the budget spent."""
        return fraction_spent(self.config.training.budget, self.step, self.meter)

    @functools.cached_property
    def network_dtype(self) -> torch.dtype:
        """Of the weights; looked up once, since each look walks all modules."""
        return next(self.policy.parameters()).dtype

    @functools.cached_property
    def replay(self) -> TracedForward | None:
        """The policy's forward in eval mode without its Python; None where that is not exact."""
        training = self.config.training
        if training.precision != "fp32" or training.compile or wants_shards(self.config):
            return None
        size = self.dataset.image_size
        return trace_forward(self.policy, (self.dataset.channels, size, size))

    @functools.cached_property
    def average(self) -> Denoiser:
        """A second network with the EMA's weights; `follow_average` brings it up to them."""
        if wants_shards(self.config):
            return self._sharded_twin()
        twin = copy.deepcopy(self.policy).requires_grad_(False)
        weights = self.ema.weights()
        for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
            tensor.data = weights[name]
        if self.config.training.compile:
            compile_network(twin, self.device)  # a copy has lost its compiled code
        return twin

    def _sharded_twin(self) -> Denoiser:
        data = self.dataset
        twin = build_network(
            self.config.model, data.channels, data.image_size, data.num_classes, self.config.seed
        )
        twin.to(self.device).requires_grad_(False)
        shard(twin, self.device, keep_whole=False)
        return twin

    @torch.no_grad()
    def follow_average(self) -> None:
        """Give the second network the EMA's present weights.

        Replicated, its tensors are the EMA's own. Sharded, each rank copies its rows.
        """
        if not wants_shards(self.config):
            return
        weights = self.ema.weights()
        for name, tensor in self.average.state_dict().items():
            local(tensor).copy_(weights[name])

    def predict(
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        *,
        average: bool = False,
        given: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """The current weights' prediction without gradient sync, in fp32.

        Args:
            sample: (n, C, H, W), any floating dtype.
            timestep: (n,), what the network gets (index, or 1000 t).
            class_labels: (n,), null class included.
            average: ask the EMA weights instead.
            given: rows of what `prepare` made of these times and labels.
        """
        # float64 states exist in tests only; the network runs in its own precision.
        dtype = self.network_dtype
        inputs = {
            "sample": sample.to(dtype),
            "timestep": timestep.to(dtype),
            "class_labels": class_labels,
        }
        known = {"given": given} if given else {}
        return self._forward(average)(**inputs, **known).to(sample.dtype)

    def prepare(
        self, timestep: Tensor, class_labels: Tensor, *, average: bool = False
    ) -> tuple[Tensor, ...]:
        """What the policy makes of times and labels (W,) alone; nothing where it can't be had."""
        replay = self._forward(average)
        if not isinstance(replay, TracedForward):
            return ()
        size = self.dataset.image_size
        shape = (self.dataset.channels, size, size)
        return replay.prepare(shape, timestep.to(self.network_dtype), class_labels)

    def _forward(self, average: bool) -> Callable[..., Tensor]:
        replayable = not (average or self.policy.training or torch.is_grad_enabled())
        if replayable and self.replay is not None:
            return self.replay

        network = self.average.train(self.policy.training) if average else self.policy

        def forward(**inputs: Any) -> Tensor:
            with self.accelerator.autocast():
                return cast(Tensor, network(**inputs))

        return forward


def build_run(config: RunConfig) -> Run:
    """Data, network, EMA, optimizer and accelerate's wrapping, all from the config's seed."""
    dataset = load_dataset(config.data)
    network = build_network(
        config.model, dataset.channels, dataset.image_size, dataset.num_classes, seed=config.seed
    )
    initialise(network, config)
    accelerator = make_accelerator(config)
    if config.model.gradient_checkpointing:
        cast(Any, network.backbone).enable_gradient_checkpointing()
    network.to(accelerator.device)
    if config.training.compile:
        compile_network(network, accelerator.device)
    sharded = wants_shards(config)
    if sharded:
        shard(network, accelerator.device)
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        [p for p in network.parameters() if p.requires_grad],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        # One kernel for all parameters: a small network's step is mostly call overhead.
        fused=True,
    )
    ema = EMA(network, config.model.ema_half_life_samples)
    prepared = accelerator.prepare(optimizer)
    # One Ray Train worker has a process group too, for which accelerate would wrap the network in
    # DDP: 5 % of a small network's step for nothing. It skips that for evaluation.
    alone = accelerator.num_processes == 1
    wrapped = network if sharded else accelerator.prepare_model(network, evaluation_mode=alone)
    run = Run(
        config=config,
        dataset=dataset,
        schedule=NoiseSchedule.from_config(config.noise_schedule),
        network=wrapped,
        policy=accelerator.unwrap_model(wrapped),
        ema=ema,
        optimizer=prepared,
        accelerator=accelerator,
        meter=ComputeMeter(accelerator.device),
    )
    check_wrapping(config, run.network, run.world_size)
    if config.training.compile:
        _check_compiled(run)
    return run


def _check_compiled(run: Run) -> None:
    """Compare the gradients of a micro-batch of noise, compiled and not."""
    data, rows = run.dataset, run.micro_batch_size
    draws = generator(run.config.seed, "compiled_gradients")
    shape = (rows, data.channels, data.image_size, data.image_size)
    given = {
        "sample": torch.randn(shape, generator=draws),
        "timestep": 1000.0 * torch.rand(rows, generator=draws),
        "class_labels": torch.arange(rows) % (data.num_classes + 1),
    }
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    check_gradients(
        run.network,
        {name: tensor.to(run.device) for name, tensor in given.items()},
        run.accelerator.autocast,
        precision[run.config.training.precision],
    )


def make_accelerator(config: RunConfig) -> Any:
    """An Accelerator for this process, also where an earlier run left another one behind."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, GradientState

    # A reused process keeps the first run's precision otherwise, and refuses another one.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    on_cpu = config.training.device == "cpu" or not torch.cuda.is_available()
    # Workers that were given no GPU train on the CPU, as a warning has said.
    given = config.scaling.use_gpu or config.scaling.num_workers == 0
    if on_cpu and given and config.training.device == "cuda":
        raise ConfigError(
            "training.device: cuda, but PyTorch finds no GPU in this process; use cpu, or auto, "
            "which takes a GPU where there is one"
        )
    if on_cpu and config.training.precision == "fp16":
        raise ConfigError(
            "training.precision: fp16 scales its losses on a GPU only, and this process has none; "
            "use bf16 or fp32"
        )
    precision = "no" if config.training.precision == "fp32" else config.training.precision
    # The networks' buffers are constants (a DiT's position embedding): nothing to broadcast.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[ddp])
