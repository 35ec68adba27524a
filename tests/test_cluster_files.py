"""The files in cluster/ against their schemas, with unknown keys refused, and against the pins."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
SCHEMAS = ROOT / "tests" / "schemas"
KUBERAY = {"RayCluster": "rayclusters.v1.json", "RayJob": "rayjobs.v1.json"}
DOCUMENTS = [
    pytest.param(document, id=f"{path.stem}-{document.get('kind', 'file')}-{number}")
    for path in sorted(CLUSTER.glob("*.yaml"))
    for number, document in enumerate(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    if "apiVersion" in document
]


def unknown_keys(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Keys that the schema does not name, as `kubectl apply` would drop or refuse them."""
    if isinstance(value, dict):
        if schema.get("x-kubernetes-preserve-unknown-fields"):
            return
        named, other = schema.get("properties"), schema.get("additionalProperties")
        patterns = schema.get("patternProperties", {})
        for key, inner in value.items():
            if named and key in named:
                yield from unknown_keys(inner, named[key], f"{path}.{key}")
            elif pattern := [s for p, s in patterns.items() if re.search(p, key)]:
                yield from unknown_keys(inner, pattern[0], f"{path}.{key}")
            elif isinstance(other, dict):
                yield from unknown_keys(inner, other, f"{path}.{key}")
            elif named is not None or other is False:
                yield f"{path}.{key}"
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from unknown_keys(inner, schema.get("items", {}), f"{path}[{number}]")


def mistakes(document: dict[str, Any], tmp_path: Path) -> list[str]:
    if document["apiVersion"].startswith("ray.io/"):
        schema = json.loads((SCHEMAS / KUBERAY[document["kind"]]).read_text())
        wrong = [e.message for e in jsonschema.Draft202012Validator(schema).iter_errors(document)]
        return [*wrong, *unknown_keys(document, schema)]
    path = tmp_path / "document.yaml"
    path.write_text(yaml.safe_dump(document))
    tool = Path(sys.executable).with_name("kubernetes-validate")
    done = subprocess.run([tool, "--strict", path], capture_output=True, text=True, timeout=60)
    return [] if done.returncode == 0 else [done.stdout + done.stderr]


def test_there_are_documents() -> None:
    kinds = {parameter.values[0]["kind"] for parameter in DOCUMENTS}  # type: ignore[index, call-overload]
    assert {"RayCluster", "RayJob", "Deployment", "StatefulSet", "NetworkPolicy"} <= kinds


@pytest.mark.parametrize("document", DOCUMENTS)
def test_kubernetes_files_fit_their_schemas(document: dict[str, Any], tmp_path: Path) -> None:
    assert mistakes(document, tmp_path) == []


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "Deployment"])
def test_an_unknown_key_is_refused(kind: str, tmp_path: Path) -> None:
    found = [p.values[0] for p in DOCUMENTS if p.values[0]["kind"] == kind]  # type: ignore[index, call-overload]
    document = json.loads(json.dumps(found[0]))
    document["spec"]["replcas"] = 1
    assert "replcas" in str(mistakes(document, tmp_path))


def test_rays_cluster_file_fits_rays_schema() -> None:
    schema = json.loads((files("ray") / "autoscaler" / "ray-schema.json").read_text())
    document = yaml.safe_load((CLUSTER / "ray-up.aws.yaml").read_text())
    jsonschema.validate(document, schema)
    assert list(unknown_keys(document, schema)) == []
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "idle_timeout": 1}, schema)


def test_the_runtime_environment_is_one_that_ray_takes() -> None:
    from ray.runtime_env import RuntimeEnv

    text = (CLUSTER / "runtime_env.yaml").read_text()
    values = yaml.safe_load(text)
    assert set(values) <= RuntimeEnv.known_fields
    RuntimeEnv(**{**values, "working_dir": "gcs://package.zip"})
    assert {"/.git/", "/.venv/", "/runs/", ".env", "*.pem"} <= set(values["excludes"])


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_versions_in_the_files_are_the_pinned_ones() -> None:
    own = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert own is not None
    docker = (CLUSTER / "Dockerfile").read_text()
    assert f"ARG TORCH_VERSION={pins()['torch']}\n" in docker
    assert f"ARG RAY_VERSION={pins()['ray']}\n" in docker
    # What Ray's autoscaler for AWS calls and imports runs in the head's container.
    assert re.search(r'"boto3==\$\{BOTO3_VERSION\}"', docker)
    assert re.search(r"ARG BOTO3_VERSION=\d+\.\d+\.\d+\n", docker)
    assert {"openssh-client", "rsync"} <= set(docker.split())
    for name in ("raycluster.yaml", "rayjob.yaml"):
        rays = re.findall(r'rayVersion: "(.+)"', (CLUSTER / name).read_text())
        assert rays == [pins()["ray"]]
    assert f"MLflow {pins()['mlflow']} " in (CLUSTER / "mlflow.yaml").read_text()
    everything = "".join(path.read_text() for path in CLUSTER.iterdir())
    images = re.findall(r"raysched:(\d[\d.]*\d)", everything)
    assert set(images) == {own[1]}


