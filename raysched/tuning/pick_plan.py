"""What a pick starts from: a sweep's folder alone, its best few trials, and seeds it never used.

The trials' own `config.yaml` say what they were trained with, to the letter; only the seed, the
name and the budget are the pick's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from raysched.config.loading import Loaded, load
from raysched.config.parsing import read_mapping
from raysched.config.run import RunConfig
from raysched.config.space import LoadedSweep
from raysched.config.sweep import EarlyStoppingConfig, SearchConfig, SweepConfig
from raysched.errors import StorageError
from raysched.tuning.folder import BASE_FILE, SWEEP_FILE
from raysched.tuning.journal import JOURNAL_FILE, apply_event, read_events
from raysched.tuning.objectives import Objectives, sweep_objectives
from raysched.tuning.records import TrialRecord, the_baseline
from raysched.tuning.trial import rolls_out
from raysched.tuning.verdict import eligible, ranked

PICK_FOLDER = "pick"
# Candidates and fresh seeds where nobody asks for others: of fewer seeds there is but a hint.
DEFAULT_TOP, DEFAULT_SEEDS = 3, 3
ROLLOUTS = "scheduled_sampling"


@dataclasses.dataclass(frozen=True)
class PickPlan:
    """What will be trained again.

    Attributes:
        folder: the sweep's folder.
        loaded: the sweep that trains it: no search, no early stopping, fresh seeds.
        chosen: the baseline and the candidates, as records without work.
        configs: what each of them was trained with, by number.
    """

    folder: Path
    loaded: LoadedSweep
    chosen: tuple[TrialRecord, ...]
    configs: Mapping[int, RunConfig]

    def rolls_out(self, record: TrialRecord) -> bool:
        """Whether a trial trains with rollouts."""
        return rolls_out(self.configs[record.number])


def _asked_before(folder: Path) -> tuple[int, int]:
    """Candidates and seeds of the pick that a sweep's folder holds; the defaults without one.

    Raises:
        StorageError: its file is damaged.
    """
    path = folder / PICK_FOLDER / SWEEP_FILE
    if not path.is_file():
        return DEFAULT_TOP, DEFAULT_SEEDS
    stored = _read_settings(path)
    return stored.search.num_samples, len(stored.seeds)


def plan_pick(folder: Path, *, top: int | None, num_seeds: int | None) -> PickPlan:
    """Read a sweep's folder and choose whom to train again.

    Args:
        folder: of the sweep, absolute.
        top: candidates beside the baseline; None: as many as were asked for before.
        num_seeds: fresh seeds; None likewise.

    Raises:
        StorageError: the folder holds no sweep, or none of its candidates reached the budget.
    """
    sweep, base = _read_sweep(folder)
    before = _asked_before(folder)
    top, num_seeds = top or before[0], num_seeds or before[1]
    records: dict[int, TrialRecord] = {}
    for event in read_events(folder / JOURNAL_FILE):
        apply_event(records, event)
    candidates = [r for r in eligible(list(records.values())) if not r.baseline]
    baseline = the_baseline(records.values())
    if baseline is None or not candidates:
        raise StorageError(
            f"{folder}: no candidate of this sweep has reached its budget, so there is nothing to "
            "pick from; go on with it by raysched tune … --resume"
        )
    configs = {r.number: _trained_with(folder, r) for r in (baseline, *candidates)}
    families = {n: config.exposure == ROLLOUTS for n, config in configs.items()}
    budget = next(c.training.budget.forward_equivalents for c in configs.values())
    assert budget is not None, "a trial's budget is in forward equivalents"
    asked = sweep_objectives(sweep.objective, base.config, budget)
    chosen = (baseline, *choose(candidates, families, top, asked))
    seeds = fresh_seeds(sweep.seeds, num_seeds)
    update = {
        "seeds": seeds,
        "budget_forward_equivalents": budget,
        "search": SearchConfig(
            algorithm="random",
            num_samples=len(chosen) - 1,
            max_concurrent=sweep.search.max_concurrent,
        ),
        "early_stopping": EarlyStoppingConfig(kind="none"),
        "output_dir": str(folder / PICK_FOLDER),
    }
    loaded = LoadedSweep(
        sweep.model_copy(update=update), base, str(folder / SWEEP_FILE), [], given=True
    )
    runs = tuple(
        TrialRecord(r.number, baseline=r.baseline, assignments=r.assignments) for r in chosen
    )
    return PickPlan(folder, loaded, runs, {r.number: configs[r.number] for r in chosen})


def choose(
    candidates: Sequence[TrialRecord],
    rollouts: Mapping[int, bool],
    top: int,
    objectives: Objectives | None = None,
) -> list[TrialRecord]:
    """The best few, with the best of either kind among them where there is room.

    Whether rollouts pay, and which cheaper method does, can only be said of what is compared.

    Args:
        candidates: trials that reached the budget.
        rollouts: by number, whether it trains with rollouts.
        top: how many; the first ones where there are fewer.
        objectives: what the sweep searched for; default: q.
    """
    best_first = ranked(candidates, objectives)
    chosen = best_first[:top]
    for kind in (True, False):
        of_kind = [r for r in best_first if rollouts[r.number] == kind]
        if top > 1 and of_kind and of_kind[0] not in chosen:
            chosen[-1] = of_kind[0]
    return chosen


def fresh_seeds(used: Sequence[int], count: int) -> tuple[int, ...]:
    """The next seeds after those of the sweep: the choice was made on the latter."""
    first = max(used) + 1
    return tuple(range(first, first + count))


def _read_sweep(folder: Path) -> tuple[SweepConfig, Loaded]:
    path = folder / SWEEP_FILE
    if not path.is_file() or not (folder / JOURNAL_FILE).is_file():
        raise StorageError(f"{folder}: holds no sweep; name the folder that raysched tune made")
    return _read_settings(path), load(folder / BASE_FILE)


def _read_settings(path: Path) -> SweepConfig:
    try:
        return SweepConfig.model_validate(read_mapping(path, str(path)))
    except ValidationError as error:
        raise StorageError(f"{path}: is damaged: {error.errors()[0]['msg']}") from error


def _trained_with(folder: Path, record: TrialRecord) -> RunConfig:
    trial = folder / "trials" / record.name
    written = [trial / "config.yaml", *sorted(trial.glob("seed-*/config.yaml"))]
    path = next((p for p in written if p.is_file()), None)
    if path is None:
        raise StorageError(
            f"{trial}: its config.yaml is missing, so trial {record.name} can't be trained again"
        )
    return load(path).config
