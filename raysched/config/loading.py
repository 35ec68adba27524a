"""A run's configuration from a file and the command line, checked against everything at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from raysched.config.entries import (
    COMMAND_LINE,
    MARKER,
    Entries,
    Entry,
    Finding,
    check_values,
    flatten,
    nested,
    raise_findings,
)
from raysched.config.fields import RUN, same
from raysched.config.idle import check_idle
from raysched.config.overrides import merge, resolve_tokens, split_tokens
from raysched.config.parsing import StrictDumper, bounded, read_mapping
from raysched.config.rollout_rules import ROLLOUT_CAUTIONS, ROLLOUT_ERRORS
from raysched.config.rules import CAUTIONS, ERRORS, check_rules
from raysched.config.run import RunConfig
from raysched.errors import ConfigError

DEFAULTS = "defaults"
# Settings that the model resolves from others; a dump spells them out.
DERIVED = ("scheduled_sampling.reflexflow", "scheduled_sampling.grid", "noise_schedule.kind")


@dataclass(frozen=True)
class Loaded:
    """A checked configuration.

    Args:
        config: the resolved run.
        warnings: one line each.
        raw: what the user wrote, nested, after flat keys and overrides, unresolved.
        source: the file's name as given, or `defaults`.
    """

    config: RunConfig
    warnings: list[str]
    raw: dict[str, Any]
    source: str


@dataclass(frozen=True)
class Written:
    """What a file and the command line hold, before it is checked.

    Args:
        entries: by dotted path.
        findings: the mistakes so far.
        source: the file's name.
        spelled_out: the file is a dump, where every setting stands without being a wish.
    """

    entries: Entries
    findings: list[Finding]
    source: str
    spelled_out: bool = False


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Loaded:
    """Load and check a run's configuration.

    Args:
        path: a .yaml, .yml, .toml or .json file; None: all defaults.
        overrides: tokens of the command line, such as `training.batch_size=32`.

    Raises:
        ConfigError: all mistakes at once.
    """
    if path is None:
        return load_mapping({}, DEFAULTS, overrides)
    source = str(path)
    return load_mapping(read_mapping(Path(path), source), source, overrides)


def load_mapping(mapping: Mapping[Any, Any], source: str, overrides: Sequence[str] = ()) -> Loaded:
    """Check a run's configuration that is already a mapping; otherwise as `load`."""
    written = read_entries(mapping, source)
    tokens, wrong = split_tokens(overrides, lambda key: RUN.resolve(key) in RUN.leaves)
    given, unknown = resolve_tokens(tokens)
    return finish(written, given, [*wrong, *unknown])


def read_entries(mapping: Mapping[Any, Any], source: str) -> Written:
    """A file's mapping as entries; those of a dump are cut down to what differs from defaults."""
    if not bounded(mapping):
        raise ConfigError(f"{source}: too large or too deeply nested for a configuration")
    if isinstance(mapping, Mapping) and {"space", "base"} & set(mapping):
        raise ConfigError(f"{source}: is a sweep, not a run; use it with: raysched tune {source}")
    spelled_out = MARKER in mapping
    rest = {key: value for key, value in mapping.items() if key != MARKER}
    entries, findings = flatten(rest, RUN, source)
    if spelled_out and not findings and not check_values(entries, RUN):
        entries = _needed(entries)
    return Written(entries, findings, source, spelled_out)


def _needed(entries: Entries) -> Entries:
    """The entries without those that the defaults give anyway."""
    full = RunConfig.model_validate(nested(entries))
    kept = {p: e for p, e in entries.items() if not same(e.value, RUN.default(p))}
    if RunConfig.model_validate(nested(kept)) != full:
        kept = dict(entries)
    for path in DERIVED:
        fewer = {p: e for p, e in kept.items() if p != path}
        if RunConfig.model_validate(nested(fewer)) == full:
            kept = fewer
    return kept


