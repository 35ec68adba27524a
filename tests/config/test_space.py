"""Sweeps: every key and both ends of each range are checked before anything starts."""

import json

import pytest

from raysched.config.entries import nest
from raysched.config.fields import RUN, SWEEP
from raysched.config.loading import load_mapping
from raysched.config.space import assign, baseline_config, load_sweep, sweep_budget
from raysched.config.sweep import SweepConfig
from raysched.errors import ConfigError

SS = "scheduled_sampling"
K = f"{SS}.max_step_offset"


@pytest.fixture
def sweep(tmp_path):
    """A function that writes a sweep beside a base file and loads it."""
    base = {SS: {"max_step_offset": 2, "probability": 0.5, "grid": 20}, "training": {}}
    (tmp_path / "base.json").write_text(json.dumps(base))
    path = tmp_path / "s.json"

    def load(*overrides, **values):
        path.write_text(json.dumps({"base": "base.json", **values}))
        return load_sweep(path, overrides)

    load.path = path
    return load


def problems(sweep, *overrides, **values):
    with pytest.raises(ConfigError) as caught:
        sweep(*overrides, **values)
    start = f"{sweep.path}: "
    return [line.removeprefix(start) for line in caught.value.problems]


MISTAKES = [
    ({K: {"randint": [-1, 3]}}, f"{K}: randint: low: must be ≥ 0, got -1"),
    ({K: {"randint": [3, 3]}}, f"{K}: randint must have low < high, got [3, 3]"),
    ({K: {"randint": [1.5, 3]}}, f"{K}: randint must be two whole numbers, got [1.5, 3]"),
    ({K: {"randint": [1]}}, f"{K}: randint must be [low, high], got [1]"),
    (
        {K: {"uniform": [1, 3]}},
        f"{K}: uniform draws fractions, but the setting is a whole number; use randint",
    ),
    (
        {f"{SS}.probability": {"uniform": [0.5, 1.5]}},
        f"{SS}.probability: uniform: high: must be ≥ 0 and ≤ 1, got 1.5",
    ),
    (
        {f"{SS}_probability": {"uniform": [-0.5, 1]}},
        f"{SS}_probability: uniform: low: must be ≥ 0 and ≤ 1, got -0.5",
    ),
    (
        {f"{SS}.grid": {"choice": [20, 2000]}},
        f"{SS}.grid: choice: must be ≤ noise_schedule.num_train_timesteps (1000), got 2000",
    ),
    (
        {f"{SS}.grid": {"randint": [2, 1002]}},
        f"{SS}.grid: randint: high - 1: must be ≤ noise_schedule.num_train_timesteps (1000), "
        "got 1001",
    ),
    (
        {"optimizer.learning_rate": {"loguniform": [0, 1]}},
        "optimizer.learning_rate: loguniform must have low > 0, got 0",
    ),
    (
        {f"{SS}.sampler": {"choice": ["euler", "eular"]}},
        f"{SS}.sampler: choice: must be one of unipc, euler, dpm, rk4, got 'eular'; did you mean "
        "euler?",
    ),
    (
        {f"{SS}.sampler": {"uniform": [0, 1]}},
        f"{SS}.sampler: uniform needs a setting that is a number; use choice",
    ),
    (
        {f"{SS}.sampler": {"grid": ["euler"]}},
        f"{SS}.sampler: grid needs search.algorithm grid, got tpe; use choice",
    ),
    (
        {f"{SS}.sampler": {"choyce": ["euler"]}},
        f"{SS}.sampler: 'choyce' is no kind; it must be one of choice, uniform, loguniform, "
        "quniform, randint, lograndint, qrandint, grid; did you mean choice?",
    ),
    ({f"{SS}.sampler": {"choice": []}}, f"{SS}.sampler: choice must be a list, not empty, got []"),
    ({f"{SS}.samplr": {"choice": [1]}}, f"{SS}.samplr: unknown key; did you mean {SS}.sampler?"),
    ({"seed": {"choice": [1]}}, "seed: can't be searched: repeats belong in the sweep's seeds"),
    (
        {"training.batch_size": {"choice": [64, 63]}},
        None,
    ),
]


