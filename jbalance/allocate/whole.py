"""Apportionment: whole amounts that sum to the budget exactly, within a floor and a cap per unit.

`webster` hands out one unit of amount after the other to the largest w_i / (k_i + 1/2): a larger
budget never takes anything away. `largest_remainder` rounds the real shares instead: it stays within
one of them, but growing the budget by one can take one from a unit.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jbalance import _axes, checks
from jbalance import _search as search
from jbalance._water_fill import water_fill
from jbalance.allocate import _checks
from jbalance.types import Binding, IntegerAllocation, Status

# Largest budget whose real shares float32 still separates from the neighboring whole numbers.
LARGEST_REMAINDER_MAX = 2**22
_PARTS = 2**24  # into which the fine search divides that bracket
_STEPS_AROUND = 4  # float32 steps by which rounding can misplace the level of the coarse search


def whole(
    w: ArrayLike,
    budget: ArrayLike,
    floor: ArrayLike = 0,
    cap: ArrayLike = checks.INT32_MAX,
    device_of: ArrayLike | None = None,
    *,
    method: str = "webster",
    axis_name: str | None = None,
) -> IntegerAllocation:
    """Share whole budgets among units in proportion to w, exactly.

    Args:
      w: [U] importance, >= 0. A zero gets its floor only, unless all units of its device are zero
        (then they count alike); so does a denormal one. A weight below 2^-90 of its device's largest
        gets its floor until all larger ones are at their caps.
      budget: [] or [G] whole amount that each device shares among its units, 0..2^31-1. Count bytes in
        blocks.
      floor: [U] or [] least amount of a unit.
      cap: [U] or [] greatest amount of a unit.
      device_of: [U] int in 0..G-1; None with one budget.
      method: "webster" (monotone in the budget) or "largest_remainder" (within one of the real share;
        budgets up to 2^22).
      axis_name: mesh axis that the units are split over; the sums become psum.

    Returns:
      An `IntegerAllocation`: amounts that sum to min(budget, sum of caps) on each device; equal claims
      are served by index. Under jit, floors that do not fit on a device give status INFEASIBLE and are
      scaled down there by the same rule.

    Raises:
      ValueError: wrong shapes or dtypes, negative or NaN entries, a floor above its cap, floors above
        a budget (with the amount missing), an unknown method, a budget too large for the method.

    Reference: Balinski and Young, Fair Representation (1982); Fox, Operations Research 14 (1966).
    """
    _axes.unsplit(w=w, floor=floor, cap=cap, device_of=device_of)
    solve = checks.choice("method", method, ROUNDINGS)
    w, budget, floor, cap, device_of = _checks.whole_inputs(w, budget, floor, cap, device_of)
    if method == "largest_remainder" and checks.is_concrete(budget):
        checks.int_in_range("budget", budget, 0, LARGEST_REMAINDER_MAX)
    out = _rounded(w, budget, floor, cap, device_of, solve, axis_name)
    _checks.whole_feasible(out, w, budget, floor, device_of)
    return out


@functools.partial(jax.jit, static_argnames=("solve", "axis_name"))
def _rounded(w, budget, floor, cap, device_of, solve, axis_name) -> IntegerAllocation:
    """The parts that every rounding shares: degenerate weights, infeasible floors, the report."""
    w, budgets = jnp.asarray(w, jnp.float32), jnp.asarray(budget, jnp.uint32).reshape(-1)
    # No comparison holds of NaN.
    valid = (w >= 0) & (jnp.asarray(floor) >= 0) & (jnp.asarray(cap) >= jnp.asarray(floor))
    # Behind a barrier: XLA would spend seconds on folding the sums of scalars made as long as w.
    floor, cap = lax.optimization_barrier(
        tuple(jnp.broadcast_to(jnp.asarray(x, jnp.uint32), w.shape) for x in (floor, cap))
    )
    device_of = None if device_of is None else jnp.asarray(device_of)
    devices = Devices(device_of, budgets.shape[0], axis_name)

    bad = ~jnp.isfinite(devices.most(jnp.where(valid, w, jnp.inf))) | (jnp.asarray(budget) < 0)
    infeasible = devices.total(floor) > budgets
    scaled_down = devices.per_unit(infeasible)
    w, floor, cap = (
        jnp.where(scaled_down, floor.astype(jnp.float32), w),
        jnp.where(scaled_down, 0, floor),
        jnp.where(scaled_down, floor, cap),
    )
    scaled, floor = _open_weights(w, budgets, floor, cap, devices)
    cap = jnp.where(scaled > 0, cap, floor)
    amount = solve(scaled, budgets, floor, cap, devices)
    amount = jnp.where(devices.per_unit(devices.total(cap) <= budgets), cap, amount)
    at_floor = (amount == floor) & (floor > 0)
    binding = jnp.where(at_floor, Binding.FLOOR, Binding.PRICE)
    status = jnp.where(jnp.any(infeasible), Status.INFEASIBLE, Status.OK)
    next_claim = jnp.where(amount < cap, w / (amount.astype(jnp.float32) + 0.5), 0.0)
    return IntegerAllocation(
        amount=amount.astype(jnp.int32),
        price=devices.most(next_claim).reshape(jnp.shape(budget)),
        binding=jnp.where(amount >= cap, Binding.CAP, binding).astype(jnp.int32),
        slack=(budgets - devices.total(amount)).astype(jnp.int32).reshape(jnp.shape(budget)),
        status=jnp.where(jnp.any(bad), Status.INVALID, status).astype(jnp.int32),
    )


@dataclasses.dataclass(frozen=True)
class Devices:
    """Sums over the units of each device, and back."""

    device_of: jax.Array | None  # [U]
    number: int  # G
    axis_name: str | None

    def total(self, x: jax.Array) -> jax.Array:
        return search.total(x, self.device_of, self.number, self.axis_name)

    def per_unit(self, x: jax.Array) -> jax.Array:
        return search.per_unit(x, self.device_of)

    def most(self, x: jax.Array) -> jax.Array:
        """Largest of x [U] >= 0 on each device [G]."""
        return search.segment_most(x, self.device_of, self.number, self.axis_name)

    def first(self, amount: jax.Array, room: jax.Array) -> jax.Array:
        return search.first_by_index(amount, room, self.device_of, self.axis_name)


class Rounding(Protocol):
    """Real shares of whole budgets, rounded to whole amounts: an entry of `ROUNDINGS`."""

    def __call__(
        self,
        w: jax.Array,
        budgets: jax.Array,
        floor: jax.Array,
        cap: jax.Array,
        devices: Devices,
    ) -> jax.Array:
        """Amounts that sum to min(budget, sum of caps) on each device, within floor and cap.

        Args:
          w: [U] float32 >= 0, of which the largest of a device is in [1, 2); 0 gets its floor.
          budgets: [G] uint32, at least the sum of the floors there.
          floor: [U] uint32.
          cap: [U] uint32 >= floor.
          devices: sums and largest values over the units of each device (`total`, `most`), what the
            device of each unit has (`per_unit`), and amounts handed out by index (`first`).

        Returns:
          [U] uint32.
        """
        ...


def _open_weights(w, budgets, floor, cap, devices: Devices) -> tuple[jax.Array, jax.Array]:
    """w times a power of two a device that brings the largest into [1, 2), and the floors.

    Where weights are too far apart for float32 and the large ones are all at their caps, these are their
    floors, and their weights 0.
    """

    def short(threshold: jax.Array) -> jax.Array:
        full = jnp.where(w >= devices.per_unit(threshold), cap, floor)
        return devices.total(full) < budgets

    top = devices.per_unit(search.open_top(w, short, devices.most, devices.per_unit))
    scaled, _ = search.normalize(w, top)
    full = (w > top) & (top > 0)
    scaled = jnp.where((scaled >= search.LEAST_WEIGHT) & ~full, scaled, 0.0)
    return scaled, jnp.where(full, cap, floor)


def _webster(
    w: jax.Array, budgets: jax.Array, floor: jax.Array, cap: jax.Array, devices: Devices
) -> jax.Array:
    """Divisor greedy: k_i = round(mu w_i) at the level mu where the sum meets the budget.

    A coarse search in float32 brackets mu within a few float steps. Inside the bracket the crossings
    k + 1/2 = mu w_i are computed from exact products, so that their order is that of the greedy to
    about 2^-45, and a second search picks the cut; what still ties is served by index.
    """

    def rounded(key: jax.Array) -> jax.Array:
        k = jnp.floor(w * devices.per_unit(search.from_key(key)) + 0.5)
        return jnp.clip(_to_uint(k), floor, cap)

    shape = budgets.shape
    key = search.largest(
        lambda k: search.excess(devices.total(rounded(k)), budgets), search.INF_KEY, shape
    )
    low = search.from_key(jnp.where(key > _STEPS_AROUND, key - _STEPS_AROUND, 0))
    width = search.from_key(jnp.minimum(key + _STEPS_AROUND, search.INF_KEY - 1)) - low

    base, distance = _crossing(w, jnp.broadcast_to(devices.per_unit(low), w.shape))
    slope = w * devices.per_unit(width / _PARTS)

    def extra(part: jax.Array) -> jax.Array:
        past = slope * devices.per_unit(part.astype(jnp.float32)) - distance
        # Bounded, or base + steps of a unit far above its cap would wrap.
        steps = jnp.where(past >= 0, jnp.minimum(jnp.floor(past) + 1, 2.0**30), 0)
        return jnp.clip(base + _to_uint(steps), floor, cap)

    part = search.largest(lambda p: search.excess(devices.total(extra(p)), budgets), _PARTS, shape)
    amount = extra(part)
    tied = extra(part + 1) - amount
    return amount + devices.first(tied, budgets - devices.total(amount))


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
    head = high.astype(jnp.float32) * search.power_of_two(scale + 24)
    tail = (low & 0xFFFFFF).astype(jnp.float32) * search.power_of_two(scale)
    floor = jnp.floor(head)
    distance = (0.5 - (head - floor)) - tail
    past = distance <= 0
    return _to_uint(floor) + past, jnp.where(past, distance + 1.0, distance)


def _mantissa(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x = m 2^e with m a 24-bit uint32 (0 for what float32 cannot normalize)."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    exponent = (bits >> 23).astype(jnp.int32)
    m = jnp.where(exponent > 0, (bits & 0x7FFFFF) | 0x800000, 0)
    return m, exponent - 150


def _largest_remainder(
    w: jax.Array, budgets: jax.Array, floor: jax.Array, cap: jax.Array, devices: Devices
) -> jax.Array:
    """Round the real shares down, then give what is left to the largest remainders."""
    real = _real_shares(w, budgets, floor, cap, devices)
    # A hair below the share, so that rounding cannot hand out more than there is.
    base = jnp.clip(_to_uint(jnp.floor(real * (1 - 2.0**-23))), floor, cap)
    base = jnp.where(devices.per_unit(budgets) == 0, 0, base)
    key = search.to_key(jnp.where(base < cap, real - base.astype(jnp.float32), 0.0))
    left = budgets - devices.total(base)

    def reached(depth: jax.Array) -> jax.Array:
        return (key >= search.INF_KEY - devices.per_unit(depth)).astype(jnp.uint32)

    depth = search.largest(
        lambda d: search.excess(devices.total(reached(d)), left), search.INF_KEY, left.shape
    )
    # Over the threshold all get one; just below it, the first by index.
    above = reached(depth)
    tied = (reached(depth + 1) - above) * (base < cap)
    return base + above + devices.first(tied, left - devices.total(above))


def _real_shares(w, budgets, floor, cap, devices) -> jax.Array:
    """Water-filling of each device's budget [U]; an empty budget counts as one, and is cut above."""
    limits = jnp.maximum(budgets, 1).astype(jnp.float32)
    by_device = devices.device_of is not None
    return water_fill(
        w,
        jnp.sum(limits),
        floor,
        cap,
        segment_of=devices.device_of,
        segment_cap=limits if by_device else None,
        axis_name=devices.axis_name,
    ).amount


ROUNDINGS: dict[str, Rounding] = {"webster": _webster, "largest_remainder": _largest_remainder}
__all__ = ["LARGEST_REMAINDER_MAX", "ROUNDINGS", "Rounding", "whole"]
