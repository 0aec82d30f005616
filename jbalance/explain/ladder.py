"""Why `allocate.ladder` gave each unit its level: shadow prices, complementary slackness, what if.

The allocation takes the steps of all ladders in one order, steepest first and ties by index, so the
budget at which a unit gets its next step is what the steps before it cost, and its own. All sums are
exact: int64 on the host.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbalance import allocate, checks
from jbalance.allocate._checks import ladder_inputs
from jbalance.allocate._hull import hull_of
from jbalance.explain._values import concrete
from jbalance.types import Allocation, container

NONE = -1  # in place of a budget, where none is enough


@container
class LadderReasons:
    """What each unit asked for, got and lacks; costs and budgets in the unit of `costs`.

    Complementary slackness, where all steps of the hulls cost the same: marginal <= the price of the
    unit's device <= last, and of a budget that has a price less than a step is left. With unequal costs
    a step may not fit where cheaper ones would, and `bound` less `value` says what that leaves open.
    """

    allocation: Allocation  # levels, `binding` and prices
    asked: np.ndarray  # [U] int64, cost of all steps that have a value
    got: np.ndarray  # [U] int64, cost of its level
    marginal: np.ndarray  # [U] float32 value per cost of its next step; 0 if it wants no more
    last: np.ndarray  # [U] float32 value per cost of its last step; inf at level 0
    next_cost: np.ndarray  # [U] int64 of its next step; 0 if it wants no more
    next_budget: np.ndarray  # [U] int64, least budget of its device that holds the step; NONE
    next_total: np.ndarray  # [U] int64, least total budget that does besides; NONE
    value: float  # of all levels
    bound: float  # no choice of levels is worth more: the dual at these prices


def ladder(
    values: ArrayLike,
    costs: ArrayLike,
    budgets: ArrayLike,
    device_of: ArrayLike | None = None,
    *,
    total_budget: ArrayLike | None = None,
) -> LadderReasons:
    """Explain `allocate.ladder` of the same arguments, unit by unit.

    A unit takes its next step iff its device's budget is at least `next_budget` and the total one at
    least `next_total`, the other devices' budgets being as they are. Steps go along the concave hull, so
    one may lead over several levels.

    Args:
      values: [U, M] worth of each level.
      costs: [U, M] or [M] whole costs, rising with the level.
      budgets: [G] or [] whole budget of each device.
      device_of: [U] int in 0..G-1; None with one budget.
      total_budget: [] whole budget of all devices together; None for their sum.

    Returns:
      `LadderReasons`, NumPy arrays; O(U M log(U M)) on the host.

    Raises:
      ValueError: as `allocate.ladder`, or traced arguments.
    """
    concrete(
        values=values,
        costs=costs,
        budgets=budgets,
        device_of=device_of,
        total_budget=total_budget,
    )
    out = allocate.ladder(values, costs, budgets, device_of, total_budget=total_budget)
    values, costs, budgets, device_of, total_budget = ladder_inputs(
        values, costs, budgets, device_of, total_budget
    )
    values, level = np.asarray(values), np.asarray(out.level)
    costs = np.broadcast_to(np.asarray(costs, np.int64), values.shape)
    budgets = np.atleast_1d(np.asarray(budgets, np.int64))
    owner = np.zeros(len(values), int) if device_of is None else np.asarray(device_of)
    hull = _hull(jnp.asarray(values), jnp.asarray(costs, jnp.uint32))
    slope, corner = (np.asarray(x).T for x in (hull.slope, hull.corner))
    unit, wanted = np.arange(len(values)), (slope > 0).sum(axis=1)
    wants = level < wanted
    following = _next_corner(corner, level)
    steps = np.pad(slope, ((0, 0), (1, 1)), constant_values=((0, 0), (np.inf, 0)))
    held = allocate.ladder(values, costs, budgets, device_of).level  # without a total budget
    least = _least_budgets(slope, costs, owner, budgets.size, np.asarray(held))
    alone, together = (np.where(wants, x[unit, following - 1], NONE) for x in least)
    value = float(values.astype(np.float64)[unit, level].sum())
    return LadderReasons(
        allocation=out,
        asked=costs[unit, wanted],
        got=costs[unit, level],
        marginal=np.where(wants, steps[unit, level + 1], 0).astype(np.float32),
        last=steps[unit, level].astype(np.float32),
        next_cost=np.where(wants, costs[unit, following] - costs[unit, level], 0),
        next_budget=alone,
        next_total=np.full_like(together, NONE) if total_budget is None else together,
        value=value,
        bound=_dual(values, costs, budgets, owner, total_budget, out),
    )


_hull = jax.jit(hull_of)


def _next_corner(corner: np.ndarray, level: np.ndarray) -> np.ndarray:
    """[U] the next level on the hull, by corner [U, M-1]; the last level behind it."""
    number = np.arange(1, corner.shape[1] + 1)
    above = np.where(corner & (number > level[:, None]), number, corner.shape[1])
    return above.min(axis=1)


def _least_budgets(slope, costs, owner, num_devices, held) -> tuple[np.ndarray, np.ndarray]:
    """[U, M-1] the least budget of its device, and the least total, at which each step is taken.

    Of the other devices' steps only those count towards a total that they hold, up to level held [U];
    where a device holds a step, it holds all that come before it.
    """
    cost = np.where(slope > 0, np.diff(costs, axis=1), 0)
    unit, step = (x.ravel() for x in np.indices(slope.shape))
    # Steepest first, ties by the unit's index, and a unit's steps from below.
    order = np.lexsort((step, unit, -slope.ravel()))
    cost, device = cost.ravel()[order], owner[unit[order]]
    counted = np.where(step[order] < held[unit[order]], cost, 0)
    base = np.bincount(owner, costs[:, 0], num_devices).astype(np.int64)
    alone = np.zeros_like(cost)
    together = base.sum() + np.cumsum(counted)
    for d in range(num_devices):
        own = device == d
        before = np.cumsum(cost[own])
        alone[own] = base[d] + before
        together[own] += before - np.cumsum(counted[own])
    back = np.empty_like(order)
    back[order] = np.arange(order.size)
    return alone[back].reshape(slope.shape), together[back].reshape(slope.shape)


def _dual(values, costs, budgets, owner, total_budget, out: Allocation) -> float:
    """What no levels within the budgets exceed: sum_i max_m (v - price c) + sum_d price_d B_d."""
    price, total_price = (np.asarray(x, np.float64) for x in (out.price, out.total_price))
    best = (values.astype(np.float64) - price[owner][:, None] * costs).max(axis=1).sum()
    total = 0 if total_budget is None else float(total_price) * int(total_budget)
    return float(best + (price - total_price) @ budgets + total)


class WhatIf(NamedTuple):
    """What other budgets would change; all under jit too."""

    before: Allocation
    after: Allocation
    change: jax.Array  # [] float32 value after less value before: solved again
    first_order: (
        jax.Array
    )  # [] float32 of the value, by the prices: change <= first_order + before.gap


def what_if(
    values: ArrayLike,
    costs: ArrayLike,
    budgets: ArrayLike,
    change: ArrayLike,
    device_of: ArrayLike | None = None,
    *,
    total_budget: ArrayLike | None = None,
    total_change: ArrayLike = 0,
) -> WhatIf:
    """What budgets that are larger or smaller would change: exactly by solving again, and by the prices.

    The value is concave in the budgets but for whole steps, so to first order, by the price of each
    budget, it never rises by less than it does exactly, up to the gap.

    Args:
      values: [U, M] worth of each level.
      costs: [U, M] or [M] whole costs, rising with the level.
      budgets: [G] or [] whole budget of each device.
      change: [G] or [] whole, what is added to them, of any sign.
      device_of: [U] int in 0..G-1; None with one budget.
      total_budget: [] whole budget of all devices together; None for their sum.
      total_change: [] whole, what is added to it.

    Returns:
      `WhatIf`.

    Raises:
      ValueError: as `allocate.ladder`, before or after; budgets below 0 or above 2^31-1 after the
        change; a total_change without a total budget.
    """
    checks.rank("budgets", budgets, (0, 1), "[] or [G]")
    checks.rank("change", change, (0, 1), "[] or [G]")
    if np.shape(change) != np.shape(budgets):
        raise ValueError(
            f"change has shape {np.shape(change)}: it must be that of budgets, {np.shape(budgets)}"
        )
    more = _changed("budgets", budgets, "change", change)
    if total_budget is None:
        checks.one_int("total_change", total_change, 0, 0)
    else:
        total_change = checks.one_int("total_change", total_change)
    changed = (
        None
        if total_budget is None
        else _changed("total_budget", total_budget, "total_change", total_change)
    )
    before = allocate.ladder(values, costs, budgets, device_of, total_budget=total_budget)
    after = allocate.ladder(values, costs, more, device_of, total_budget=changed)
    levels = jnp.stack([before.level, after.level], axis=1)
    worth = jnp.take_along_axis(jnp.asarray(values, jnp.float32), levels, axis=1)
    above = (before.price - before.total_price) * jnp.asarray(change, jnp.float32)
    first_order = jnp.sum(above) + before.total_price * jnp.asarray(total_change, jnp.float32)
    return WhatIf(before, after, jnp.sum(worth[:, 1] - worth[:, 0]), first_order)


def _changed(name: str, budget: Any, change_name: str, change: Any) -> Any:
    """budget + change in int32; ValueError where that is below 0 or above 2^31-1."""
    change = checks.int_in_range(change_name, change)
    budget = checks.whole(name, budget)
    if not checks.is_concrete(budget, change):
        return jnp.asarray(budget) + jnp.asarray(change)
    summed = np.asarray(budget, np.int64) + np.asarray(change, np.int64)
    return checks.whole(f"{name} + {change_name}", summed)
