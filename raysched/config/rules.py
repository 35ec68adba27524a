"""Rules between settings: combinations that can't work, and those that surprise.

Two tables. A rule speaks only if one of its settings was written by the user, so defaults never
trip one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from raysched.config.entries import COMMAND_LINE, Entries, Finding
from raysched.config.fields import show
from raysched.config.run import RunConfig
from raysched.config.storage_uri import storage_rule, store_rule

Check = Callable[[RunConfig], str | None]
SS = "scheduled_sampling."
# Of the probes that a run makes of itself.
PROBE_STEPS = 8
IMAGE_SIZES = {"digits": 8, "fashion_mnist": 28, "image_folder": 32}


@dataclass(frozen=True)
class Rule:
    """One rule.

    Args:
        path: the setting that the message names.
        others: the settings that it is checked against.
        check: the message if the rule is broken.
        only: the settings of which one must be written by the user; default: any of them.
    """

    path: str
    others: tuple[str, ...]
    check: Check
    only: tuple[str, ...] = ()


def image_size(c: RunConfig) -> int:
    """Edge of the images in pixels, as far as the configuration says."""
    return c.data.image_size or IMAGE_SIZES[c.data.source]


def rollouts_off(c: RunConfig) -> str | None:
    """Why no rollouts can happen, whatever the probability; None if they can."""
    if c.exposure == "none":
        return "exposure is none, so there are no rollouts"
    if c.exposure != "scheduled_sampling":
        return f"exposure is {c.exposure}, which has settings of its own"
    if c.scheduled_sampling.max_step_offset == 0:
        return "max_step_offset is 0, so there are no rollouts; set it (5 to 10 is usual)"
    return None


def never_rolled(c: RunConfig) -> str | None:
    """Why no sample is ever rolled out although rollouts are on."""
    s = c.scheduled_sampling
    if rollouts_off(c):
        return None
    if not s.ramp_steps and s.probability == 0:
        return (
            "the probability is 0 and there is no ramp, so no sample is rolled out; "
            "set probability or ramp_steps"
        )
    if s.ramp_steps and s.prob_start == s.prob_end == 0:
        return "the ramp goes from 0 to 0, so no sample is rolled out; set prob_end"
    return None


def while_on(check: Check) -> Check:
    """A check that says nothing while rollouts are off: that has its own line."""
    return lambda c: None if rollouts_off(c) else check(c)


def _reflexflow(c: RunConfig) -> str | None:
    if c.scheduled_sampling.reflexflow is not True or c.prediction_type == "flow_matching":
        return None
    return (
        "must be false or auto unless prediction_type is flow_matching, "
        f"got true with prediction_type {c.prediction_type}"
    )


def _schedule(c: RunConfig) -> str | None:
    if c.prediction_type != "flow_matching" or c.noise_schedule.kind == "flow":
        return None
    return (
        f"must be flow for prediction_type flow_matching, got {c.noise_schedule.kind}; "
        "DDPM schedules go with epsilon, v_prediction or sample"
    )


def _flow_method(c: RunConfig) -> str | None:
    if c.exposure not in ("defar", "mixflow") or c.prediction_type == "flow_matching":
        return None
    return (
        f"must not be {c.exposure} unless prediction_type is flow_matching, "
        f"got prediction_type {c.prediction_type}"
    )


def _grid(c: RunConfig) -> str | None:
    grid, finest = c.scheduled_sampling.grid, c.noise_schedule.num_train_timesteps
    if not isinstance(grid, int) or grid <= finest:
        return None
    return f"must be ≤ noise_schedule.num_train_timesteps ({finest}), got {grid}"


def _betas(c: RunConfig) -> str | None:
    n = c.noise_schedule
    if n.kind not in ("linear", "scaled_linear") or n.beta_start < n.beta_end:
        return None
    return f"must be < noise_schedule.beta_end ({n.beta_end:g}), got {n.beta_start:g}"


def _batch(c: RunConfig) -> str | None:
    t, workers = c.training, max(1, c.scaling.num_workers)
    parts = workers * t.gradient_accumulation
    if t.batch_size % parts == 0:
        return None
    return (
        f"must be divisible by scaling.num_workers × training.gradient_accumulation "
        f"({workers} × {t.gradient_accumulation}), got {t.batch_size}; "
        f"{max(1, t.batch_size // parts) * parts} would do"
    )


def _groups(c: RunConfig) -> str | None:
    m = c.model
    odd = [n for n in m.block_out_channels if n % m.norm_num_groups]
    if m.kind != "unet" or not odd:
        return None
    return (
        f"must be multiples of model.norm_num_groups ({m.norm_num_groups}), "
        f"got {show(m.block_out_channels)}"
    )


def _levels(c: RunConfig) -> str | None:
    halvings, size = len(c.model.block_out_channels) - 1, image_size(c)
    if c.model.kind != "unet" or size % 2**halvings == 0:
        return None
    return (
        f"has {halvings + 1} resolutions, so the images' edge must be divisible by "
        f"{2**halvings}, got {size}; use fewer channels in the list or another data.image_size"
    )


def _patch(c: RunConfig) -> str | None:
    size = image_size(c)
    if c.model.kind != "dit" or size % c.model.patch_size == 0:
        return None
    return f"must divide the images' edge ({size}), got {c.model.patch_size}"


def _heads(c: RunConfig) -> str | None:
    m = c.model
    width = m.num_attention_heads * m.attention_head_dim
    if m.kind != "dit" or width % 4 == 0:
        return None
    return f"times num_attention_heads must be a multiple of 4, got {width}"


def _folder(c: RunConfig) -> str | None:
    if c.data.source != "image_folder" or c.data.path is not None:
        return None
    return "must name the folder of the images for source image_folder, got null"


def _cpu_gpu(c: RunConfig) -> str | None:
    if c.training.device != "cpu" or not c.scaling.use_gpu:
        return None
    return "must be false with training.device cpu, got true"


def _fp16(c: RunConfig) -> str | None:
    if c.training.precision != "fp16" or c.training.device != "cpu":
        return None
    return "must be fp32 or bf16 with training.device cpu, got fp16"


def _equal_forwards(c: RunConfig) -> str | None:
    if c.scaling.strategy != "fsdp" or c.scaling.num_workers < 2:
        return None
    if c.exposure not in ("scheduled_sampling", "defar") or not c.rollout.jump_gradient:
        return None
    where = "defar" if c.exposure == "defar" else "scheduled_sampling"
    return (
        f"must be ddp with {where}.jump_gradient: fsdp needs equal forwards with gradient on all "
        "workers, and only those whose samples jump make one"
    )


def _compiled(c: RunConfig) -> str | None:
    if not c.training.compile:
        return None
    if c.scaling.strategy == "fsdp" and c.scaling.num_workers > 1:
        return "must be false with scaling.strategy fsdp, got true; ddp compiles"
    return None


def _repeated_nfe(c: RunConfig) -> str | None:
    nfe = c.evaluation.nfe
    return f"must not repeat a number, got {show(nfe)}" if len(set(nfe)) < len(nfe) else None


def _probed_steps(c: RunConfig) -> str | None:
    count = c.noise_schedule.num_train_timesteps
    wanted = c.evaluation.probe_every_forward_equivalents is not None
    if not wanted or c.noise_schedule.kind == "flow" or count >= PROBE_STEPS:
        return None
    return (
        f"walks the path in {PROBE_STEPS} steps: must be null with "
        f"noise_schedule.num_train_timesteps {count}"
    )


def _neighbours(c: RunConfig) -> str | None:
    e = c.evaluation
    fewest = min(e.num_samples, e.final_num_samples)
    if e.neighbours < fewest:
        return None
    return f"must be < the number of samples ({fewest}), got {e.neighbours}"


def _text_given(path: str) -> Rule:
    section, _, leaf = path.partition(".")

    def check(c: RunConfig) -> str | None:
        value = getattr(getattr(c, section), leaf)
        blank = isinstance(value, str) and not value.strip()
        return f"must be text, not empty, or null, got {show(value)}" if blank else None

    return Rule(path, (), check)


ERRORS: tuple[Rule, ...] = (
    Rule(SS + "reflexflow", ("prediction_type", "noise_schedule.kind"), _reflexflow),
    Rule("exposure", ("prediction_type", "noise_schedule.kind"), _flow_method),
    Rule("noise_schedule.kind", ("prediction_type",), _schedule),
    Rule(SS + "grid", ("noise_schedule.num_train_timesteps",), _grid, (SS + "grid",)),
    Rule("noise_schedule.beta_start", ("noise_schedule.beta_end",), _betas),
    Rule("training.batch_size", ("training.gradient_accumulation", "scaling.num_workers"), _batch),
    Rule("model.block_out_channels", ("model.norm_num_groups",), _groups),
    Rule("model.block_out_channels", ("data.image_size", "data.source"), _levels),
    Rule("model.patch_size", ("model.kind", "data.image_size", "data.source"), _patch),
    Rule("model.attention_head_dim", ("model.num_attention_heads",), _heads),
    Rule("data.path", ("data.source",), _folder),
    Rule("scaling.use_gpu", ("training.device",), _cpu_gpu),
    Rule("training.precision", ("training.device",), _fp16),
    Rule(
        "scaling.strategy",
        (
            "scaling.num_workers",
            "exposure",
            SS + "jump_gradient",
            SS + "grid",
            "defar.jump_gradient",
        ),
        _equal_forwards,
    ),
    Rule(
        "training.compile",
        ("scaling.strategy", "scaling.num_workers", "model.kind", "model.block_out_channels"),
        _compiled,
    ),
    Rule("evaluation.nfe", (), _repeated_nfe),
    Rule("evaluation.probe_every_forward_equivalents", (), _probed_steps),
    Rule(
        "evaluation.neighbours",
        ("evaluation.num_samples", "evaluation.final_num_samples"),
        _neighbours,
    ),
    *map(_text_given, ("data.path", "data.cache_dir", "training.output_dir", "tracking.uri")),
    _text_given("training.storage_path"),
    Rule("training.storage_path", (), storage_rule),
    Rule("tracking.uri", (), store_rule),
)


def _rk4_nfe(c: RunConfig) -> str | None:
    # The last step, down to sigma = 0, is Euler's.
    branches = 1 if c.evaluation.guidance_scale == 1 else 2
    odd = [n for n in c.evaluation.nfe if n % branches or (n // branches - 1) % 4]
    if c.evaluation.sampler != "rk4" or not odd:
        return None
    exact = ", ".join(str(branches * n) for n in (1, 5, 9))
    return (
        f"holds {', '.join(map(str, odd))}, but sampler rk4 spends {4 * branches} network "
        f"evaluations per step and {branches} on the last: {exact} and so on are exact, others "
        "are rounded down"
    )


def _needs_gpu(c: RunConfig) -> str | None:
    if c.training.device != "cuda" or c.scaling.use_gpu or c.scaling.num_workers == 0:
        return None
    return "is cuda, but the workers get no GPU; set scaling.use_gpu: true"


def _null_class(c: RunConfig) -> str | None:
    if c.evaluation.guidance_scale == 1 or c.model.label_dropout > 0:
        return None
    return "needs a trained null class, but model.label_dropout is 0; guidance will be arbitrary"


def _late_best(c: RunConfig) -> str | None:
    if c.evaluation.placement != "background" or not c.training.keep_best:
        return None
    return (
        "goes by evaluations that come late with evaluation.placement background: the checkpoint "
        "kept is the first after the result, steps behind the weights that were evaluated; use "
        "placement ranks"
    )


CAUTIONS: tuple[Rule, ...] = (
    Rule("training.keep_best", ("evaluation.placement",), _late_best),
    Rule("evaluation.nfe", ("evaluation.sampler",), _rk4_nfe),
    Rule("training.device", ("scaling.use_gpu",), _needs_gpu),
    Rule("evaluation.guidance_scale", ("model.label_dropout",), _null_class),
)


def check_rules(
    rules: Iterable[Rule], config: RunConfig, entries: Entries, ignore: frozenset[str]
) -> list[Finding]:
    """The rules of a table that are broken.

    Args:
        rules: `ERRORS` or `CAUTIONS`.
        config: the resolved run.
        entries: what the user wrote.
        ignore: settings whose value was refused already; their rules are skipped.
    """
    findings = []
    for rule in rules:
        involved = (rule.path, *rule.others)
        written = [p for p in rule.only or involved if p in entries]
        if not written or ignore & set(involved):
            continue
        text = rule.check(config)
        if text:
            places = [entries[p].place for p in involved if p in entries]
            place = COMMAND_LINE if COMMAND_LINE in places else places[0]
            findings.append(Finding(place, rule.path, text, frozenset(involved)))
    return findings
