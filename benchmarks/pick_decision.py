"""How often `raysched pick` is right where the truth is known.

Every arm (the baseline and the candidates) is trained on fresh seeds; a trained model is stood in
for by samples, (n, 2) features from a shared noise, displaced by the arm's known error and by a
random one of its own for every seed. q is KID against reference rows. Comparison and decision are
those of a real pick.

  equal      all arms have the same error: "no clear winner" is the only right answer
  planted    one candidate's error is smaller by a known margin: its name is the right answer, and
             the interval should hold the true difference of q

    python benchmarks/pick_decision.py --json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from raysched.evaluation.bootstrap import paired_difference_over_seeds, q_value
from raysched.tuning.pick_decision import Candidate, Decision, decide_pick
from raysched.tuning.records import TrialRecord
from raysched.tuning.verdict import Comparison

NUM_SAMPLES, NUM_BOOTSTRAP, CONFIDENCE = 100, 200, 0.95
# Displacement of the models from the data, and its spread from seed to seed.
ERROR, SEED_SPREAD = 1.0, 0.04
MARGIN, BETTER = 0.5, 2


def arm(shift: float, noise: Tensor, num_seeds: int, generator: torch.Generator) -> list[Tensor]:
    """(n, 2) samples per seed from one shared noise."""
    wander = SEED_SPREAD * torch.randn(num_seeds, generator=generator)
    own = [torch.randn(noise.shape, generator=generator) for _ in range(num_seeds)]
    return [0.9 * noise + 0.3 * o + shift + w for o, w in zip(own, wander, strict=True)]


def repetition(seed: int, *, num_seeds: int, margin: float, num_candidates: int) -> Decision:
    """One pick: sampled models, the paired comparisons, the decision."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(NUM_SAMPLES, 2, generator=generator)
    reference = torch.randn(NUM_SAMPLES, 2, generator=generator)
    baseline = arm(ERROR, noise, num_seeds, generator)
    candidates = []
    for number in range(1, num_candidates + 1):
        shift = ERROR - (margin if number == BETTER else 0.0)
        own = arm(shift, noise, num_seeds, generator)
        found = paired_difference_over_seeds(
            [([a], [b]) for a, b in zip(baseline, own, strict=True)],
            reference,
            "kid",
            num_bootstrap=NUM_BOOTSTRAP,
            confidence=CONFIDENCE,
        )
        record = TrialRecord(number, assignments={"k": number}, status="finished")
        comparison = Comparison(
            number, found.difference, found.low, found.high, CONFIDENCE, found.dof
        )
        candidates.append(Candidate(record, True, comparison))
    return decide_pick(candidates, num_seeds=num_seeds, metric="KID")


def simulate(
    *, repetitions: int, num_seeds: int, margin: float, num_candidates: int
) -> Counter[str]:
    """Answers of many picks."""
    return Counter(
        repetition(
            s, num_seeds=num_seeds, margin=margin, num_candidates=num_candidates
        ).verdict.answer
        for s in range(repetitions)
    )


def true_difference(margin: float) -> float:
    """q of the baseline minus q of the better one, on many samples and seeds."""
    generator = torch.Generator().manual_seed(10**6)
    reference = torch.randn(2000, 2, generator=generator)
    found = []
    for shift in (ERROR, ERROR - margin):
        noise = torch.randn(2000, 2, generator=generator)
        models = arm(shift, noise, 4, generator)
        found.append(sum(q_value([m], reference, "kid") for m in models) / len(models))
    return found[0] - found[1]


def planted(*, repetitions: int, num_seeds: int = 5) -> dict[str, float]:
    """How often the better one is named, and its interval holds the true difference."""
    truth, named, covered = true_difference(MARGIN), 0, 0
    for seed in range(repetitions):
        found = repetition(seed, num_seeds=num_seeds, margin=MARGIN, num_candidates=3)
        low, high = found.verdict.low, found.verdict.high
        assert low is not None
        assert high is not None
        named += found.winner == BETTER
        covered += low <= truth <= high
    return {"repetitions": repetitions, "named": named, "covered": covered, "truth": truth}


def main() -> None:
    """Print both cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    n = options.repetitions
    equal = {
        seeds: dict(simulate(repetitions=n, num_seeds=seeds, margin=0.0, num_candidates=3))
        for seeds in (3, 5)
    }
    result: dict[str, Any] = {
        "repetitions": n,
        "equal": equal,
        "planted": {seeds: planted(repetitions=n, num_seeds=seeds) for seeds in (3, 5)},
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"equal: {equal}")
    for seeds, row in result["planted"].items():
        print(f"planted, {seeds} seeds: named {row['named']}, interval holds {row['covered']}")


if __name__ == "__main__":
    main()
