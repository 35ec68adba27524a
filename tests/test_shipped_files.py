"""What a clone holds beside the package: set-up, checks, cluster files, README."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLUSTER_FILES = sorted((ROOT / "cluster").glob("*.yaml"))


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert len(found) > 50
    return {item.name.lower().replace("_", "-"): item for item in found}


def make(*arguments: str) -> str:
    """What make would do, with everything already installed or nothing, as `.venv` is."""
    done = subprocess.run(
        ["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def tracked_texts() -> dict[str, str]:
    folders = ("raysched", "tests", "configs", "tune_spaces", "cluster", "benchmarks", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [ROOT / ".ci" / "run", *ROOT.glob("*.*"), ROOT / "Makefile"]
    suffixes = {".py", ".md", ".yaml", ".json", ".toml", ".txt", ""}
    return {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in files
        if path.is_file() and path.suffix in suffixes and path.name != Path(__file__).name
    }


def test_every_constraint_is_one_exact_version() -> None:
    for item in constraints().values():
        assert re.fullmatch(r"==[A-Za-z0-9.]+", str(item.specifier)), item
        assert item.url is None


def test_torch_is_pinned_without_a_build_suffix_and_alike_in_both_places() -> None:
    assert str(constraints()["torch"]) == "torch==2.13.0"
    assert "PINNED_TORCH := torch==2.13.0\n" in (ROOT / "Makefile").read_text()


def test_constraints_hold_every_dependency_inside_its_range() -> None:
    pins = constraints()
    needed = [
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["dev"],
        *PROJECT["optional-dependencies"]["quality"],
    ]
    for item in map(Requirement, needed):
        (pin,) = pins[item.name.lower().replace("_", "-")].specifier
        assert item.specifier.contains(pin.version), item


def test_this_environment_has_the_pinned_versions() -> None:
    pins = constraints()
    wrong = {}
    for text in PROJECT["dependencies"]:
        name = Requirement(text).name
        installed = importlib.metadata.version(name).split("+")[0]
        (pin,) = pins[name.lower()].specifier
        # TORCH=... may have put another torch in its place.
        if installed != pin.version and name != "torch":
            wrong[name] = installed
    assert wrong == {}


def test_no_file_names_a_package_index_or_somebodys_machine() -> None:
    home = re.escape(f"{Path.home()}/")
    hosts = re.compile(rf"--(?:extra-)?index-url|--find-links|--trusted-host|/home/\w+/|{home}")
    texts = tracked_texts()
    assert {"Makefile", ".ci/run", "constraints.txt", "raysched/cli.py"} <= texts.keys()
    # How to get another build of torch, and the home of the image's own user.
    own = ("/home/raysched/", "https://download.pytorch.org/whl/")
    found = set()
    for name, text in texts.items():
        for known in own:
            text = re.sub(rf"(--index-url \")?{re.escape(known)}", "", text)
        if name != "README.md" and hosts.search(text):
            found.add(name)
    assert found == set()


def test_a_demo_installs_torch_first_and_then_the_rest_with_constraints(tmp_path: Path) -> None:
    copy = tmp_path / "clone"
    copy.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, copy)
    done = subprocess.run(
        ["make", "--dry-run", "demo", f"PYTHON={sys.executable}"],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=60,
    )
    steps = [line for line in done.stdout.splitlines() if "pip install" in line or "tune" in line]
    assert [line.split()[-1].strip("'\"") for line in steps] == [
        "torch==2.13.0",
        ".",
        "tune_spaces/digits_rollout.yaml",
    ]
    assert all("-c .venv/constraints.txt" in line for line in steps[:2])


def test_a_ready_environment_is_not_installed_again(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", "--dry-run", "demo", f"PYTHON={sys.executable}"]

    def plan(*more: str) -> str:
        done = subprocess.run(
            [*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        return done.stdout

    (stamp,) = re.findall(r"touch (\.venv/\.ready-\S+)", plan())
    (tmp_path / ".venv").mkdir()
    (tmp_path / stamp).touch()
    assert "pip install" not in plan()
    assert "pip install" in plan("TORCH=torch==2.12.0")
    with (tmp_path / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert "pip install" in plan()


def test_the_fast_tier_leaves_out_slow_and_browser_tests() -> None:
    assert re.findall(r'-m (".*")', make("test")) == ['"not slow and not browser"']
    everything = ['"not slow and not browser"', '"slow and not browser"', '"browser"']
    assert re.findall(r'-m (".*")', make("test-all")) == everything
    rest = make("test-all", "TEST_ALL_SKIP_FAST=1")
    assert re.findall(r'-m (".*")', rest) == everything[1:]
    # The browser is there before its tests.
    assert rest.index("apt-get install") < rest.index('-m "browser"')


def test_the_readme_shows_pictures_that_are_there_and_small() -> None:
    shown = re.findall(r"!\[[^]]+\]\((docs/[\w./-]+)\)", (ROOT / "README.md").read_text())
    pages = ("parallel-coordinates", "quality-by-fe", "samples")
    assert {"docs/pareto.png", *(f"docs/mlflow-{name}.png" for name in pages)} <= set(shown)
    assert all(1_000 < (ROOT / name).stat().st_size < 200_000 for name in shown)


def test_ci_is_valid_shell_that_runs_lint_and_both_tiers() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    lines = [line.split()[:2] for line in script.read_text().splitlines() if line]
    targets = [words[1] for words in lines if words[0] == "make"]
    assert targets == ["install-dev", "lint", "test", "test-all"]


def test_pre_commit_hooks_are_local() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    hooks = {hook["id"]: hook["entry"] for hook in repos[0]["hooks"]}
    assert {"ruff", "ruff-format", "mypy", "codespell"} <= hooks.keys()
    assert all(entry.startswith(".venv/bin/") for entry in hooks.values())


def test_the_licence_is_the_one_that_the_project_names() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_changelog_knows_this_version() -> None:
    assert f"\n## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_there_are_cluster_files() -> None:
    assert "runtime_env.yaml" in {path.name for path in CLUSTER_FILES}


@pytest.mark.parametrize("path", CLUSTER_FILES, ids=lambda path: path.name)
def test_a_cluster_file_is_yaml_with_settings(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    assert documents
    assert all(isinstance(document, dict) for document in documents)


def test_ray_takes_the_runtime_environment() -> None:
    from ray.runtime_env import RuntimeEnv

    settings = yaml.safe_load((ROOT / "cluster" / "runtime_env.yaml").read_text())
    accepted = RuntimeEnv(**{**settings, "working_dir": str(ROOT)})
    assert dict(accepted)["excludes"] == settings["excludes"]


def test_the_readmes_reading_order_names_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    _, heading, rest = text.partition("ead the code in this order")
    assert heading, "README.md: the section 'Read the code in this order' is missing"
    section = rest.split("\n## ")[0]
    named = re.findall(r"raysched/[\w/]+\.py", section)
    assert len(named) >= 5
    assert [name for name in named if not (ROOT / name).is_file()] == []
