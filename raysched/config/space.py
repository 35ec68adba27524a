"""A sweep from its file and the command line, with the base run that it searches around."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raysched.config.constraints import parse_constraint
from raysched.config.dimensions import read_points, read_space
from raysched.config.early_rules import early_mistakes
from raysched.config.entries import (
    COMMAND_LINE,
    Entries,
    Entry,
    Finding,
    check_values,
    flatten,
    nest,
    nested,
    raise_findings,
    unknown_key,
)
from raysched.config.fields import RUN, SWEEP, show
from raysched.config.loading import (
    DEFAULTS,
    Loaded,
    Written,
    assign,
    baseline_config,
    examine,
    read_entries,
)
from raysched.config.objective_rules import objective_mistakes
from raysched.config.overrides import (
    BUDGET_UNITS,
    Token,
    merge,
    parse_value,
    resolve_tokens,
    split_tokens,
)
from raysched.config.parsing import parse_yaml, read_mapping
from raysched.config.run import RunConfig
from raysched.config.structure import Structure, structure_of
from raysched.config.structure_rules import structure_findings
from raysched.config.sweep import KINDS, Dimension, SweepConfig
from raysched.config.sweep_rules import sweep_budget, sweep_warnings
from raysched.errors import ConfigError

__all__ = ["LoadedSweep", "assign", "baseline_config", "load_sweep", "sweep_budget"]

FREE_FORM = ("space", "overrides")
BUDGET = "budget_forward_equivalents"


@dataclass(frozen=True)
class LoadedSweep:
    """A checked sweep.

    Args:
        sweep: the sweep, its space by dotted keys.
        base: the base run with the sweep's and the command line's overrides.
        source: the space's file.
        warnings: one line each.
        given: whether its trials are given rather than searched.
    """

    sweep: SweepConfig
    base: Loaded
    source: str
    warnings: list[str]
    given: bool = False

    @property
    def tunes_baseline(self) -> bool:
        """Whether something beside the method is searched, so that plain training is tuned."""
        return not self.given and bool(self.structure.beside_the_method().space)

    @property
    def structure(self) -> Structure:
        """Which of its settings go together."""
        return structure_of(self.sweep, self.base.config)

    @property
    def budget(self) -> float:
        """F in forward equivalents."""
        return sweep_budget(self.sweep, self.base)


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> LoadedSweep:
    """Load and check a sweep and its base run, before anything is started.

    Args:
        path: the space's file.
        overrides: tokens of the command line; keys of the sweep go there, all others to the base.

    Raises:
        ConfigError: all mistakes at once.
    """
    source = str(path)
    mapping = read_mapping(Path(path), source)
    if "space" not in mapping and not any(k in SWEEP.leaves for k in mapping if k != "name"):
        raise ConfigError(f"{source}: is no sweep: it has no space; a run goes to raysched train")
    entries, findings = flatten(mapping, SWEEP, source)
    for_sweep, for_base, wrong = _split(overrides)
    findings += wrong
    given, wrong = _sweep_entries(for_sweep, entries)
    findings += wrong
    base_given, wrong = resolve_tokens(for_base)
    findings += wrong
    entries = _with_budget({**entries, **given}, base_given, given, findings)
    # Points in a list are checked one by one, against the space.
    listed = {p for p, e in entries.items() if p == "search.points" and isinstance(e.value, list)}
    findings += check_values({p: e for p, e in entries.items() if p not in listed}, SWEEP)
    findings += _repeated_seeds(entries)

    written, base_overrides, wrong = _base(entries, Path(path), source)
    findings += wrong
    merged, budgets = merge(written.entries, base_overrides)
    merged, more = merge(merged, base_given)
    config, mistakes = examine(merged)
    findings += [*written.findings, *budgets, *more, *mistakes]
    usable = {p: e for p, e in merged.items() if not any(p in m.involved for m in mistakes)}
    sweep, wrong = _sweep(entries, source, usable)
    findings += wrong
    if sweep is None:
        # Later they are checked with the space; a text that can't be read is told at once.
        findings += _unreadable_constraints(entries, source)
    raise_findings([*findings, *_budget_mistake(sweep, config, source)])
    assert sweep is not None, "a sweep without findings is valid"
    base = Loaded(config, [], nested(merged), written.source)
    wrong, idle = structure_findings(sweep, config, base.raw, source)
    budget = sweep_budget(sweep, config)
    wrong += early_mistakes(sweep, config, budget, source, sound=not wrong)
    raise_findings([*wrong, *objective_mistakes(sweep, config, source)])
    warnings = [*sweep_warnings(sweep, config, merged, written, source), *idle]
    return LoadedSweep(sweep, base, source, warnings)


def _split(overrides: Sequence[str]) -> tuple[list[Token], list[Token], list[Finding]]:
    """The command line's tokens for the sweep, those for the base run, and the mistakes."""

    def is_key(key: str) -> bool:
        return key in SWEEP.leaves or RUN.resolve(key) in RUN.leaves or _is_sweep_key(key)

    tokens, findings = split_tokens(overrides, is_key)
    tokens = [_spelled_out(token) for token in tokens]
    last = {path.rpartition(".")[2] for path in SWEEP.leaves}
    for_sweep = [
        t
        for t in tokens
        # The last part: an unknown key that names a setting of the sweep gets the better hint.
        if _is_sweep_key(t.key) or (t.key in last and RUN.resolve(t.key) not in RUN.leaves)
    ]
    return for_sweep, [t for t in tokens if t not in for_sweep], findings


