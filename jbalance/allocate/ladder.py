"""Multiple-choice knapsack by Lagrange multipliers: a level of each unit's ladder under all budgets.

    maximize sum_i v_i,m(i)   subject to   sum_{i on d} c_i,m(i) <= B_d for every device d, sum <= B

The optimum is a price (METHOD section 4): each unit takes every step of its ladder's concave hull
whose value per cost is above its device's price. The prices come from one threshold search over all
devices at once, ties go by the unit's index, and what is taken in that order is nested: a larger
total budget, or larger device budgets without a total, only add steps. The price of a full device is
the reason given to the user.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jbalance import _axes
from jbalance import _search as search
from jbalance.allocate import _checks
from jbalance.allocate._hull import Hull, by_level, hull_of
from jbalance.types import Allocation, Binding, Status


def ladder(
    values: ArrayLike,
    costs: ArrayLike,
    budgets: ArrayLike,
    device_of: ArrayLike | None = None,
    *,
    total_budget: ArrayLike | None = None,
    axis_name: str | None = None,
    split_budgets: bool = False,
) -> Allocation:
    """Choose a level for every unit, worth the most under the budgets.

    With steps of equal cost the result is optimal; with unequal ones its value is within one step per
    budget of the relaxed optimum, and `gap` bounds by how much. The budgets are never exceeded.

    The value never falls as the total budget grows, nor as device budgets do without a total one or
    with steps of equal cost. Under a total budget that binds, a larger device budget may let in a
    steeper step of unequal cost that leaves more of the total unspent: the value then falls, by at most
    the `gap` of the result.

    Args:
      values: [U, M] finite worth of each level, in any one currency. Levels that are not on the
        concave hull of a unit's (cost, value) points are never chosen, nor are steps of no value.
      costs: [U, M], or [M] where it is the same for all units: whole costs in blocks, rising with the
        level; level 0 is what a unit cannot go below.
      budgets: [G] or [] whole budget of each device, in blocks, up to 2^31-1 (`resources.blocks`).
      device_of: [U] int in 0..G-1; None with one budget.
      total_budget: [] whole budget of all devices together, if it is less than their sum.
      axis_name: mesh axis that the units are split over; each pass then exchanges G scalars, or two
        for each where costs sum to nearly 2^32.
      split_budgets: budgets are split as the units are: [] is that of this shard, a device with the
        units that lie on it. Only a total budget then needs others, one scalar a pass.

    Returns:
      An `Allocation`. Under jit, level-0 costs that do not fit give status INFEASIBLE (all units at
      level 0), NaN or costs that do not rise give INVALID.

    Raises:
      ValueError: wrong shapes or dtypes, NaN, costs that do not rise, a device_of outside the budgets,
        level-0 costs above a budget (with the device and the amount missing); split_budgets without
        axis_name, or with more than one budget.

    Reference: Fox, Operations Research 14 (1966) for equal costs; Shih, J. Oper. Res. Soc. 30 (1979).
    """
    _axes.unsplit(values=values, costs=costs, device_of=device_of)
    values, costs, budgets, device_of, total_budget = _checks.ladder_inputs(
        values, costs, budgets, device_of, total_budget
    )
    if split_budgets and (axis_name is None or np.ndim(budgets) > 0):
        raise ValueError(
            f"split_budgets is True, axis_name {axis_name!r} and budgets of shape {np.shape(budgets)}: "
            f"name the axis, and give each shard its own budget []"
        )
    out = _solve(values, costs, budgets, device_of, total_budget, axis_name, split_budgets)
    _checks.ladder_feasible(out, values, costs, budgets, device_of, total_budget)
    return out


@functools.partial(jax.jit, static_argnames=("axis_name", "split_budgets"))
def _solve(values, costs, budgets, device_of, total_budget, axis_name, split_budgets) -> Allocation:
    values = jnp.asarray(values, jnp.float32)
    costs = jnp.asarray(costs, jnp.uint32)
    limits = _Limits.of(budgets, total_budget, device_of, axis_name, split_budgets)
    hull = hull_of(values, costs)
    base = limits.spent(_cost_at(costs, jnp.zeros(values.shape[0], jnp.uint32)))
    level, price, total_price = _levels(hull, base, limits)
    rising = jnp.all(costs[..., 1:] > costs[..., :-1]) & jnp.all(jnp.isfinite(values))
    failed = jnp.stack([base.above(limits), limits.negative | ~rising]).astype(jnp.int32)
    infeasible, invalid = search.psum(failed, axis_name) > 0
    level = jnp.where(infeasible, 0, level)
    spent = limits.spent(_cost_at(costs, level))
    return _report(hull, level, spent, price, total_price, limits, infeasible, invalid)


@dataclasses.dataclass(frozen=True)
class _Spent:
    """Costs of some levels, summed as the budgets are."""

    device: jax.Array  # [G] uint32
    total: jax.Array | None  # [1] uint32 of all devices; None without a total budget

    def above(self, limits: _Limits) -> jax.Array:
        """Whether a budget is exceeded."""
        exceeded = jnp.any(self.device > limits.device)
        if self.total is not None and limits.total is not None:
            exceeded |= jnp.any(self.total > limits.total)
        return exceeded


@dataclasses.dataclass(frozen=True)
class _Limits:
    """The budgets, and whose units each is of."""

    device: jax.Array  # [G] uint32
    total: jax.Array | None  # [1] uint32
    negative: jax.Array  # [] bool, whether one was negative
    device_of: jax.Array | None
    device_axis: str | None  # over which a device's units lie: none where each shard is a device
    axis_name: str | None

    @classmethod
    def of(cls, budgets, total_budget, device_of, axis_name, split_budgets) -> _Limits:
        negative, limit = jnp.any(jnp.asarray(budgets) < 0), None
        if total_budget is not None:
            negative |= jnp.asarray(total_budget) < 0
            limit = jnp.asarray(total_budget, jnp.uint32)[None]
        device = jnp.atleast_1d(jnp.asarray(budgets, jnp.uint32))
        device_of = None if device_of is None else jnp.asarray(device_of)
        device_axis = None if split_budgets else axis_name
        return cls(device, limit, negative, device_of, device_axis, axis_name)

    def spent(self, cost: jax.Array) -> _Spent:
        """Of the units' costs [U] uint32."""
        total = None if self.total is None else search.total(cost, None, 1, self.axis_name)
        number = self.device.shape[0]
        return _Spent(search.total(cost, self.device_of, number, self.device_axis), total)

    def over_shards(self) -> str | None:
        """The axis over which the devices' results are split, or None."""
        return None if self.device_axis == self.axis_name else self.axis_name


