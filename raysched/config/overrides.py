"""Command-line tokens into overrides.

A token is `key=value`, `--key=value`, `--key value` or `--flag`; a key is dotted or flat. Values
follow the YAML rules, except that text settings take what stands there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raysched.config.entries import (
    COMMAND_LINE,
    Entries,
    Entry,
    Finding,
    flatten,
    nest,
    unknown_key,
)
from raysched.config.fields import RUN, Layout, alternatives, closest, fits, flat_key
from raysched.config.parsing import bounded, parse_yaml

CLI_OPTIONS = ("--json", "--resume", "--help")
BUDGET_UNITS = tuple(f"training.budget.{u}" for u in ("steps", "forward_equivalents", "seconds"))
EXAMPLE = "scheduled_sampling.max_step_offset=5"


@dataclass(frozen=True)
class Token:
    """One override before its key is known to exist.

    Args:
        key: as written, without dashes.
        text: the value as written; None for a flag alone.
        dashed: whether it was written as an option.
    """

    key: str
    text: str | None
    dashed: bool


def split_tokens(
    tokens: Sequence[str], is_key: Callable[[str], bool]
) -> tuple[list[Token], list[Finding]]:
    """Group command-line tokens into keys and values.

    Args:
        tokens: what the command line has left over.
        is_key: whether a key is known; decides if `a=b` after an option is its value.
    """
    out: list[Token] = []
    findings: list[Finding] = []
    waiting = list(reversed([str(token) for token in tokens]))
    while waiting:
        token = waiting.pop()
        name, equals, text = token.removeprefix("--").partition("=")
        dashed = token.startswith("--")
        if dashed and name and not equals:
            follows = waiting[-1] if waiting else None
            text_after = None
            if follows is not None and not _starts_override(follows, is_key):
                text_after = waiting.pop()
            out.append(Token(name, text_after, True))
        elif equals and name.strip() and not name.startswith("-"):
            out.append(Token(name.strip(), text, dashed))
        else:
            expected = f"expected an override such as {EXAMPLE}"
            near = closest("--" + token.lstrip("-"), CLI_OPTIONS, 0.75)
            hint = f" (or did you mean {near}?)" if near and token.startswith("-") else ""
            findings.append(Finding(COMMAND_LINE, repr(token), expected + hint))
    return out, findings


def _starts_override(token: str, is_key: Callable[[str], bool]) -> bool:
    return token.startswith("--") or ("=" in token and is_key(token.partition("=")[0]))


def resolve_tokens(tokens: Sequence[Token], layout: Layout = RUN) -> tuple[Entries, list[Finding]]:
    """Tokens as entries of a model.

    Returns:
        The entries (the last word wins), and the mistakes; values aren't checked yet.
    """
    entries: Entries = {}
    findings: list[Finding] = []
    for token in tokens:
        path = layout.resolve(token.key)
        if path in layout.sections:
            found, wrong = _section(path, token, layout)
            entries |= found
            findings += wrong
        elif path not in layout.leaves:
            findings.append(_unknown(token, layout))
        elif token.text is None:
            if fits(layout.leaves[path], True):
                entries[path] = Entry(True, COMMAND_LINE)
            else:
                text = f"needs a value: {token.key}=VALUE or --{token.key} VALUE"
                findings.append(Finding(COMMAND_LINE, path, text))
        else:
            try:
                value = parse_value(token.text, layout.leaves[path])
                entries[path] = Entry(value, COMMAND_LINE)
            except ValueError as error:
                text = f"value {token.text!r} can't be read: {error}"
                findings.append(Finding(COMMAND_LINE, path, text))
    return entries, findings


def _section(path: str, token: Token, layout: Layout) -> tuple[Entries, list[Finding]]:
    """A whole section as the value: its settings one by one."""
    try:
        value = parse_yaml(token.text or "null")
    except ValueError as error:
        return {}, [Finding(COMMAND_LINE, path, f"value {token.text!r} can't be read: {error}")]
    return flatten(nest({path: value}), layout, COMMAND_LINE)


def _unknown(token: Token, layout: Layout) -> Finding:
    """The finding for a key or an option that doesn't exist, with the nearest one that does."""
    if (token.dashed and token.text is None) or (token.dashed and "." not in token.key):
        spelled = {f"--{flat_key(path)}" for path in layout.leaves} | set(CLI_OPTIONS)
        near = closest(f"--{token.key.replace('-', '_')}", spelled, 0.7)
        if near:
            text = f"unknown option; did you mean {near}?"
            return Finding(COMMAND_LINE, f"--{token.key}", text)
    finding = unknown_key(COMMAND_LINE, token.key, layout)
    return replace(finding, path=f"--{token.key}") if token.dashed else finding


def parse_value(text: str, schema: dict[str, Any]) -> Any:
    """An override's value by the YAML rules; text settings take it as it stands.

    Args:
        text: as on the command line.
        schema: the setting's schema.

    Raises:
        ValueError: the text is no YAML value.
    """
    kinds = alternatives(schema)
    plain = any(k.get("type") == "string" and not {"enum", "const"} & k.keys() for k in kinds)
    if plain and text[:1] not in ("'", '"'):
        none = text in ("", "~", "null", "Null", "NULL")
        return None if none and fits(schema, None) else text
    value = parse_yaml(text)
    if not bounded(value):
        raise ValueError("too large or too deeply nested")
    return value


def merge(file: Entries, overrides: Entries) -> tuple[Entries, list[Finding]]:
    """Entries of the file with those of the command line in their place.

    A budget on the command line replaces the file's, whatever its unit.
    """
    units = [u for u in BUDGET_UNITS if u in overrides and overrides[u].value is not None]
    kept = {p: e for p, e in file.items() if not (units and p in BUDGET_UNITS)}
    return {**kept, **overrides}, [*one_budget(file), *one_budget(overrides)]


def one_budget(entries: Entries) -> list[Finding]:
    """A finding if entries of one place give the budget in several units."""
    units = [u for u in BUDGET_UNITS if u in entries and entries[u].value is not None]
    if len(units) < 2:
        return []
    names = " and ".join(u.rpartition(".")[2] for u in units)
    text = f"must be given in one unit, got {names}; keep one"
    return [Finding(entries[units[-1]].place, "training.budget", text, frozenset(units))]
