"""Conditions and constraints of a space: every mistake before anything starts."""

import json
import random

import pytest

from raysched.config.constraints import parse_constraint
from raysched.config.space import load_sweep
from raysched.errors import ConfigError

SS = "scheduled_sampling"
START, END = f"{SS}.prob_start", f"{SS}.prob_end"
RAMP, K, PROBABILITY = f"{SS}.ramp_steps", f"{SS}.max_step_offset", f"{SS}.probability"
RAMPED = {"when": {RAMP: {"min": 1}}}


@pytest.fixture
def sweep(tmp_path):
    """A function that writes a sweep around a small base run and loads it."""
    base = {SS: {"max_step_offset": 2, "probability": 0.5, "grid": 20}}
    (tmp_path / "base.json").write_text(json.dumps(base))

    def load(*overrides, **values):
        quiet = {"early_stopping": {"kind": "none"}}
        (tmp_path / "s.json").write_text(json.dumps({"base": "base.json", **quiet, **values}))
        return load_sweep(tmp_path / "s.json", overrides)

    return load


def problem(sweep, *overrides, **values):
    with pytest.raises(ConfigError) as caught:
        sweep(*overrides, **values)
    (line,) = caught.value.problems
    return line.partition(": ")[2]


SPACE = {
    RAMP: {"choice": [0, 25]},
    PROBABILITY: {"uniform": [0.1, 1.0], "when": {RAMP: 0}},
    START: {"uniform": [0.0, 1.0], **RAMPED},
    END: {"uniform": [0.0, 1.0], **RAMPED},
}


def test_settings_are_searched_only_where_their_condition_holds(sweep):
    structure = sweep(space=SPACE, constraints=[f"{START} <= {END}"]).structure
    generator = random.Random(3)
    drawn = [structure.random(generator) for _ in range(200)]
    for settings in drawn:
        expected = {RAMP, START, END} if settings[RAMP] else {RAMP, PROBABILITY}
        assert set(settings) == expected
        held = START not in settings or settings[START] <= settings[END]
        assert (structure.broken(settings) is None) == held
    assert len({len(settings) for settings in drawn}) == 2


def test_a_condition_on_a_setting_that_is_left_out_itself_does_not_hold(sweep):
    space = {
        "exposure": {"choice": ["scheduled_sampling", "defar"]},
        RAMP: {"choice": [0, 25], "when": {"exposure": "scheduled_sampling"}},
        END: {"uniform": [0.1, 1.0], **RAMPED},
    }
    structure = sweep(f"{RAMP}=50", space=space).structure
    assert structure.choose({"exposure": "defar", RAMP: 25, END: 1.0}.get) == {"exposure": "defar"}


def test_a_grid_with_conditions_holds_every_combination_once(sweep):
    space = {
        RAMP: {"grid": [0, 25]},
        PROBABILITY: {"grid": [0.1, 0.2], "when": {RAMP: 0}},
        START: {"grid": [0.1, 0.5], **RAMPED},
        END: {"grid": [0.3, 0.6], **RAMPED},
    }
    loaded = sweep("search.algorithm=grid", space=space, constraints=[f"{START} <= {END}"])
    every = [json.dumps(settings) for settings in loaded.structure.every()]
    assert len(every) == len(set(every)) == 2 + 3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"space": {START: {"uniform": [0, 1], "when": {f"{SS}.ramp_step": 1}}}},
            f"space.{START}: when.{SS}.ramp_step: unknown key; did you mean {RAMP}?",
        ),
        (
            {"space": {START: {"uniform": [0, 1], "when": {"exposure": "defarr"}}}},
            f"space.{START}: when.exposure: must be one of none, scheduled_sampling, "
            "input_perturbation, self_correction, defar, mixflow, dream, got 'defarr'; did you "
            "mean defar?",
        ),
        (
            {"space": {START: {"uniform": [0, 1], "when": {RAMP: {"least": 1}}}}},
            f"space.{START}: when.{RAMP}: a range has min, max or both, got {{least: 1}}",
        ),
        (
            {"space": {**SPACE, START: {"uniform": [0, 1], "when": {RAMP: 7}}}},
            f"space.{START}: when.{RAMP}: 7 is none of the values that the space gives it",
        ),
        (
            {"space": {START: {"uniform": [0, 1], "when": {}}}},
            f"space.{START}: when must be a mapping: setting -> value, got {{}}",
        ),
        (
            {
                "space": {
                    START: {"uniform": [0, 1], "when": {END: {"min": 0.5}}},
                    END: {"uniform": [0, 1], "when": {START: {"min": 0.5}}},
                }
            },
            None,
        ),
        (
            {"space": SPACE, "constraints": [f"{START} > {END} + 1"]},
            f"constraints[0]: none of 1000 random combinations fulfils '{START} > {END} + 1'",
        ),
        (
            {"space": SPACE, "constraints": [f"{START} <= {SS}.prob_ent"]},
            f"constraints[0]: {SS}.prob_ent: unknown key; did you mean {END}?",
        ),
        (
            {"space": SPACE, "constraints": [f"{K} <= 3"]},
            "constraints[0]: names no searched setting",
        ),
        (
            {"space": SPACE, "search": {"points": [{RAMP: 25, PROBABILITY: 0.5}]}},
            f"search.points[0].{PROBABILITY}: is not searched beside the other settings of this "
            f"point: when {{{RAMP}: 0}}",
        ),
        (
            {
                "space": SPACE,
                "constraints": [f"{START} <= {END}"],
                "search": {"points": [{RAMP: 25, START: 0.9, END: 0.1}]},
            },
            f"search.points[0]: breaks '{START} <= {END}'",
        ),
        (
            {"space": SPACE, "search": {"algorithm": "gp"}},
            "search.algorithm: gp can't model settings with a condition (when), as "
            f"{PROBABILITY} has; use tpe",
        ),
        (
            {"space": {RAMP: {"qrandint": [0, 10, 3]}}},
            f"space.{RAMP}: qrandint must reach high from low in whole steps, got [0, 10, 3]",
        ),
        ({"space": SPACE, "objective": {"name": "cost_to_target"}}, None),
        ({"space": SPACE, "objective": {"several": ["quality", "quality"]}}, None),
        ({"space": SPACE, "objective": {"several": ["quality"], "reference": {}}}, None),
    ],
)
def test_a_mistake_between_dimensions_is_one_clear_line(sweep, values, expected):
    line = problem(sweep, **values)
    if expected is None:
        assert "circle" in line or line.startswith("objective.")
    else:
        assert line == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 < 2", "names no setting"),
        ("seed = 3", "write =="),
        ("seed", "must compare"),
        ("__import__('os').system('true') == 0", "only comparisons"),
        ("seed.__class__ == 1", "unknown key"),
        ("(lambda: 1)() == seed", "only comparisons"),
        ("seed ** 99999 > 1", "only comparisons"),
        ("[x for x in seed] == 1", "only comparisons"),
        ("exposure == defar", "or a text"),
        ("seed is 1", "in place of is"),
        ("1 <" * 200 + " seed", "at most 500"),
    ],
)
def test_a_constraint_is_read_and_never_run(text, expected):
    with pytest.raises(ValueError, match=expected.replace("[", r"\[")):
        parse_constraint(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed + 1 <= 4", True),
        ("1 < seed < 3", False),
        ("not (seed == 3) or exposure in ['defar', 'none']", True),
        ("seed / 0 > 1", False),
        ("exposure != 'defar' and -seed < 0", False),
        ("seed == true", False),
    ],
)
def test_a_constraint_says_what_it_says(text, expected):
    assert parse_constraint(text).holds({"seed": 3, "exposure": "defar"}) is expected


