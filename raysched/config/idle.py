"""Settings that have no effect, by reason: one warning each."""

from __future__ import annotations

from collections.abc import Collection

from raysched.config.entries import COMMAND_LINE, Entries, Finding
from raysched.config.fields import show
from raysched.config.idle_execution import IDLE_EXECUTION, Idle, when
from raysched.config.rules import SS, never_rolled, rollouts_off, while_on
from raysched.config.run import RunConfig, ScheduledSamplingConfig

RAMP = tuple(SS + f for f in ("prob_start", "prob_end"))
RAMPS = tuple(SS + f for f in ("start_step", "ramp_shape"))
REFLEX = tuple(SS + f"reflexflow_{f}" for f in ("alpha", "beta1", "beta2", "norm"))
CHANCE = (SS + "probability", SS + "ramp_steps")
SHAPE = tuple(
    SS + name
    for name in ScheduledSamplingConfig.model_fields
    if SS + name not in (*RAMP, *RAMPS, *REFLEX, *CHANCE, SS + "max_step_offset")
)
UNET = tuple(
    "model." + f
    for f in ("block_out_channels", "layers_per_block", "attention", "norm_num_groups")
)
DIT = tuple(
    "model." + f for f in ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size")
)
RIVALS = ("input_perturbation", "self_correction", "defar", "mixflow", "dream")


def _reflex_is_off(c: RunConfig) -> str | None:
    if c.scheduled_sampling.reflexflow is True:
        return None
    flow = c.prediction_type == "flow_matching"
    return "reflexflow is off" + ("" if flow else f" ({c.prediction_type} is no flow_matching)")


def _rival(method: str) -> Idle:
    """A method's own section, while another method is chosen."""
    fields = type(getattr(RunConfig(), method)).model_fields
    return Idle(
        tuple(f"{method}.{field}" for field in fields),
        ("exposure",),
        lambda c: f"exposure is {c.exposure}" if c.exposure != method else None,
    )


IDLE: tuple[Idle, ...] = (
    Idle(
        (*CHANCE, *RAMP, *RAMPS, *SHAPE, *REFLEX),
        (SS + "max_step_offset",),
        lambda c: rollouts_off(c) if c.exposure == "scheduled_sampling" else None,
    ),
    Idle(
        (SS + "max_step_offset", *CHANCE, *RAMP, *RAMPS, *SHAPE, *REFLEX),
        ("exposure",),
        lambda c: rollouts_off(c) if c.exposure != "scheduled_sampling" else None,
    ),
    *map(_rival, RIVALS),
    Idle((SS + "max_step_offset", *SHAPE, *REFLEX), CHANCE, never_rolled),
    Idle(
        RAMP,
        (SS + "ramp_steps",),
        while_on(
            when(lambda c: not c.scheduled_sampling.ramp_steps, "there is no ramp; set ramp_steps")
        ),
    ),
    Idle(
        RAMPS,
        (SS + "ramp_steps", SS + "offset_ramp_steps"),
        while_on(
            when(
                lambda c: (
                    not (c.scheduled_sampling.ramp_steps or c.scheduled_sampling.offset_ramp_steps)
                ),
                "there is no ramp; set ramp_steps",
            )
        ),
    ),
    Idle(
        (SS + "offset_start",),
        (SS + "offset_ramp_steps",),
        while_on(
            when(
                lambda c: not c.scheduled_sampling.offset_ramp_steps,
                "there is no ramp of K; set offset_ramp_steps",
            )
        ),
    ),
    Idle(
        (SS + "posterior_reference",),
        (SS + "target",),
        while_on(
            when(
                lambda c: c.scheduled_sampling.target != "posterior_mean",
                "target is not posterior_mean",
            )
        ),
    ),
    Idle(
        (SS + "jump_gradient",),
        (SS + "grid",),
        while_on(when(lambda c: c.scheduled_sampling.grid != "jump", "it takes grid: jump")),
    ),
    Idle(
        (SS + "probability",),
        (SS + "ramp_steps",),
        while_on(
            when(
                lambda c: c.scheduled_sampling.ramp_steps > 0,
                "with a ramp (ramp_steps > 0) prob_start and prob_end count",
            )
        ),
    ),
    Idle(
        (SS + "order",),
        (SS + "sampler",),
        while_on(
            when(
                lambda c: c.scheduled_sampling.sampler in ("euler", "rk4"),
                "only dpm and unipc have orders to choose from",
            )
        ),
    ),
    Idle(
        (SS + "max_step_offset",),
        (SS + "grid",),
        while_on(
            when(
                lambda c: (
                    c.scheduled_sampling.grid == "jump"
                    and c.scheduled_sampling.max_step_offset > 1
                ),
                "grid: jump is always one step of random length; 1 says the same",
            )
        ),
    ),
    Idle(
        (SS + "dropout",),
        ("model.dropout",),
        while_on(when(lambda c: c.model.dropout == 0, "model.dropout is 0")),
    ),
    Idle(
        (SS + "strategy", SS + "reuse"),
        (SS + "grid",),
        while_on(
            when(
                lambda c: c.scheduled_sampling.grid == "jump",
                "grid: jump is always one step of random length",
            )
        ),
    ),
    Idle(
        REFLEX,
        (SS + "reflexflow", "prediction_type"),
        while_on(lambda c: None if never_rolled(c) else _reflex_is_off(c)),
    ),
    Idle(
        (SS + "reflexflow_norm",),
        (SS + "reflexflow_alpha",),
        while_on(
            lambda c: (
                None
                if never_rolled(c) or _reflex_is_off(c) or c.scheduled_sampling.reflexflow_alpha
                else "reflexflow_alpha is 0"
            )
        ),
    ),
    Idle(
        ("defar.norm",),
        ("defar.alpha",),
        when(lambda c: c.exposure == "defar" and not c.defar.alpha, "defar.alpha is 0"),
    ),
    Idle(
        ("noise_schedule.shift",),
        ("noise_schedule.kind", "prediction_type"),
        when(lambda c: c.noise_schedule.kind != "flow", "only the flow schedule is shifted"),
    ),
    Idle(
        ("noise_schedule.beta_start", "noise_schedule.beta_end"),
        ("noise_schedule.kind", "prediction_type"),
        when(
            lambda c: c.noise_schedule.kind in ("flow", "cosine"),
            "only the schedules linear and scaled_linear have betas to choose",
        ),
    ),
    Idle(
        ("init_weights",),
        ("init_from",),
        when(lambda c: c.init_from is None, "init_from is not given"),
    ),
    Idle(UNET, ("model.kind",), when(lambda c: c.model.kind == "dit", "model.kind is dit")),
    Idle(DIT, ("model.kind",), when(lambda c: c.model.kind == "unet", "model.kind is unet")),
    Idle(
        ("model.label_dropout", "evaluation.guidance_scale"),
        ("model.class_conditional",),
        when(lambda c: not c.model.class_conditional, "model.class_conditional is false"),
    ),
    *IDLE_EXECUTION,
)
# Values that ask for nothing, so that "without effect" would be no news.
ASKS_NOTHING = {
    (SS + "max_step_offset", 0),
    (SS + "probability", 0),
    (SS + "ramp_steps", 0),
    (SS + "reflexflow", False),
    (SS + "reflexflow", "auto"),
    (SS + "order", "auto"),
    (SS + "grid", None),
    (SS + "offset_ramp_steps", 0),
    (SS + "stratified", False),
    (SS + "t_min", 0),
    (SS + "t_max", 1),
    (SS + "source_t_max", 1),
    (SS + "ancestral", False),
    (SS + "guidance_scale", 1),
    (SS + "policy", "online"),
    (SS + "dropout", False),
    (SS + "bucket", 1),
    (SS + "reuse", "last"),
    (SS + "jump_gradient", False),
    ("scaling.strategy", "ddp"),
    ("data.path", None),
    ("data.grayscale", False),
    ("tracking.uri", None),
    ("training.keep_best", 0),
    ("training.storage_path", None),
    ("evaluation.guidance_scale", 1),
    ("evaluation.placement", "auto"),
    ("model.label_dropout", 0),
}


