"""Solvers as programs: the state rows that each keeps, and how every forward combines them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from raysched.config.run import SolverName

Order = Literal["auto", 1, 2, 3]


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

    def emitting(self) -> Tensor:
        """Coefficients (num_terms,) with which x becomes the network's output, unchanged."""
        ones = {("m", "out"), ("x", "out" if ("x", "out") in self.terms else "m")}
        return torch.tensor([float(term in ones) for term in self.terms], dtype=torch.float64)


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
