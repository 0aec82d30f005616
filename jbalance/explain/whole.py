"""Why `allocate.whole` gave each unit its amount: claims, and the budget that gives it one more."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jbalance import allocate, checks
from jbalance.explain._values import concrete
from jbalance.explain.ladder import NONE
from jbalance.types import IntegerAllocation, container

_BATCH = 64  # units whose budgets are searched for together


@container
class WholeReasons:
    """What each unit asked for, got and lacks.

    marginal <= the price of the unit's device <= last, but for units at their floor or cap: the min-max
    inequality of divisor methods (Balinski and Young, Fair Representation, 1982).
    """

    allocation: IntegerAllocation  # amounts, `binding` and prices
    asked: np.ndarray  # [U] int64, what it would take of a budget without end: its cap
    got: np.ndarray  # [U] int64
    marginal: np.ndarray  # [U] float32 its claim to one more, w / (amount + 1/2); 0 at its cap
    last: np.ndarray  # [U] float32 its claim to the last one, w / (amount - 1/2); inf of none
    next_budget: np.ndarray  # [U] int64, least budget of its device that gives it one more; NONE


def whole(
    w: ArrayLike,
    budget: ArrayLike,
    floor: ArrayLike = 0,
    cap: ArrayLike = checks.INT32_MAX,
    device_of: ArrayLike | None = None,
) -> WholeReasons:
    """Explain `allocate.whole` of the same arguments by Webster's method, unit by unit.

    Args:
      w: [U] importance, >= 0.
      budget: [] or [G] whole amount that each device shares among its units.
      floor: [U] or [] least amount of a unit.
      cap: [U] or [] greatest amount of a unit.
      device_of: [U] int in 0..G-1; None with one budget.

    Returns:
      `WholeReasons`, NumPy arrays. The next budget is found by solving again, 31 times for each unit:
      O(U^2).

    Raises:
      ValueError: as `allocate.whole`, or traced arguments.
    """
    concrete(w=w, budget=budget, floor=floor, cap=cap, device_of=device_of)
    out = allocate.whole(w, budget, floor, cap, device_of)
    amount = np.asarray(out.amount, np.int64)
    w = np.asarray(checks.non_negative("w", w))
    most = np.broadcast_to(np.asarray(cap, np.int64), amount.shape)
    with np.errstate(divide="ignore"):
        last = np.where(amount > 0, w / np.maximum(amount - 0.5, 0.5), np.inf)
    budget, floor, cap = (
        jnp.asarray(checks.whole(name, x), jnp.int32)
        for name, x in (("budget", budget), ("floor", floor), ("cap", cap))
    )
    owner = np.zeros(w.shape, np.int32) if device_of is None else np.asarray(device_of, np.int32)
    next_budget = _next_budgets(w, jnp.atleast_1d(budget), floor, cap, owner, out.amount)
    return WholeReasons(
        allocation=out,
        asked=most,
        got=amount,
        marginal=np.where(amount < most, w / (amount + 0.5), 0).astype(np.float32),
        last=last.astype(np.float32),
        next_budget=np.asarray(next_budget, np.int64),
    )


@jax.jit
def _next_budgets(w, budget, floor, cap, device_of, amount) -> jax.Array:
    """[U] int32: the amounts never fall as a budget grows, so halving finds where a unit's rises."""

    def gets_more(unit: jax.Array, of_device: jax.Array) -> jax.Array:
        changed = budget.at[device_of[unit]].set(of_device)
        return allocate.whole(w, changed, floor, cap, device_of).amount[unit] > amount[unit]

    def least(unit: jax.Array) -> jax.Array:
        def halve(_, ends):
            low, high = ends  # not enough, enough
            middle = low + (high - low) // 2
            enough = gets_more(unit, middle)
            return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

        most = jnp.int32(checks.INT32_MAX)
        _, high = lax.fori_loop(0, 31, halve, (budget[device_of[unit]], most))
        return jnp.where(gets_more(unit, most), high, NONE)

    return lax.map(least, jnp.arange(w.shape[0]), batch_size=_BATCH)
