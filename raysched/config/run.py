"""What one training run is: a frozen pydantic model with one section per subject.

Every field carries its description, range and default; the JSON schema for editors is made from
them. Values that depend on others (`prediction_type`, the schedule's kind, the rollout grid,
`reflexflow: auto`) are resolved while validating, so that code that reads a config never guesses.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raysched.config.rivals import (
    DefarConfig,
    DreamConfig,
    InputPerturbationConfig,
    MixFlowConfig,
    SelfCorrectionConfig,
)
from raysched.config.scheduled_sampling import ScheduledSamplingConfig
from raysched.config.sections import (
    LARGEST_INT,
    DataConfig,
    Fraction,
    IntTuple,
    ModelConfig,
    NoiseScheduleConfig,
    NonNegativeFloat,
    NonNegativeInt,
    OptimizerConfig,
    PositiveFloat,
    PositiveInt,
    PredictionType,
    QualityMetric,
    ScalingConfig,
    ScheduleKind,
    Section,
    SolverName,
    TrackingConfig,
)

__all__ = [
    "LARGEST_INT",
    "BudgetConfig",
    "DataConfig",
    "EvaluationConfig",
    "Fraction",
    "IntTuple",
    "ModelConfig",
    "NoiseScheduleConfig",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OptimizerConfig",
    "PositiveFloat",
    "PositiveInt",
    "PredictionType",
    "QualityMetric",
    "RunConfig",
    "ScalingConfig",
    "ScheduleKind",
    "ScheduledSamplingConfig",
    "Section",
    "SolverName",
    "TrackingConfig",
    "TrainingConfig",
]

EvaluationPlacement = Literal["auto", "inline", "ranks", "background"]
ExposureMethod = Literal[
    "none",
    "scheduled_sampling",
    "input_perturbation",
    "self_correction",
    "defar",
    "mixflow",
    "dream",
]


class BudgetConfig(Section):
    """When training ends: exactly one of the three; default 900 optimizer steps."""

    steps: PositiveInt | None = Field(None, description="Optimizer steps.")
    forward_equivalents: PositiveFloat | None = Field(
        None, description="Compute in forward equivalents (a trained sample costs 3)."
    )
    seconds: PositiveFloat | None = Field(None, description="Training time, evaluation excluded.")

    @model_validator(mode="before")
    @classmethod
    def _default_budget(cls, value: Any) -> Any:
        units = ("steps", "forward_equivalents", "seconds")
        if isinstance(value, dict) and all(value.get(unit) is None for unit in units):
            return {**value, "steps": 900}
        return value


class TrainingConfig(Section):
    """The loop: budget, batch, precision, checkpoints."""

    output_dir: str | None = Field(
        None, description="Folder of the run; default: runs/<name>-<time>."
    )
    budget: BudgetConfig = Field(default_factory=lambda: BudgetConfig(), description="The end.")
    batch_size: PositiveInt = Field(
        64, description="Samples per optimizer step, over all workers and micro-batches."
    )
    gradient_accumulation: PositiveInt = Field(
        1, description="Micro-batches per worker and optimizer step."
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Precision of the network; rollout states stay fp32."
    )
    compile: bool = Field(
        False,
        description="Compile the network (torch.compile): fused code after minutes of "
        "compiling; a resume agrees to rounding, no longer bitwise.",
    )
    checkpoint_every_steps: PositiveInt = Field(200, description="Optimizer steps between saves.")
    keep_last: PositiveInt = Field(2, description="Checkpoints kept.")
    keep_best: NonNegativeInt = Field(
        0, description="Further checkpoints kept: those of the best evaluations (quality/q)."
    )
    storage_path: str | None = Field(
        None,
        description="Also upload checkpoints and results to this folder, or s3:// or gs:// URI; "
        "null: keep them in output_dir only.",
    )
    storage_timeout_s: PositiveFloat = Field(
        60.0, description="Longest wait for uploads when the run ends."
    )
    log_every_steps: PositiveInt = Field(10, description="Steps between logged points.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train.")


class EvaluationConfig(Section):
    """Sampling from the EMA weights and measuring quality against the held-out reference."""

    enabled: bool = Field(True, description="Evaluate during and after training.")
    placement: EvaluationPlacement = Field(
        "auto",
        description="Who evaluates: inline (the first worker, the others wait), ranks (shared "
        "among the workers, same numbers), background (another process or Ray task, on a copy of "
        "the EMA weights, while training goes on; the last one by the workers). auto: ranks.",
    )
    every_forward_equivalents: PositiveFloat | None = Field(
        None, description="Compute between evaluations; default: a quarter of the budget."
    )
    nfe: IntTuple = Field((5, 10), description="Network evaluations per sample; q is their mean.")
    num_samples: Annotated[int, Field(ge=8, le=LARGEST_INT)] = Field(
        400, description="Samples of an evaluation during training."
    )
    final_num_samples: Annotated[int, Field(ge=8, le=LARGEST_INT)] = Field(
        1000, description="Samples of the evaluation at the end of the budget."
    )
    batch_size: PositiveInt = Field(200, description="Samples per network call.")
    sampler: SolverName = Field("euler", description="Solver that generates the samples.")
    guidance_scale: Annotated[float, Field(ge=0.0)] = Field(
        1.0, description="Classifier-free guidance; 1 is off."
    )
    epsilon_scaling: Annotated[float, Field(ge=0.5, le=2.0)] | None = Field(
        1.005, description="Divisor of the second, Epsilon-Scaled column; null: leave it out."
    )
    metric: QualityMetric = Field("kid", description="q, lower is better.")
    features: Literal["auto", "pixels", "efficientnet_lite0"] = Field(
        "auto", description="Feature space; auto: pixels up to 32x32."
    )
    num_bootstrap: Annotated[int, Field(ge=20, le=LARGEST_INT)] = Field(
        200, description="Bootstrap replicates."
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = Field(
        0.95, description="Level of the intervals."
    )
    neighbours: PositiveInt = Field(5, description="k of precision, recall, density, coverage.")
    seed: NonNegativeInt = Field(1234, description="Seed of the sampling noise, for all trials.")
    grid_images: PositiveInt = Field(40, description="Images of the logged sample grid.")
    probe_every_forward_equivalents: PositiveFloat | None = Field(
        None, description="Compute between small exposure-bias probes; null: none."
    )
    probe_share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.02, description="Most that these probes' forwards may be of the training's compute."
    )


class RunConfig(Section):
    """One training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(
        "run", description="Name of the run and of its folder."
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Seed of all randomness.")
    exposure: ExposureMethod = Field(
        "scheduled_sampling", description="Method against exposure bias; none: plain training."
    )
    prediction_type: PredictionType = Field(
        "flow_matching", description="What the network predicts."
    )
    init_from: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Begin with the weights of this run, checkpoint or pipeline; its compute is "
        "not counted.",
    )
    init_weights: Literal["ema", "online"] = Field(
        "ema", description="Which of its weights: averaged or last."
    )
    data: DataConfig = Field(default_factory=lambda: DataConfig())
    model: ModelConfig = Field(default_factory=lambda: ModelConfig())
    noise_schedule: NoiseScheduleConfig = Field(default_factory=lambda: NoiseScheduleConfig())
    scheduled_sampling: ScheduledSamplingConfig = Field(
        default_factory=lambda: ScheduledSamplingConfig()
    )
    input_perturbation: InputPerturbationConfig = Field(
        default_factory=lambda: InputPerturbationConfig()
    )
    self_correction: SelfCorrectionConfig = Field(default_factory=lambda: SelfCorrectionConfig())
    defar: DefarConfig = Field(default_factory=lambda: DefarConfig())
    mixflow: MixFlowConfig = Field(default_factory=lambda: MixFlowConfig())
    dream: DreamConfig = Field(default_factory=lambda: DreamConfig())
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig())
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig())
    evaluation: EvaluationConfig = Field(default_factory=lambda: EvaluationConfig())
    tracking: TrackingConfig = Field(default_factory=lambda: TrackingConfig())
    scaling: ScalingConfig = Field(default_factory=lambda: ScalingConfig())

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, value: Any) -> Any:
        return _resolved(value) if isinstance(value, dict) else value

    @property
    def rollout(self) -> ScheduledSamplingConfig:
        """The rollouts that the run's method makes, K = 0 if it makes none.

        DEFAR is a rollout of one step of random length with ReflexFlow's loss, and
        self-correction starts where such a jump starts.
        """
        if self.exposure == "scheduled_sampling":
            return self.scheduled_sampling
        if self.exposure == "defar":
            return _jump(
                1.0,
                reflexflow=True,
                reflexflow_alpha=self.defar.alpha,
                reflexflow_beta1=self.defar.beta1,
                reflexflow_beta2=self.defar.beta2,
                reflexflow_norm=self.defar.norm,
                jump_gradient=self.defar.jump_gradient,
            )
        if self.exposure == "self_correction":
            return _jump(self.self_correction.probability, reflexflow=False)
        return ScheduledSamplingConfig(reflexflow=False)