def test_a_text_is_no_number_to_compare_with(sweep):
    space = {f"{SS}.sampler": {"choice": ["euler", "dpm"]}}
    line = problem(sweep, space=space, constraints=[f"{SS}.sampler < 3"])
    assert "needs numbers, got" in line


@pytest.mark.parametrize("grids", [[20, 50, 100, 200, "jump"], ["jump", 20]])
def test_a_text_among_numbers_is_told_wherever_it_is_drawn_and_may_be_excepted(sweep, grids):
    grid = f"{SS}.grid"
    space = {K: {"choice": [1, 2, 3]}, grid: {"choice": grids}}
    line = problem(sweep, space=space, constraints=[f"{K} <= {grid}"])
    assert line == f"constraints[0]: {K} <= {grid}: needs numbers, got 'jump'"
    pointed = {"points": [{K: 1, grid: "jump"}]}
    assert problem(sweep, space=space, constraints=[f"{K} <= {grid}"], search=pointed) == line
    sweep(space=space, constraints=[f"{grid} == 'jump' or {K} <= {grid}"])


def test_a_first_point_of_which_no_completion_is_a_run_is_told(sweep):
    ancestral, sampler = f"{SS}.ancestral", f"{SS}.sampler"
    space = {K: {"choice": [1, 2]}, sampler: {"choice": ["unipc", "euler"]}}
    space[ancestral] = {"choice": [False, True]}
    search = {"points": [{ancestral: True, sampler: "unipc"}]}
    line = problem(sweep, f"{sampler}=euler", space=space, search=search)
    assert line == (
        f"search.points[0]: is no run: trial: {ancestral}: must be false unless sampler is euler, "
        "got true with sampler unipc"
    )
    # What is left open can still make a run of it.
    sweep(f"{sampler}=euler", space=space, search={"points": [{ancestral: True}]})


def test_a_grid_larger_than_the_search_is_warned_of(sweep):
    space = {RAMP: {"grid": [0, 25]}, PROBABILITY: {"grid": [0.1, 0.2, 0.3], "when": {RAMP: 0}}}
    (line,) = sweep("search.algorithm=grid", "search.num_samples=3", space=space).warnings
    assert "search.num_samples: only the first 3 of the grid's combinations" in line
    assert "of 4;" in line
    assert sweep("search.algorithm=grid", "search.num_samples=4", space=space).warnings == []


def test_offsets_without_a_chance_are_warned_of_before_the_start(sweep):
    space = {K: {"randint": [1, 5]}}
    (line,) = sweep(f"{PROBABILITY}=0", space=space).warnings
    assert f"space.{K}: had no effect in any of" in line
    assert sweep(space=space).warnings == []


def test_a_condition_that_the_base_run_never_meets_is_warned_of(sweep):
    space = {
        K: {"randint": [1, 5]},
        f"{SS}.reflexflow_alpha": {
            "uniform": [0.1, 1],
            "when": {"prediction_type": "flow_matching"},
        },
    }
    assert sweep(space=space).warnings == []
    (line,) = sweep("prediction_type=epsilon", space=space).warnings
    assert "is never searched" in line


def test_a_dimension_replaced_on_the_command_line_keeps_its_condition(sweep):
    loaded = sweep(f"space.{PROBABILITY}.uniform=[0.2, 0.3]", space=SPACE)
    assert loaded.sweep.space[PROBABILITY].conditions == {RAMP: 0}