def _spelled_out(token: Token) -> Token:
    """`--num-samples 40` means search.num_samples: options are short, and this one is frequent."""
    name = token.key.replace("-", "_")
    if not token.dashed or RUN.resolve(token.key) in RUN.leaves:
        return token
    path = next((p for p in (name, f"search.{name}") if p in SWEEP.leaves), token.key)
    return Token(path, token.text, token.dashed)


def _is_sweep_key(key: str) -> bool:
    return key.partition(".")[0] in SweepConfig.model_fields or key == "training.output_dir"


def _sweep_entries(tokens: Sequence[Token], file: Entries) -> tuple[Entries, list[Finding]]:
    """The sweep's own overrides; `space.KEY=…` and `overrides.KEY=…` replace one key there."""
    plain: list[Token] = []
    free: Entries = {}
    findings: list[Finding] = []
    for token in tokens:
        head, _, key = token.key.partition(".")
        if token.key == "training.output_dir":
            plain.append(Token("output_dir", token.text, token.dashed))
        elif head in FREE_FORM and key:
            current = free.get(head, file.get(head, Entry({}, COMMAND_LINE))).value
            current = dict(current) if isinstance(current, Mapping) else {}
            try:
                path, value = _free_form(head, key, token.text or "")
                before = next((v for k, v in current.items() if RUN.resolve(str(k)) == path), None)
                if head == "space" and isinstance(before, Mapping) and "when" in before:
                    value = {"when": before["when"], **value}
                current = {k: v for k, v in current.items() if RUN.resolve(str(k)) != path}
                current[path] = value
            except ValueError as error:
                findings.append(Finding(COMMAND_LINE, token.key, f"can't be read: {error}"))
            free[head] = Entry(current, COMMAND_LINE)
        else:
            plain.append(token)
    entries, wrong = resolve_tokens(plain, SWEEP)
    if "base" in entries and isinstance(entries["base"].value, str):
        absolute = str(Path(entries["base"].value).absolute())
        entries["base"] = Entry(absolute, COMMAND_LINE)
    return {**entries, **free}, [*findings, *wrong]


def _free_form(head: str, key: str, text: str) -> tuple[str, Any]:
    """The run's setting that `space.KEY`, `space.KEY.KIND` or `overrides.KEY` names, and a value.

    Raises:
        ValueError: the text is no YAML value.
    """
    setting, _, kind = key.rpartition(".")
    if head == "space" and setting and kind in KINDS:
        return RUN.resolve(setting), {kind: parse_yaml(text)}
    path = RUN.resolve(key)
    if head == "overrides" and path in RUN.leaves:
        return path, parse_value(text, RUN.leaves[path])
    return path, parse_yaml(text)


def _with_budget(
    entries: Entries, base_given: Entries, given: Entries, findings: list[Finding]
) -> Entries:
    """Let a `training.budget` of the command line replace the sweep's budget."""
    units = [u for u in BUDGET_UNITS if u in base_given and base_given[u].value is not None]
    if not units:
        return entries
    if BUDGET in given:
        text = f"must be given once, got {units[0]} and {BUDGET}; keep one"
        findings.append(Finding(COMMAND_LINE, units[0], text))
    return {p: e for p, e in entries.items() if p != BUDGET}


