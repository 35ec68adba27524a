"""What a user is told about a mistake, word by word."""

import json

import pytest

from raysched.config.loading import load, load_mapping
from raysched.errors import EXIT_USAGE, ConfigError

SS = "scheduled_sampling"


def problems(mapping, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_mapping(mapping, "c.yaml", overrides)
    return caught.value.problems


MISTAKES = [
    ({SS: {"max_step_offset": -3}}, f"{SS}.max_step_offset: must be ≥ 0, got -3"),
    ({SS: {"max_step_offset": "5"}}, f"{SS}.max_step_offset: must be a whole number ≥ 0, got '5'"),
    ({SS: {"max_step_offset": 5.0}}, f"{SS}.max_step_offset: must be a whole number ≥ 0, got 5.0"),
    (
        {SS: {"max_step_offset": True}},
        f"{SS}.max_step_offset: must be a whole number ≥ 0, got true",
    ),
    ({SS: {"max_step_offset": [5]}}, f"{SS}.max_step_offset: must be a whole number ≥ 0, got [5]"),
    (
        {SS: {"max_step_offset": 10**40}},
        f"{SS}.max_step_offset: must be ≤ 9007199254740992, got a number of more than 30 digits",
    ),
    ({SS: {"probability": 1.5}}, f"{SS}.probability: must be ≥ 0 and ≤ 1, got 1.5"),
    (
        {SS: {"probability": float("nan")}},
        f"{SS}.probability: must be a finite number ≥ 0 and ≤ 1, got nan",
    ),
    ({SS: {"order": 4}}, f"{SS}.order: must be one of auto, 1, 2, 3, got 4"),
    ({SS: {"order": True}}, f"{SS}.order: must be one of auto, 1, 2, 3, got true"),
    ({SS: {"grid": 0}}, f"{SS}.grid: must be a whole number ≥ 1, jump or null, got 0"),
    (
        {SS: {"grid": "jmp"}},
        f"{SS}.grid: must be a whole number ≥ 1, jump or null, got 'jmp'; did you mean jump?",
    ),
    ({SS: {"reflexflow": 1}}, f"{SS}.reflexflow: must be true or false or auto, got 1"),
    (
        {SS: {"sampler": "eular"}},
        f"{SS}.sampler: must be one of unipc, euler, dpm, rk4, got 'eular'; did you mean euler?",
    ),
    (
        {SS: None},
        f"{SS}: must be a mapping of settings, got null; write its settings below it or leave it "
        "out",
    ),
    (
        {"max_step_offset": 3},
        f"max_step_offset: unknown key; did you mean {SS}.max_step_offset?",
    ),
    (
        {SS: {"max_step_ofset": 3}},
        f"{SS}.max_step_ofset: unknown key; did you mean {SS}.max_step_offset?",
    ),
    (
        {"scheduled_sampling_probabilty": 1.0},
        f"scheduled_sampling_probabilty: unknown key; did you mean {SS}.probability?",
    ),
    (
        {"training": {"budget": {"step": 3}}},
        "training.budget.step: unknown key; did you mean training.budget.steps?",
    ),
    (
        {"learning_rate": 1e-3},
        "learning_rate: unknown key; did you mean optimizer.learning_rate?",
    ),
    (
        {"training.batch_size": 8},
        "training.batch_size: unknown key; write it nested, batch_size below training",
    ),
    ({1: 2}, "a key must be text, got 1; write it in quotes"),
    ({"data": {True: 2}}, "data: a key must be text, got true; write it in quotes"),
    (
        {"evaluation": {"nfe": [5, "x"]}},
        "evaluation.nfe: must be a list of whole numbers ≥ 1, at least one, got [5, 'x']",
    ),
    (
        {"evaluation": {"nfe": 5}},
        "evaluation.nfe: must be a list of whole numbers ≥ 1, at least one, got 5",
    ),
    ({"evaluation": {"nfe": [5, 5]}}, "evaluation.nfe: must not repeat a number, got [5, 5]"),
    (
        {"evaluation": {"guidance_scale": float("inf")}},
        "evaluation.guidance_scale: must be a finite number ≥ 0, got inf",
    ),
    (
        {"name": "a/b"},
        "name: must be 1 to 100 letters, digits, '.', '_' or '-', beginning with a letter or "
        "digit, got 'a/b'",
    ),
    ({"tracking": {"uri": 5}}, "tracking.uri: must be text or null, got 5"),
    (
        {"data": {"cache_dir": " "}},
        "data.cache_dir: must be text, not empty, or null, got ' '",
    ),
    (
        {"prediction_type": "epsilon", SS: {"reflexflow": True}},
        f"{SS}.reflexflow: must be false or auto unless prediction_type is flow_matching, got "
        "true with prediction_type epsilon",
    ),
    (
        {"prediction_type": "flow_matching", "noise_schedule": {"kind": "cosine"}},
        "noise_schedule.kind: must be flow for prediction_type flow_matching, got cosine; DDPM "
        "schedules go with epsilon, v_prediction or sample",
    ),
    (
        {SS: {"grid": 2000}},
        f"{SS}.grid: must be ≤ noise_schedule.num_train_timesteps (1000), got 2000",
    ),
    (
        {"noise_schedule": {"kind": "linear", "beta_start": 0.5, "beta_end": 0.1}},
        "noise_schedule.beta_start: must be < noise_schedule.beta_end (0.1), got 0.5",
    ),
    (
        {"training": {"batch_size": 10}, "scaling": {"num_workers": 3}},
        "training.batch_size: must be divisible by scaling.num_workers × "
        "training.gradient_accumulation (3 × 1), got 10; 9 would do",
    ),
    (
        {"model": {"block_out_channels": [12, 24]}},
        "model.block_out_channels: must be multiples of model.norm_num_groups (8), got [12, 24]",
    ),
    (
        {"model": {"block_out_channels": [8] * 5}},
        "model.block_out_channels: has 5 resolutions, so the images' edge must be divisible by "
        "16, got 8; use fewer channels in the list or another data.image_size",
    ),
    (
        {"model": {"kind": "dit", "patch_size": 3}},
        "model.patch_size: must divide the images' edge (8), got 3",
    ),
    (
        {"data": {"source": "image_folder"}},
        "data.path: must name the folder of the images for source image_folder, got null",
    ),
    (
        {"training": {"budget": {"steps": 3, "seconds": 4.0}}},
        "training.budget: must be given in one unit, got steps and seconds; keep one",
    ),
    (
        {"scheduled_sampling_grid": 5, SS: {"grid": 6}},
        f"{SS}.grid: is given twice, as scheduled_sampling_grid: 5 and {SS}.grid: 6; keep one",
    ),
]


@pytest.mark.parametrize(("mapping", "expected"), MISTAKES, ids=[m[1][:60] for m in MISTAKES])
def test_a_mistake_is_one_clear_line(mapping, expected):
    assert problems(mapping) == [f"c.yaml: {expected}"]


def test_all_mistakes_are_told_at_once_with_their_places():
    mapping = {"sed": 1, SS: {"grid": 2000, "probability": "x"}}
    assert problems(mapping, "training.batch_size=0", "training.bach_size=3", "--foo") == [
        "c.yaml: sed: unknown key; did you mean seed?",
        "command line: training.bach_size: unknown key; did you mean training.batch_size?",
        problems({}, "--foo")[0],
        f"c.yaml: {SS}.probability: must be a number ≥ 0 and ≤ 1, got 'x'",
        "command line: training.batch_size: must be ≥ 1, got 0",
        f"c.yaml: {SS}.grid: must be ≤ noise_schedule.num_train_timesteps (1000), got 2000",
    ]


def test_a_rule_says_nothing_about_a_value_that_is_refused_already():
    mapping = {"prediction_type": "epsilonn", SS: {"reflexflow": True}}
    assert len(problems(mapping)) == 1


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["bar"], f"command line: 'bar': expected an override such as {SS}.max_step_offset=5"),
        (["--resum"], "command line: --resum: unknown option; did you mean --resume?"),
        (
            ["--scheduled-sampling-grid", "5"],
            "command line: --scheduled-sampling-grid: unknown option; did you mean "
            "--scheduled_sampling_grid?",
        ),
        (
            ["--scheduled_sampling_grid"],
            f"command line: {SS}.grid: needs a value: scheduled_sampling_grid=VALUE or "
            "--scheduled_sampling_grid VALUE",
        ),
        (
            ["prediction_type=epsilon", "--scheduled_sampling_reflexflow"],
            f"command line: {SS}.reflexflow: must be false or auto unless prediction_type is "
            "flow_matching, got true with prediction_type epsilon",
        ),
        (
            ["training.budget.steps=3", "training.budget.seconds=3"],
            "command line: training.budget: must be given in one unit, got steps and seconds; "
            "keep one",
        ),
        ([f"{SS}=5"], None),
        (["evaluation.nfe=[5"], None),
        (["--"], None),
        (["=5"], None),
    ],
)
def test_a_mistake_on_the_command_line_is_told_as_such(tokens, expected):
    told = problems({}, *tokens)
    assert len(told) == 1
    assert told[0].startswith("command line: ")
    if expected:
        assert told == [expected]


