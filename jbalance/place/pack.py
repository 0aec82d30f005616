"""Which device holds which unit: longest first, refined by swaps and moves.

One layer at a time; `jax.vmap` runs many layers at once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jbalance import checks
from jbalance.types import Placement, Status

_GAIN = 1e-6  # relative: a swap that gains less is rounding


def pack(
    loads: ArrayLike,
    num_devices: int,
    capacity: ArrayLike | None = None,
    *,
    max_count: int | None = None,
    swaps: int = 100,
) -> Placement:
    """Place units on devices so that the largest load relative to capacity is small.

    Longest-processing-time first: the units in order of falling load, each to the device that it fills
    least. Then, `swaps` times at most, the exchange of two units (or the move of one) between the
    fullest device and another that lowers the fuller of the two the most.

    Args:
      loads: [U] >= 0, in any unit.
      num_devices: G.
      capacity: [G] > 0 in the unit of the loads; None: all alike, and nothing is too much.
      max_count: most units on one device (ceil(U / G) for equal counts); None: any number.
      swaps: most refinements; 0 for longest-first alone.

    Returns:
      A `Placement`; status INFEASIBLE if a device holds more than its capacity.

    Raises:
      ValueError: loads negative or NaN, capacity not positive or of the wrong length, more units than
        num_devices * max_count.

    Reference: Graham, SIAM J. Applied Math. 17 (1969).
    """
    checks.rank("loads", loads, 1, "[U]")
    checks.non_empty("loads", loads)
    checks.non_negative("loads", loads)
    if num_devices != int(num_devices):
        raise ValueError(f"num_devices is {num_devices}: it must be a whole number")
    if num_devices < 1:
        raise ValueError(f"num_devices is {num_devices}: at least one device is needed")
    if swaps < 0:
        raise ValueError(f"swaps is {swaps}: it must be >= 0")
    num_units = np.shape(loads)[0]
    if max_count is None:
        max_count = num_units
    elif num_devices * max_count < num_units:
        raise ValueError(
            f"max_count is {max_count}: {num_devices} devices then hold {num_devices * max_count} of "
            f"{num_units} units, it must be at least {-(-num_units // num_devices)}"
        )
    if capacity is not None:
        checks.rank("capacity", capacity, 1, "[G]")
        checks.positive("capacity", capacity)
        if np.shape(capacity)[0] != num_devices:
            raise ValueError(
                f"capacity has {np.shape(capacity)[0]} entries for num_devices = {num_devices}"
            )
    return _pack(loads, capacity, num_devices, max_count, swaps)


@functools.partial(jax.jit, static_argnames=("num_devices", "max_count", "swaps"))
def _pack(loads, capacity, num_devices, max_count, swaps) -> Placement:
    loads = jnp.asarray(loads, jnp.float32)
    limited = capacity is not None
    capacity = jnp.asarray(capacity, jnp.float32) if limited else jnp.ones((num_devices,))
    device_of, load, count = _longest_first(loads, capacity, max_count)
    device_of, load, count = _refine(loads, capacity, max_count, swaps, device_of, load, count)
    relative = jnp.max(load / capacity)
    over = limited & (relative > 1 + _GAIN)
    return Placement(
        device_of=device_of,
        load=load,
        count=count,
        relative_load=relative,
        bound=_bound(loads, capacity),
        status=jnp.where(over, Status.INFEASIBLE, Status.OK).astype(jnp.int32),
    )


def _longest_first(loads, capacity, max_count):
    order = jnp.argsort(-loads, stable=True)

    def put(carry, unit):
        load, count = carry
        after = jnp.where(count < max_count, (load + loads[unit]) / capacity, jnp.inf)
        d = jnp.argmin(after)
        return (load.at[d].add(loads[unit]), count.at[d].add(1)), d.astype(jnp.int32)

    start = (jnp.zeros_like(capacity), jnp.zeros(capacity.shape, jnp.int32))
    (load, count), devices = lax.scan(put, start, order)
    return jnp.zeros(loads.shape, jnp.int32).at[order].set(devices), load, count


def _refine(loads, capacity, max_count, swaps, device_of, load, count):
    """Swaps and moves between the fullest device and another, best first, while they help."""
    num_units = loads.shape[0]
    # A column of zero load stands for the empty place on each device: exchanging with it is a move.
    num_devices = capacity.shape[0]
    partner_load = jnp.concatenate([loads, jnp.zeros(num_devices)])

    def step(carry):
        i, _, device_of, load, count = carry
        full = jnp.argmax(load / capacity)
        partner_device = jnp.concatenate([device_of, jnp.arange(num_devices, dtype=jnp.int32)])
        delta = loads[:, None] - partner_load
        here = (load[full] - delta) / capacity[full]
        there = (load[partner_device] + delta) / capacity[partner_device]
        empty = jnp.arange(partner_load.shape[0]) >= num_units
        allowed = (device_of == full)[:, None] & (partner_device != full)
        allowed &= ~empty | (count[partner_device] < max_count)
        worse = jnp.where(allowed, jnp.maximum(here, there), jnp.inf)
        best = jnp.argmin(worse)
        unit, partner = best // partner_load.shape[0], best % partner_load.shape[0]
        other = partner_device[partner]
        helps = worse[unit, partner] < load[full] / capacity[full] * (1 - _GAIN)
        moved = partner >= num_units
        swapped = device_of.at[unit].set(other)
        swapped = swapped.at[jnp.where(moved, unit, partner)].set(jnp.where(moved, other, full))
        change = jnp.where(moved, 1, 0)
        new = (
            swapped.astype(jnp.int32),
            load.at[full].add(-delta[unit, partner]).at[other].add(delta[unit, partner]),
            count.at[full].add(-change).at[other].add(change),
        )
        kept = jax.tree.map(lambda a, b: jnp.where(helps, a, b), new, (device_of, load, count))
        return i + 1, helps, *kept

    def going(carry):
        return (carry[0] < swaps) & carry[1]

    start = (jnp.int32(0), jnp.array(num_devices > 1), device_of, load, count)
    _, _, device_of, _, count = lax.while_loop(going, step, start)
    # Summed afresh: the running sums carry the rounding of every swap.
    return device_of, jax.ops.segment_sum(loads, device_of, num_devices), count


def _bound(loads: jax.Array, capacity: jax.Array) -> jax.Array:
    """The relative load that no placement goes below: mean, largest unit, or two of the G + 1 largest
    units on one device (pigeon-hole)."""
    top = jnp.max(capacity)
    bound = jnp.maximum(jnp.sum(loads) / jnp.sum(capacity), jnp.max(loads) / top)
    num_devices = capacity.shape[0]
    if loads.shape[0] > num_devices:
        largest = lax.top_k(loads, num_devices + 1)[0]
        bound = jnp.maximum(bound, (largest[-1] + largest[-2]) / top)
    return bound
