"""Longest processing time first (LPT): items by falling load, each to the least filled device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jbalance.place._exchange import Amounts, Problem, amounts, first_least, pressure


def longest_first(
    problem: Problem, units: jax.Array, max_count: int, *, copies: bool
) -> tuple[jax.Array, jax.Array]:
    """Where each item goes.

    Args:
      problem: the units and devices.
      units: [R] int32 the unit of each item, in the order in which they are placed; copies of a
        unit follow each other.
      max_count: most items on a device; R <= G * max_count.
      copies: items of one unit go to distinct devices.

    Returns:
      (device [R], place on that device [R]), int32.

    Reference: Graham, SIAM J. Applied Math. 17 (1969). With copies it can run into a corner, the
    devices that have places left holding the unit already; all items are then dealt out in turn,
    which cannot, since no unit has more copies than there are devices.
    """
    num_devices = problem.per_capacity.shape[0]
    devices = jnp.arange(num_devices)

    def put(carry, unit):
        held, count, last, used, cornered = carry
        used = used & (unit == last)
        more = amounts(problem, unit)
        with_unit = jax.tree.map(jnp.add, held, more)
        after = pressure(with_unit, problem.per_capacity, problem.room)
        open_to = count < max_count
        if copies:
            open_to &= ~used
        d = first_least(jnp.where(open_to, after, jnp.inf))
        here = devices == d
        held = jax.tree.map(lambda new, old: jnp.where(here, new, old), with_unit, held)
        cornered |= ~jnp.any(open_to)
        place = jnp.sum(jnp.where(here, count, 0))
        return (held, count + here, unit, used | here, cornered), (d, place)

    start = (
        Amounts(problem.base, None if problem.memory is None else jnp.zeros(num_devices)),
        jnp.zeros(num_devices, jnp.int32),
        jnp.int32(-1),
        jnp.zeros(num_devices, bool),
        jnp.array(False),
    )
    (*_, cornered), (device, place) = lax.scan(put, start, units)
    turn = jnp.arange(units.shape[0], dtype=jnp.int32)
    device = jnp.where(cornered, turn % num_devices, device)
    return device, jnp.where(cornered, turn // num_devices, place)
