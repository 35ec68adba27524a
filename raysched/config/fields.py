"""The settings that a model has, by dotted path, and how a value is checked and described.

Both come from the model's JSON schema, so that the ranges have one home: the model.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raysched.config.run import LARGEST_INT, RunConfig, Section
from raysched.config.sweep import SweepConfig

FLAT_PREFIX = "scheduled_sampling_"

_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "object": "a mapping",
}
# The only pattern that the models use is that of names.
NAME_WORDS = "1 to 100 letters, digits, '.', '_' or '-', beginning with a letter or digit"


@dataclass(frozen=True)
class Layout:
    """The dotted paths of a model.

    Args:
        model: the top-level model.
    """

    model: type[Section]

    @cached_property
    def leaves(self) -> dict[str, dict[str, Any]]:
        """Dotted path -> JSON schema of each setting, in the model's order."""
        return _leaves(self.model, "")

    @cached_property
    def sections(self) -> set[str]:
        """Dotted paths of the sections."""
        parts = (path.split(".")[:-1] for path in self.leaves)
        return {".".join(p[: n + 1]) for p in parts for n in range(len(p))}

    def default(self, path: str) -> Any:
        """The model's own default of a setting, before any resolving, in JSON types."""
        return self.leaves[path].get("default")

    def resolve(self, key: str) -> str:
        """The dotted path that a flat or dotted spelling means; unknown ones unchanged."""
        name = key.removeprefix(FLAT_PREFIX)
        dotted = f"scheduled_sampling.{name}"
        return dotted if name != key and dotted in self.leaves else key

    def hint(self, path: str) -> str:
        """', did you mean X?' for a mistyped path, or nothing."""
        near = self._nearest(path)
        return f"; did you mean {near}?" if near else ""

    def _nearest(self, path: str) -> str | None:
        section, _, leaf = path.rpartition(".")
        known = [*self.leaves, *sorted(self.sections)]
        if self.resolve(leaf) != leaf and self.resolve(leaf) in self.leaves:
            return self.resolve(leaf)
        flat = {flat_key(p): p for p in self.leaves}
        if path.startswith(FLAT_PREFIX) and (match := closest(path, flat, cutoff=0.8)):
            return flat[match]
        siblings = {p.rpartition(".")[2]: p for p in known if p.rpartition(".")[0] == section}
        elsewhere = [p for p in known if p.rpartition(".")[2] == leaf]
        if section and (match := closest(leaf, siblings, cutoff=0.8)):
            return siblings[match]
        if elsewhere:
            return closest(path, elsewhere, cutoff=0.0)
        if match := closest(leaf, siblings):
            return siblings[match]
        spelled = {p: p for p in known} | flat
        if match := closest(path, spelled):
            return spelled[match]
        leaves = {p.rpartition(".")[2]: p for p in known}
        match = closest(leaf, leaves, cutoff=0.75)
        return leaves[match] if match else None


def _leaves(model: type[Section], prefix: str) -> dict[str, dict[str, Any]]:
    schema = model.model_json_schema()
    out: dict[str, dict[str, Any]] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            out |= _leaves(kind, f"{prefix}{name}.")
        else:
            out[prefix + name] = schema["properties"][name]
    return out


RUN = Layout(RunConfig)
SWEEP = Layout(SweepConfig)


