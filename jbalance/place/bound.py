"""Lower bounds on the makespan of any placement, and which of them binds."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbalance import checks
from jbalance._bits import in_32_bits
from jbalance.place._copies import fewest
from jbalance.place._inputs import check_capacity, check_loads, check_max_count, check_slots
from jbalance.place.types import Bound, Term

_MOST_HOLES = 16


@in_32_bits
def bound(
    loads: ArrayLike,
    num_devices: int,
    capacity: ArrayLike | None = None,
    *,
    max_count: int | None = None,
    num_slots: int | None = None,
    group_of: ArrayLike | None = None,
    num_nodes: int | None = None,
) -> Bound:
    """A load (over capacity) that some device of every placement reaches, and which term says so.

    The largest of, with x_1 >= x_2 >= ... the loads and c the largest capacity,

    - MEAN: sum of the loads / sum of the capacities;
    - LARGEST: x_1 / c; with slots for copies, the least that the largest copy can be, over c;
    - PIGEON_HOLE: of the j G + 1 largest units some device has j + 1: the least sum of so many of
      them, (x_{jG+1-j} + ... + x_{jG+1}) / c, for j = 1..16 (beyond, the mean is within 1/16 of
      it);
    - COUNT: where each device must take at least n units, since the others take at most max_count,
      that of the largest has n - 1 more: x_1 and the n - 1 smallest, over c;
    - GROUP: where whole groups go to nodes, what MEAN, LARGEST and PIGEON_HOLE say of groups on
      nodes, over the devices of a node.

    With slots only MEAN, LARGEST and GROUP hold: other copies may be as small as one likes.

    Args:
      loads: [U] >= 0.
      num_devices: G.
      capacity: [G] > 0; None: all 1.
      max_count: most units on a device; None: any number.
      num_slots: U <= R <= U G, places for units and copies of equal share, no two of a unit on a
        device; None: one place a unit.
      group_of: [U] int in 0..U-1, units that must be on one node; None: no such rule.
      num_nodes: nodes of num_devices / num_nodes devices each, with `group_of` and equal
        capacities.

    Returns:
      A `Bound`.

    Raises:
      ValueError: loads or capacity as for `pack`; slots fewer than units or more than copies on
        distinct devices; `group_of` without num_nodes, or nodes that do not divide the devices.
    """
    loads, num_devices = check_loads(loads, num_devices)
    capacity = check_capacity(capacity, num_devices)
    num_units = np.shape(loads)[0]
    max_count = check_max_count(max_count, num_units, num_devices)
    if num_slots is not None:
        num_slots = check_slots(num_slots, num_units, num_devices)
    if group_of is not None:
        checks.rank("group_of", group_of, 1, "[U]")
        checks.same_length("group_of", group_of, "loads", loads)
        group_of = checks.index_below("group_of", group_of, num_units)
        num_nodes = checks.static_int("num_nodes", num_nodes, 1)
        if num_devices % num_nodes:
            raise ValueError(
                f"num_nodes is {num_nodes}: it must divide num_devices = {num_devices}"
            )
        if capacity is not None:
            raise ValueError("capacity is given with group_of: the group rule is of equal devices")
    elif num_nodes is not None:
        raise ValueError(
            f"num_nodes is {num_nodes}, but group_of is None: say which units go together"
        )
    return _bound(loads, num_devices, capacity, max_count, num_slots, group_of, num_nodes)


@functools.partial(jax.jit, static_argnames=("num_devices", "max_count", "num_slots", "num_nodes"))
def _bound(loads, num_devices, capacity, max_count, num_slots, group_of, num_nodes) -> Bound:
    loads = jnp.asarray(loads, jnp.float32)
    capacity = jnp.ones(num_devices) if capacity is None else jnp.asarray(capacity, jnp.float32)
    if num_slots is None:
        terms = of_units(loads, capacity, max_count)
    else:
        copies = fewest(loads, num_slots, num_devices)
        terms = of_copies(loads, capacity, copies)
    if group_of is not None:
        groups = jax.ops.segment_sum(loads, group_of, loads.shape[0])
        of_nodes = of_units(groups, jnp.full(num_nodes, num_devices / num_nodes), None)
        terms[Term.GROUP] = functools.reduce(jnp.maximum, of_nodes.values())
    return largest_term(terms)


def of_units(loads: jax.Array, capacity: jax.Array, max_count: int | None) -> dict[Term, jax.Array]:
    """The terms of units in one place each."""
    num_units, num_devices = loads.shape[0], capacity.shape[0]
    top = jnp.max(capacity)
    falling = -jnp.sort(-loads)
    terms = {
        Term.MEAN: jnp.sum(loads) / jnp.sum(capacity),
        Term.LARGEST: falling[0] / top,
    }
    if num_units > num_devices:
        # Each sum of its own entries: differences of running sums would round above the truth.
        more = np.arange(1, min((num_units - 1) // num_devices, _MOST_HOLES) + 1)[:, None]
        back = np.arange(more.size + 1)
        entries = jnp.where(back <= more, falling[np.maximum(more * num_devices - back, 0)], 0)
        terms[Term.PIGEON_HOLE] = jnp.max(jnp.sum(entries, axis=1)) / top
    if max_count is not None:
        least = num_units - (num_devices - 1) * max_count
        if least > 1:
            terms[Term.COUNT] = (falling[0] + jnp.sum(falling[1 - least :])) / top
    return terms


def of_copies(loads: jax.Array, capacity: jax.Array, copies: jax.Array) -> dict[Term, jax.Array]:
    """The terms of units in as many copies as make the largest copy least."""
    return {
        Term.MEAN: jnp.sum(loads) / jnp.sum(capacity),
        Term.LARGEST: jnp.max(loads / copies) / jnp.max(capacity),
    }


def largest_term(terms: dict[Term, jax.Array]) -> Bound:
    """The bound, the first of equal terms."""
    values = jnp.stack(list(terms.values()))
    names = jnp.array([int(term) for term in terms], jnp.int32)
    return Bound(jnp.max(values), names[jnp.argmax(values)])