BAD_FILES = [
    ("a.yaml", b"", "the file is empty; write at least one setting, such as 'seed: 0'"),
    ("a.json", b" \n", "the file is empty; write at least one setting, such as 'seed: 0'"),
    ("a.yaml", b"# nothing\n", "the file is empty; write at least one setting, such as 'seed: 0'"),
    ("a.yaml", b"- 1\n", "must hold a mapping of settings (key: value), got a list"),
    ("a.json", b"5", "must hold a mapping of settings (key: value), got a single value"),
    (
        "a.yaml",
        b"seed: 1\nseed: 2\n",
        "not valid YAML: line 2, column 1: key 'seed' is given twice",
    ),
    (
        "a.yaml",
        b"seed: [1\nx: 3\n",
        "not valid YAML: line 2, column 2: expected ',' or ']', but got ':'",
    ),
    ("a.yaml", b"\xff\xfe", "not UTF-8 text (byte 1)"),
    ("a.yaml", b"a: &a [*a]\n", "too large or too deeply nested for a configuration"),
    ("a.yaml", b"[" * 3000, "not valid YAML: nested too deeply"),
    ("a.json", b"[" * 100000, "not valid JSON: nested too deeply"),
    ("a.json", b'{"seed": 1,}', None),
    ("a.json", b'{"seed": 1, "seed": 2}', "not valid JSON: key 'seed' is given twice"),
    ("a.toml", b"seed = \n", None),
    ("a.toml", b"seed = 1\nseed = 2\n", None),
    ("a.yaml", b"seed: !!python/object:os.system {}\n", None),
    ("a.yaml", b'seed: !!int ""\n', None),
    ("a.yaml", b"seed: 1\n---\nseed: 2\n", None),
    ("a.yaml", b"seed: \x00\n", None),
    (
        "a.txt",
        b"seed: 1\n",
        "unknown kind of file '.txt'; a configuration ends in .yaml, .yml, .toml or .json",
    ),
]


