"""Tabu search by exchanges between the fullest device and another: it refines every placement.

A placement is a grid [G, C] of unit ids, C places on each device; an empty place holds U, a unit of
no load, so that a move is an exchange with an empty place. Each step makes the exchange that leaves
the fuller of the two devices least full, better than before or not, and what has just been
exchanged rests for a few steps (tabu search: Glover, ORSA J. Computing 1, 1989): a search that
stops where no exchange helps keeps two to five times as much of the excess over the bound. The best
grid on the way is the result.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbalance.place._inputs import ROUNDING

_REST = 8  # steps for which an exchanged unit stays where it is
_ENOUGH = 1e-5  # relative: so near to the bound the search ends
_OVER = 1e9  # pressure of a device whose memory is exceeded, times by how much: worse than any load


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """What is placed, and where. Loads are scaled so that their mean over capacity is 1."""

    load: jax.Array  # [U + 1] float32, that of U is 0
    per_capacity: jax.Array  # [G] 1 / capacity
    base: jax.Array  # [G] load of units outside of the grid
    memory: jax.Array | None = None  # [U + 1], with `room`
    room: jax.Array | None = None  # [G] what memory each device has for the units of the grid
    away: jax.Array | None = (
        None  # [U + 1, G] what a unit on a device costs, added to the objective
    )


class Amounts(NamedTuple):
    """Load and memory of places, or of devices."""

    load: jax.Array
    memory: jax.Array | None


def amounts(problem: Problem, units: jax.Array) -> Amounts:
    """Of the units in any places."""
    memory = None if problem.memory is None else problem.memory[units]
    return Amounts(problem.load[units], memory)


def pressure(totals: Amounts, per_capacity: jax.Array, room: jax.Array | None) -> jax.Array:
    """Load over capacity; far above any where memory is exceeded, so that this is mended first."""
    relative = totals.load * per_capacity
    if totals.memory is None or room is None:
        return relative
    over = totals.memory > room * (1 + ROUNDING)
    # Room may be negative, where units outside of the grid take more than there is.
    return jnp.where(over, _OVER * (1 + totals.memory - room), relative)


def _on_devices(problem, each):
    """What lies on every device [G], from the places [G, C]."""
    total = jax.tree.map(lambda x: jnp.sum(x, axis=1), each)
    return total._replace(load=total.load + problem.base)


def _objective(problem, grid, each):
    """Pressure of the fullest device, and what units away from home cost: []."""
    most = jnp.max(pressure(_on_devices(problem, each), problem.per_capacity, problem.room))
    if problem.away is None:
        return most
    return most + jnp.sum(problem.away[grid, jnp.arange(grid.shape[0])[:, None]])


def exchange(
    problem: Problem, grid: jax.Array, steps: int, target: jax.Array, *, copies: bool
) -> tuple[jax.Array, jax.Array]:
    """The best grid in `steps` exchanges, or the first whose objective is near `target`.

    Args:
      problem: the units and devices.
      grid: [G, C] int32 unit ids, U in empty places.
      steps: most exchanges.
      target: [] a bound on the objective.
      copies: a unit may be in several places, but never twice on one device.

    Returns:
      (grid [G, C], its objective []).
    """
    enough = target * (1 + _ENOUGH)

    def step(carry):
        i, (grid, each), rests_until, best, least = carry
        here, there, possible = _best_exchange(problem, grid, each, rests_until <= i, copies)
        at_here, at_there = (cells(grid) == here) & possible, (cells(grid) == there) & possible

        def swapped(x):
            flat = x.reshape(-1)
            return jnp.where(at_here, flat[there], jnp.where(at_there, flat[here], x))

        grid, each = jax.tree.map(swapped, (grid, each))
        rests_until = jnp.where(at_here | at_there, i + _REST, rests_until)
        now = _objective(problem, grid, each)
        best = jnp.where(now < least, grid, best)
        return i + 1, (grid, each), rests_until, best, jnp.minimum(now, least)

    def going(carry):
        return (carry[0] < steps) & (carry[-1] > enough)

    each = amounts(problem, grid)
    start = (jnp.int32(0), (grid, each), jnp.zeros_like(grid), grid)
    return lax.while_loop(going, step, (*start, _objective(problem, grid, each)))[-2:]


def _best_exchange(problem, grid, each, free, copies):
    """The places of the best exchange with the fullest device, and whether there is one."""
    num_devices, places = grid.shape
    num_units = problem.load.shape[0] - 1
    devices = jnp.arange(num_devices)
    totals = _on_devices(problem, each)
    full = first_least(-pressure(totals, problem.per_capacity, problem.room))
    # Axes: a place of the fullest device, a device, a place of it.
    mine = jax.tree.map(lambda x: x[full][:, None, None], (grid, each, free))
    shift = jax.tree.map(jnp.subtract, mine[1], each)
    room = problem.room
    here = pressure(
        jax.tree.map(lambda x, y: x[full] - y, totals, shift),
        problem.per_capacity[full],
        None if room is None else room[full],
    )
    there = pressure(
        jax.tree.map(lambda x, y: x[:, None] + y, totals, shift),
        problem.per_capacity[:, None],
        None if room is None else room[:, None],
    )
    allowed = (mine[0] < num_units) & mine[2] & free & (devices != full)[:, None]
    if copies:
        same = mine[0] == grid
        allowed &= ~jnp.any(same, axis=2, keepdims=True)  # its device has this unit already
        allowed &= ~(jnp.any(same, axis=0) & (grid < num_units))  # the fullest has that one
    after = jnp.where(allowed, jnp.maximum(here, there), jnp.inf)
    best = first_least(after)
    # No exchange is allowed where all are infinite.
    possible = jnp.min(after) < jnp.inf
    return full * places + best // grid.size, best % grid.size, possible


def cells(grid: jax.Array) -> jax.Array:
    """The index of each place."""
    return jnp.arange(grid.size, dtype=jnp.int32).reshape(grid.shape)


def first_least(x: jax.Array) -> jax.Array:
    """Flat index of the least entry, the first of equals: argmin in two passes that vectorize."""
    index = jnp.arange(x.size, dtype=jnp.int32).reshape(x.shape)
    least = jnp.min(x)
    # Where all is NaN no entry equals the least: the last index then.
    return jnp.min(jnp.where(x == least, index, x.size - 1))
