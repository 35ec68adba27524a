"""Every file that the project ships."""

import json
from pathlib import Path

import jsonschema
import pytest

from raysched.config.loading import dump, load, load_mapping, write_yaml
from raysched.config.parsing import parse_yaml
from raysched.config.schema import run_schema, schema_text, sweep_schema
from raysched.config.space import assign, baseline_config, load_sweep

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(p for p in (ROOT / "configs").iterdir() if p.is_file())
SPACES = sorted((ROOT / "tune_spaces").iterdir())
NAMES = [p.name for p in CONFIGS]


def test_the_shipped_files_are_found():
    assert {"digits_flow.yaml", "fashion_mnist_flow.yaml", "minimal.json"} <= set(NAMES)
    questions = (
        *("rollout", "schedule", "samplers", "reflexflow"),
        *("methods", "everything", "finetune"),
    )
    shipped = {f"{data}_{q}.yaml" for data in ("digits", "fashion_mnist") for q in questions}
    assert shipped <= {p.name for p in SPACES}


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_a_shipped_config_loads_without_warnings(path):
    assert load(path).warnings == []


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_a_shipped_config_survives_dump_and_load(path, tmp_path):
    config = load(path).config
    again = load_mapping(json.loads(json.dumps(dump(config))), "dump")
    assert (again.config, again.warnings) == (config, [])
    write_yaml(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml").config == config


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_a_shipped_config_has_a_method_and_its_baseline_has_none(path):
    loaded = load(path)
    assert loaded.config.exposure != "none"
    if loaded.config.exposure == "scheduled_sampling":
        assert loaded.config.scheduled_sampling.max_step_offset > 0
    baseline = baseline_config(loaded.raw)
    assert (baseline.exposure, baseline.scheduled_sampling.max_step_offset) == ("none", 0)
    assert baseline.scheduled_sampling.reflexflow is False
    assert baseline.rollout.max_step_offset == 0
    assert baseline.training == loaded.config.training


@pytest.mark.parametrize("path", SPACES, ids=[p.name for p in SPACES])
def test_a_shipped_space_loads_without_warnings_and_each_point_is_a_run(path):
    loaded = load_sweep(path)
    assert loaded.warnings == []
    for point in loaded.sweep.search.points:
        assert set(point) <= set(loaded.sweep.space)
        assign(loaded.base.raw, point)


@pytest.mark.parametrize("path", SPACES, ids=[p.name for p in SPACES])
def test_the_chance_is_searched_where_it_counts_in_a_shipped_space(path):
    """With a ramp `probability` is ignored, without one the chances at its ends are."""
    sweep = load_sweep(path).sweep
    ramp, chance = "scheduled_sampling.ramp_steps", "scheduled_sampling.probability"
    if ramp not in sweep.space:
        return
    assert sweep.space[chance].conditions == {ramp: 0}
    for key in ("prob_start", "prob_end", "ramp_shape"):
        dimension = sweep.space.get(f"scheduled_sampling.{key}")
        assert dimension is None or dimension.conditions == {ramp: {"min": 1}}
    for point in sweep.search.points:
        assert (chance in point) == (point[ramp] == 0)


@pytest.mark.parametrize("path", [p for p in CONFIGS + SPACES if p.suffix == ".yaml"])
def test_a_shipped_yaml_names_a_schema_that_exists(path):
    prefix = "# yaml-language-server: $schema="
    first = path.read_text().splitlines()[0]
    assert first.startswith(prefix)
    schema = (path.parent / first.removeprefix(prefix)).resolve()
    kind = "sweep" if path.parent.name == "tune_spaces" else "run"
    assert schema == ROOT / "configs" / "schema" / f"{kind}.schema.json"
    assert schema.is_file()


@pytest.mark.parametrize(("name", "make"), [("run", run_schema), ("sweep", sweep_schema)])
def test_the_committed_schema_is_the_one_that_the_code_makes(name, make):
    file = ROOT / "configs" / "schema" / f"{name}.schema.json"
    assert file.read_text(encoding="utf-8") == schema_text(make())


@pytest.mark.parametrize("path", CONFIGS + SPACES, ids=lambda p: p.name)
def test_a_shipped_file_and_its_dump_fit_the_schema(path):
    is_sweep = path.parent.name == "tune_spaces"
    jsonschema.validate(parse_yaml(path.read_text()), sweep_schema() if is_sweep else run_schema())
    if not is_sweep:
        jsonschema.validate(dump(load(path).config), run_schema())


def test_the_schema_refuses_what_the_loader_refuses():
    for wrong in ({"sed": 1}, {"scheduled_sampling_grid": 0}, {"model": {"kind": "unett"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, run_schema())
    two = {"space": {"seed": {"choice": [1], "grid": [1]}}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(two, sweep_schema())


def test_the_schemas_know_flat_keys_and_refuse_others():
    run, sweep = run_schema(), sweep_schema()
    assert run["additionalProperties"] is sweep["additionalProperties"] is False
    assert run["properties"]["scheduled_sampling_max_step_offset"]["minimum"] == 0
    space = sweep["properties"]["space"]
    assert space["additionalProperties"] is False
    assert "scheduled_sampling.grid" in space["properties"]
    assert all("description" in p or "$ref" in p for p in run["properties"].values())
