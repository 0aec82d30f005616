"""Replacement with hysteresis: move units under new loads only where it is worth what it moves."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbalance import _axes, checks
from jbalance import _search as search
from jbalance._bits import in_32_bits
from jbalance.place import _copies
from jbalance.place._exchange import Problem
from jbalance.place._inputs import (
    check_capacity,
    check_loads,
    check_max_count,
    check_swaps,
    scale_of,
    with_empty,
)
from jbalance.place.bound import largest_term, of_units
from jbalance.place.pack import placement, refine
from jbalance.place.types import Placement, Rebalanced
from jbalance.types import Status


@in_32_bits
def rebalance(
    device_of: ArrayLike,
    loads: ArrayLike,
    size: ArrayLike,
    num_devices: int,
    capacity: ArrayLike | None = None,
    *,
    max_count: int | None = None,
    memory_capacity: ArrayLike | None = None,
    cost: ArrayLike = 0.0,
    threshold: ArrayLike = 0.05,
    swaps: int = 128,
) -> Rebalanced:
    """Exchange units of a placement under new loads where that is worth what it moves.

    From the placement as it is, the exchanges of `pack` are made; the best placement on the way is
    that of least relative load + cost * what has moved. It replaces the old one only if it is
    better by more than the threshold, so that noise in the loads moves nothing.

    Args:
      device_of: [U] int in 0..G-1, where the units are.
      loads: [U] >= 0, as they now are.
      size: [U] whole, what moving each unit moves, in blocks (`resources.blocks`).
      num_devices: G.
      capacity: [G] > 0, as for `pack`.
      max_count: as for `pack`; what holds more already is not brought below it.
      memory_capacity: [G] whole blocks that each device has for the units; None: enough.
      cost: [] >= 0, of moving a block, in the unit of the relative load: seconds a block over the
        steps until the next time, where relative load is seconds a step.
      threshold: [] >= 0, the part of the relative load that must be gained.
      swaps: exchanges that are tried.

    Returns:
      `Rebalanced` with a `Placement`.

    Raises:
      ValueError: as `pack`, and sizes that are not whole, a device_of outside of the devices, cost
        or threshold negative.
    """
    loads, num_devices = check_loads(loads, num_devices)
    _axes.unsplit(device_of=device_of, size=size)
    checks.rank("device_of", device_of, 1, "[U]")
    checks.same_length("device_of", device_of, "loads", loads)
    device_of = checks.index_below("device_of", device_of, num_devices)
    capacity = check_capacity(capacity, num_devices)
    max_count = check_max_count(max_count, np.shape(loads)[0], num_devices)
    memory_capacity = check_capacity(memory_capacity, num_devices, "memory_capacity")
    size, cost, threshold = _check_drift(loads, size, cost, threshold)
    args = (device_of, loads, size, capacity, memory_capacity, cost, threshold)
    return _rebalance(*args, num_devices, max_count, check_swaps(swaps))


def _check_drift(loads, size, cost, threshold):
    """Size in int32, cost and threshold in float32; ValueError for what does not fit."""
    checks.rank("size", size, 1, "[U]")
    checks.same_length("size", size, "loads", loads)
    size = checks.whole("size", size)
    for name, x in (("cost", cost), ("threshold", threshold)):
        checks.rank(name, x, 0, "[]")
    return size, checks.non_negative("cost", cost), checks.non_negative("threshold", threshold)


@functools.partial(jax.jit, static_argnames=("num_devices", "max_count", "swaps"))
def _rebalance(
    device_of, loads, size, capacity, room, cost, threshold, num_devices, max_count, swaps
):
    loads, device_of = jnp.asarray(loads, jnp.float32), jnp.asarray(device_of, jnp.int32)
    limits = None if capacity is None else jnp.asarray(capacity, jnp.float32)
    capacity = jnp.ones(num_devices) if limits is None else limits
    room = None if room is None else jnp.asarray(room, jnp.float32)
    memory = None if room is None else jnp.asarray(size, jnp.float32)
    scale = scale_of(loads, capacity)
    home = device_of[:, None] == jnp.arange(num_devices)
    problem = Problem(
        load=with_empty(loads / scale),
        per_capacity=1 / capacity,
        base=jnp.zeros(num_devices),
        memory=None if memory is None else with_empty(memory / jnp.mean(room)),
        room=None if room is None else room / jnp.mean(room),
        away=_away(home, size, cost / scale),
    )
    terms = of_units(loads, capacity, max_count)

    def placed(device_of) -> Placement:
        return placement(loads, capacity, limits, memory, room, device_of, terms)

    target = largest_term(terms).value / scale
    place_of = _rank_on_device(device_of, -loads, num_devices)
    new = refine(problem, device_of, place_of, max_count, swaps, target)
    holder = new[:, None] == jnp.arange(num_devices)
    old = placed(device_of)
    return _unless_worth_it(old, placed(new), holder & ~home, size, cost, threshold)


def _rank_on_device(device_of, key, num_devices):
    """For each unit [U] how many of a lower key, or of the same and a lower index, are beside it."""
    order = jnp.lexsort((key, device_of))
    counts = jax.ops.segment_sum(jnp.ones_like(device_of), device_of, num_devices)
    starts = jnp.cumsum(counts) - counts
    index = jnp.arange(device_of.shape[0], dtype=jnp.int32)
    return jnp.zeros_like(device_of).at[order].set(index - starts[device_of[order]])


def _away(home, size, price):
    """What each unit costs on each device, [U + 1, G]: nothing where it is already."""
    cost = jnp.where(home, 0.0, price * jnp.asarray(size, jnp.float32)[:, None])
    return jnp.pad(cost, ((0, 1), (0, 0)))


def moved_blocks(moved: jax.Array, size: ArrayLike) -> jax.Array:
    """Blocks [] uint32 that devices have to fetch, moved [U, G]; saturates at 2^32 - 1."""
    sizes = jnp.where(moved, jnp.asarray(size, jnp.uint32)[:, None], 0)
    return search.total(sizes.reshape(-1), None, 1, None)[0]


def _unless_worth_it(old, new, moved, size, cost, threshold) -> Rebalanced:
    """The old placement, or the new one where it gains the threshold and what moving costs."""
    paid = new.relative_load + cost * moved_blocks(moved, size)
    worth = paid < old.relative_load * (1 - threshold)
    # What does not fit has to move at any cost.
    worth |= (old.status == Status.INFEASIBLE) & (new.status == Status.OK)
    moved = moved & worth
    return Rebalanced(
        placement=_copies.choose(worth, new, old),
        moved=moved,
        moved_blocks=moved_blocks(moved, size),
        load_before=old.relative_load,
    )
