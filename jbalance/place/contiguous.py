"""Linear partition: consecutive layers to the stages of a pipeline."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jbalance._bits import in_32_bits
from jbalance.place._inputs import ROUNDING, check_capacity, check_loads, check_memory
from jbalance.place.bound import of_units
from jbalance.place.pack import placement
from jbalance.place.types import Placement


@in_32_bits
def contiguous(
    loads: ArrayLike,
    num_devices: int,
    capacity: ArrayLike | None = None,
    *,
    memory: ArrayLike | None = None,
    memory_capacity: ArrayLike | None = None,
) -> Placement:
    """Cut a row of units into a stretch for each device, the largest relative load least.

    least_d(i) = min over j < i of max(least_{d-1}(j), sum of loads j..i-1 / capacity_d), by dynamic
    programming over all stretches that fit the device's memory: exact, O(G U^2). Device d holds the
    d-th stretch; none is empty.

    Args:
      loads: [U] >= 0, of layers in their order.
      num_devices: G <= U, stages.
      capacity: [G] > 0, as for `pack`.
      memory: [U] >= 0, as for `pack`.
      memory_capacity: [G] > 0, as for `pack`.

    Returns:
      A `Placement`; its bound is that of `pack`, which need not keep neighbors together.
      INFEASIBLE where no cut fits the memory (all units are then cut alike), or a device holds more
      than its capacity.

    Raises:
      ValueError: as `pack`, and more devices than units.

    Reference: Pinar and Aykanat, J. Parallel Distrib. Comput. 64 (2004).
    """
    loads, num_devices = check_loads(loads, num_devices)
    capacity = check_capacity(capacity, num_devices)
    memory, memory_capacity = check_memory(memory, memory_capacity, loads, num_devices)
    if num_devices > np.shape(loads)[0]:
        raise ValueError(
            f"num_devices is {num_devices}: {np.shape(loads)[0]} units make at most as many stretches"
        )
    return _contiguous(loads, capacity, memory, memory_capacity, num_devices)


@functools.partial(jax.jit, static_argnames=("num_devices",))
def _contiguous(loads, capacity, memory, room, num_devices) -> Placement:
    loads = jnp.asarray(loads, jnp.float32)
    limits = None if capacity is None else jnp.asarray(capacity, jnp.float32)
    capacity = jnp.ones(num_devices) if limits is None else limits
    num_units = loads.shape[0]
    stretch = _stretches(loads)
    if memory is not None:
        memory, room = jnp.asarray(memory, jnp.float32), jnp.asarray(room, jnp.float32)
        needed = _stretches(memory)
    empty = jnp.arange(num_units + 1)[:, None] >= jnp.arange(num_units + 1)

    def stage(least, d):
        cost = jnp.where(empty, jnp.inf, stretch / capacity[d])
        if memory is not None:
            cost = jnp.where(needed > room[d] * (1 + ROUNDING), jnp.inf, cost)
        through = jnp.maximum(least[:, None], cost)
        return jnp.min(through, axis=0), jnp.argmin(through, axis=0).astype(jnp.int32)

    start = jnp.full(num_units + 1, jnp.inf).at[0].set(0.0)
    least, begins = lax.scan(stage, start, jnp.arange(num_devices))

    def back(end, begin):
        return begin[end], end

    ends = lax.scan(back, jnp.int32(num_units), begins, reverse=True)[1]
    alike = (jnp.arange(1, num_devices + 1) * num_units) // num_devices
    cut = jnp.isfinite(least[-1])
    ends = jnp.where(cut, ends, alike)
    device_of = jnp.searchsorted(ends, jnp.arange(num_units), side="right").astype(jnp.int32)
    terms = of_units(loads, capacity, None)
    return placement(loads, capacity, limits, memory, room, device_of, terms)


def _stretches(x):
    """Sums of x over [j, i), [U + 1, U + 1], each of its own entries: none is a difference."""
    num_units = x.shape[0]
    inside = jnp.arange(num_units + 1)[:, None] <= jnp.arange(num_units)
    sums = jnp.cumsum(jnp.where(inside, x, 0), axis=1)
    return jnp.pad(sums, ((0, 0), (1, 0)))