def flat_key(path: str) -> str:
    """The flat spelling of a dotted path; only scheduled_sampling has one."""
    head, _, leaf = path.partition(".")
    return FLAT_PREFIX + leaf if head == "scheduled_sampling" and leaf else path


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The most similar of the known words."""
    return next(iter(difflib.get_close_matches(word, list(known), 1, cutoff)), None)


def show(value: Any) -> str:
    """A value as YAML users write it, shortened."""
    text = _repr(value, 3)
    return text if len(text) <= 70 else text[:67] + "..."


def _repr(value: Any, depth: int) -> str:
    if isinstance(value, list | tuple):
        inner = [_repr(v, depth - 1) if depth else "..." for v in value[:8]]
        return "[" + ", ".join(inner + ["..."] * (len(value) > 8)) + "]"
    if isinstance(value, dict):
        pairs = list(value.items())[:4]
        inner = [f"{k}: {_repr(v, depth - 1) if depth else '...'}" for k, v in pairs]
        return "{" + ", ".join(inner + ["..."] * (len(value) > 4)) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    return repr(value)


def same(a: Any, b: Any) -> bool:
    """Equality that tells true from 1, unlike Python's own; 1 and 1.0 are the same."""
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def alternatives(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The schema's alternatives: itself, or what its `anyOf` lists."""
    return list(schema.get("anyOf", [schema]))


def fits(schema: dict[str, Any], value: Any) -> bool:
    """Whether a value from a file has the type and range that a setting's schema asks for."""
    return any(_fits(option, value) for option in alternatives(schema))


def _fits(schema: dict[str, Any], value: Any) -> bool:
    if "enum" in schema or "const" in schema:
        allowed = schema.get("enum", [schema.get("const")])
        return any(type(value) is type(a) and value == a for a in allowed)
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return is_number(value, whole=kind == "integer") and not _violated(schema, value)
    if kind == "string":
        pattern = schema.get("pattern", "")
        return (
            isinstance(value, str)
            and _writable(value)
            and len(value) >= schema.get("minLength", 0)
            and re.search(pattern.replace("$", r"\Z"), value) is not None
        )
    if kind == "array":
        return (
            isinstance(value, list | tuple)
            and len(value) >= schema.get("minItems", 0)
            and all(fits(schema.get("items", {}), v) for v in value)
        )
    types: dict[str, type] = {"boolean": bool, "null": type(None), "object": dict}
    return kind is None or isinstance(value, types[str(kind)])


def _writable(text: str) -> bool:
    """Whether file systems and databases take a text."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def is_number(value: Any, *, whole: bool = False) -> bool:
    """Whether a value is a finite number (bools are none), or a whole one."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    if isinstance(value, int):
        return abs(value) <= 10**300
    return math.isfinite(value)


def _violated(schema: dict[str, Any], value: float) -> list[str]:
    """The bounds of a schema that a number breaks."""
    broken: dict[str, Callable[[float], bool]] = {
        "minimum": lambda b: value < b,
        "exclusiveMinimum": lambda b: value <= b,
        "maximum": lambda b: value > b,
        "exclusiveMaximum": lambda b: value >= b,
    }
    return [name for name, test in broken.items() if name in schema and test(schema[name])]


_SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _bounds(schema: dict[str, Any], names: Iterable[str] = _SIGNS) -> str:
    given = [
        f"{_SIGNS[n]} {schema[n]:g}" if schema[n] < 10**6 else f"{_SIGNS[n]} {schema[n]}"
        for n in names
        if n in schema
    ]
    return " and ".join(given)


def describe(schema: dict[str, Any]) -> str:
    """What a setting takes, in words: 'a whole number ≥ 0', 'one of euler, dpm', …"""
    words = [_describe(option) for option in alternatives(schema)]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def _describe(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(str(v) for v in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    kind = schema.get("type")
    if kind == "array":
        least = ", at least one" if schema.get("minItems") else ""
        return "a list of " + _plural(schema.get("items", {})) + least
    if kind == "string" and schema.get("pattern"):
        return NAME_WORDS
    if kind == "string" and schema.get("minLength"):
        return "text, not empty"
    shown = {k: v for k, v in schema.items() if v != LARGEST_INT}
    return f"{_WORDS.get(str(kind), 'a value')} {_bounds(shown)}".strip()


def _plural(schema: dict[str, Any]) -> str:
    shown = {k: v for k, v in schema.items() if v != LARGEST_INT}
    word = {"integer": "whole numbers", "number": "numbers"}.get(schema.get("type", ""), "values")
    return f"{word} {_bounds(shown)}".strip()


def mistake(schema: dict[str, Any], value: Any) -> str:
    """The rule that a value breaks and the value: 'must be ≥ 0, got -3'."""
    options = [o for o in alternatives(schema) if o.get("type") != "null"]
    only = options[0]
    number = only.get("type") in ("integer", "number") and "enum" not in only
    if len(options) == 1 and number and is_number(value, whole=only["type"] == "integer"):
        shown = {k: v for k, v in only.items() if v != LARGEST_INT}
        rule = _bounds(shown) if _violated(shown, value) else _bounds(only, _violated(only, value))
        return f"must be {rule}, got {show(value)}"
    choices = [str(v) for o in options for v in o.get("enum", [o.get("const", "")])]
    near = closest(value, choices) if isinstance(value, str) else None
    words = describe(schema)
    if isinstance(value, float) and not math.isfinite(value):
        words = words.replace("a number", "a finite number")
    return f"must be {words}, got {show(value)}" + (f"; did you mean {near}?" if near else "")