def _repeated_seeds(entries: Entries) -> list[Finding]:
    """A finding if a seed is given twice: the same run would count as two."""
    entry = entries.get("seeds")
    seeds = entry.value if entry and isinstance(entry.value, list) else []
    if entry is None or all(seed not in seeds[:n] for n, seed in enumerate(seeds)):
        return []
    return [Finding(entry.place, "seeds", f"must not repeat a seed, got {show(seeds)}")]


def _base(entries: Entries, path: Path, source: str) -> tuple[Written, Entries, list[Finding]]:
    """The base run's file and the sweep's overrides of it."""
    findings: list[Finding] = []
    written = Written({}, [], DEFAULTS)
    base = entries["base"].value if "base" in entries else None
    if isinstance(base, str):
        file = path.parent / base
        try:
            written = read_entries(read_mapping(file, str(file)), str(file))
        except ConfigError as error:
            findings += [Finding(source, "base", problem) for problem in error.problems]
    overrides: Entries = {}
    given = entries.get("overrides")
    if given is not None and isinstance(given.value, Mapping):
        for key, value in given.value.items():
            target = RUN.resolve(key) if isinstance(key, str) else ""
            if target in RUN.leaves:
                overrides[target] = Entry(value, f"{source}: overrides")
            elif target in RUN.sections and isinstance(value, Mapping):
                inner, wrong = flatten(nest({target: value}), RUN, f"{source}: overrides")
                overrides |= inner
                findings += wrong
            else:
                text = unknown_key(source, target or show(key), RUN).text
                findings.append(Finding(source, f"overrides.{key}", text))
    return written, overrides, findings


def _sweep(
    entries: Entries, source: str, base: Entries
) -> tuple[SweepConfig | None, list[Finding]]:
    """The sweep's model with its space and points checked against the base run."""
    algorithm = entries.get("search.algorithm", Entry("tpe", source)).value
    space = entries.get("space", Entry({}, source))
    if not isinstance(space.value, Mapping):
        return None, []  # said by the check of types
    if not space.value:
        text = "must be a mapping, not empty: a setting's key -> choice, uniform, loguniform, …"
        return None, [Finding(source, "space", text)]
    dimensions, findings = read_space(space.value, space.place, base, str(algorithm))
    refused = {RUN.resolve(str(key)) for key in space.value} - set(dimensions)
    points = entries.get("search.points", Entry([], source))
    resolved, wrong = read_points(points.value, points.place, dimensions, refused)
    findings += wrong
    bad = {p for m in check_values(entries, SWEEP) for p in m.involved}
    if findings or bad:
        return None, findings
    plain = {p: e for p, e in entries.items() if p not in ("space", "search.points")}
    values: dict[str, Any] = nested(plain)
    values["space"] = {path: _spelled(d) for path, d in dimensions.items()}
    values.setdefault("search", {})["points"] = resolved
    try:
        return SweepConfig.model_validate(values), []
    except ValidationError as error:
        return None, [
            Finding(source, ".".join(map(str, e["loc"])), e["msg"])
            for e in error.errors()
            if "[key]" not in e["loc"] or e["loc"][0] != "space"  # said where it is resolved
        ]


def _unreadable_constraints(entries: Entries, source: str) -> list[Finding]:
    written = entries.get("constraints", Entry([], source)).value
    findings = []
    for number, text in enumerate(written if isinstance(written, list | tuple) else []):
        try:
            if isinstance(text, str):
                parse_constraint(text)
        except ValueError as error:
            findings.append(Finding(source, f"constraints[{number}]", str(error)))
    return findings


def _spelled(dimension: Dimension) -> dict[str, Any]:
    return {dimension.kind: list(dimension.values), "when": dimension.when}


def _budget_mistake(sweep: SweepConfig | None, config: RunConfig, source: str) -> list[Finding]:
    if sweep is None:
        return []
    try:
        sweep_budget(sweep, config)
    except ConfigError as error:
        return [Finding(source, "", problem) for problem in error.problems]
    return []
