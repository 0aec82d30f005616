"""Replicated placement (as of experts): heavy units get copies, by Adams' divisor method and LPT."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbalance._bits import in_32_bits
from jbalance.place import _copies
from jbalance.place._exchange import exchange
from jbalance.place._inputs import check_loads, check_slots, check_swaps, scale_of, status
from jbalance.place._longest_first import longest_first
from jbalance.place.bound import largest_term, of_copies
from jbalance.place.types import Replicas

_FEW_SLOTS = 3  # a device; up to here copies and places are searched for together


@in_32_bits
def replicate(loads: ArrayLike, num_devices: int, num_slots: int, *, swaps: int = 128) -> Replicas:
    """Give heavy units copies and place all copies so that the largest load of a device is small.

    A unit's load is shared alike by its copies, which lie on distinct devices. Spare slots go to
    the unit whose copies are the largest, one after the other; the copies are placed longest first,
    then exchanged as in `pack`. With two or three slots a device copies are then taken from one
    unit and given to another, and places searched anew, for as long as that helps.

    Args:
      loads: [U] >= 0, in any unit.
      num_devices: G.
      num_slots: U <= R <= U G, on all devices together, ceil(R / G) at most on each.
      swaps: exchanges that are tried; 0 for longest first alone, without the joint search.

    Returns:
      `Replicas`, status INVALID for NaN or negative loads under jit. The bound is that of any
      number of copies of each unit.

    Raises:
      ValueError: loads negative or NaN, fewer slots than units, more than copies on distinct
          devices.

    References: the balancer of DeepSeek-AI's expert parallelism, which gives copies and places
    longest first (arXiv:2412.19437, section 3.4; it may put two copies on one device); Graham
    (1969); Glover (1989).
    """
    loads, num_devices = check_loads(loads, num_devices)
    num_slots = check_slots(num_slots, np.shape(loads)[0], num_devices)
    swaps = check_swaps(swaps)
    return _replicate(loads, num_devices, num_slots, swaps)


@functools.partial(jax.jit, static_argnames=("num_devices", "num_slots", "swaps"))
def _replicate(loads, num_devices, num_slots, swaps) -> Replicas:
    loads = jnp.asarray(loads, jnp.float32)
    copies, bound, grid = _place_copies(loads, num_devices, num_slots, swaps)
    return _replicas(loads, copies, grid, bound)


def _place_copies(loads, num_devices: int, num_slots: int, swaps: int):
    """(copies [U], `Bound`, grid [G, C] of units) of loads [U]."""
    num_units, capacity = loads.shape[0], jnp.ones(num_devices)
    copies = _copies.fewest(loads, num_slots, num_devices)
    bound = largest_term(of_copies(loads, capacity, copies))
    scale = scale_of(loads, capacity)
    scaled, target = loads / scale, bound.value / scale
    per_device = -(-num_slots // num_devices)

    problem = _copies.problem_of(scaled, copies, num_devices)
    items = _items(loads / copies, copies, num_slots)
    device, place = longest_first(problem, items, per_device, copies=True)
    grid = jnp.full((num_devices, per_device), num_units, jnp.int32).at[device, place].set(items)
    if swaps:
        grid, _ = exchange(problem, grid, swaps, target, copies=True)
        if per_device <= _FEW_SLOTS and num_slots > num_units:
            copies, grid = _copies.search(scaled, copies, grid, target)
            problem = _copies.problem_of(scaled, copies, num_devices)
            grid, _ = exchange(problem, grid, swaps, target, copies=True)
    return copies, bound, grid


def _items(load, copies, num_slots):
    """The unit [R] of each copy, those of the largest copies first."""
    order = jnp.argsort(-load, stable=True)
    ends = jnp.cumsum(copies[order])
    position = jnp.searchsorted(ends, jnp.arange(num_slots), side="right")
    return order[position].astype(jnp.int32)


def _replicas(loads, copies, grid, bound) -> Replicas:
    """What the units of grid [G, C] are to the devices."""
    share = jnp.append(loads / copies, 0.0)
    load = jnp.sum(share[grid], axis=1)
    return Replicas(
        unit_of=grid,
        copies=copies,
        load=load,
        count=jnp.sum(grid < loads.shape[0], axis=1, dtype=jnp.int32),
        relative_load=jnp.max(load),
        bound=bound.value,
        term=bound.term,
        status=status(jnp.array(False), loads),
    )