def check_idle(config: RunConfig, entries: Entries, *, only_overrides: bool) -> list[Finding]:
    """One warning per reason for written settings that have no effect.

    Args:
        config: the resolved run.
        entries: what the user wrote.
        only_overrides: warn of settings of the command line only (the file spells out all).
    """
    findings = []
    for idle in IDLE:
        affected = [
            p
            for p in idle.affected
            if p in entries
            and not _asks_nothing(p, entries[p].value)
            and (entries[p].place == COMMAND_LINE or not only_overrides)
        ]
        reason = idle.reason(config) if affected else None
        if reason:
            finding = _idle_finding(idle, affected, reason, entries)
            findings += [finding] if finding else []
    return findings


def idle_keys(config: RunConfig, written: Collection[str]) -> frozenset[str]:
    """The settings among those written that another of them leaves without effect.

    Args:
        config: a run with these settings.
        written: dotted keys.
    """
    return frozenset(
        path
        for idle in IDLE
        if any(cause in written for cause in idle.causes) and idle.reason(config) is not None
        for path in idle.affected
        if path in written
    )


def _asks_nothing(path: str, value: object) -> bool:
    scalar = value is None or isinstance(value, bool | int | float | str)
    return scalar and (path, value) in ASKS_NOTHING


def _idle_finding(
    idle: Idle, affected: list[str], reason: str, entries: Entries
) -> Finding | None:
    later = [p for p in affected if entries[p].place == COMMAND_LINE]
    cause = next((p for p in idle.causes if p in entries), "")
    overridden = bool(cause) and entries[cause].place == COMMAND_LINE and not later
    involved = frozenset({*affected, *idle.causes})
    if overridden and idle.quiet:
        return None
    if overridden and len(affected) > 1:
        text = f"{show(entries[cause].value)} leaves {len(affected)} settings of the file unused"
        return Finding(COMMAND_LINE, cause, text, involved)
    named = later or affected
    section = named[0].rpartition(".")[0]
    shown = [named[0], *(p.removeprefix(section + ".") for p in named[1:4])]
    more = f" and {len(named) - 4} more" if len(named) > 4 else ""
    verb = "has" if len(named) == 1 else "have"
    return Finding(
        entries[named[0]].place, ", ".join(shown) + more, f"{verb} no effect: {reason}", involved
    )
