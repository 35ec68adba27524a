"""Constraints between searched settings: one comparison in text, never run as code.

    scheduled_sampling.prob_start <= scheduled_sampling.prob_end
    sampler_steps * 2 < 10 or exposure != "defar"

Settings stand under their dotted or flat names, texts in quotes; there are comparisons, `in` a
list, and / or / not, and + - * / of numbers. The text is parsed into Python's syntax tree, of
which only these nodes are walked.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raysched.config.fields import RUN, is_number, same, show

MAX_LENGTH = 500
WORDS = {"true": True, "false": False, "null": None}
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
SIGNS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}


@dataclass(frozen=True)
class Constraint:
    """A checked constraint.

    Attributes:
        text: as written.
        names: dotted keys of the settings in it.
        tree: its syntax tree.
    """

    text: str
    names: frozenset[str]
    tree: ast.expr

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it is true; a division by zero makes it false.

        Args:
            values: a value for every one of its names.

        Raises:
            ValueError: it compares or reckons with something that is no number.
        """
        try:
            return bool(_value(self.tree, values))
        except ZeroDivisionError:
            return False


def parse_constraint(text: str) -> Constraint:
    """Parse a constraint.

    Raises:
        ValueError: it can't be read, holds something else than comparisons, or an unknown key.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"must have at most {MAX_LENGTH} characters, got {len(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        hint = "; write == to compare" if "=" in text and "==" not in text else ""
        raise ValueError(f"can't be read as a comparison, got {show(text)}{hint}") from error
    names: set[str] = set()
    _check(tree, names)
    top = tree.operand if isinstance(tree, ast.UnaryOp) else tree
    if not isinstance(top, ast.Compare | ast.BoolOp):
        raise ValueError(f"must compare settings, as in `a <= b`, got {show(text)}")
    if not names:
        raise ValueError(f"names no setting, got {show(text)}")
    return Constraint(text, frozenset(names), tree)


def _check(node: ast.expr, names: set[str]) -> None:
    """Refuse whatever `_value` doesn't know, and collect the settings."""
    if isinstance(node, ast.Name | ast.Attribute):
        written = _dotted(node)
        if written in WORDS:
            return
        path = RUN.resolve(written)
        if path not in RUN.leaves:
            quotes = "" if "." in written else f', or a text, as in "{written}"'
            hint = (RUN.hint(path) if "." in written else "; write a setting") + quotes
            raise ValueError(f"{written}: unknown key{hint}")
        names.add(path)
        return
    known = isinstance(node, ast.BoolOp | ast.Compare | ast.List | ast.Tuple)
    if isinstance(node, ast.Constant):
        known = node.value is None or isinstance(node.value, bool | int | float | str)
    elif isinstance(node, ast.UnaryOp):
        known = isinstance(node.op, ast.Not | ast.USub)
    elif isinstance(node, ast.BinOp):
        known = type(node.op) in ARITHMETIC
    if not known:
        raise ValueError(
            f"{ast.unparse(node)}: only comparisons, and, or, not, + - * / and lists are known"
        )
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            _check(child, names)
        elif isinstance(child, ast.Is | ast.IsNot):
            raise ValueError(f"{ast.unparse(node)}: write == or != in place of is")


def _dotted(node: ast.expr) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise ValueError(f"{ast.unparse(node)}: a dot may only stand in a setting's name")
    return ".".join([node.id, *reversed(parts)])


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name() | ast.Attribute():
            written = _dotted(node)
            return WORDS[written] if written in WORDS else values[RUN.resolve(written)]
        case ast.List() | ast.Tuple():
            return [_value(item, values) for item in node.elts]
        case ast.UnaryOp(op=ast.Not()):
            return not _value(node.operand, values)
        case ast.UnaryOp():
            return -_number(_value(node.operand, values), node)
        case ast.BinOp():
            left, right = (_number(_value(n, values), node) for n in (node.left, node.right))
            return ARITHMETIC[type(node.op)](left, right)
        case ast.BoolOp(op=ast.And()):
            return all(_value(item, values) for item in node.values)
        case ast.BoolOp():
            return any(_value(item, values) for item in node.values)
    assert isinstance(node, ast.Compare), "checked when it was parsed"
    return _compare(node, values)


def _compare(node: ast.Compare, values: Mapping[str, Any]) -> bool:
    left = _value(node.left, values)
    for op, item in zip(node.ops, node.comparators, strict=True):
        right = _value(item, values)
        if isinstance(op, ast.Eq | ast.NotEq):
            true = same(left, right) == isinstance(op, ast.Eq)
        elif isinstance(op, ast.In | ast.NotIn):
            listed = right if isinstance(right, list | tuple) else [right]
            true = any(same(left, v) for v in listed) == isinstance(op, ast.In)
        else:
            true = ORDER[type(op)](_number(left, node), _number(right, node))
        if not true:
            return False
        left = right
    return True


def _number(value: Any, node: ast.expr) -> float:
    if not is_number(value):
        raise ValueError(f"{ast.unparse(node)}: needs numbers, got {show(value)}")
    number: float = value
    return number
