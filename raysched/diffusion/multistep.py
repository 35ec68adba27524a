"""Coefficients of the multistep solvers, DPM-Solver++ and UniPC, for all lanes and steps at once.

Both expand the data prediction in lambda = log(alpha/sigma) over one step of length h and need
the functions phi_k(z) = sum_j z^j/(j + k)! at z = -h. Written with them, every coefficient is
free of cancellation, however small the step is. The order grows from 1 at a lane's source and is
lowered where a step is infinite in lambda: from alpha = 0, and to sigma = 0.

Legend: L lanes, S steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Terms = dict[tuple[str, str], Tensor]
_SERIES_TERMS = 14


def phi_functions(z: Tensor, count: int) -> list[Tensor]:
    """phi_1(z)…phi_count(z), phi_k(z) = sum over j of z^j/(j + k)!; z <= 0 may be -inf.

    Near 0 the last one is summed as a series and the others follow by phi_k = 1/k! + z phi_{k+1};
    far from 0 the first is (e^z - 1)/z and the others follow the opposite way.
    """
    small = z.abs() < 0.5
    near = torch.where(small, z, torch.zeros_like(z))
    far = torch.where(small, torch.full_like(z, -1.0), z)
    series = [torch.full_like(z, 1 / math.factorial(_SERIES_TERMS + count))]
    for j in reversed(range(_SERIES_TERMS)):
        series[0] = torch.addcmul(near.new_tensor(1 / math.factorial(j + count)), series[0], near)
    values = [torch.expm1(far) / far]
    for k in range(1, count):
        values.append((values[-1] - 1 / math.factorial(k)) / far)
        series.insert(0, 1 / math.factorial(count - k) + near * series[0])
    return [torch.where(small, s, v) for s, v in zip(series, values, strict=True)]


def _shifted(values: Tensor, places: int, fill: float) -> Tensor:
    """values[:, f - places], with `fill` where there is none."""
    head = torch.full_like(values[:, :places], fill)
    return torch.cat([head, values[:, : values.shape[1] - places]], dim=1)


def _orders(log_snr: Tensor, step: Tensor, highest: int) -> Tensor:
    """Order of each step, (L, S): as high as the lane's finite history allows."""
    order = torch.ones_like(step, dtype=torch.int64)
    finite = torch.isfinite(step)
    for back in range(1, highest):
        reachable = torch.isfinite(_shifted(log_snr[:, :-1], back, -math.inf))
        order = order + (reachable & finite & (order == back)).long()
    return order


def _gain(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(sigma_n/sigma, alpha_n - alpha·sigma_n/sigma) of each step."""
    ratio = sigma[:, 1:] / sigma[:, :-1]
    return ratio, alpha[:, 1:] - alpha[:, :-1] * ratio


def dpm_terms(alpha: Tensor, sigma: Tensor, to_x0: tuple[Tensor, Tensor], order: int) -> Terms:
    """DPM-Solver++ multistep (arXiv 2211.01095): 2M midpoint, or 3M.

    Args:
        alpha: (L, S + 1), at the nodes.
        sigma: (L, S + 1), at the nodes.
        to_x0: coefficients of x0 in x and the network's output at the nodes.
        order: 2 or 3.
    """
    ratio, gain = _gain(alpha, sigma)
    log_snr = torch.log(alpha / sigma)
    h = log_snr[:, 1:] - log_snr[:, :-1]
    used = _orders(log_snr, h, order)
    inverse_r0 = torch.where(used >= 2, h / _shifted(h, 1, 1.0), torch.zeros_like(h))
    on_m1 = -0.5 * gain * inverse_r0
    on_m2 = torch.zeros_like(gain)
    if order == 3:
        first, second = _third_order(alpha[:, 1:], h)
        on_m1 = torch.where(used == 3, first, on_m1)
        on_m2 = torch.where(used == 3, second, on_m2)
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


def _third_order(alpha_to: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
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


def unipc_terms(alpha: Tensor, sigma: Tensor, to_x0: tuple[Tensor, Tensor], order: int) -> Terms:
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
    log_snr = torch.log(alpha / sigma)
    h = log_snr[:, 1:] - log_snr[:, :-1]
    used = _orders(log_snr, h, order)
    predictor = _unipc_weights(log_snr, h, used, order, corrector=False)
    corrector = _unipc_weights(log_snr, h, used, order, corrector=True)
    c_x, c_out = (c[:, :-1] for c in to_x0)
    terms: Terms = {("m", "x"): c_x, ("m", "out"): c_out, ("x", "y"): ratio}
    terms["x", "m"] = gain * (1 - predictor.sum(dim=0))
    for k in range(1, order):
        terms["x", f"m{k}"] = gain * predictor[k - 1]
    # The corrector at a node belongs to the step before it; at the source there is none.
    terms["y", "y"] = _shifted(ratio, 1, 1.0)
    terms["y", "m"] = _shifted(gain * corrector[-1], 1, 0.0)
    terms["y", "m1"] = _shifted(gain * (1 - corrector.sum(dim=0)), 1, 0.0)
    for k in range(1, order):
        terms["y", f"m{k + 1}"] = _shifted(gain * corrector[k - 1], 1, 0.0)
    return terms


def _unipc_weights(
    log_snr: Tensor, h: Tensor, used: Tensor, highest: int, *, corrector: bool
) -> Tensor:
    """rho_k/r_k of the differences m_k - m_0, for the predictor (highest - 1, L, S).

    For the corrector one more, the last: rho of the difference between the new evaluation and
    m_0.
    """
    weights = torch.zeros(highest - 1 + int(corrector), *h.shape, dtype=h.dtype)
    for order in range(1, highest + 1):
        chosen = used == order
        size = order if corrector else order - 1
        if size == 0:
            continue
        safe_h = torch.where(chosen, h, torch.ones_like(h))
        r = [
            torch.where(
                chosen,
                (_shifted(log_snr[:, :-1], k, 0.0) - log_snr[:, :-1]) / safe_h,
                torch.full_like(h, -float(k)),
            )
            for k in range(1, order)
        ]
        rho = _unipc_rho(safe_h, [*r, torch.ones_like(h)][:size])
        for k in range(order - 1):
            weights[k] = torch.where(chosen, rho[k] / r[k], weights[k])
        if corrector:
            weights[-1] = torch.where(chosen, rho[-1], weights[-1])
    return weights


def _unipc_rho(h: Tensor, points: list[Tensor]) -> list[Tensor]:
    """Solve sum_k rho_k points_k^(i-1) = i! phi_{i+1}(-h)/phi_1(-h); a single rho is 1/2."""
    size = len(points)
    if size == 1:
        return [torch.full_like(h, 0.5)]
    phi = phi_functions(-h, size + 1)
    if size == 2:  # the default order's corrector, in closed form: a solver costs several times it
        p, q = points
        first = (2 * phi[2] - q * phi[1]) / phi[0] / (p - q)
        return [first, phi[1] / phi[0] - first]
    right = torch.stack([math.factorial(i) * phi[i] / phi[0] for i in range(1, size + 1)], dim=-1)
    stacked = torch.stack(points, dim=-1)
    matrix = torch.stack([stacked**i for i in range(size)], dim=-2)
    # Padded steps have no length; they are never used, but must not stop the solver.
    broken = ~torch.isfinite(matrix).flatten(-2).all(-1) | ~torch.isfinite(right).all(-1)
    degenerate = broken | (h == 0)
    matrix = torch.where(degenerate[..., None, None], torch.eye(size, dtype=h.dtype), matrix)
    rho: Tensor = torch.linalg.solve(matrix, right)
    return list(rho.unbind(-1))
