"""The condition of a dimension (`when`): reading it, and its mistakes that need no trial.

`when` maps settings to what they must be: a value, a list of values, or `{min: …, max: …}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raysched.config.fields import RUN, fits, is_number, mistake, show

BOUNDS = ("min", "max")


def split_condition(value: Any, space: Mapping[Any, Any]) -> tuple[Any, dict[str, Any], list[str]]:
    """A dimension as written, parted into its kind and its condition.

    Args:
        value: as in the file.
        space: the whole space as in the file.

    Returns:
        The kind with its values, the condition by dotted keys, and the condition's mistakes.
    """
    if not isinstance(value, Mapping) or "when" not in value:
        return value, {}, []
    kinds = {key: item for key, item in value.items() if key != "when"}
    when = value["when"]
    if not isinstance(when, Mapping) or not when:
        return kinds, {}, [f"when must be a mapping: setting -> value, got {show(when)}"]
    resolved = normal_condition(when)
    searched = {RUN.resolve(str(key)): dimension for key, dimension in space.items()}
    texts = []
    for key, test in resolved.items():
        if key not in RUN.leaves:
            texts.append(f"when.{key}: unknown key{RUN.hint(key)}")
        elif searched.get(key) is value:
            texts.append(f"when.{key}: a setting can't be its own condition")
        else:
            texts += [f"when.{key}: {text}" for text in _test_mistakes(key, test, searched)]
    return kinds, resolved, texts


def normal_condition(when: Mapping[Any, Any]) -> dict[str, Any]:
    """A condition by dotted keys."""
    return {RUN.resolve(str(key)): test for key, test in when.items()}


def first_match(test: Any) -> Any:
    """A value that fits a condition."""
    if isinstance(test, Mapping):
        return test.get("min", test.get("max"))
    return test[0] if isinstance(test, list | tuple) and test else test


def _test_mistakes(key: str, test: Any, searched: Mapping[str, Any]) -> list[str]:
    if isinstance(test, Mapping):
        unknown = [bound for bound in test if bound not in BOUNDS]
        if unknown or not test:
            return [f"a range has min, max or both, got {show(dict(test))}"]
        if not all(is_number(bound) for bound in test.values()):
            return [f"min and max must be numbers, got {show(dict(test))}"]
        if test.get("min", 0) > test.get("max", test.get("min", 0)):
            return [f"min must be ≤ max, got {show(dict(test))}"]
        return []
    listed = list(test) if isinstance(test, list | tuple) else [test]
    if not listed:
        return ["must be a value, a list of values or a range, got []"]
    wrong = [value for value in listed if not fits(RUN.leaves[key], value)]
    if wrong:
        return [mistake(RUN.leaves[key], wrong[0])]
    dimension = searched.get(key)
    given = dimension if isinstance(dimension, Mapping) else {}
    values = given.get("choice", given.get("grid"))
    if isinstance(values, list | tuple) and not any(value in values for value in listed):
        return [f"{show(test)} is none of the values that the space gives it"]
    return []
