"""Coefficients of the multistep solvers, DPM-Solver++ and UniPC, for all lanes and steps at once.

Both expand the data prediction in lambda = log(alpha/sigma) over one step of length h and need
the functions phi_k(z) = sum_j z^j/(j + k)! at z = -h. Written with them, every coefficient is
free of cancellation, however small the step is. The order grows from 1 at a lane's source and is
lowered where a step is infinite in lambda: from alpha = 0, and to sigma = 0.

Everything is computed with numpy: tables are small, and a hundred operations on them cost half of
what torch takes.

Legend: L lanes, S steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Terms = dict[tuple[str, str], Tensor]
Arrays = dict[tuple[str, str], Array]
_SERIES_TERMS = 14


def _with_numpy(make: Callable[..., Arrays]) -> Callable[..., Terms]:
    """Let a function of float64 arrays take and return float64 tensors on the CPU."""

    @functools.wraps(make)
    def terms(alpha: Tensor, sigma: Tensor, to_x0: tuple[Tensor, Tensor], order: int) -> Terms:
        # Infinite steps and padding divide by zero on purpose; what they give is not used.
        with np.errstate(all="ignore"):
            arrays = make(
                alpha.numpy(), sigma.numpy(), (to_x0[0].numpy(), to_x0[1].numpy()), order=order
            )
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    return terms


def phi_functions(z: Array, count: int) -> list[Array]:
    """phi_1(z)…phi_count(z), phi_k(z) = sum over j of z^j/(j + k)!; z <= 0 may be -inf.

    Near 0 the last one is summed as a series and the others follow by phi_k = 1/k! + z phi_{k+1};
    far from 0 the first is (e^z - 1)/z and the others follow the opposite way.
    """
    small = np.abs(z) < 0.5
    near = np.where(small, z, 0.0)
    far = np.where(small, -1.0, z)
    last: Array = np.full_like(z, 1 / math.factorial(_SERIES_TERMS + count))
    for j in reversed(range(_SERIES_TERMS)):
        last *= near
        last += 1 / math.factorial(j + count)
    series = [last]
    values = [np.expm1(far) / far]
    for k in range(1, count):
        values.append((values[-1] - 1 / math.factorial(k)) / far)
        series.insert(0, 1 / math.factorial(count - k) + near * series[0])
    return [np.where(small, s, v) for s, v in zip(series, values, strict=True)]


def _shifted(values: Array, places: int, fill: float) -> Array:
    """values[:, f - places], with `fill` where there is none."""
    out = np.full_like(values, fill)
    if places < values.shape[1]:
        out[:, places:] = values[:, : values.shape[1] - places]
    return out


def _orders(log_snr: Array, step: Array, highest: int) -> NDArray[np.int64]:
    """Order of each step, (L, S): as high as the lane's finite history allows."""
    order = np.ones(step.shape, dtype=np.int64)
    finite = np.isfinite(step)
    for back in range(1, highest):
        reachable = np.isfinite(_shifted(log_snr[:, :-1], back, -math.inf))
        order = order + (reachable & finite & (order == back))
    return order


