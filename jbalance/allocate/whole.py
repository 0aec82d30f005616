"""Whole amounts that sum to the budget exactly, within a floor and a cap per unit.

`webster` hands out one unit of amount after the other to the largest w_i / (k_i + 1/2): a larger
budget never takes anything away. `largest_remainder` rounds the real shares instead: it stays within
one of them, but growing the budget by one can take one from a unit.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import checks
from jbalance.allocate import search
from jbalance.allocate.water_fill import water_fill
from jbalance.types import Binding, Rounding, Status, Whole

# Largest budget whose real shares float32 still separates from the neighbouring whole numbers.
LARGEST_REMAINDER_MAX = 2**22
_PARTS = 2**24  # into which the fine search divides that bracket
_STEPS_AROUND = 4  # float32 steps by which rounding can misplace the level of the coarse search


def whole(
    w: jax.Array,
    budget: jax.Array | int,
    floor: jax.Array | int = 0,
    cap: jax.Array | int = checks.INT32_MAX,
    *,
    method: str = "webster",
    axis_name: str | None = None,
) -> Whole:
    """Share a whole budget among units in proportion to w, exactly.

    Args:
      w: [U] importance, >= 0. A zero gets its floor only, unless all are zero (then all count alike);
        so does a weight below 2^-90 of the largest.
      budget: [] whole amount to share, 0..2^31-1. Count bytes in blocks.
      floor: [U] or [] least amount of a unit.
      cap: [U] or [] greatest amount of a unit.
      method: "webster" (monotone in the budget) or "largest_remainder" (within one of the real share;
        budgets up to 2^22).
      axis_name: mesh axis that the units are split over; the sums become psum.

    Returns:
      A `Whole`: amounts that sum to min(budget, sum of caps); equal claims are served by index. Under
      jit, floors that do not fit give status INFEASIBLE and are scaled down by the same rule.

    Raises:
      ValueError: wrong shapes or dtypes, negative or NaN entries, a floor above its cap, floors above
        the budget (with the amount missing), an unknown method, a budget too large for the method.

    Reference: Balinski and Young, Fair Representation (1982); Fox, Operations Research 14 (1966).
    """
    solve = checks.choice("method", method, ROUNDINGS)
    _check(w, budget, floor, cap)
    if method == "largest_remainder" and checks.is_concrete(budget):
        checks.in_range("budget", budget, 0, LARGEST_REMAINDER_MAX)
    out = _rounded(w, budget, floor, cap, solve, axis_name)
    if checks.is_concrete(out.status) and out.status != Status.OK:
        asked = int(np.broadcast_to(np.asarray(floor, np.int64), np.shape(w)).sum())
        raise ValueError(
            f"floor: the floors sum to {asked}, above budget = {int(budget)}: "
            f"{asked - int(budget)} is missing"
        )
    return out


def _check(w, budget, floor, cap) -> None:
    checks.rank("w", w, 1, "[U]")
    checks.non_empty("w", w)
    checks.non_negative("w", w)
    checks.rank("budget", budget, 0, "[]")
    checks.whole("budget", budget)
    for name, x in (("floor", floor), ("cap", cap)):
        checks.rank(name, x, (0, 1), "[] or [U]")
        if np.ndim(x):
            checks.same_length(name, x, "w", w)
        checks.whole(name, x)
    checks.not_above("floor", floor, "cap", cap)


@functools.partial(jax.jit, static_argnames=("solve", "axis_name"))
def _rounded(w, budget, floor, cap, solve, axis_name) -> Whole:
    """The parts that every rounding shares: degenerate weights, infeasible floors, the report."""
    w, budget = jnp.asarray(w, jnp.float32), jnp.asarray(budget, jnp.uint32)
    # Behind a barrier: XLA would spend seconds on folding the sums of scalars made as long as w.
    floor, cap = lax.optimization_barrier(
        tuple(jnp.broadcast_to(jnp.asarray(x, jnp.uint32), w.shape) for x in (floor, cap))
    )

    def total(x: jax.Array) -> jax.Array:
        return search.total(x, None, 1, axis_name)[0]

    infeasible = total(floor) > budget
    w, floor, cap = (
        jnp.where(infeasible, floor.astype(jnp.float32), w),
        jnp.where(infeasible, 0, floor),
        jnp.where(infeasible, floor, cap),
    )
    scaled = _normalise(w, axis_name)
    cap = jnp.where(scaled > 0, cap, floor)
    amount = solve(scaled, budget, floor, cap, total, axis_name)
    amount = jnp.where(total(cap) <= budget, cap, amount)
    next_price = jnp.max(jnp.where(amount < cap, w / (amount.astype(jnp.float32) + 0.5), 0.0))
    if axis_name is not None:
        next_price = lax.pmax(next_price, axis_name)
    binding = jnp.where(
        amount >= cap,
        Binding.CAP,
        jnp.where((amount == floor) & (floor > 0), Binding.FLOOR, Binding.PRICE),
    )
    status = jnp.where(infeasible, Status.INFEASIBLE, Status.OK).astype(jnp.int32)
    return Whole(
        amount=amount.astype(jnp.int32),
        price=next_price,
        binding=binding.astype(jnp.int32),
        slack=(budget - total(amount)).astype(jnp.int32),
        status=jnp.where(jnp.isfinite(next_price), status, jnp.int32(Status.INVALID)),
    )


def _normalise(w: jax.Array, axis_name: str | None) -> jax.Array:
    """w times a power of two, so that the largest is in [1, 2); exact, hence the same shares."""
    top = jnp.max(w)
    top = top if axis_name is None else lax.pmax(top, axis_name)
    w = jnp.where(top > 0, w, 1.0)
    top = jnp.where(top > 0, top, 1.0)
    bits = lax.bitcast_convert_type(top, jnp.uint32)
    exponent = (bits >> 23).astype(jnp.int32) - 127
    w = _scale(_scale(w, -(exponent // 2)), -(exponent - exponent // 2))
    return jnp.where(w >= 2.0**-90, w, 0.0)


def _scale(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """x times 2^exponent, |exponent| <= 126."""
    return x * lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _webster(w, budget, floor, cap, total, axis_name):
    """Divisor greedy: k_i = round(mu w_i) at the level mu where the sum meets the budget.

    A coarse search in float32 brackets mu within a few float steps. Inside the bracket the crossings
    k + 1/2 = mu w_i are computed from exact products, so that their order is that of the greedy to
    about 2^-45, and a second search picks the cut; what still ties is served by index.
    """

    def rounded(key: jax.Array) -> jax.Array:
        k = jnp.floor(w * search.from_key(key) + 0.5)
        return jnp.clip(_to_uint(k), floor, cap)

    key = search.largest(lambda k: search.excess(total(rounded(k)), budget), search.INF_KEY, ())
    low = search.from_key(jnp.where(key > _STEPS_AROUND, key - _STEPS_AROUND, 0))
    width = search.from_key(jnp.minimum(key + _STEPS_AROUND, search.INF_KEY - 1)) - low

    base, distance = _crossing(w, low)
    slope = w * (width / _PARTS)

    def extra(part: jax.Array) -> jax.Array:
        past = slope * part.astype(jnp.float32) - distance
        steps = jnp.where(past >= 0, jnp.floor(past) + 1, 0)
        return jnp.clip(base + _to_uint(steps), floor, cap)

    part = search.largest(lambda p: search.excess(total(extra(p)), budget), _PARTS, ())
    amount = extra(part)
    tied = extra(part + 1) - amount
    return amount + search.first_by_index(tied, (budget - total(amount))[None], None, axis_name)


def _to_uint(x: jax.Array) -> jax.Array:
    """Whole float32 numbers as uint32, saturating (the conversion itself is undefined past 2^32)."""
    return jnp.minimum(x, 2.0**31).astype(jnp.uint32)


def _crossing(w: jax.Array, level: jax.Array) -> tuple[jax.Array, jax.Array]:
    """round(level w) [U] uint32 and the exact distance in (0, 1] of level w to its next half.

    The product of two 24-bit mantissas has 48 bits: its two halves are exact float32 numbers, made
    from integer products of 12-bit limbs, so no rounding or fused multiply-add can disturb them.
    """
    (m, m_exp), (n, n_exp) = _mantissa(w), _mantissa(level)
    mid = (m >> 12) * (n & 0xFFF) + (m & 0xFFF) * (n >> 12)
    low = (m & 0xFFF) * (n & 0xFFF) + ((mid & 0xFFF) << 12)
    high = (m >> 12) * (n >> 12) + (mid >> 12) + (low >> 24)
    scale = jnp.clip(m_exp + n_exp, -126, 100)
    head = _scale(high.astype(jnp.float32), jnp.clip(scale + 24, -126, 126))
    tail = _scale((low & 0xFFFFFF).astype(jnp.float32), scale)
    floor = jnp.floor(head)
    distance = (0.5 - (head - floor)) - tail
    past = distance <= 0
    return _to_uint(floor) + past, jnp.where(past, distance + 1.0, distance)


def _mantissa(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x = m 2^e with m a 24-bit uint32 (0 for what float32 cannot normalise)."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    exponent = (bits >> 23).astype(jnp.int32)
    m = jnp.where(exponent > 0, (bits & 0x7FFFFF) | 0x800000, 0)
    return m, exponent - 150


def _largest_remainder(w, budget, floor, cap, total, axis_name):
    """Round the real shares down, then give what is left to the largest remainders."""
    del total
    real = water_fill(
        w, jnp.maximum(budget, 1).astype(jnp.float32), floor, cap, axis_name=axis_name
    )
    # A hair below the share, so that rounding cannot hand out more than there is.
    base = jnp.clip(_to_uint(jnp.floor(real.amount * (1 - 2.0**-23))), floor, cap)
    base = jnp.where(budget == 0, 0, base)
    remainder = jnp.where(base < cap, real.amount - base.astype(jnp.float32), 0.0)
    key = search.to_key(remainder)

    def count(x: jax.Array) -> jax.Array:
        return search.total(x.astype(jnp.uint32), None, 1, axis_name)[0]

    left = budget - count(base)
    # Over the threshold all get one; at it, the first by index.
    at = jnp.uint32(search.INF_KEY) - search.largest(
        lambda k: search.excess(count(key >= search.INF_KEY - k), left), search.INF_KEY, ()
    )
    above = (key >= at).astype(jnp.uint32)
    tied = (key == at - 1) & (base < cap)
    given = search.first_by_index(
        tied.astype(jnp.uint32), (left - count(above))[None], None, axis_name
    )
    return base + above + given


ROUNDINGS: dict[str, Any] = {"webster": _webster, "largest_remainder": _largest_remainder}
__all__ = ["LARGEST_REMAINDER_MAX", "ROUNDINGS", "Rounding", "whole"]