@pytest.mark.parametrize(("space", "expected"), MISTAKES, ids=[str(m[1])[:50] for m in MISTAKES])
def test_a_mistake_in_a_space_is_one_clear_line(sweep, space, expected):
    if expected is None:
        (line,) = problems(sweep, "scaling.num_workers=2", space=space)
        assert "with" not in line.split(":")[0]
        assert "must be divisible" in line
        return
    assert problems(sweep, space=space) == [f"space.{expected}"]


@pytest.mark.parametrize(
    "key", ["seed", "name", "training.output_dir", "training.budget.steps", "tracking.uri"]
)
def test_settings_that_trials_must_share_cannot_be_searched(sweep, key):
    (line,) = problems(sweep, space={key: {"choice": [1]}})
    assert line.startswith(f"space.{key}: can't be searched: ")


def test_all_mistakes_of_a_sweep_are_told_at_once(sweep):
    told = problems(
        sweep,
        "foo.bar=1",
        space={K: {"randint": [-1, 3]}, "sed": {"choice": [1]}, f"{SS}.order": {"choice": [2]}},
        search={"num_sampls": 3, "points": [{K: 1, f"{SS}.order": 3, "x": 1}]},
        seeds=[],
        overrides={"training.batch_size": 0},
    )
    assert len(told) == 8


def test_flat_keys_of_a_space_and_its_points_are_stored_dotted(sweep):
    loaded = sweep(
        space={f"{SS}_max_step_offset": {"randint": [1, 3]}},
        search={"points": [{f"{SS}_max_step_offset": 2}]},
    )
    assert list(loaded.sweep.space) == [K]
    assert loaded.sweep.search.points == ({K: 2},)
    assert loaded.warnings == []


@pytest.mark.parametrize("value", [0, 3, 2.0, True, "2", None])
def test_a_point_outside_the_space_is_refused(sweep, value):
    (line,) = problems(
        sweep, space={K: {"randint": [1, 3]}}, search={"points": [{K: 1}, {K: value}]}
    )
    assert line.startswith(f"search.points[1].{K}: must lie in randint [1, 3], got ")


def test_a_seed_counts_once(sweep):
    space = {K: {"choice": [1]}}
    assert problems(sweep, space=space, seeds=[3, 3]) == [
        "seeds: must not repeat a seed, got [3, 3]"
    ]


def test_a_dimension_can_be_replaced_on_the_command_line(sweep):
    space = {K: {"choice": [1]}}
    loaded = sweep(f"space.{K}.randint=[2, 9]", f"space.{SS}_grid.choice=[5, 10]", space=space)
    assert loaded.sweep.space[K].values == (2, 9)
    assert loaded.sweep.space[f"{SS}.grid"].values == (5, 10)


ODD_VALUES = [
    None,
    True,
    -1,
    10**400,
    float("nan"),
    "x",
    "\ud800",
    [],
    [[1]],
    {},
    {1: 2},
    {"a": [1]},
]


def told(load, *args):
    """The lines about a mistake, or none."""
    try:
        load(*args)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize("value", ODD_VALUES, ids=range(len(ODD_VALUES)))
def test_odd_values_anywhere_give_lines_and_never_a_traceback(value, monkeypatch):
    lines = []
    for path in [*RUN.leaves, *RUN.sections]:
        lines += told(load_mapping, nest({path: value}), "s.yaml")
    for path in [*SWEEP.leaves, *SWEEP.sections]:
        mapping = {"space": {K: {"choice": [1]}}, **nest({path: value})}
        monkeypatch.setattr("raysched.config.space.read_mapping", lambda p, s, m=mapping: m)
        lines += told(load_sweep, "s.yaml")
    assert lines
    assert all(line.startswith("s.yaml: ") and line.isprintable() for line in lines)


def test_the_base_is_found_beside_the_space_and_a_missing_one_is_told(sweep, monkeypatch):
    monkeypatch.chdir("/")
    assert sweep(space={K: {"choice": [1]}}).base.config.scheduled_sampling.grid == 20
    (line,) = problems(sweep, space={K: {"choice": [1]}}, base="nope.json")
    assert line.startswith("base: ")
    assert "no such file" in line