def _jump(probability: float, **options: Any) -> ScheduledSamplingConfig:
    """Rollouts of one Euler step of random length, towards anchored targets."""
    return ScheduledSamplingConfig(
        max_step_offset=1, probability=probability, grid="jump", sampler="euler", **options
    )


def _resolved(raw: dict[str, Any]) -> dict[str, Any]:
    """Fill the values that depend on others; leaves anything malformed to the validators."""
    out = dict(raw)
    noise, rollout = out.get("noise_schedule", {}), out.get("scheduled_sampling", {})
    if isinstance(noise, NoiseScheduleConfig) or isinstance(rollout, ScheduledSamplingConfig):
        return out
    noise, rollout = (dict(s) if isinstance(s, dict) else s for s in (noise, rollout))
    prediction = out.get("prediction_type")
    if isinstance(noise, dict):
        if "prediction_type" not in out and noise.get("kind", "flow") != "flow":
            prediction = out["prediction_type"] = "epsilon"
        if prediction in ("epsilon", "v_prediction", "sample"):
            noise.setdefault("kind", "linear")
        out["noise_schedule"] = noise
    if isinstance(rollout, dict):
        if rollout.get("grid") is None and isinstance(noise, dict):
            rollout["grid"] = noise.get("num_train_timesteps", 1000)
        if rollout.get("reflexflow", "auto") == "auto":
            offset = rollout.get("max_step_offset", 0)
            rollout["reflexflow"] = (
                prediction in (None, "flow_matching")
                and out.get("exposure", "scheduled_sampling") == "scheduled_sampling"
                and isinstance(offset, int)
                and offset > 0
            )
        out["scheduled_sampling"] = rollout
    return out
