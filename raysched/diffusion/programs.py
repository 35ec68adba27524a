"""Solvers as programs: the state rows that each keeps, and how every forward combines them.

A program names its updates one after another, as a paper would. Multiplied out, each new row is
one linear combination of the old rows and the network's output, which is what the engine applies:
fewer and larger operations for the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysched.config.run import SolverName

Order = Literal["auto", 1, 2, 3]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Program:
    """What happens after each network call, the same for all lanes.

    Attributes:
        rows: state rows; the first, x, is the network's input, and the initial value of those
            in `start`.
        updates: (name, sources) in order: name becomes the linear combination of its sources;
            `out` is the network's output, `noise` a unit Gaussian of each forward's own.
        carry: new row -> the value that it takes.
        start: rows that begin as the source latent; the others begin as zeros.
        forwards_per_step: network calls of one step.
    """

    rows: tuple[str, ...]
    updates: tuple[tuple[str, tuple[str, ...]], ...]
    carry: Mapping[str, str]
    start: tuple[str, ...] = ("x",)
    forwards_per_step: int = 1

    @property
    def is_noisy(self) -> bool:
        """Whether steps add noise."""
        return any("noise" in sources for _, sources in self.updates)

    @cached_property
    def terms(self) -> tuple[tuple[str, str], ...]:
        """(name, source) of every coefficient, in the order in which they are used."""
        return tuple((name, source) for name, sources in self.updates for source in sources)

    @property
    def sources(self) -> tuple[str, ...]:
        """What the new rows are linear combinations of, once the updates are folded."""
        return (*self.rows, "out", *(("noise",) if self.is_noisy else ()))

    def folded(self, coefficients: Tensor) -> Tensor:
        """The updates multiplied out: coefficients of the new rows in the sources.

        Args:
            coefficients: (num_terms, …) of the terms, float64 on the CPU.

        Returns:
            (num_sources, num_rows, …).
        """
        weights = iter(coefficients.numpy())
        one = np.ones(coefficients.shape[1:])
        made: dict[str, dict[str, Array]] = {source: {source: one} for source in self.sources}
        for name, parts in self.updates:
            total: dict[str, Array] = {}
            for part in parts:
                weight = next(weights)
                for source, share in made[part].items():
                    product = weight if share is one else weight * share
                    total[source] = total[source] + product if source in total else product
            made[name] = total
        out = np.zeros((len(self.sources), len(self.rows), *coefficients.shape[1:]))
        for place, row in enumerate(self.rows):
            for source, share in made[self.carry[row]].items():
                out[self.sources.index(source), place] = share
        return torch.from_numpy(out)

    def emitting(self) -> Tensor:
        """Folded coefficients (num_sources, num_rows): x becomes the network's output."""
        out = torch.zeros(len(self.sources), len(self.rows), dtype=torch.float64)
        out[self.sources.index("out"), 0] = 1.0
        return out


EULER = Program(("x",), (("x", ("x", "out")),), {"x": "x"})
ANCESTRAL = Program(("x",), (("x", ("x", "out", "noise")),), {"x": "x"})
DPM = {
    2: Program(
        ("x", "m1"),
        (("m", ("x", "out")), ("x", ("x", "out", "m1"))),
        {"x": "x", "m1": "m"},
    ),
    3: Program(
        ("x", "m1", "m2"),
        (("m", ("x", "out")), ("x", ("x", "out", "m1", "m2"))),
        {"x": "x", "m1": "m", "m2": "m1"},
    ),
}
UNIPC = {
    1: Program(
        ("x", "y", "m1"),
        (("m", ("x", "out")), ("y", ("y", "m1", "m")), ("x", ("y", "m"))),
        {"x": "x", "y": "y", "m1": "m"},
        start=("x", "y"),
    ),
    2: Program(
        ("x", "y", "m1", "m2"),
        (("m", ("x", "out")), ("y", ("y", "m1", "m2", "m")), ("x", ("y", "m", "m1"))),
        {"x": "x", "y": "y", "m1": "m", "m2": "m1"},
        start=("x", "y"),
    ),
    3: Program(
        ("x", "y", "m1", "m2", "m3"),
        (("m", ("x", "out")), ("y", ("y", "m1", "m2", "m3", "m")), ("x", ("y", "m", "m1", "m2"))),
        {"x": "x", "y": "y", "m1": "m", "m2": "m1", "m3": "m2"},
        start=("x", "y"),
    ),
}
RK4 = Program(
    ("x", "base", "acc"),
    (
        ("acc", ("acc", "x", "out")),
        ("x", ("base", "acc", "x", "out")),
        ("base", ("base", "x")),
    ),
    {"x": "x", "base": "base", "acc": "acc"},
    start=("x", "base"),
    forwards_per_step=4,
)


def solver_program(
    solver: SolverName, order: Order = "auto", *, ancestral: bool = False
) -> Program:
    """The program of a solver; order matters to dpm and unipc only, auto is 2."""
    if ancestral:
        assert solver == "euler", "only Euler's steps have an ancestral form"
        return ANCESTRAL
    number = 2 if order == "auto" else order
    if solver == "rk4":
        return RK4
    if solver == "euler" or (solver == "dpm" and number == 1):
        return EULER
    return DPM[number] if solver == "dpm" else UNIPC[number]