def test_overrides_reach_the_sweep_or_the_base(sweep, tmp_path):
    loaded = sweep(
        "search.num_samples=3",
        "--name",
        "mine",
        "--training.output_dir=out",
        f"{SS}.grid=50",
        "--tracking.enabled=false",
        "early_stopping.kind=none",
        "seeds=[1, 2]",
        f"space.{SS}.sampler={{choice: [euler, dpm]}}",
        "overrides.model.attention=true",
        space={K: {"choice": [1]}},
        overrides={f"{SS}_probability": 0.25},
    )
    assert (loaded.sweep.name, loaded.sweep.output_dir) == ("mine", "out")
    assert loaded.sweep.search.num_samples == 3
    assert loaded.sweep.early_stopping.kind == "none"
    assert loaded.sweep.seeds == (1, 2)
    assert set(loaded.sweep.space) == {K, f"{SS}.sampler"}
    assert loaded.base.config.scheduled_sampling.grid == 50
    assert loaded.base.config.scheduled_sampling.probability == 0.25
    assert loaded.base.config.model.attention is True
    assert loaded.base.config.tracking.enabled is False
    assert loaded.base.config.training.output_dir is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ([], 5000.0),
        (["budget_forward_equivalents=7"], 7.0),
        (["training.budget.forward_equivalents=9"], 9.0),
        (["training.budget.steps=10"], 10 * 3 * 64),
        (["training.budget.steps=10", "training.batch_size=8"], 10 * 3 * 8),
    ],
)
def test_the_last_word_on_the_budget_has_the_command_line(sweep, override, expected):
    loaded = sweep(*override, space={K: {"choice": [1]}}, budget_forward_equivalents=5000)
    assert loaded.budget == expected


def test_a_sweep_refuses_a_budget_in_seconds(sweep):
    (line,) = problems(sweep, "training.budget.seconds=5", space={K: {"choice": [1]}})
    assert "equal compute" in line


def test_a_budget_without_any_is_the_bases_default():
    plain = SweepConfig.model_validate({"space": {K: {"choice": [1]}}})
    assert sweep_budget(plain, load_mapping({}, "b").config) == 900 * 3 * 64


def test_a_trial_resolves_dependent_values_anew():
    raw = load_mapping({}, "b").raw
    assert assign(raw, {K: 3}).scheduled_sampling.reflexflow is True
    assert assign(raw, {K: 0}).scheduled_sampling.reflexflow is False
    noise = assign(raw, {K: 3, "prediction_type": "epsilon"})
    assert noise.scheduled_sampling.reflexflow is False
    assert noise.noise_schedule.kind == "linear"
    with pytest.raises(ConfigError, match=r"trial: scheduled_sampling\.grid: must be ≤"):
        assign(raw, {f"{SS}_grid": 3000})
    with pytest.raises(ConfigError, match="unknown key"):
        assign(raw, {"nope": 1})


def test_the_baseline_is_the_base_without_rollouts():
    loaded = load_mapping(
        {SS: {"max_step_offset": 3, "probability": 1.0, "reflexflow": True}}, "b"
    )
    baseline = baseline_config(loaded.raw)
    assert baseline.exposure == "none"
    assert baseline.scheduled_sampling.max_step_offset == 0
    assert baseline.scheduled_sampling.reflexflow is False
    assert baseline.optimizer == loaded.config.optimizer


def test_searching_the_sampler_on_the_training_grid_warns(sweep):
    space = {f"{SS}.sampler": {"choice": ["euler", "dpm"]}}
    assert "all solvers agree" in sweep(f"{SS}.grid=1000", space=space).warnings[0]
    assert sweep(space=space).warnings == []


def test_stopping_trials_within_their_ramp_is_refused(sweep):
    space = {f"{SS}.ramp_steps": {"randint": [1, 500]}}
    with pytest.raises(ConfigError, match=r"early_stopping\.grace_fraction: .*step 499"):
        sweep("training.budget.steps=1000", space=space)
    assert sweep("training.budget.steps=4000", space=space).warnings == []


def test_a_run_is_no_sweep_and_a_sweep_is_no_run(sweep, tmp_path):
    with pytest.raises(ConfigError, match="raysched train"):
        load_sweep(tmp_path / "base.json")
    with pytest.raises(ConfigError, match="raysched tune"):
        load_mapping({"space": {}}, "s.yaml")
