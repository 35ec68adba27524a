"""Who may import whom, and how long files and functions may get; nothing is imported."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "raysched"

# Data flows down: a module imports from its own row and from those above it.
ROWS = (
    ("errors", "config", "signals"),
    ("diffusion",),
    ("models",),
    ("data",),
    ("evaluation",),
    ("training",),
    ("tracking",),
    ("distributed",),
    ("tuning",),
    ("report",),
    (
        "arguments",
        "outcome",
        "doctor",
        "commands",
        "job_commands",
        "sweep_commands",
        "cli",
        "__main__",
    ),
)
ROW_OF = {room: number for number, row in enumerate(ROWS) for room in row}

# Who may use these; everybody else is refused, lazily or not.
ONLY_IN = {
    "ray": {"distributed", "tuning"},
    "mlflow": {"tracking"},
    "optuna": {"tuning"},
    "matplotlib": {"report"},
    "diffusers": {"models"},
    "accelerate": {"training"},
    "typer": {"cli", "commands", "job_commands", "sweep_commands"},
}
# Code that is copied out with a logged model and runs where raysched isn't installed.
TRAVELS = {"raysched.tracking.pyfunc_code": {"diffusers"}}
# Rooms that get by on the standard library and little else.
NOTHING_BUT = {
    "errors": set[str](),
    "signals": set[str](),
    "arguments": set[str](),
    "outcome": set[str](),
    "config": {"pydantic", "yaml"},
    "diffusion": {"torch", "numpy"},
}
# The aim is 300 and 40; a table of settings or of coefficients may need a little more.
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 50
# It reads like the algorithm, in one piece.
LONGER_FUNCTIONS = {"train_step": 60}


@functools.cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def room(module: str) -> str:
    """`raysched.data.cache` is in `data`; the package itself is in no room."""
    return module.split(".")[1] if "." in module else ""


def imports(module: str, tree: ast.AST) -> Iterator[str]:
    """Full names of what a module imports, inside functions as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide the room"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else node.module


def test_all_rooms_are_known() -> None:
    found = {room(module) for module in modules()} - {""}
    assert found - ROW_OF.keys() == set()
    assert {"config", "diffusion", "models", "data", "training", "tracking"} <= found


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_from_rows_above_its_own(module: str) -> None:
    if not room(module):
        assert list(imports(module, modules()[module])) == []
        return
    own = ROW_OF[room(module)]
    wrong = [
        name
        for name in imports(module, modules()[module])
        if room(name) and name.split(".")[0] == "raysched" and ROW_OF[room(name)] > own
    ]
    assert wrong == []


@pytest.mark.parametrize("module", modules())
def test_a_library_is_used_only_in_its_rooms(module: str) -> None:
    used = {name.split(".")[0] for name in imports(module, modules()[module])}
    wrong = {name for name in used & ONLY_IN.keys() if room(module) not in ONLY_IN[name]}
    assert wrong - TRAVELS.get(module, set()) == set()


@pytest.mark.parametrize("module", [m for m in modules() if room(m) in NOTHING_BUT])
def test_light_rooms_stay_light(module: str) -> None:
    used = {name.split(".")[0] for name in imports(module, modules()[module])}
    allowed = NOTHING_BUT[room(module)] | sys.stdlib_module_names | {"raysched"}
    assert used - allowed == set()


def test_no_two_modules_import_each_other() -> None:
    graph = {
        module: {name for name in imports(module, tree) if name in modules()}
        for module, tree in modules().items()
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_no_file_is_too_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in ("raysched", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert lengths
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def test_no_function_is_too_long() -> None:
    too_long = {
        f"{module}.{node.name}": code_lines(node)
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and code_lines(node) > LONGER_FUNCTIONS.get(node.name, MAX_FUNCTION_LINES)
    }
    assert too_long == {}


def test_no_error_is_swallowed() -> None:
    silent = [
        f"{module}:{node.lineno}"
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and all(isinstance(statement, ast.Pass) for statement in node.body)
    ]
    assert silent == []


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "helpers", "misc", "common"}
    assert [m for m in modules() if m.split(".")[-1] in drawers] == []


def test_no_base_class_has_a_single_child() -> None:
    parents: dict[str, list[str]] = {}
    classes = [
        node
        for tree in modules().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    names = {node.name for node in classes}
    for node in classes:
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in names:
                parents.setdefault(base.id, []).append(node.name)
    assert {base: children for base, children in parents.items() if len(children) == 1} == {}


def test_only_tests_of_a_gpu_or_a_browser_skip() -> None:
    skipping = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "tests").rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if ("pytest." + "skip(" in line or "mark." + "skip" in line or "importor" + "skip" in line)
        and not {"cuda", "chromium"} & set(re.findall("[a-z]+", line.lower()))
    ]
    assert skipping == []