def test_clusters_are_closed_and_heads_take_no_work() -> None:
    documents = [p.values[0] for p in DOCUMENTS]
    specs = [d["spec"] for d in documents if d["kind"] == "RayCluster"]  # type: ignore[index, call-overload]
    specs += [d["spec"]["rayClusterSpec"] for d in documents if d["kind"] == "RayJob"]  # type: ignore[index, call-overload]
    assert len(specs) == 2
    for spec in specs:
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["autoscalerOptions"]["version"] == "v2"
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert spec["gcsFaultToleranceOptions"]["redisAddress"]
        group = spec["workerGroupSpecs"][0]
        assert group["minReplicas"] < group["maxReplicas"]
    assert "USER raysched" in (CLUSTER / "Dockerfile").read_text()


FAKE_RAY = """#!/usr/bin/env python3
import socket, sys, time
open({seen!r}, "w").write("\\n".join(sys.argv))
place = ("127.0.0.1", int(sys.argv[sys.argv.index("--dashboard-port") + 1]))
server = socket.create_server(place)
time.sleep(60)
"""


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Callable[[str], subprocess.CompletedProcess[str]]]:
    """`cluster/local` with a `ray` that only notes its arguments, for a user with a long home."""
    for folder in ("cluster", "bin", "h" * 60):
        (tmp_path / folder).mkdir()
    script = shutil.copy(CLUSTER / "local", tmp_path / "cluster")
    ray = tmp_path / "bin" / "ray"
    ray.write_text(FAKE_RAY.format(seen=str(tmp_path / "seen")))
    ray.chmod(0o755)
    # Ports of its own, and a folder of Ray's that no head of the user has.
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = str(one.getsockname()[1])
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path / ("h" * 60)),
        "RAYSCHED_HEAD_PORT": port,
        "RAYSCHED_DASHBOARD_PORT": port,
    }

    def run(verb: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [script, verb], env=environment, capture_output=True, text=True, timeout=60
        )

    rays = Path(f"/tmp/raysched-{os.getuid()}-{port}")
    (tmp_path / "rays").symlink_to(rays)
    try:
        yield run
    finally:
        run("stop")
        rays.unlink() if rays.is_symlink() else shutil.rmtree(rays, ignore_errors=True)


Local = Callable[[str], subprocess.CompletedProcess[str]]


def test_rays_sockets_have_short_paths_below_a_long_home(local: Local, tmp_path: Path) -> None:
    started = local("start")
    assert started.returncode == 0, started.stdout + started.stderr
    arguments = (tmp_path / "seen").read_text().splitlines()
    temp = arguments[arguments.index("--temp-dir") + 1]
    session = "session_2026-01-01_12-00-00_123456_1234567"
    assert len(f"{temp}/{session}/sockets/dash_UsageStatsHead") <= 107
    found = Path(temp).stat()
    assert (found.st_mode & 0o777, found.st_uid) == (0o700, os.getuid())
    assert local("stop").stdout == "stopped\n"


def test_a_link_in_the_place_of_rays_folder_is_refused(local: Local, tmp_path: Path) -> None:
    (tmp_path / "rays").readlink().symlink_to(tmp_path)
    started = local("start")
    assert started.returncode == 2
    assert "is not a folder of yours" in started.stderr
    assert not (tmp_path / "seen").exists()


def test_shell_scripts_pass_shellcheck() -> None:
    scripts = [
        path
        for folder in (CLUSTER, ROOT / ".ci")
        for path in folder.iterdir()
        if path.is_file() and path.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash")
    ]
    assert {path.name for path in scripts} >= {"local", "run"}
    tool = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([tool, *scripts], capture_output=True, text=True, timeout=60)
    assert done.stdout == ""
    assert done.returncode == 0


def test_the_sweep_of_the_kubernetes_job_waits_for_nodes_and_lets_the_cluster_grow() -> None:
    from raysched.config.space import load_sweep

    (job,) = (p.values[0] for p in DOCUMENTS if p.values[0]["kind"] == "RayJob")  # type: ignore[index, call-overload]
    *words, _ = job["spec"]["entrypoint"].partition(" tune ")[2].split()
    space, *overrides = words
    loaded = load_sweep(ROOT / Path(space).relative_to("/opt/raysched"), overrides)
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert loaded.sweep.search.max_concurrent >= groups[0]["maxReplicas"]
    assert loaded.base.config.scaling.resource_timeout_s >= 300
