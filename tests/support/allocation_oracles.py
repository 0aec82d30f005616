"""Definitions of the allocations, slow and plain: fractions, float64, enumeration."""

from __future__ import annotations

import heapq
import itertools
from fractions import Fraction

import numpy as np
from scipy.optimize import linprog, minimize


def heap_greedy(w, budget, floor=0, cap=2**31 - 1):
    """One unit after the other to the largest w_i / (k_i + 1/2), exactly, ties by index."""
    n = len(w)
    weight = [Fraction(float(x)) for x in w]
    if not any(weight):
        weight = [Fraction(1)] * n
    amount = [int(x) for x in np.broadcast_to(floor, n)]
    most = [int(x) for x in np.broadcast_to(cap, n)]

    def claim(i):
        return -weight[i] / (2 * amount[i] + 1), i

    heap = [claim(i) for i in range(n) if weight[i] and amount[i] < most[i]]
    heapq.heapify(heap)
    for _ in range(int(budget) - sum(amount)):
        if not heap:
            break
        _, i = heap[0]
        amount[i] += 1
        if amount[i] < most[i]:
            heapq.heapreplace(heap, claim(i))
        else:
            heapq.heappop(heap)
    return np.array(amount)


def heap_greedy_on_devices(w, budgets, floor, cap, device_of):
    """`heap_greedy` of each device on its own."""
    floor, cap = (np.broadcast_to(x, len(w)) for x in (floor, cap))
    amount = np.zeros(len(w), int)
    for d, budget in enumerate(budgets):
        at = np.flatnonzero(device_of == d)
        if at.size:
            amount[at] = heap_greedy(w[at], budget, floor[at], cap[at])
    return amount


def best_ladder_values(values, costs, budgets, device_of, total=None):
    """Value [N] of the best choice of levels by trying all, for N problems at once."""
    _, num_units, num_levels = values.shape
    choices = np.array(list(itertools.product(range(num_levels), repeat=num_units)))
    units = np.arange(num_units)
    cost = costs[:, units, choices]
    fits = np.ones(cost.shape[:2], bool)
    for d in range(budgets.shape[1]):
        spent = (cost * (device_of == d)[:, None, :]).sum(-1)
        fits &= spent <= budgets[:, d, None]
    if total is not None:
        fits &= cost.sum(-1) <= total[:, None]
    return np.where(fits, values[:, units, choices].sum(-1), -np.inf).max(1)


def relaxed_ladder_value(values, costs, budgets, device_of, total=None):
    """Value of one problem's linear programme: mixtures of levels allowed."""
    num_units, num_levels = values.shape
    rows = [np.repeat(device_of == d, num_levels) * costs.ravel() for d in range(len(budgets))]
    limits = list(budgets)
    if total is not None:
        rows.append(costs.ravel())
        limits.append(total)
    one_level = np.kron(np.eye(num_units), np.ones(num_levels))
    out = linprog(-values.ravel(), np.array(rows), limits, one_level, np.ones(num_units))
    assert out.success, out.message
    return -out.fun


def water_level(w, budget, floor=0.0, cap=np.inf):
    """Amounts clip(mu w, floor, cap) that sum to the budget, by bisection in float64."""
    w = np.asarray(w, np.float64)
    low, high = 0.0, 1.0
    while np.clip(high * w, floor, cap).sum() < budget:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if np.clip(middle * w, floor, cap).sum() < budget:
            low = middle
        else:
            high = middle
    return np.clip(high * w, floor, cap)


def proportionally_fair(w, budget, floor, cap, segment_of, segment_floor, segment_cap):
    """Maximiser of sum w_i log b_i under all bounds: what water-filling over segments solves."""
    constraints = [{"type": "eq", "fun": lambda b: b.sum() - budget}]
    for p, (least, most) in enumerate(zip(segment_floor, segment_cap, strict=True)):
        at = segment_of == p
        constraints += [
            {"type": "ineq", "fun": lambda b, at=at, least=least: b[at].sum() - least},
            {"type": "ineq", "fun": lambda b, at=at, most=most: most - b[at].sum()},
        ]
    out = minimize(
        lambda b: -(w * np.log(b)).sum(),
        np.clip(np.full(len(w), budget / len(w)), floor, cap),
        jac=lambda b: -w / b,
        bounds=list(zip(np.maximum(floor, 1e-6), cap, strict=True)),
        constraints=constraints,
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert out.success, out.message
    return out.x
