"""Threshold search on the bits of a key: behind whole amounts, ladders, water levels and tiles.

A threshold (a price, a water level, an index) is a uint32 key, and what is spent at a key only grows
with it. The search narrows a bracket around the key where the budget is met, each pass evaluating the
sum once: nothing is sorted, shapes never depend on data, and over a mesh a pass exchanges only the few
scalars that the sum needs. Non-negative float32 numbers order like their bits, so a search over keys
ends on one exact float. Passes halve the bracket or interpolate in it: 12 to 20 on smooth data, where
halving alone would take 31. What did not end by then is halved to its end, so that hostile data cost
`MOST_PASSES`.

Sums of int32 amounts must not wrap while a candidate is far too large: `total` returns uint32 that
saturates at 2^32 - 1 instead.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

INF_KEY = 0x7F800000  # the bits of float32 infinity
_SATURATED = 0xFFFFFFFF
_NEAR_WRAP = float(3 * 2**30)  # float32 sums are within 2^-3 of the truth long before 2^32
LEAST_WEIGHT = 2.0**-90  # of the largest: what a smaller one gets beside it does not show
_HALVINGS = 5  # before interpolating: a float's exponent is nothing to interpolate
_EVERY = 6  # and now and then, where interpolation keeps one end
_INTERPOLATED = 20  # passes, after which all are halvings
# Those 20 halve the 31 bits eight times at least: passes 0 to 4, 6, 12 and 18.
MOST_PASSES = _INTERPOLATED + 31 - (_HALVINGS + len(range(_EVERY, _INTERPOLATED, _EVERY)))


def to_key(x: jax.Array) -> jax.Array:
    """Order-preserving uint32 of float32 numbers; what is not above 0 becomes 0."""
    x = x.astype(jnp.float32)
    return jnp.where(x > 0, lax.bitcast_convert_type(x, jnp.uint32), jnp.uint32(0))


def from_key(key: jax.Array) -> jax.Array:
    """The float32 number that has this key."""
    return lax.bitcast_convert_type(key, jnp.float32)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent as float32, |exponent| <= 126."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def exponent_of(x: jax.Array) -> jax.Array:
    """floor(log2 x) of float32 numbers x >= 0, -127 for those that are not normal."""
    return (lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


def scale(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """x times 2^exponent, |exponent| <= 252: exact, where the result is a normal number."""
    half = exponent // 2
    return x * power_of_two(half) * power_of_two(exponent - half)


def normalize(w: jax.Array, top: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights scaled by a power of two that brings their largest, top, into [1, 2); and its exponent.

    Their sum then neither overflows nor vanishes. Where all are zero they count alike: ones. (Not
    w / top: compilers multiply by 1 / top, which is zero for the largest floats.)
    """
    bits = lax.bitcast_convert_type(jnp.where(top > 0, top, 1.0), jnp.uint32)
    exponent = 127 - (bits >> 23).astype(jnp.int32)
    return scale(jnp.where(top == 0, 1.0, w), exponent), exponent