def _gain(alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """(sigma_n/sigma, alpha_n - alpha·sigma_n/sigma) of each step."""
    ratio = sigma[:, 1:] / sigma[:, :-1]
    return ratio, alpha[:, 1:] - alpha[:, :-1] * ratio


@_with_numpy
def dpm_terms(alpha: Array, sigma: Array, to_x0: tuple[Array, Array], order: int) -> Arrays:
    """DPM-Solver++ multistep (arXiv 2211.01095): 2M midpoint, or 3M.

    Args:
        alpha: (L, S + 1), at the nodes.
        sigma: (L, S + 1), at the nodes.
        to_x0: coefficients of x0 in x and the network's output at the nodes.
        order: 2 or 3.
    """
    ratio, gain = _gain(alpha, sigma)
    log_snr = np.log(alpha / sigma)
    h = log_snr[:, 1:] - log_snr[:, :-1]
    used = _orders(log_snr, h, order)
    inverse_r0 = np.where(used >= 2, h / _shifted(h, 1, 1.0), 0.0)
    on_m1 = -0.5 * gain * inverse_r0
    on_m2 = np.zeros_like(gain)
    if order == 3:
        first, second = _third_order(alpha[:, 1:], h)
        on_m1 = np.where(used == 3, first, on_m1)
        on_m2 = np.where(used == 3, second, on_m2)
    on_m0 = gain - on_m1 - on_m2
    c_x, c_out = (c[:, :-1] for c in to_x0)
    return {
        ("m", "x"): c_x,
        ("m", "out"): c_out,
        ("x", "x"): ratio + on_m0 * c_x,
        ("x", "out"): on_m0 * c_out,
        ("x", "m1"): on_m1,
        ("x", "m2"): on_m2,
    }


def _third_order(alpha_to: Array, h: Array) -> tuple[Array, Array]:
    """Weights of 3M on m1 and m2; with the one on m0 they sum to the first-order gain.

    D1 and D2 are the first and second divided differences at the step's start, weighted by
    alpha·h·phi_2(-h) and alpha·h·phi_3(-h).
    """
    r0, r1 = _shifted(h, 1, 1.0) / h, _shifted(h, 2, 1.0) / h
    _, phi_2, phi_3 = phi_functions(-h, 3)
    on_slope, on_curve = alpha_to * h * phi_2, alpha_to * h * phi_3
    # D1 = (1 + r0/(r0 + r1)) A - r0/(r0 + r1) B and D2 = (A - B)/(r0 + r1),
    # with A = (m0 - m1)/r0 and B = (m1 - m2)/r1.
    total = r0 + r1
    on_a = on_slope * (1 + r0 / total) + on_curve / total
    on_b = -(on_slope * r0 / total + on_curve / total)
    return -on_a / r0 + on_b / r1, -on_b / r1


@_with_numpy
def unipc_terms(alpha: Array, sigma: Array, to_x0: tuple[Array, Array], order: int) -> Arrays:
    """UniPC (arXiv 2302.04867), B(h) = e^h - 1 ("bh2"), data prediction.

    At each node the state that led there is corrected with the evaluation that is made anyway,
    by a corrector of its predictor's order; then the next predictor starts from the corrected
    state. `y` is the corrected state of the node before.

    Args:
        alpha: (L, S + 1), at the nodes.
        sigma: (L, S + 1), at the nodes.
        to_x0: coefficients of x0 in x and the network's output at the nodes.
        order: 1, 2 or 3.
    """
    ratio, gain = _gain(alpha, sigma)
    log_snr = np.log(alpha / sigma)
    h = log_snr[:, 1:] - log_snr[:, :-1]
    used = _orders(log_snr, h, order)
    predictor = _unipc_weights(log_snr, h, used, order, corrector=False)
    corrector = _unipc_weights(log_snr, h, used, order, corrector=True)
    c_x, c_out = (c[:, :-1] for c in to_x0)
    terms: Arrays = {("m", "x"): c_x, ("m", "out"): c_out, ("x", "y"): ratio}
    terms["x", "m"] = gain * (1 - predictor.sum(axis=0))
    for k in range(1, order):
        terms["x", f"m{k}"] = gain * predictor[k - 1]
    # The corrector at a node belongs to the step before it; at the source there is none.
    terms["y", "y"] = _shifted(ratio, 1, 1.0)
    terms["y", "m"] = _shifted(gain * corrector[-1], 1, 0.0)
    terms["y", "m1"] = _shifted(gain * (1 - corrector.sum(axis=0)), 1, 0.0)
    for k in range(1, order):
        terms["y", f"m{k + 1}"] = _shifted(gain * corrector[k - 1], 1, 0.0)
    return terms


def _unipc_weights(
    log_snr: Array, h: Array, used: NDArray[np.int64], highest: int, *, corrector: bool
) -> Array:
    """rho_k/r_k of the differences m_k - m_0, for the predictor (highest - 1, L, S).

    For the corrector one more, the last: rho of the difference between the new evaluation and
    m_0.
    """
    weights: Array = np.zeros((highest - 1 + int(corrector), *h.shape))
    for order in range(1, highest + 1):
        chosen = used == order
        size = order if corrector else order - 1
        if size == 0:
            continue
        safe_h = np.where(chosen, h, np.ones_like(h))
        r = [
            np.where(
                chosen,
                (_shifted(log_snr[:, :-1], k, 0.0) - log_snr[:, :-1]) / safe_h,
                np.full_like(h, -float(k)),
            )
            for k in range(1, order)
        ]
        rho = _unipc_rho(safe_h, [*r, np.ones_like(h)][:size])
        for k in range(order - 1):
            weights[k] = np.where(chosen, rho[k] / r[k], weights[k])
        if corrector:
            weights[-1] = np.where(chosen, rho[-1], weights[-1])
    return weights


def _unipc_rho(h: Array, points: list[Array]) -> list[Array]:
    """Solve sum_k rho_k points_k^(i-1) = i! phi_{i+1}(-h)/phi_1(-h); a single rho is 1/2."""
    size = len(points)
    if size == 1:
        return [np.full_like(h, 0.5)]
    phi = phi_functions(-h, size + 1)
    if size == 2:  # the default order's corrector, in closed form: a solver costs several times it
        p, q = points
        first = (2 * phi[2] - q * phi[1]) / phi[0] / (p - q)
        return [first, phi[1] / phi[0] - first]
    right = np.stack([math.factorial(i) * phi[i] / phi[0] for i in range(1, size + 1)], axis=-1)
    stacked = np.stack(points, axis=-1)
    matrix = np.stack([stacked**i for i in range(size)], axis=-2)
    # Padded steps have no length; they are never used, but must not stop the solver.
    broken = ~np.isfinite(matrix).all((-2, -1)) | ~np.isfinite(right).all(-1)
    degenerate = broken | (h == 0)
    matrix = np.where(degenerate[..., None, None], np.eye(size), matrix)
    right = np.where(degenerate[..., None], 0.0, right)
    rho = np.linalg.solve(matrix, right[..., None])[..., 0]
    return list(np.moveaxis(rho, -1, 0))
