"""What the user wrote: one entry per setting with the place it comes from, and the findings.

Files are flattened into entries here (flat keys included), overrides replace entries, and the
nested mapping that the model validates is made from them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from raysched.config.fields import Layout, fits, mistake, same, show
from raysched.errors import ConfigError

COMMAND_LINE = "command line"
MARKER = "raysched_version"


@dataclass(frozen=True)
class Entry:
    """A value as written, and where.

    Args:
        value: the value in plain types.
        place: the file, or `command line`.
    """

    value: Any
    place: str


Entries = dict[str, Entry]


@dataclass(frozen=True)
class Finding:
    """One mistake or warning.

    Args:
        place: file or `command line`.
        path: dotted path of the setting; empty for the whole file.
        text: rule, value, and how to mend it.
        involved: all settings that it is about.
    """

    place: str
    path: str
    text: str
    involved: frozenset[str] = frozenset()

    @property
    def line(self) -> str:
        """The one line that the user sees."""
        line = ": ".join(part for part in (self.place, self.path, self.text) if part)
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def raise_findings(findings: Iterable[Finding]) -> None:
    """Raise all mistakes at once, each of them one line; nothing if there are none."""
    lines = list(dict.fromkeys(finding.line for finding in findings))
    if lines:
        raise ConfigError(lines)


def flatten(
    mapping: Mapping[Any, Any], layout: Layout, place: str
) -> tuple[Entries, list[Finding]]:
    """A file's mapping as entries by dotted path.

    Args:
        mapping: nested, with flat keys at the top level.
        layout: the model that it is for.
        place: the file's name.

    Returns:
        The entries, and the mistakes in keys and sections; values aren't checked yet.
    """
    walk = _Walk(layout, place)
    walk.into(mapping, "")
    return walk.entries, walk.findings


class _Walk:
    """Collects the entries of one file; `spelled` is how each key was written."""

    def __init__(self, layout: Layout, place: str) -> None:
        self.layout, self.place = layout, place
        self.entries: Entries = {}
        self.findings: list[Finding] = []
        self.spelled: dict[str, str] = {}

    def into(self, level: Mapping[Any, Any], prefix: str) -> None:
        """Collect the settings of a section and of those inside it."""
        for key, value in level.items():
            if not isinstance(key, str):
                text = f"a key must be text, got {show(key)}; write it in quotes"
                self.findings.append(Finding(self.place, prefix.rstrip("."), text))
                continue
            written = prefix + key
            path = written if prefix else self.layout.resolve(_undashed(key, self.layout))
            if "." in key or path not in self.layout.sections | self.layout.leaves.keys():
                self.findings.append(unknown_key(self.place, written, self.layout))
            elif path in self.layout.leaves:
                self._setting(path, written, value)
            elif isinstance(value, Mapping):
                self.into(value, path + ".")
            else:
                self.findings.append(not_a_section(self.place, path, value))

    def _setting(self, path: str, written: str, value: Any) -> None:
        before = self.entries.get(path)
        if before is not None and not same(before.value, value):
            text = (
                f"is given twice, as {self.spelled[path]}: {show(before.value)} "
                f"and {written}: {show(value)}; keep one"
            )
            self.findings.append(Finding(self.place, path, text, frozenset({path})))
            return
        self.entries[path] = Entry(value, self.place)
        self.spelled[path] = written


def _undashed(key: str, layout: Layout) -> str:
    """A key as a command line writes it (`--seed`), without its dashes, if that is a setting."""
    bare = layout.resolve(key.removeprefix("--"))
    return bare if bare in layout.leaves else key


def not_a_section(place: str, path: str, value: Any) -> Finding:
    """The finding for a section that holds something else than settings."""
    empty = value is None
    mend = "write its settings below it or leave it out" if empty else "write its settings below"
    return Finding(place, path, f"must be a mapping of settings, got {show(value)}; {mend}")


def unknown_key(place: str, path: str, layout: Layout) -> Finding:
    """The finding for a key that the model doesn't have, with the nearest that it has."""
    dotted = "." in path and path in layout.leaves
    if dotted:
        section, _, leaf = path.rpartition(".")
        return Finding(place, path, f"unknown key; write it nested, {leaf} below {section}")
    hint = layout.hint(path)
    if not hint and "." in path:
        section = path.rpartition(".")[0]
        if section in layout.sections:
            known = [p.removeprefix(section + ".") for p in layout.leaves if p.startswith(section)]
            hint = f"; {section} has " + ", ".join(known)
    if not hint:
        top = dict.fromkeys(p.partition(".")[0] for p in layout.leaves)
        hint = "; the top level has " + ", ".join(top)
    return Finding(place, path, "unknown key" + hint)


def check_values(entries: Entries, layout: Layout) -> list[Finding]:
    """Type and range of every entry; one finding per setting."""
    return [
        Finding(entry.place, path, mistake(layout.leaves[path], entry.value), frozenset({path}))
        for path, entry in entries.items()
        if not fits(layout.leaves[path], entry.value)
    ]


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted path as a nested mapping."""
    out: dict[str, Any] = {}
    for path, value in values.items():
        *sections, leaf = path.split(".")
        level = out
        for section in sections:
            level = level.setdefault(section, {})
        level[leaf] = value
    return out


def nested(entries: Entries) -> dict[str, Any]:
    """The entries' values as a nested mapping."""
    return nest({path: entry.value for path, entry in entries.items()})
