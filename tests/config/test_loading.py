"""Files, flat keys and overrides become one run."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysched.config.entries import check_values, flatten
from raysched.config.fields import RUN, alternatives, flat_key
from raysched.config.loading import dump, examine, load, load_mapping, to_yaml
from raysched.config.overrides import parse_value
from raysched.config.parsing import parse_yaml
from raysched.config.run import RunConfig
from raysched.errors import ConfigError

SS = "scheduled_sampling"
ROLLOUT_FIELDS = [p.partition(".")[2] for p in RUN.leaves if p.startswith(f"{SS}.")]


def another_value(path):
    """A valid value of a setting that isn't its default."""
    option = alternatives(RUN.leaves[path])[0]
    if "enum" in option:
        return next(v for v in option["enum"] if v != RUN.default(path))
    switched = not isinstance(RUN.default(path), str) and not RUN.default(path)
    return {"integer": 3, "number": 0.25, "boolean": switched}[option["type"]]


def test_the_three_line_file_of_flat_keys_is_a_whole_run(tmp_path):
    path = tmp_path / "three.json"
    flat = {"max_step_offset": 10, "probability": 1.0, "sampler": "unipc"}
    path.write_text(json.dumps({f"scheduled_sampling_{k}": v for k, v in flat.items()}))
    loaded = load(path)
    assert loaded.warnings == []
    assert loaded.raw == {SS: flat}
    assert loaded.config.data.source == "digits"
    assert loaded.config.scheduled_sampling.reflexflow is True
    assert loaded.config.scheduled_sampling.grid == 1000


# Ancestral rollouts need the sampler euler; everything else can be set alone.
@pytest.mark.parametrize("field", [name for name in ROLLOUT_FIELDS if name != "ancestral"])
def test_flat_and_dotted_spelling_mean_the_same(field):
    path = f"{SS}.{field}"
    value, flat = another_value(path), flat_key(path)
    expected = load_mapping({SS: {field: value}}, "f").config
    assert expected != RunConfig() or field == "reflexflow"
    text = json.dumps(value)
    for loaded in (
        load_mapping({flat: value}, "f"),
        load_mapping({f"--{flat}": value}, "f"),
        load_mapping({}, "f", [f"{path}={text}"]),
        load_mapping({}, "f", [f"--{flat}={text}"]),
        load_mapping({}, "f", [f"--{flat}", text]),
        load_mapping({}, "f", [f"--{path}={text}"]),
        load_mapping({}, "f", [f"{flat}={text}"]),
    ):
        assert loaded.config == expected
        assert loaded.raw == {SS: {field: value}}


def test_yaml_toml_and_json_give_the_same_run(tmp_path):
    (tmp_path / "a.yaml").write_bytes(
        b"\xef\xbb\xbfseed: 3\r\noptimizer:\r\n  learning_rate: 1e-4\r\n"
    )
    (tmp_path / "a.toml").write_text("seed = 3\n[optimizer]\nlearning_rate = 1e-4\n")
    (tmp_path / "a.json").write_text('{"seed": 3, "optimizer": {"learning_rate": 1e-4}}')
    runs = [load(tmp_path / f"a.{kind}").config for kind in ("yaml", "toml", "json")]
    assert runs[0] == runs[1] == runs[2]
    assert runs[0].optimizer.learning_rate == 1e-4


def test_yaml_anchors_and_merges_work(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        f"{SS}: &s {{max_step_offset: 2, probability: 0.5}}\n"
        "evaluation: {nfe: &n [5, 7], num_samples: 100}\n"
    )
    assert load(path).config.evaluation.nfe == (5, 7)
    merged = parse_yaml("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\n")
    assert merged["b"] == {"x": 3, "y": 2}
    assert merged["c"] == {"x": 3, "y": 4}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("5", 5), ("-3", -3), ("1_000", 1000), (".5", 0.5), ("1.", 1.0),
     ("010", "010"), ("1:30", "1:30"), ("2026-01-01", "2026-01-01"), ("null", None),
     ("true", True), ("[5, 10]", [5, 10]), ("=", "="), ("1e5x", "1e5x"), (".inf", float("inf"))],
)  # fmt: skip
def test_yaml_values_are_what_they_look_like(text, value):
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


@pytest.mark.parametrize("text", ["5", "1e5", "2026-01-01", "a: b", "a #b", "true", "{", "'5'"])
def test_text_settings_take_an_override_as_it_stands(text):
    loaded = load_mapping({}, "f", [f"training.output_dir={text}"])
    assert loaded.config.training.output_dir == text.strip("'")


def test_text_settings_can_be_reset_to_null():
    assert load_mapping({"data": {"limit": 5}}, "f", ["data.limit=null"]).config.data.limit is None
    assert parse_value("null", RUN.leaves["tracking.uri"]) is None


def test_a_flag_alone_is_true_and_does_not_swallow_the_next_override():
    tokens = ["--scheduled_sampling_reflexflow", f"{SS}.max_step_offset=4", "--model.attention"]
    config = load_mapping({}, "f", tokens).config
    assert config.scheduled_sampling.max_step_offset == 4
    assert config.model.attention is True


