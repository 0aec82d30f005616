"""How many copies each unit has: those that keep copies small, and a joint search with places."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jbalance.place._exchange import Problem, cells, exchange, first_least
from jbalance.place._inputs import with_empty

_GIVERS = 8  # units with copies that may give one, least load of a copy afterwards first
_SMALLEST, _LARGEST = 3, 2  # units that may take one, besides the largest on the fullest device
_TRIAL_SWAPS = 20
_POWER = 16  # of the mean that a trial must lower
_GAIN = 1e-5  # relative


def fewest(loads: jax.Array, num_slots: int, num_devices: int) -> jax.Array:
    """Copies [U] int32 >= 1, num_slots in all, at most one a device, whose largest load is least.

    Each spare slot goes to the unit whose copies are the largest; Adams' divisor method, which
    minimizes the largest load of a copy (Balinski and Young, Fair Representation, 1982).
    """

    def give(_, copies):
        largest = jnp.argmax(jnp.where(copies < num_devices, loads / copies, -1.0))
        return copies.at[largest].add(1)

    one_each = jnp.ones(loads.shape, jnp.int32)
    return lax.fori_loop(0, num_slots - loads.shape[0], give, one_each)


def problem_of(loads: jax.Array, copies: jax.Array, num_devices: int) -> Problem:
    """Copies of equal shares on devices that are all alike."""
    return Problem(with_empty(loads / copies), jnp.ones(num_devices), jnp.zeros(num_devices))


def search(
    loads: jax.Array, copies: jax.Array, grid: jax.Array, target: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Copies [U] and grid [G, C] after handing copies from unit to unit, with a few exchanges each.

    What helps where a device has two or three slots. A unit that is just too large for one copy
    keeps one all the same; its slot goes to the smallest units, whose copies then lie beside the
    largest ones, or to the largest. A trial stays if it lowers the power mean of the devices'
    loads: it may take several until the largest falls. The best on the way is the result.

    Args:
      loads: [U] of mean 1 over the devices.
      copies: [U] int32 to begin with.
      grid: [G, C] int32 where they are, U in empty places.
      target: [] a bound on the largest load.
    """
    num_devices = grid.shape[0]
    trials = _GIVERS * (_SMALLEST + _LARGEST + 1)

    def device_loads(copies, grid):
        return jnp.sum(with_empty(loads / copies)[grid], axis=1)

    unit = jnp.max(device_loads(copies, grid))

    def mean(copies, grid):
        return jnp.sum((device_loads(copies, grid) / unit) ** _POWER)

    def trial(carry):
        i, now, best, least = carry
        copies, grid, power = now
        giver, taker = _candidate(loads, copies, grid, i)
        given, possible = _hand_over(grid, giver, taker)
        possible &= (copies[giver] > 1) & (copies[taker] < num_devices)
        changed = copies.at[giver].add(-1).at[taker].add(1)
        changed, given = choose(possible, (changed, given), (copies, grid))
        problem = problem_of(loads, changed, num_devices)
        given, largest = exchange(problem, given, _TRIAL_SWAPS, target, copies=True)
        after = mean(changed, given)
        now = choose(after < power * (1 - _GAIN), (changed, given, after), now)
        best = choose(largest < least, (changed, given), best)
        return i + 1, now, best, jnp.minimum(largest, least)

    def going(carry):
        return (carry[0] < trials) & (carry[-1] > target)

    start = (copies, grid, mean(copies, grid))
    return lax.while_loop(going, trial, (jnp.int32(0), start, (copies, grid), unit))[2]


def choose(condition, new, old):
    """The new pytree where the condition holds, else the old one."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _candidate(loads, copies, grid, i):
    """Giver and taker of trial i: all pairs in turn, ranked by the loads as they now are."""
    num_units, num_devices = loads.shape[0], grid.shape[0]
    load = loads / copies
    merged = jnp.where(copies > 1, loads / jnp.maximum(copies - 1, 1), jnp.inf)
    open_to = copies < num_devices
    givers = lax.top_k(-merged, min(_GIVERS, num_units))[1]
    smallest = lax.top_k(jnp.where(open_to, -load, -jnp.inf), min(_SMALLEST, num_units))[1]
    largest = lax.top_k(jnp.where(open_to, load, -1.0), min(_LARGEST, num_units))[1]
    slot_loads = with_empty(load)[grid]
    full = first_least(-jnp.sum(slot_loads, axis=1))
    pressing = grid[full, jnp.argmax(slot_loads[full])]
    takers = jnp.concatenate([smallest, largest, pressing[None]])
    return givers[i // takers.size % givers.size], takers[i % takers.size]


def _hand_over(grid, giver, taker):
    """The grid with the taker in a place of the giver, on a device without it, if there is one."""
    fits = (grid == giver) & ~jnp.any(grid == taker, axis=1, keepdims=True)
    place = first_least(~fits)
    return jnp.where(cells(grid) == place, taker, grid), jnp.any(fits)