def _levels(hull: Hull, base: _Spent, limits: _Limits):
    """Levels [U], and the prices [G] of the devices' budgets and [1] of the total one."""
    devices = limits.device_of, limits.device.shape[0], limits.device_axis
    level = _climb(hull, _left(limits.device, base.device), limits.device_of, limits.device_axis)
    price = _next_slope(hull.slope, level, *devices)
    if limits.total is None or base.total is None:
        return level, price, jnp.zeros((1,), jnp.float32)
    # What its device cannot hold is no candidate for the total budget.
    within = jnp.arange(hull.slope.shape[0])[:, None] < level
    affordable = dataclasses.replace(hull, slope=jnp.where(within, hull.slope, 0.0))
    level = _climb(affordable, _left(limits.total, base.total), None, limits.axis_name)
    return level, price, _next_slope(affordable.slope, level, None, 1, limits.axis_name)


def _left(limit: jax.Array, spent: jax.Array) -> jax.Array:
    return limit - jnp.minimum(spent, limit)


def _report(hull, level, spent, price, total_price, limits, infeasible, invalid) -> Allocation:
    """What was chosen, with the prices, the slack, the gap to the relaxed optimum and the reasons."""
    slack = _left(limits.device, spent.device)
    # The price of the total budget, and on top of it what each device's own budget adds.
    above = jnp.maximum(price - total_price, 0.0)
    shards = limits.over_shards()
    gap = search.psum(jnp.sum(above * slack), shards)
    if limits.total is not None:
        total_slack = (limits.total - spent.total)[0]
    else:
        total_slack = search.total(slack, None, 1, shards)[0]
    next_slope = _slope_at(hull.slope, level)
    binding = jnp.where(next_slope > total_price[0], Binding.DEVICE, Binding.PRICE)
    status = jnp.where(infeasible, Status.INFEASIBLE, Status.OK)
    return Allocation(
        level=level.astype(jnp.int32),
        spent=spent.device,
        price=total_price + above,
        total_price=total_price[0],
        slack=slack,
        total_slack=total_slack,
        gap=jnp.where(infeasible, jnp.inf, gap + total_price[0] * total_slack),
        binding=jnp.where(next_slope > 0, binding, Binding.CAP).astype(jnp.int32),
        status=jnp.where(invalid, Status.INVALID, status).astype(jnp.int32),
    )


