"""Backtracking: units to devices within hard limits, for what exchanges miss where room is tight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jbalance.place._inputs import ROUNDING

_FEW = 64  # devices that are compared with each other
_STEPS = 8192  # placed or taken back: all that there are of 7 units on 3 devices


def within_limits(
    sizes: jax.Array, limits: jax.Array, max_count: int, device_of: jax.Array, needed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A placement that keeps all limits, by depth-first search of some thousand steps.

    The units in the order of the index, each to the first device that holds it; where none does, the
    unit before goes on to its next device. Of units that are alike only one order is tried, and of up to
    64 devices only the first of those that are left alike. (Symmetries as in Korf, A New Algorithm for
    Optimal Bin Packing, AAAI 2002.)

    Args:
      sizes: [U, R] of R resources, the largest units first.
      limits: [G, R].
      max_count: most units on a device.
      device_of: [U] int32, given back where nothing is found.
      needed: [] bool, whether to search at all.

    Returns:
      (device_of [U], whether a placement was found []).
    """
    num_units, num_devices = sizes.shape[0], limits.shape[0]
    devices = jnp.arange(num_devices)
    most = limits * (1 + ROUNDING)
    alike = jnp.all(sizes == jnp.roll(sizes, 1, axis=0), axis=1) & (jnp.arange(num_units) > 0)

    def step(carry):
        i, depth, choice, used, count = carry
        at = choice[depth]
        held = (devices == at)[:, None] * sizes[depth]
        used, count = used - held, count - (devices == at)
        first = jnp.where(alike[depth], choice[depth - 1], 0)
        fits = jnp.all(used + sizes[depth] <= most, axis=1) & (count < max_count)
        fits &= (devices > at) & (devices >= first)
        if num_devices <= _FEW:
            fits &= ~_as_before(most - used, count, devices > at)
        found = jnp.any(fits)
        to = jnp.where(found, jnp.argmax(fits), -1)
        here = devices == to
        return (
            i + 1,
            jnp.where(found, depth + 1, depth - 1),
            choice.at[depth].set(to),
            used + here[:, None] * sizes[depth],
            count + here,
        )

    def going(carry):
        return (carry[0] < _STEPS) & (carry[1] >= 0) & (carry[1] < num_units)

    start = (
        jnp.int32(0),
        jnp.where(needed, jnp.int32(0), jnp.int32(-1)),
        jnp.full(num_units, -1, jnp.int32),
        jnp.zeros_like(most),
        jnp.zeros(num_devices, jnp.int32),
    )
    _, depth, choice, _, _ = lax.while_loop(going, step, start)
    found = depth == num_units
    return jnp.where(found, choice, device_of), found


def _as_before(left: jax.Array, count: jax.Array, allowed: jax.Array) -> jax.Array:
    """Devices [G] that an allowed one before is just like: what does not fit there fits on neither."""
    same = jnp.all(left[:, None] == left, axis=2) & (count[:, None] == count)
    before = jnp.tril(jnp.ones(same.shape, bool), -1)
    return jnp.any(same & before & allowed, axis=1)