def finish(written: Written, overrides: Entries, findings: Sequence[Finding] = ()) -> Loaded:
    """Merge the overrides in, check all, and resolve.

    Raises:
        ConfigError: all mistakes at once.
    """
    entries, budgets = merge(written.entries, overrides)
    config, mistakes = examine(entries)
    raise_findings([*written.findings, *findings, *budgets, *mistakes])
    cautions = warnings_of(config, entries, spelled_out=written.spelled_out)
    return Loaded(config, [f.line for f in cautions], nested(entries), written.source)


def examine(entries: Entries) -> tuple[RunConfig, list[Finding]]:
    """The resolved run, and every mistake in values and between them.

    Values that are refused are left at their defaults, so that the rest can still be checked.
    """
    mistakes = check_values(entries, RUN)
    refused = frozenset(path for m in mistakes for path in m.involved)
    good = {path: entry for path, entry in entries.items() if path not in refused}
    try:
        config = RunConfig.model_validate(nested(good))
    except ValidationError as error:
        # The table of fields should have caught this; say it rather than fail with a traceback.
        for e in error.errors():
            path = ".".join(str(part) for part in e["loc"])
            mistakes.append(Finding("configuration", path, e["msg"]))
        return RunConfig(), mistakes
    return config, [*mistakes, *check_rules((*ERRORS, *ROLLOUT_ERRORS), config, good, refused)]


def warnings_of(
    config: RunConfig, entries: Entries, *, spelled_out: bool = False
) -> list[Finding]:
    """The warnings for a configuration without mistakes."""
    asked = {p: e for p, e in entries.items() if e.place == COMMAND_LINE or not spelled_out}
    cautions = check_rules((*CAUTIONS, *ROLLOUT_CAUTIONS), config, asked, frozenset())
    return [*cautions, *check_idle(config, entries, only_overrides=spelled_out)]


def dump(config: RunConfig) -> dict[str, Any]:
    """The resolved run in JSON types; `load_mapping(dump(c), …).config == c`."""
    return {MARKER: version("raysched"), **config.model_dump(mode="json")}


def to_yaml(values: Mapping[str, Any]) -> str:
    """A mapping as YAML text that the strict loader reads back."""
    return yaml.dump(
        dict(values), Dumper=StrictDumper, sort_keys=False, allow_unicode=True, width=99
    )


def write_yaml(config: RunConfig, path: str | Path) -> None:
    """Write the resolved run to a YAML file that loads to the same run."""
    Path(path).write_text(to_yaml(dump(config)), encoding="utf-8")


def entries_of(raw: Mapping[str, Any], place: str = DEFAULTS) -> Entries:
    """A raw mapping (`Loaded.raw`) as entries again."""
    entries, findings = flatten(raw, RUN, place)
    raise_findings(findings)
    return entries


def assign(raw: Mapping[str, Any], assignments: Mapping[str, Any]) -> RunConfig:
    """A trial's run: values that depend on others are resolved anew.

    Args:
        raw: the base's `Loaded.raw`.
        assignments: values by dotted or flat key.

    Raises:
        ConfigError: the combination can't work, or a key is unknown.
    """
    given = {RUN.resolve(key): Entry(value, "trial") for key, value in assignments.items()}
    unknown = [Finding("trial", path, "unknown key") for path in given if path not in RUN.leaves]
    raise_findings(unknown)
    entries, budgets = merge(entries_of(raw), given)
    config, mistakes = examine(entries)
    raise_findings([*budgets, *mistakes])
    return config


def baseline_config(
    raw: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> RunConfig:
    """The teacher-forced baseline of a base run: the same without rollouts.

    Args:
        raw: the base run as it was written.
        settings: what a search changes beside the rollout; the baseline is tuned, too.
    """
    off = {"scheduled_sampling.max_step_offset": 0, "exposure": "none"}
    return assign(raw, {**(settings or {}), **off, "scheduled_sampling.reflexflow": "auto"})
