"""The searched settings of a sweep: each key and every value that a trial could get.

A dimension is checked by putting both ends of its range, or all of its values, one at a time into
the base run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raysched.config.conditions import first_match, normal_condition, split_condition
from raysched.config.entries import Entries, Entry, Finding, unknown_key
from raysched.config.fields import RUN, alternatives, closest, is_number, same, show
from raysched.config.loading import examine
from raysched.config.sweep import KINDS, Dimension

RANGES = ("uniform", "loguniform", "quniform", "randint", "lograndint", "qrandint")
WHOLE = ("randint", "lograndint", "qrandint")
STEPPED = ("quniform", "qrandint")
LOGARITHMIC = ("loguniform", "lograndint")
NOT_SEARCHED = {
    "seed": "repeats belong in the sweep's seeds",
    "name": "every trial gets its own name",
    "training.output_dir": "every trial gets its own folder",
    "training.budget": "all trials are compared at the same compute; set "
    "budget_forward_equivalents",
    "tracking": "all trials are tracked in one place",
    "evaluation": "all trials must be measured alike",
    "scaling": "all trials get the same resources",
    "data": "all trials must be compared on the same data",
}


def read_space(
    space: Mapping[Any, Any], source: str, base: Entries, algorithm: str
) -> tuple[dict[str, Dimension], list[Finding]]:
    """The dimensions by dotted key.

    Args:
        space: as in the file.
        source: the file's name.
        base: the base run's entries, without mistakes.
        algorithm: how the sweep searches; `grid` needs lists.

    Returns:
        The dimensions without mistakes, and the mistakes of the others.
    """
    dimensions: dict[str, Dimension] = {}
    findings: list[Finding] = []
    for written, value in space.items():
        place = f"space.{written}"
        path = RUN.resolve(written) if isinstance(written, str) else ""
        wrong = _key_mistake(written, path, source)
        if wrong:
            findings.append(wrong)
            continue
        if path in dimensions:
            findings.append(Finding(source, place, "is given twice (flat and dotted); keep one"))
            continue
        kinds, when, texts = split_condition(value, space)
        texts = texts or _kind_mistakes(kinds, algorithm) or _range_mistakes(path, kinds)
        if not texts:
            texts = _value_mistakes(path, kinds, _fitting(when, space, base))
        findings += [Finding(source, place, text) for text in texts]
        if not texts:
            dimensions[path] = Dimension.model_validate({**kinds, "when": when or None})
    return dimensions, findings


def _fitting(when: Mapping[str, Any], space: Mapping[Any, Any], base: Entries) -> Entries:
    """The base run, changed so that a condition holds, and those that it rests on."""
    entries = dict(base)
    written = {RUN.resolve(str(key)): value for key, value in space.items()}
    left = dict(when)
    for _ in range(len(written) + 1):
        further: dict[str, Any] = {}
        for key, test in left.items():
            if key in written:
                entries[key] = Entry(first_match(test), "space")
                more = written[key].get("when") if isinstance(written[key], Mapping) else None
                further |= normal_condition(more) if isinstance(more, Mapping) else {}
        left = further
    return entries


def _key_mistake(written: Any, path: str, source: str) -> Finding | None:
    if not isinstance(written, str):
        return Finding(source, "space", f"a key must be text, got {show(written)}")
    if path in RUN.sections:
        known = ", ".join(p for p in RUN.leaves if p.startswith(path + "."))
        return Finding(source, f"space.{written}", f"is a section; search one of {known}")
    if path not in RUN.leaves:
        text = unknown_key(source, path, RUN).text
        return Finding(source, f"space.{written}", text)
    for refused, reason in NOT_SEARCHED.items():
        if path == refused or path.startswith(refused + "."):
            return Finding(source, f"space.{written}", f"can't be searched: {reason}")
    return None


def _kind_mistakes(value: Any, algorithm: str) -> list[str]:
    """Whether a dimension is exactly one known kind with a list of a right length."""
    if not isinstance(value, Mapping):
        return [f"must be one of {', '.join(KINDS)} with a list, got {show(value)}"]
    unknown = [k for k in value if k not in KINDS]
    if unknown:
        near = closest(str(unknown[0]), KINDS)
        hint = f"; did you mean {near}?" if near else ""
        return [f"{show(unknown[0])} is no kind; it must be one of {', '.join(KINDS)}{hint}"]
    given = list(value)
    if len(given) != 1:
        return [f"must have exactly one of {', '.join(KINDS)}, got {show(given)}"]
    kind, values = given[0], value[given[0]]
    if not isinstance(values, list | tuple) or not values:
        return [f"{kind} must be a list, not empty, got {show(values)}"]
    if kind in STEPPED and len(values) != 3:
        return [f"{kind} must be [low, high, step], got {show(values)}"]
    if kind in RANGES and kind not in STEPPED and len(values) != 2:
        return [f"{kind} must be [low, high], got {show(values)}"]
    if kind == "grid" and algorithm != "grid":
        return [f"grid needs search.algorithm grid, got {algorithm}; use choice"]
    if kind in RANGES and algorithm == "grid":
        return [f"search.algorithm grid needs grid or choice, got {kind}"]
    return []


def _range_mistakes(path: str, value: Mapping[str, Any]) -> list[str]:
    """What is wrong with a range whatever the base: its ends, and its kind for the setting."""
    kind, values = next(iter(value.items()))
    if kind not in RANGES:
        repeated = [v for n, v in enumerate(values) if any(same(v, w) for w in values[:n])]
        return [f"{kind} holds {show(repeated[0])} twice"] if repeated else []
    options = [o for o in alternatives(RUN.leaves[path]) if "enum" not in o]
    types = {o.get("type") for o in options}
    if not types & {"integer", "number"}:
        return [f"{kind} needs a setting that is a number; use choice"]
    whole = kind in WHOLE
    if not whole and "number" not in types:
        use = {"loguniform": "lograndint", "quniform": "qrandint"}.get(kind, "randint")
        return [f"{kind} draws fractions, but the setting is a whole number; use {use}"]
    if not all(is_number(v, whole=whole) for v in values):
        words = "whole numbers" if whole else "finite numbers"
        count = "three" if kind in STEPPED else "two"
        return [f"{kind} must be {count} {words}, got {show(values)}"]
    low, high = values[:2]
    if low >= high:
        return [f"{kind} must have low < high, got {show(values)}"]
    if kind in LOGARITHMIC and low <= 0:
        return [f"{kind} must have low > 0, got {show(low)}"]
    return _step_mistakes(kind, values) if kind in STEPPED else []


def _step_mistakes(kind: str, values: Any) -> list[str]:
    low, high, step = values
    if step <= 0:
        return [f"{kind} must have step > 0, got {show(step)}"]
    steps = (high - low) / step
    if abs(steps - round(steps)) > 1e-6:
        return [f"{kind} must reach high from low in whole steps, got {show(values)}"]
    return []


def _value_mistakes(path: str, value: Mapping[str, Any], base: Entries) -> list[str]:
    """Mistakes that an end of the range, or a value of the list, makes in the base run."""
    kind, values = next(iter(value.items()))
    named = [("", v) for v in values]
    if kind in RANGES:
        low, high = values[:2]
        half_open = kind in ("randint", "lograndint")
        last = high - 1 if half_open else high
        named = [("low: ", low), ("high - 1: " if half_open else "high: ", last)]
    texts = []
    for name, candidate in named:
        _, mistakes = examine({**base, path: Entry(candidate, "space")})
        for mistake in mistakes:
            about = "" if mistake.path == path else f"with {show(candidate)}, {mistake.path}: "
            texts.append(f"{kind}: {name}{about}{mistake.text}")
    return texts


def read_points(
    points: Any, source: str, dimensions: Mapping[str, Dimension], refused: set[str]
) -> tuple[list[dict[str, Any]], list[Finding]]:
    """The points to try first, by dotted keys, checked against the space.

    Args:
        points: as in the file.
        source: the file's name.
        dimensions: the space without mistakes.
        refused: keys of the space that have mistakes of their own.
    """
    if not isinstance(points, list | tuple):
        return [], []  # said by the check of types
    out: list[dict[str, Any]] = []
    findings: list[Finding] = []
    for number, point in enumerate(points):
        place = f"search.points[{number}]"
        if not isinstance(point, Mapping) or not point:
            text = f"must be a mapping of the space's keys, got {show(point)}"
            findings.append(Finding(source, place, text))
            continue
        resolved = {RUN.resolve(str(key)): value for key, value in point.items()}
        for path, value in resolved.items():
            if path in refused:
                continue
            if path not in dimensions:
                near = closest(path, dimensions)
                hint = f"; did you mean {near}?" if near else ""
                findings.append(Finding(source, f"{place}.{path}", f"is not in the space{hint}"))
            elif not inside(dimensions[path], value):
                dimension = dimensions[path]
                limits = f"{dimension.kind} {show(list(dimension.values))}"
                text = f"must lie in {limits}, got {show(value)}"
                findings.append(Finding(source, f"{place}.{path}", text))
        out.append(resolved)
    return out, findings


def inside(dimension: Dimension, value: Any) -> bool:
    """Whether a value is one that the dimension could give."""
    if dimension.kind not in RANGES:
        return any(same(value, v) for v in dimension.values)
    low, high = dimension.values[:2]
    if not is_number(value, whole=dimension.kind in WHOLE):
        return False
    if dimension.kind in ("randint", "lograndint"):
        return bool(low <= value < high)
    on_step = True
    if dimension.kind in STEPPED:
        steps = (value - low) / dimension.values[2]
        on_step = abs(steps - round(steps)) < 1e-6
    return bool(low <= value <= high) and on_step
