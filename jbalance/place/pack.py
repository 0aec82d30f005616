"""LPT with tabu search: units to devices, one place each, refined by swaps and moves."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jbalance._bits import in_32_bits
from jbalance.place._backtrack import within_limits
from jbalance.place._exchange import Problem, exchange
from jbalance.place._inputs import (
    ROUNDING,
    check_capacity,
    check_loads,
    check_max_count,
    check_memory,
    check_swaps,
    scale_of,
    status,
    with_empty,
)
from jbalance.place._longest_first import longest_first
from jbalance.place.bound import largest_term, of_units
from jbalance.place.types import Placement


@in_32_bits
def pack(
    loads: ArrayLike,
    num_devices: int,
    capacity: ArrayLike | None = None,
    *,
    max_count: int | None = None,
    memory: ArrayLike | None = None,
    memory_capacity: ArrayLike | None = None,
    swaps: int = 128,
) -> Placement:
    """Place units on devices so that the largest load relative to capacity is small.

    Longest-processing-time first: the units in order of falling load, each to the device that it
    fills least. Then exchanges of two units (or moves of one) between the fullest device and
    another, the best one at a time, also where none helps at once; the best placement on the way is
    returned. With memory, what exceeds a device's is mended before any load is looked at. Where a
    capacity or memory is still exceeded and need not be for all that is known, a depth-first search of
    8192 steps looks for a placement that keeps them, which is then refined.

    Args:
      loads: [U] >= 0, in any unit; for instance seconds of compute.
      num_devices: G.
      capacity: [G] > 0 in the unit of the loads; None: all alike, and nothing is too much. With
        rates (load per second) the relative load is the time that a step takes.
      max_count: most units on one device (ceil(U / G) for equal counts); None: any number.
      memory: [U] >= 0, what each unit needs of `memory_capacity`.
      memory_capacity: [G] > 0 in the unit of memory, never knowingly exceeded; with `memory`.
      swaps: exchanges that are tried; 0 for longest first alone, without any search.

    Returns:
      A `Placement`; status INFEASIBLE if a device holds more than its capacity or its memory (of many
      units the search may miss a placement that fits), INVALID for NaN or negative loads under
      jit.

    Raises:
      ValueError: loads negative or NaN, capacity not positive or of the wrong length, more units
        than num_devices * max_count, memory without memory_capacity.

    References: Graham, SIAM J. Applied Math. 17 (1969); Glover, ORSA J. Computing 1 (1989).
    """
    loads, num_devices = check_loads(loads, num_devices)
    capacity = check_capacity(capacity, num_devices)
    max_count = check_max_count(max_count, np.shape(loads)[0], num_devices)
    memory, memory_capacity = check_memory(memory, memory_capacity, loads, num_devices)
    swaps = check_swaps(swaps)
    return _pack(loads, capacity, memory, memory_capacity, num_devices, max_count, swaps)


@functools.partial(jax.jit, static_argnames=("num_devices", "max_count", "swaps"))
def _pack(loads, capacity, memory, room, num_devices, max_count, swaps) -> Placement:
    loads = jnp.asarray(loads, jnp.float32)
    limits = None if capacity is None else jnp.asarray(capacity, jnp.float32)
    capacity = jnp.ones(num_devices) if limits is None else limits
    scale = scale_of(loads, capacity)
    problem = Problem(with_empty(loads / scale), 1 / capacity, jnp.zeros(num_devices))
    order = jnp.argsort(-loads, stable=True).astype(jnp.int32)
    if memory is not None:
        memory, room = jnp.asarray(memory, jnp.float32), jnp.asarray(room, jnp.float32)
        shares = memory / jnp.mean(room)
        problem = dataclasses.replace(
            problem, memory=with_empty(shares), room=room / jnp.mean(room)
        )
        # What is large in either way comes first, while there is room for it.
        order = jnp.argsort(-jnp.maximum(loads / scale, shares), stable=True).astype(jnp.int32)
    places = loads.shape[0] if max_count is None else max_count
    device, place = longest_first(problem, order, places, copies=False)
    device_of = jnp.zeros(loads.shape, jnp.int32).at[order].set(device)
    place_of = jnp.zeros(loads.shape, jnp.int32).at[order].set(place)
    terms = of_units(loads, capacity, max_count)
    if swaps:
        target = largest_term(terms).value / scale

        def refined(device_of, place_of):
            return refine(problem, device_of, place_of, max_count, swaps, target)

        if limits is None and memory is None:
            device_of = refined(device_of, place_of)
        else:
            hard = _Limits.of(loads, limits, memory, room, places)
            device_of = hard.kept(refined, device_of, place_of, order)
    return placement(loads, capacity, limits, memory, room, device_of, terms)


def refine(problem, device_of, place_of, max_count, swaps, target):
    """device_of [U] after the best of `swaps` exchanges.

    The first places of every device take part, at least twice as many as units there are on
    average. What lies in the others, where counts are very uneven, are its smallest units: they
    stay.
    """
    num_units, num_devices = device_of.shape[0], problem.per_capacity.shape[0]
    places = min(num_units, 2 * -(-num_units // num_devices) + 8)
    places = places if max_count is None else min(places, max_count)
    units = jnp.arange(num_units, dtype=jnp.int32)
    grid = jnp.full((num_devices, places), num_units, jnp.int32)
    grid = grid.at[device_of, place_of].set(units, mode="drop")
    outside = place_of >= places

    def of_outside(x):
        return jax.ops.segment_sum(jnp.where(outside, x[:-1], 0), device_of, num_devices)

    rest = {"base": problem.base + of_outside(problem.load)}
    if problem.memory is not None:
        rest["room"] = problem.room - of_outside(problem.memory)
    grid, _ = exchange(dataclasses.replace(problem, **rest), grid, swaps, target, copies=False)
    rows = jnp.broadcast_to(jnp.arange(num_devices, dtype=jnp.int32)[:, None], grid.shape)
    return device_of.at[grid].set(rows, mode="drop")


@dataclasses.dataclass(frozen=True)
class _Limits:
    """What devices hold at most of the capacity and the memory that were given."""

    sizes: jax.Array  # [U, R]
    limits: jax.Array  # [G, R]
    max_count: int

    @classmethod
    def of(cls, loads, limits, memory, room, max_count) -> _Limits:
        given = [pair for pair in ((loads, limits), (memory, room)) if pair[1] is not None]
        sizes, limits = (jnp.stack(x, axis=1) for x in zip(*given, strict=True))
        return cls(sizes, limits, max_count)

    def exceeded(self, device_of: jax.Array) -> jax.Array:
        """Whether a device holds more."""
        held = jax.ops.segment_sum(self.sizes, device_of, self.limits.shape[0])
        return jnp.any(held > self.limits * (1 + ROUNDING))

    def kept(self, refined, device_of, place_of, order) -> jax.Array:
        """`refined` device_of [U], from one that backtracking finds where the first exceeds a limit."""
        # Nothing to search where all of it, or one unit alone, is too much.
        most = self.limits * (1 + ROUNDING)
        hopeful = jnp.all(jnp.sum(self.sizes, axis=0) <= jnp.sum(most, axis=0))
        hopeful &= jnp.all(jnp.max(self.sizes, axis=0) <= jnp.max(most, axis=0))

        def attempt(carry):
            i, device_of, place_of, _ = carry
            device_of = refined(device_of, place_of)
            needed = hopeful & (i == 0) & self.exceeded(device_of)
            sizes = self.sizes[order]
            mended, found = within_limits(
                sizes, self.limits, self.max_count, device_of[order], needed
            )
            device_of = jnp.zeros_like(device_of).at[order].set(mended)
            return i + 1, device_of, _place_of(device_of, self.limits.shape[0]), found

        start = (jnp.int32(0), device_of, place_of, jnp.array(True))
        return lax.while_loop(lambda carry: carry[-1], attempt, start)[1]


def _place_of(device_of: jax.Array, num_devices: int) -> jax.Array:
    """[U] int32: how many units before it are on the same device."""
    count = jax.ops.segment_sum(jnp.ones_like(device_of), device_of, num_devices)
    begin = jnp.cumsum(count) - count
    order = jnp.argsort(device_of, stable=True)
    rank = jnp.arange(device_of.size, dtype=jnp.int32) - begin[device_of[order]]
    return jnp.zeros_like(device_of).at[order].set(rank)


def placement(loads, capacity, limits, memory, room, device_of, terms) -> Placement:
    """The placement of units at device_of [U]; `limits` is the capacity if it is one."""
    num_devices = capacity.shape[0]
    load = jax.ops.segment_sum(loads, device_of, num_devices)
    relative = jnp.max(load / capacity)
    over = jnp.array(False) if limits is None else relative > 1 + ROUNDING
    if memory is not None:
        used = jax.ops.segment_sum(memory, device_of, num_devices)
        over |= jnp.any(used > room * (1 + ROUNDING))
    least = largest_term(terms)
    return Placement(
        device_of=device_of,
        load=load,
        count=jax.ops.segment_sum(jnp.ones_like(device_of), device_of, num_devices),
        relative_load=relative,
        bound=least.value,
        term=least.term,
        status=status(over, loads, limits, memory, room, relative),
    )