def open_top(
    w: jax.Array,
    short: Callable[[jax.Array], jax.Array],
    most: Callable[[jax.Array], jax.Array],
    per_unit: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Largest weight [P] but for those of units that are at their caps for certain; 0 where all are 0.

    A unit gets nothing while one of 2^33 times its weight takes any. So where budget is left with all
    units down to 2^-57 of the largest weight at their caps, those down to 2^-24 of it surely are, and
    what lies below takes their place. Else no unit below 2^-90 of it, `LEAST_WEIGHT`, gets any.

    Args:
      w: [U] >= 0.
      short: thresholds [P] -> whether budget is left with units of at least these weights at their caps.
      most: of x [U] >= 0, the largest [P].
      per_unit: x [P] -> [U].
    """

    def step(carry):
        top, _ = carry
        following = most(jnp.where(w < per_unit(top * 2.0**-24), w, 0))
        down = short(top * 2.0**-57) & (following > 0)
        return jnp.where(down, following, top), jnp.any(down)

    top = most(w)
    return lax.while_loop(lambda carry: carry[1], step, step((top, True)))[0]


def excess(spent: jax.Array, budget: jax.Array) -> jax.Array:
    """spent - budget as float32; of uint32 numbers the sign and zero are exact."""
    over = (spent - budget).astype(jnp.float32)
    return jnp.where(spent > budget, over, -(budget - spent).astype(jnp.float32))


def largest(over: Callable[[jax.Array], jax.Array], top: int, shape: tuple[int, ...]) -> jax.Array:
    """Keys at which the budgets are met, all searched at once.

    Args:
      over: keys [*shape] uint32 -> float32 [*shape], what is spent at these keys less the budget;
        must not decrease with the key.
      top: exclusive bound of the keys, taken to be above the budget.
      shape: of the keys; for instance one per device.

    Returns:
      uint32 keys [*shape]: one that meets its budget exactly, if the search comes across it, else the
      largest with over(key) <= 0. 0 where even that is over. `over` is called once and then in each of
      at most `MOST_PASSES` passes.
    """

    def step(carry):
        i, low, high, f_low, f_high, side = carry
        width = high - low
        part = f_low / (f_low - f_high)
        inner = jnp.clip(width.astype(jnp.float32) * part, 1.0, 2.0**31).astype(jnp.uint32)
        halve = (i < _HALVINGS) | (i % _EVERY == 0) | (i >= _INTERPOLATED)
        move = jnp.where(halve, width // 2, jnp.minimum(inner, width - 1))
        middle = low + jnp.where(active(carry), move, 0)
        f = over(middle)
        up = f <= 0
        # Illinois: an end that stays twice in a row counts half, or it would stay for ever.
        again = jnp.where(halve | (up != side), 1.0, 0.5)
        return (
            i + 1,
            jnp.where(up, middle, low),
            jnp.where(up, high, middle),
            jnp.where(up, f, f_low * again),
            jnp.where(up, f_high * again, f),
            up,
        )

    def active(carry):
        _, low, high, f_low, _, _ = carry
        return (high - low > 1) & (f_low < 0)

    # Behind a barrier: nothing is below key 0, and XLA would fold the sum of those zeros for seconds.
    f_low = over(lax.optimization_barrier(jnp.zeros(shape, jnp.uint32)))
    # From the data, so that inside shard_map the carry varies over the mesh as the data does.
    low = jnp.where(f_low > 0, jnp.uint32(0), jnp.uint32(0))
    start = (jnp.int32(0), low, low + jnp.uint32(top), f_low, jnp.abs(f_low) + 1, f_low > 0)
    return lax.while_loop(lambda carry: jnp.any(active(carry)), step, start)[1]


def psum(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Sum over the mesh axis that the units are split over, if they are."""
    return x if axis_name is None else lax.psum(x, axis_name)


def segment_total(x: jax.Array, segment_of: jax.Array | None, num_segments: int) -> jax.Array:
    """Sums [P] of x [U] over its segments; one segment where `segment_of` is None."""
    if segment_of is None:
        return jnp.sum(x, dtype=x.dtype)[None]
    return jax.ops.segment_sum(x, segment_of, num_segments)


def total(
    x: jax.Array,
    segment_of: jax.Array | None,
    num_segments: int,
    axis_name: str | None,
    wraps: bool = True,
) -> jax.Array:
    """Exact sums [P] of whole numbers x [U] (uint32), saturating at 2^32 - 1.

    Where `may_wrap` said no of a bound on x, wraps=False leaves the check out: one pass over the units.
    """
    x = x.astype(jnp.uint32)
    exact = psum(segment_total(x, segment_of, num_segments), axis_name)
    if not wraps:
        return exact
    rough = psum(segment_total(x.astype(jnp.float32), segment_of, num_segments), axis_name)
    return jnp.where(rough >= _NEAR_WRAP, jnp.uint32(_SATURATED), exact)


def may_wrap(
    x: jax.Array, segment_of: jax.Array | None, num_segments: int, axis_name: str | None
) -> jax.Array:
    """Whether some sum of whole numbers x [U] comes near 2^32."""
    rough = psum(segment_total(x.astype(jnp.float32), segment_of, num_segments), axis_name)
    return jnp.any(rough >= _NEAR_WRAP)


def _saturating_add(a: jax.Array, b: jax.Array) -> jax.Array:
    return a + jnp.minimum(b, ~a)


def segment_most(
    x: jax.Array, segment_of: jax.Array | None, num_segments: int, axis_name: str | None
) -> jax.Array:
    """Largest [P] of numbers x [U] >= 0, 0 in a segment without units."""
    key = to_key(x)
    if segment_of is None:
        top = jnp.max(key)[None]
    else:
        top = jax.ops.segment_max(key, segment_of, num_segments)
    return from_key(top if axis_name is None else lax.pmax(top, axis_name))


def per_unit(per_segment: jax.Array, segment_of: jax.Array | None) -> jax.Array:
    """Each unit's entry of a [P] array (a scalar where there is one segment)."""
    return per_segment[0] if segment_of is None else per_segment[segment_of]


def before_shard(x: jax.Array, axis_name: str) -> jax.Array:
    """Sums of x [P] uint32 over the shards before this one, saturating at 2^32 - 1.

    In log2(G) steps, each of which sends the P numbers to one other shard (Hillis and Steele, 1986).
    """
    size = lax.axis_size(axis_name)

    def from_shard_before(x: jax.Array, distance: int) -> jax.Array:
        pairs = [(i, i + distance) for i in range(size - distance)]
        return lax.ppermute(x, axis_name, pairs)  # zeros where there is none before

    sums = from_shard_before(x, 1)
    distance = 1
    while distance < size:
        sums = _saturating_add(sums, from_shard_before(sums, distance))
        distance *= 2
    return sums


def first_by_index(
    amount: jax.Array,
    room: jax.Array,
    segment_of: jax.Array | None,
    axis_name: str | None,
) -> jax.Array:
    """How much of `amount` each unit gets when `room` is handed out in the order of the index.

    Args:
      amount: [U] uint32, what the units would take; zero for those that take no part.
      room: [P] uint32, what there is to hand out in each segment.
      segment_of: [U] the segment of each unit, or None for one segment.
      axis_name: mesh axis that the units are split over, in the order of the index: a shard hands out
        what those before it leave.

    Returns:
      given [U] uint32: all of `amount` before the cut, what is left of the room at the cut, 0 after.
    """
    num_units, num_segments = amount.shape[0], room.shape[0]
    index = jnp.arange(num_units, dtype=jnp.uint32)
    if axis_name is not None:
        taken = before_shard(total(amount, segment_of, num_segments, None), axis_name)
        room = room - jnp.minimum(taken, room)

    # Nothing to search where no segment has room and several takers: the usual case when priorities
    # differ.
    takers = segment_total((amount > 0).astype(jnp.uint32), segment_of, num_segments)
    contested = (room > 0) & (takers > 1)

    def before(cut: jax.Array) -> jax.Array:
        return jnp.where(index < per_unit(cut, segment_of), amount, jnp.uint32(0))

    def over(cut: jax.Array) -> jax.Array:
        spent = total(before(cut), segment_of, num_segments, None)
        return jnp.where(contested, excess(spent, room), 0.0)

    cut = largest(over, num_units + 1, (num_segments,))
    whole = before(jnp.where(contested, cut, 0))
    left = room - total(whole, segment_of, num_segments, None)
    next_taker = _first(amount - whole, index, segment_of, num_segments)
    at_cut = index == per_unit(next_taker, segment_of)
    return jnp.where(at_cut, jnp.minimum(amount, per_unit(left, segment_of)), whole)


def _first(left, index, segment_of, num_segments):
    """Smallest index [P] of a unit that has something left to take in each segment."""
    none = jnp.uint32(_SATURATED)
    candidates = jnp.where(left > 0, index, none)
    if segment_of is None:
        return jnp.min(candidates)[None]
    return jax.ops.segment_min(candidates, segment_of, num_segments)
