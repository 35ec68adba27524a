"""What a sweep is: a base run, a search space over its dotted keys, an objective and a budget.

The space's keys and both ends of every range are checked against the run model before Ray starts
(`raysched.config.space`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from raysched.config.run import NonNegativeInt, PositiveFloat, PositiveInt, Section

FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


KINDS = (
    *("choice", "uniform", "loguniform", "quniform"),
    *("randint", "lograndint", "qrandint", "grid"),
)
Floats = Annotated[tuple[float, float], Field(strict=False)]
Integers = Annotated[tuple[int, int], Field(strict=False)]
Listed = Annotated[tuple[Any, ...], Field(strict=False, min_length=1)]


class Dimension(Section):
    """One searched setting; exactly one of the kinds is given, named and bounded as in Ray Tune.

    `uniform` and `loguniform` are [low, high], `randint` and `lograndint` [low, high) with
    integers, `quniform` and `qrandint` [low, high, step] with both ends; `choice` draws from a
    list; `grid` tries every value of a list (grid search only). With `when` the setting is
    searched only in trials whose other settings fit.
    """

    choice: Listed | None = None
    uniform: Floats | None = None
    loguniform: Floats | None = None
    quniform: Annotated[tuple[float, float, float], Field(strict=False)] | None = None
    randint: Integers | None = None
    lograndint: Integers | None = None
    qrandint: Annotated[tuple[int, int, int], Field(strict=False)] | None = None
    grid: Listed | None = None
    when: dict[str, Any] | None = None

    @property
    def kind(self) -> str:
        """The name of the kind that is given."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """The list of values, or the ends of the range (and its step)."""
        return tuple(getattr(self, self.kind))

    @property
    def conditions(self) -> dict[str, Any]:
        """Dotted key -> what it must be for this setting to be searched."""
        return self.when or {}

    def at_step(self, index: int) -> float:
        """The value after so many steps of `quniform` or `qrandint`."""
        low, _, step = self.values
        value = low + index * step
        # 0.1 + 2 * 0.1 is not 0.3; nobody means the difference.
        return float(f"{value:.12g}") if self.kind == "quniform" else value


class SearchConfig(Section):
    """How settings are proposed."""

    algorithm: Literal["tpe", "random", "grid", "quasi_random", "gp", "nsga2"] = Field(
        "tpe",
        description="Optuna's TPE, Gaussian process or NSGA-II; random, Sobol points, or a grid.",
    )
    num_samples: PositiveInt = Field(7, description="Trials beside the baseline.")
    seed: NonNegativeInt = Field(0, description="Seed of the search.")
    startup_trials: PositiveInt = Field(4, description="Random trials before a model.")
    population: PositiveInt | None = Field(
        None, description="nsga2: trials of a generation; default: a quarter of num_samples, ≥ 4."
    )
    max_concurrent: PositiveInt | None = Field(
        None,
        description="Trials at once; default: as many as fit on the nodes that there are at the "
        "start. On a cluster that grows: as many as it may grow for.",
    )
    points: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = Field(
        (), description="Points to try first, as dotted keys."
    )


class EarlyStoppingConfig(Section):
    """Early stopping whose time axis is compute in forward equivalents."""

    kind: Literal["asha", "hyperband", "median", "mo_asha", "none"] = Field(
        "asha",
        description="asha; hyperband: asynchronous halving in several brackets; median: worse "
        "than the others' median; mo_asha: halving on non-dominated rank, for several objectives; "
        "none.",
    )
    grace_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.25, description="Share of the budget that every trial gets."
    )
    reduction_factor: Annotated[float, Field(gt=1.0)] = Field(
        2.0, description="At a rung the best 1/factor go on."
    )
    brackets: Annotated[int, Field(ge=1, le=10)] = Field(
        3, description="hyperband: brackets, each beginning one rung later than the one before."
    )
    min_trials: PositiveInt = Field(3, description="median: fewest other trials to compare with.")


Component = Literal[
    "quality",
    "forward_equivalents",
    "nfe",
    "adherence",
    "diversity",
    "fidelity",
    "self_consistency",
]


class ObjectiveConfig(Section):
    """What a trial is judged by (definitions: README, how it counts): one number, or several."""

    name: Literal["quality_at_budget", "area", "cost_to_target", "gain_over_baseline"] = Field(
        "quality_at_budget",
        description="quality_at_budget: q at the first evaluation with FE >= F; area: the best q "
        "so far, averaged over ln(FE); cost_to_target: FE at which q first reaches the target; "
        "gain_over_baseline: q of the baseline minus q, by seed.",
    )
    several: Annotated[tuple[Component, ...], Field(strict=False, max_length=5)] = Field(
        (),
        description="Two to five objectives at once (a Pareto search) in place of name. "
        "forward_equivalents and nfe: compute, and network evaluations per sample, until the "
        "target is reached.",
    )
    target: FiniteFloat | None = Field(
        None, description="q to be reached: of cost_to_target, forward_equivalents and nfe."
    )
    reference: dict[str, FiniteFloat] = Field(
        default_factory=dict,
        description="Corner from which the hypervolume is measured, one bound per objective; "
        "default: a tenth of the range beyond the worst trials.",
    )


class SweepConfig(Section):
    """A sweep over one base run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(
        "sweep", description="Prefix of the sweep's name; a time is added."
    )
    base: str | None = Field(
        None, description="The base run's file, relative to this one; default: all defaults."
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="Dotted keys that replace the base's values."
    )
    budget_forward_equivalents: PositiveFloat | None = Field(
        None, description="F, the same for all trials; default: the base's budget."
    )
    space: Annotated[dict[str, Dimension], Field(min_length=1)] = Field(
        description="Dotted key -> choice, uniform, loguniform, quniform, randint, lograndint, "
        "qrandint or grid, and when: the condition under which it is searched."
    )
    constraints: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="Comparisons that every trial fulfils, such as a.b <= a.c."
    )
    search: SearchConfig = Field(default_factory=lambda: SearchConfig())
    early_stopping: EarlyStoppingConfig = Field(default_factory=lambda: EarlyStoppingConfig())
    objective: ObjectiveConfig = Field(default_factory=lambda: ObjectiveConfig())
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)] = Field(
        (0,), description="Every trial is trained once per seed; its q is the mean."
    )
    output_dir: str | None = Field(
        None, description="Folder of the sweep; default: runs/<name>-<time>."
    )
