"""Mistakes of a space that show only when its dimensions come together.

Conditions that go round in a circle, constraints that nothing fulfils, first points that break
them, searches that can't model the space: all found on random combinations, before anything
starts.
"""

from __future__ import annotations

import graphlib
import random
from collections.abc import Mapping
from typing import Any

from raysched.config.constraints import parse_constraint
from raysched.config.entries import Finding
from raysched.config.fields import RUN, show
from raysched.config.idle import idle_keys
from raysched.config.loading import assign
from raysched.config.run import RunConfig
from raysched.config.structure import Structure, fixed_values
from raysched.config.sweep import SweepConfig
from raysched.errors import ConfigError

NUM_POINTS = 1000
# Whole runs are slower to check than constraints.
NUM_RUNS = 40


def structure_findings(
    sweep: SweepConfig, config: RunConfig, raw: Mapping[str, Any], source: str
) -> tuple[list[Finding], list[str]]:
    """The mistakes and the warnings of a sweep's structure.

    Args:
        sweep: its dimensions checked one by one.
        config: the base run.
        raw: the base run as it was written.
        source: the file's name.
    """
    findings: list[Finding] = []
    constraints = []
    for number, text in enumerate(sweep.constraints):
        place = f"constraints[{number}]"
        try:
            constraint = parse_constraint(text)
        except ValueError as error:
            findings.append(Finding(source, place, str(error)))
            continue
        if not constraint.names & set(sweep.space):
            findings.append(Finding(source, place, "names no searched setting"))
        constraints.append(constraint)
    structure = Structure(sweep.space, fixed_values(config), tuple(constraints))
    try:
        _ = structure.order
    except graphlib.CycleError as error:
        circle = " -> ".join(error.args[1])
        findings.append(Finding(source, "space", f"conditions go round in a circle: {circle}"))
    findings += _algorithm_mistakes(sweep, source)
    if findings:
        return findings, []
    points = _points(structure)
    # A constraint that can't be reckoned with can't judge points either.
    findings = _constraint_mistakes(structure, points, source)
    findings = findings or _point_mistakes(sweep, structure, raw, source)
    if findings:
        return findings, []
    kept = [point for point in points if structure.broken(point) is None]
    return _run_mistakes(structure, kept, raw, source)


def _algorithm_mistakes(sweep: SweepConfig, source: str) -> list[Finding]:
    if sweep.search.algorithm != "gp":
        return []
    place = "search.algorithm"
    conditional = [key for key, dimension in sweep.space.items() if dimension.conditions]
    if conditional:
        text = f"gp can't model settings with a condition (when), as {conditional[0]} has; use tpe"
        return [Finding(source, place, text)]
    if all(dimension.kind == "choice" for dimension in sweep.space.values()):
        return [
            Finding(source, place, "gp needs a setting with a range, all are choices; use tpe")
        ]
    return []


def _points(structure: Structure) -> list[dict[str, Any]]:
    generator = random.Random(0)  # noqa: S311 - no secret
    return [structure.random(generator) for _ in range(NUM_POINTS)]


def _constraint_mistakes(
    structure: Structure, points: list[dict[str, Any]], source: str
) -> list[Finding]:
    findings = []
    for number, constraint in enumerate(structure.constraints):
        alone = Structure(structure.space, structure.fixed, (constraint,))
        searched = constraint.names & set(structure.space)
        concerned = [point for point in points if searched <= point.keys()]
        try:
            # Every one of them: the first to fulfil it may be the only one of numbers.
            broken = [alone.broken(point) is not None for point in concerned]
        except ValueError as error:
            findings.append(Finding(source, f"constraints[{number}]", str(error)))
            continue
        if all(broken):
            text = f"none of {NUM_POINTS} random combinations fulfils {show(constraint.text)}"
            findings.append(Finding(source, f"constraints[{number}]", text))
    if not findings and all(structure.broken(point) is not None for point in points):
        text = f"none of {NUM_POINTS} random combinations fulfils all of them"
        findings.append(Finding(source, "constraints", text))
    return findings


def _point_mistakes(
    sweep: SweepConfig, structure: Structure, raw: Mapping[str, Any], source: str
) -> list[Finding]:
    """First points with settings that no completion of them searches, that break a rule, or of
    which no completion is a run: the search would drop them without a word.
    """
    findings = []
    generator = random.Random(1)  # noqa: S311 - no secret
    for number, point in enumerate(sweep.search.points):
        place = f"search.points[{number}]"
        completed = [structure.random(generator, point) for _ in range(NUM_POINTS // 5)]
        whole = [settings for settings in completed if point.keys() <= settings.keys()]
        if not whole:
            unused = next(k for k in point if not any(k in settings for settings in completed))
            when = show(structure.space[unused].conditions)
            text = f"is not searched beside the other settings of this point: when {when}"
            findings.append(Finding(source, f"{place}.{unused}", text))
            continue
        broken = [structure.broken(settings) for settings in whole]
        if all(broken):
            assert broken[0] is not None
            findings.append(Finding(source, place, f"breaks {show(broken[0].text)}"))
            continue
        kept = [settings for settings, by in zip(whole, broken, strict=True) if by is None]
        reason = _no_run(raw, kept)
        if reason:
            findings.append(Finding(source, place, f"is no run: {reason}"))
    return findings


def _no_run(raw: Mapping[str, Any], points: list[dict[str, Any]]) -> str:
    """Why none of some combinations is a run; empty if one of them is."""
    reason = ""
    for point in points:
        try:
            assign(raw, point)
        except ConfigError as error:
            reason = reason or "; ".join(error.problems)
        else:
            return ""
    return reason


def _run_mistakes(
    structure: Structure, points: list[dict[str, Any]], raw: Mapping[str, Any], source: str
) -> tuple[list[Finding], list[str]]:
    """A finding if no combination is a run; warnings for settings that never have an effect."""
    used: set[str] = set()
    reason = ""
    checked = 0
    for point in points[:NUM_RUNS]:
        try:
            config = assign(raw, point)
        except ConfigError as error:
            reason = reason or str(error)
            continue
        checked += 1
        used |= point.keys() - idle_keys(config, RUN.leaves)
    if not checked:
        text = f"none of {min(len(points), NUM_RUNS)} random combinations is a run: {reason}"
        return [Finding(source, "space", text)], []
    drawn = {key for point in points for key in point}
    warnings = []
    for key in structure.space:
        if key not in drawn:
            when = show(structure.space[key].conditions)
            warnings.append(f"{source}: space.{key}: is never searched: when {when} does not hold")
        elif key not in used:
            warnings.append(
                f"{source}: space.{key}: had no effect in any of {checked} random combinations: "
                "another setting, searched or of the base run, switches it off"
            )
    return [], warnings
