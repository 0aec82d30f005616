"""Errors of the allocations: shapes and values before, budgets that cannot be kept after."""

from __future__ import annotations

from typing import Any

import numpy as np

from jbalance import _axes, checks
from jbalance.types import Status


def whole_inputs(w, budget, floor, cap, device_of):
    """The arguments of `whole` in float32 and int32, and the errors that show before it is solved."""
    checks.rank("w", w, 1, "[U]")
    checks.non_empty("w", w)
    w = checks.non_negative("w", w)
    budget, device_of = _device_budgets("budget", budget, device_of, "w", w)
    for name, x in (("floor", floor), ("cap", cap)):
        checks.rank(name, x, (0, 1), "[] or [U]")
        if np.ndim(x):
            checks.same_length(name, x, "w", w)
    floor, cap = checks.whole("floor", floor), checks.whole("cap", cap)
    checks.not_above("floor", floor, "cap", cap)
    return w, budget, floor, cap, device_of


def whole_feasible(out, w, budget, floor, device_of) -> None:
    """ValueError for concrete floors that do not fit: on which device, and by how much."""
    if not checks.is_concrete(out.status) or out.status != Status.INFEASIBLE:
        return
    budget = np.atleast_1d(np.asarray(budget, np.int64))
    floor = np.broadcast_to(np.asarray(floor, np.int64), np.shape(w))
    device_of = np.zeros(floor.shape, int) if device_of is None else np.asarray(device_of)
    required = np.bincount(device_of, floor, budget.size).astype(np.int64)
    d = int(np.argmax(required > budget))
    raise ValueError(
        f"floor: the floors on device {d} sum to {required[d]}, above its budget = {budget[d]}: "
        f"{required[d] - budget[d]} is missing"
    )


def ladder_inputs(values, costs, budgets, device_of, total_budget):
    """The arguments of `ladder` in float32 and int32, and the errors that show before it is solved."""
    checks.rank("values", values, 2, "[U, M]")
    checks.non_empty("values", values)
    values = checks.finite("values", values)
    if np.shape(values)[1] < 2:
        raise ValueError(
            "values has 1 level: a ladder needs at least 2, the lowest and one above it"
        )
    checks.rank("costs", costs, (1, 2), "[M] or [U, M]")
    checks.same_length("costs", costs, "values", values, axis=-1)
    if np.ndim(costs) == 2:
        checks.same_length("costs", costs, "values", values)
    costs = checks.whole("costs", costs)
    if checks.is_concrete(costs):
        steps = np.diff(np.asarray(costs, np.int64), axis=-1)
        if (steps <= 0).any():
            index = tuple(int(i) for i in np.argwhere(steps <= 0)[0])
            raise ValueError(
                f"costs must rise with the level: the step up from costs{list(index)} is "
                f"{int(steps[index])}, it must be at least 1"
            )
    budgets, device_of = _device_budgets("budgets", budgets, device_of, "values", values)
    if total_budget is not None:
        checks.rank("total_budget", total_budget, 0, "[]")
        total_budget = checks.whole("total_budget", total_budget)
    return values, costs, budgets, device_of, total_budget


def ladder_feasible(out, values, costs, budgets, device_of, total_budget) -> None:
    """ValueError for lowest levels that do not fit: which budget, and by how much."""
    if not checks.is_concrete(out.status) or out.status != Status.INFEASIBLE:
        return
    base = np.broadcast_to(np.asarray(costs, np.int64), np.shape(values))[:, 0]
    budgets = np.atleast_1d(np.asarray(budgets, np.int64))
    device_of = np.zeros(base.shape, int) if device_of is None else np.asarray(device_of)
    spent = np.bincount(device_of, base, budgets.size).astype(np.int64)
    for d in np.flatnonzero(spent > budgets):
        raise ValueError(
            f"budgets[{d}] is {budgets[d]}, but level 0 of its units costs {spent[d]}: "
            f"{spent[d] - budgets[d]} is missing"
        )
    raise ValueError(
        f"total_budget is {int(total_budget)}, but level 0 of all units costs {spent.sum()}: "
        f"{spent.sum() - int(total_budget)} is missing"
    )


def _device_budgets(
    name: str, budgets: Any, device_of: Any, units_name: str, units: Any
) -> tuple[Any, Any]:
    """Both in int32; ValueError unless `budgets` [] or [G] are whole and `device_of` [U] fits them."""
    _axes.unsplit(**{name: budgets})
    checks.rank(name, budgets, (0, 1), "[] or [G]")
    checks.non_empty(name, budgets)
    budgets = checks.whole(name, budgets)
    if device_of is not None:
        checks.rank("device_of", device_of, 1, "[U]")
        checks.same_length("device_of", device_of, units_name, units)
        device_of = checks.index_below("device_of", device_of, np.size(budgets))
    elif np.size(budgets) > 1:
        raise ValueError(
            f"device_of is None, but {name} has {np.size(budgets)} entries: say which unit is where"
        )
    return budgets, device_of