@pytest.mark.parametrize(("name", "content", "expected"), BAD_FILES)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    if expected:
        assert caught.value.problems == [f"{path}: {expected}"]


def test_a_missing_file_names_its_neighbour_and_a_folder_is_no_file(tmp_path):
    (tmp_path / "digits.yaml").write_text("seed: 1")
    with pytest.raises(ConfigError, match=r"digts\.yaml: no such file.* mean .*digits\.yaml"):
        load(tmp_path / "digts.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load(tmp_path)
    assert ConfigError.exit_code == EXIT_USAGE


def test_odd_characters_in_a_key_stay_on_one_line():
    assert "\n" not in problems(json.loads('{"a\\nb\\ud800": 1}'))[0]


@pytest.mark.parametrize(
    "uri",
    ["http://me:hunter2@host:5000", "postgresql://u:hunter2@host/db", "sqlite:///a?key=hunter2"],
)
def test_a_password_in_the_store_is_refused_and_not_repeated(uri):
    with pytest.raises(ConfigError) as caught:
        load(None, [f"tracking.uri={uri}"])
    (problem,) = caught.value.problems
    assert "tracking.uri: must not hold a password" in problem
    assert "hunter2" not in problem
    load(None, ["tracking.uri=postgresql://mlflow@host/db"])