def test_a_negative_number_is_the_value_of_an_option():
    with pytest.raises(ConfigError, match=r"command line: seed: must be ≥ 0.*got -3"):
        load_mapping({}, "f", ["--seed", "-3"])


def test_the_last_word_on_the_command_line_wins_and_sections_merge():
    tokens = ["seed=1", "seed=2", f"{SS}={{grid: 20, max_step_offset: 1}}"]
    config = load_mapping({SS: {"probability": 0.5}}, "f", tokens).config
    assert config.seed == 2
    assert config.scheduled_sampling.grid == 20
    assert config.scheduled_sampling.probability == 0.5


@pytest.mark.parametrize("unit", ["steps", "forward_equivalents", "seconds"])
@pytest.mark.parametrize("other", ["steps", "forward_equivalents", "seconds"])
def test_a_budget_on_the_command_line_replaces_the_files(unit, other):
    file = {"training": {"budget": {unit: 100}}}
    budget = load_mapping(file, "f", [f"training.budget.{other}=7"]).config.training.budget
    assert {k: v for k, v in budget.model_dump().items() if v is not None} == {other: 7}


@pytest.mark.parametrize(
    ("mapping", "kind", "prediction"),
    [
        ({}, "flow", "flow_matching"),
        ({"prediction_type": "epsilon"}, "linear", "epsilon"),
        ({"noise_schedule": {"kind": "cosine"}}, "cosine", "epsilon"),
        ({"prediction_type": "sample", "noise_schedule": {"kind": "flow"}}, "flow", "sample"),
    ],
)
def test_schedule_and_prediction_type_follow_each_other(mapping, kind, prediction):
    loaded = load_mapping(mapping, "f")
    assert loaded.warnings == []
    config = loaded.config
    assert (config.noise_schedule.kind, config.prediction_type) == (kind, prediction)
    assert load_mapping(dump(config), "f").config == config


def test_a_dump_may_be_overridden_like_the_file_it_came_from():
    file = {SS: {"max_step_offset": 3, "probability": 0.5}}
    dumped = dump(load_mapping(file, "f").config)
    for override in ("prediction_type=epsilon", f"{SS}.max_step_offset=0", "exposure=none"):
        again = load_mapping(dumped, "dump", [override])
        assert again.config == load_mapping(file, "f", [override]).config
        assert len(again.warnings) <= 1


def leaf_values(path):
    """Valid values of a setting, odd ones included."""
    choices = []
    for option in alternatives(RUN.leaves[path]):
        choices.append(_values(option))
    return st.one_of(choices)


def _values(option):
    if "enum" in option or "const" in option:
        return st.sampled_from(option.get("enum", [option.get("const")]))
    low = option.get("minimum", option.get("exclusiveMinimum", 0))
    high = option.get("maximum", option.get("exclusiveMaximum", 1e9))
    if option["type"] == "integer":
        return st.integers(int(low), int(min(high, 10**6)))
    if option["type"] == "number":
        return st.floats(
            low, high, exclude_min="exclusiveMinimum" in option,
            exclude_max="exclusiveMaximum" in option,
        )  # fmt: skip
    if option["type"] == "string":
        if "pattern" in option:
            return st.from_regex(option["pattern"].replace("$", r"\Z"))
        return st.text(
            st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1
        )
    if option["type"] == "array":
        return st.lists(_values(option["items"]), min_size=1, max_size=4)
    return st.none() if option["type"] == "null" else st.booleans()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_valid_run_survives_yaml(data):
    paths = data.draw(st.lists(st.sampled_from(sorted(RUN.leaves)), max_size=6, unique=True))
    # Two units of the budget are a mistake of their own.
    budget = [path for path in paths if path.startswith("training.budget.")]
    paths = [path for path in paths if path not in budget[1:]]
    mapping = {}
    for path in paths:
        level = mapping
        *sections, leaf = path.split(".")
        for section in sections:
            level = level.setdefault(section, {})
        level[leaf] = data.draw(leaf_values(path))
    entries, findings = flatten(mapping, RUN, "f")
    assert findings == check_values(entries, RUN) == []
    config, mistakes = examine(entries)
    if mistakes:  # combinations may be refused, types and ranges of these values may not
        assert all(
            len(m.involved) > 1 or "empty" in m.text or "repeat" in m.text for m in mistakes
        )
        return
    loaded = load_mapping(mapping, "f")
    assert loaded.config == config
    text = to_yaml(dump(loaded.config))
    again = load_mapping(parse_yaml(text), "f")
    assert again.config == loaded.config
    assert again.warnings == []
    assert load_mapping(loaded.raw, "f").config == loaded.config


def test_loading_a_config_imports_nothing_heavy():
    code = (
        "import sys, raysched.config.loading, raysched.config.space, raysched.config.schema\n"
        "heavy = {'torch', 'ray', 'mlflow', 'diffusers', 'pandas', 'matplotlib', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
