"""Text into plain values: YAML, TOML and JSON, read strictly.

YAML differs from PyYAML's default in what surprises users: a key given twice is an error, `1e-4`
is a number, `010`, `1:30` and dates are text.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from raysched.config.fields import closest
from raysched.errors import ConfigError

MAX_VALUES = 100_000
MAX_DEPTH = 40
# What PyYAML's constructors raise, beside its own errors, for explicit tags on odd values.
_ODD_VALUE = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """PyYAML's implicit types with other numbers, without dates and `=`."""
    dropped = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp", "value")}
    kept = {
        first: [(tag, pattern) for tag, pattern in found if tag not in dropped]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    number = (
        ("int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0b[01]+)"),
        ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"),
        ("float", r"[-+]?\.[0-9]+(?:[eE][-+]?[0-9]+)?"),
        ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"),
    )
    for tag, pattern in number:
        entry = (f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z"))
        for first in "-+.0123456789":
            kept.setdefault(first, []).append(entry)
    return kept


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader with strict keys and plain numbers."""

    yaml_implicit_resolvers = _resolvers()

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that the same mapping holds twice (merged keys may be overridden)."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is given twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node


class StrictDumper(yaml.SafeDumper):
    """Writes what `StrictLoader` reads back."""

    yaml_implicit_resolvers = _resolvers()

    def ignore_aliases(self, data: Any) -> bool:
        """Write repeated lists out."""
        return True


def parse_yaml(text: str) -> Any:
    """YAML text as plain values.

    Raises:
        ValueError: with what is wrong and where.
    """
    try:
        return yaml.load(text, Loader=StrictLoader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except _ODD_VALUE as error:
        raise ValueError(f"a value doesn't fit its explicit tag ({error})") from None


def _parse_json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                raise ValueError(f"key {key!r} is given twice")
            out[key] = value
        return out

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{place}: {error.msg[:1].lower()}{error.msg[1:]}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _parse_toml(text: str) -> Any:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


PARSERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    ".yaml": ("YAML", parse_yaml),
    ".yml": ("YAML", parse_yaml),
    ".json": ("JSON", _parse_json),
    ".toml": ("TOML", _parse_toml),
}


def read_mapping(path: Path, source: str) -> dict[Any, Any]:
    """The mapping that a configuration file holds.

    Args:
        path: the file; its suffix says its kind.
        source: the file's name in messages.

    Raises:
        ConfigError: the file is missing, unreadable, not text, corrupt, empty or no mapping.
    """
    text = _read_text(path, source)
    kind, parse = PARSERS[path.suffix.lower()]
    try:
        value = parse(text) if text.strip() else None
    except ValueError as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"{source}: not valid {kind}: {detail}") from None
    if value is None:
        raise ConfigError(
            f"{source}: the file is empty; write at least one setting, such as 'seed: 0'"
        )
    if not isinstance(value, dict):
        found = "a list" if isinstance(value, list) else "a single value"
        raise ConfigError(f"{source}: must hold a mapping of settings (key: value), got {found}")
    if not bounded(value):
        raise ConfigError(f"{source}: too large or too deeply nested for a configuration")
    return value


def is_space(path: str) -> bool:
    """Whether a configuration file is a sweep's space, rather than a run's config."""
    return "space" in read_mapping(Path(path), path)


def _read_text(path: Path, source: str) -> str:
    try:
        if path.is_dir():
            raise ConfigError(f"{source}: is a folder; give a file (.yaml, .toml or .json)")
        if not path.exists():
            raise ConfigError(f"{source}: no such file{_neighbour(path)}")
        if path.suffix.lower() not in PARSERS:
            raise ConfigError(
                f"{source}: unknown kind of file {path.suffix!r}; "
                "a configuration ends in .yaml, .yml, .toml or .json"
            )
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8 text (byte {error.start + 1})") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{source}: can't be read: {reason}") from None


def _neighbour(path: Path) -> str:
    """A file of a similar name beside the one that is missing."""
    if not path.parent.is_dir():
        return ""
    names = [p.name for p in path.parent.iterdir() if p.suffix.lower() in PARSERS]
    match = closest(path.name, names)
    return f"; did you mean {path.parent / match}?" if match else ""


def bounded(value: Any) -> bool:
    """Whether a value is small; aliases that nest or multiply without end are not."""
    left, todo = MAX_VALUES, [(value, 0)]
    while todo:
        item, depth = todo.pop()
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            return False
        if isinstance(item, dict):
            todo += [(v, depth + 1) for v in item.values()]
        elif isinstance(item, list | tuple):
            todo += [(v, depth + 1) for v in item]
    return True
