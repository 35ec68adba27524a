"""Objectives that no trial could report, found before anything starts."""

from __future__ import annotations

from raysched.config.entries import Finding
from raysched.config.fields import show
from raysched.config.run import RunConfig
from raysched.config.sweep import SweepConfig
from raysched.config.sweep_rules import sweep_budget


def objective_mistakes(sweep: SweepConfig, base: RunConfig, source: str) -> list[Finding]:
    """What is wrong with a sweep's objective, seen from its base run."""
    objective, evaluation = sweep.objective, base.evaluation
    asked: set[str] = set(objective.several) or {objective.name}
    findings = []

    def refuse(key: str, text: str) -> None:
        findings.append(Finding(source, f"objective.{key}", text))

    if not evaluation.enabled:
        findings.append(Finding(source, "evaluation.enabled", "must be true: trials are judged"))
    if objective.several:
        if "name" in objective.model_fields_set and objective.name != "quality_at_budget":
            refuse("several", f"stands in place of name, got {objective.name} too; keep one")
        if len(asked) < len(objective.several) or len(asked) < 2:
            refuse("several", f"must be two or more, each once, got {show(objective.several)}")
    needing = asked & {"cost_to_target", "forward_equivalents", "nfe"}
    if needing and not objective.target:
        got = show(objective.target)
        refuse("target", f"must be a q to reach, not 0, for {sorted(needing)[0]}, got {got}")
    if "nfe" in asked and len(evaluation.nfe) < 2:
        refuse("several", f"nfe needs two or more in evaluation.nfe, got {show(evaluation.nfe)}")
    if "adherence" in asked and not base.model.class_conditional:
        refuse("several", "adherence needs model.class_conditional: true")
    every, budget = evaluation.every_forward_equivalents, sweep_budget(sweep, base)
    if "area" in asked and every is not None and every >= budget:
        text = f"area needs evaluation.every_forward_equivalents < {budget:g}, got {every:g}"
        refuse("name", text)
    if objective.reference and set(objective.reference) != set(objective.several):
        known = ", ".join(objective.several) or "none: there is one objective"
        refuse("reference", f"must name the objectives ({known}), got {show(objective.reference)}")
    return findings
