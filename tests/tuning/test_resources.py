import pytest

from raysched.config.run import RunConfig
from raysched.errors import ConfigError
from raysched.tuning.search import max_concurrent, trial_resources


def run(**scaling) -> RunConfig:
    return RunConfig.model_validate({"scaling": scaling})


def test_as_many_trials_at_once_as_the_cpus_carry():
    assert max_concurrent(run(), [{"CPU": 2}], None) == 2
    assert max_concurrent(run(num_workers=0, cpus_per_worker=3), [{"CPU": 8}], None) == 2
    assert max_concurrent(run(num_workers=2, cpus_per_worker=2), [{"CPU": 8}], None) == 2
    assert max_concurrent(run(num_workers=2), [{"CPU": 9}], 3) == 3
    assert max_concurrent(run(use_gpu=True, num_workers=2), [{"CPU": 64, "GPU": 4}], None) == 2


def test_a_trial_that_can_never_be_placed_is_refused_before_it_waits_for_ever():
    with pytest.raises(ConfigError, match="each trial needs 3 CPUs, the cluster has 2"):
        max_concurrent(run(num_workers=3), [{"CPU": 2}], None)
    with pytest.raises(ConfigError, match="each trial needs 1 GPUs, the cluster has 0"):
        max_concurrent(run(use_gpu=True), [{"CPU": 2}], None)


def test_a_worker_never_spans_two_nodes():
    two = [{"CPU": 2.0}, {"CPU": 2.0}]
    assert max_concurrent(run(num_workers=0, cpus_per_worker=2), two, None) == 2
    assert max_concurrent(run(num_workers=3), two, None) == 1
    with pytest.raises(ConfigError, match="only 0 fit on the cluster's nodes"):
        max_concurrent(run(num_workers=0, cpus_per_worker=3), two, None)


def test_a_trials_own_process_takes_a_cpu_only_where_it_trains_itself():
    assert trial_resources(run(num_workers=2))["CPU"] == 0
    assert trial_resources(run(num_workers=0, cpus_per_worker=2))["CPU"] == 2