def _cost_at(costs: jax.Array, level: jax.Array) -> jax.Array:
    """What each unit [U] costs at its level."""
    if costs.ndim == 1:
        return costs[level]
    return jnp.take_along_axis(costs, level[:, None], axis=1)[:, 0]


def _climb(hull: Hull, room: jax.Array, device_of, axis_name) -> jax.Array:
    """Levels [U] reached by taking the steps of positive slope in their order while room [P] lasts."""
    key = search.to_key(hull.slope)
    blocks = list(zip(by_level(key), by_level(hull.cost), strict=True))

    def cost_where(chosen: Callable[[jax.Array], jax.Array]) -> jax.Array:
        parts = [jnp.sum(jnp.where(chosen(k), c, 0), 0, jnp.uint32) for k, c in blocks]
        return functools.reduce(jnp.add, parts)

    def spent(threshold: jax.Array, wraps: bool = True) -> jax.Array:
        cost = cost_where(lambda k: k >= threshold)
        return search.total(cost, device_of, room.shape[0], axis_name, wraps)

    def threshold_at(depth: jax.Array) -> jax.Array:
        return search.per_unit(search.INF_KEY - depth, device_of)

    def depth_met(wraps: bool) -> jax.Array:
        def over(depth: jax.Array) -> jax.Array:
            return search.excess(spent(threshold_at(depth), wraps), room)

        return search.largest(over, search.INF_KEY, room.shape)

    # Only if all of it together would not wrap can the passes do without the check.
    everything = cost_where(lambda k: k > 0)
    wraps = search.may_wrap(everything, device_of, room.shape[0], axis_name)
    depth = lax.cond(wraps, lambda: depth_met(True), lambda: depth_met(False))
    threshold = threshold_at(depth)

    def is_tied(key: jax.Array) -> jax.Array:
        return (key == threshold - 1) & (key > 0)

    left = room - spent(threshold, wraps=False)  # within the room, so it cannot wrap
    given = search.first_by_index(cost_where(is_tied), left, device_of, axis_name)
    climbed = jnp.cumsum(jnp.where(is_tied(key), hull.cost, 0), axis=0, dtype=jnp.uint32)
    reached = (key >= threshold) | (is_tied(key) & hull.corner & (climbed <= given))
    number = jnp.arange(1, key.shape[0] + 1, dtype=jnp.uint32)[:, None]
    return jnp.max(jnp.where(reached, number, 0), axis=0)


def _slope_at(slope: jax.Array, level: jax.Array) -> jax.Array:
    """Slope [U] of each unit's next step, 0 where there is none worth taking."""
    number = jnp.arange(slope.shape[0], dtype=jnp.uint32)[:, None]
    following = jnp.where(number == level, jnp.maximum(slope, 0.0), 0.0)
    return functools.reduce(jnp.add, [jnp.sum(block, axis=0) for block in by_level(following)])


def _next_slope(slope, level, device_of, num_segments, axis_name) -> jax.Array:
    """The steepest step [P] that was not taken: what one more unit of cost would be worth."""
    return search.segment_most(_slope_at(slope, level), device_of, num_segments, axis_name)
