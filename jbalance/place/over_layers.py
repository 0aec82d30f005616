"""LPT and tabu search over layers: each layer's time and each device's memory are both even."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jbalance import _axes, checks
from jbalance._bits import in_32_bits
from jbalance.place._exchange import Problem, first_least
from jbalance.place._inputs import (
    ROUNDING,
    check_capacity,
    check_swaps,
    scale_of,
    status,
    with_empty,
)
from jbalance.place._longest_first import longest_first
from jbalance.place.bound import largest_term, of_units
from jbalance.place.types import Bound, Placement

_REST = 8  # steps for which an exchanged unit stays where it is
# What the squared unevenness of the devices' memory counts against the layers' time over its bound:
# 1 % of unevenness is worth 1 % of the time, 5 % are worth 25 %.
_EVEN = 100.0
_OVER = 1e6  # against memory above a device's capacity, relative to it: worse than any time


@in_32_bits
def over_layers(
    loads: ArrayLike,
    memory: ArrayLike,
    memory_capacity: ArrayLike,
    speed: ArrayLike | None = None,
    *,
    swaps: int = 512,
) -> Placement:
    """Place the units of all layers so that the layers' times are short and the memory is even.

    All devices wait for the fullest one of each layer, so a step takes

      sum over layers l of max over devices d of load(l, d) / speed(d).

    Units start by falling memory, each on the device that it fills least. Then the best exchange of two
    units, or move of one, is made again and again, also where none helps, and what was moved rests for
    some steps (tabu search). It looks at the time over its bound plus 100 times the mean square of the
    devices' relative deviation from even memory; memory above a device's capacity is mended before
    either. The best placement on the way is the result. One step is O(U^2).

    Args:
      loads: [L, K] >= 0, of K units in each of L layers; for instance tokens that attention reads.
      memory: [L, K] >= 0, what each unit needs of `memory_capacity`.
      memory_capacity: [G] > 0 in the unit of memory; even memory is in proportion to it.
      speed: [G] > 0, load per time; None: all 1.
      swaps: exchanges that are tried; 0 for longest first by memory alone.

    Returns:
      A `Placement` of each layer, as of `pack` under vmap and as `step_time` takes it: device_of [L, K],
      load and count [L, G], relative_load, bound and term [L]; but one status []: INFEASIBLE if a
      device holds more than its memory (the search may miss a placement that fits), INVALID for NaN
      or negative numbers under jit.

    Raises:
      ValueError: loads or memory negative, NaN or of other shapes, capacity or speed not positive or of
        different lengths.

    References: Graham, SIAM J. Applied Math. 17 (1969); Glover, ORSA J. Computing 1 (1989).
    """
    given = _check(loads, memory, memory_capacity, speed)
    return _over_layers(*given, check_swaps(swaps))


@in_32_bits
def over_layers_bound(
    loads: ArrayLike, memory: ArrayLike, memory_capacity: ArrayLike, speed: ArrayLike | None = None
) -> jax.Array:
    """A time [] that no placement of `over_layers` within the memory beats.

    The larger of the sum over layers of what `bound` says of each; and of the least time in which some
    device can serve the memory that the others have no room for: the units of least load for their
    memory, the last one in part.
    """
    return _bound(*_check(loads, memory, memory_capacity, speed))


def _check(loads, memory, room, speed):
    """The arguments of either function in float32; ValueError for bad ones."""
    _axes.unsplit(loads=loads, memory=memory)
    checks.rank("loads", loads, 2, "[L, K]")
    checks.non_empty("loads", loads)
    loads = checks.non_negative("loads", loads)
    memory = checks.non_negative("memory", memory)
    if np.shape(memory) != np.shape(loads):
        raise ValueError(
            f"memory has shape {np.shape(memory)}: it must be that of loads, {np.shape(loads)}"
        )
    checks.rank("memory_capacity", room, 1, "[G]")
    checks.non_empty("memory_capacity", room)
    room = check_capacity(room, np.shape(room)[0], "memory_capacity")
    if speed is not None:
        checks.rank("speed", speed, 1, "[G]")
    if speed is not None and np.shape(speed) != np.shape(room):
        raise ValueError(
            f"speed has shape {np.shape(speed)}: it must be that of memory_capacity, {np.shape(room)}"
        )
    return loads, memory, room, check_capacity(speed, np.shape(room)[0], "speed")


def _arrays(loads, memory, room, speed):
    loads, memory, room = (jnp.asarray(x, jnp.float32) for x in (loads, memory, room))
    return loads, memory, room, jnp.ones_like(room) if speed is None else jnp.asarray(speed)


class _Units(NamedTuple):
    """What is placed; loads over the bound of the time, memory over what is even on average."""

    layer: jax.Array  # [U]
    load: jax.Array  # [U]
    memory: jax.Array  # [U]
    per_speed: jax.Array  # [G]
    per_even: jax.Array  # [G] 1 / memory of the device when all are even
    room: jax.Array  # [G] in even memories of the device
    weight: jax.Array  # [G] of a device's deviation: its part of all memory


@functools.partial(jax.jit, static_argnames="swaps")
def _over_layers(loads, memory, room, speed, swaps) -> Placement:
    loads, memory, room, speed = _arrays(loads, memory, room, speed)
    (num_layers, each), num_devices = loads.shape, room.shape[0]
    terms = jax.vmap(lambda x: largest_term(of_units(x, speed, None)))(loads)
    scale = _bound(loads, memory, room, speed)
    mean = scale_of(memory.reshape(-1), room)  # memory for each unit of capacity
    units = _Units(
        layer=jnp.repeat(jnp.arange(num_layers), each),
        load=loads.reshape(-1) / jnp.where(scale > 0, scale, 1.0),
        memory=memory.reshape(-1),
        per_speed=1 / speed,
        per_even=1 / (room * mean),
        room=jnp.full(num_devices, 1 / mean),
        weight=room / jnp.sum(room),
    )
    order = jnp.argsort(-units.memory, stable=True).astype(jnp.int32)
    start = Problem(with_empty(units.memory), units.per_even, jnp.zeros(num_devices))
    first, _ = longest_first(start, order, order.shape[0], copies=False)
    device_of = jnp.zeros_like(order).at[order].set(first)
    device_of = _search(units, device_of, num_layers, swaps).reshape(loads.shape)
    index = jnp.arange(num_layers)[:, None], device_of
    load = jnp.zeros((num_layers, num_devices)).at[index].add(loads)
    used = jax.ops.segment_sum(memory.reshape(-1), device_of.reshape(-1), num_devices)
    over = jnp.any(used > room * (1 + ROUNDING))
    return Placement(
        device_of=device_of,
        load=load,
        count=jnp.zeros((num_layers, num_devices), jnp.int32).at[index].add(1),
        relative_load=jnp.max(load / speed, axis=1),
        bound=terms.value,
        term=terms.term,
        status=status(over, loads, memory, room, speed),
    )


@jax.jit
def _bound(loads, memory, room, speed) -> jax.Array:
    loads, memory, room, speed = _arrays(loads, memory, room, speed)
    layers: Bound = jax.vmap(lambda x: largest_term(of_units(x, speed, None)))(loads)
    # Cheapest first: load for each unit of memory. What needs no memory goes elsewhere.
    loads, memory = loads.reshape(-1), memory.reshape(-1)
    order = jnp.argsort(jnp.where(memory > 0, loads / memory, jnp.inf))
    taken = jnp.concatenate([jnp.zeros(1), jnp.cumsum(memory[order])])
    served = jnp.concatenate([jnp.zeros(1), jnp.cumsum(loads[order])])
    least = jnp.maximum(taken[-1] - (jnp.sum(room) - room), 0)
    forced = jnp.interp(least, taken, served) / speed
    return jnp.maximum(jnp.sum(layers.value), jnp.max(forced) * (1 - ROUNDING))


def _search(units: _Units, device_of, num_layers: int, swaps: int):
    """The best device_of [U] in so many steps."""

    def step(i, carry):
        device_of, rests_until, best, least = carry
        a, b, to = _best_step(units, device_of, num_layers, rests_until <= i)
        # A move is an exchange with nothing: b is then U, which no unit is.
        from_a = device_of[a]
        moved = device_of.at[a].set(to).at[b].set(from_a, mode="drop")
        rests = rests_until.at[a].set(i + _REST).at[b].set(i + _REST, mode="drop")
        now = _objective(units, moved, num_layers)
        best = jnp.where(now < least, moved, best)
        return moved, rests, best, jnp.minimum(now, least)

    start = _objective(units, device_of, num_layers)
    carry = device_of, jnp.zeros_like(device_of), device_of, start
    return lax.fori_loop(0, swaps, step, carry)[2]


def _times(units: _Units, device_of, num_layers: int):
    """Load [L, G] of each layer on each device."""
    empty = jnp.zeros((num_layers, units.per_speed.shape[0]))
    return empty.at[units.layer, device_of].add(units.load)


def _objective(units: _Units, device_of, num_layers: int):
    times = _times(units, device_of, num_layers) * units.per_speed
    used = jax.ops.segment_sum(units.memory, device_of, units.per_speed.shape[0])
    return jnp.sum(jnp.max(times, axis=1)) + jnp.sum(
        _uneven(units, used, jnp.arange(used.shape[0]))
    )


def _best_step(units: _Units, device_of, num_layers: int, free):
    """The unit a to move, where to, and the unit b that takes its place; U for none."""
    num_units, num_devices = units.load.shape[0], units.per_speed.shape[0]
    devices = jnp.arange(num_devices)
    used = jax.ops.segment_sum(units.memory, device_of, num_devices)
    costs = _uneven(units, used, devices)
    move, pair = _slower(units, device_of, num_layers)

    def memory_cost(shift, p, q):
        """Of so much memory from p to q."""
        after = _uneven(units, used[p] - shift, p) + _uneven(units, used[q] + shift, q)
        return after - costs[p] - costs[q]

    mine, yours = device_of[:, None], device_of[None]
    move += memory_cost(units.memory[:, None], mine, devices[None])
    pair += memory_cost(units.memory[:, None] - units.memory[None], mine, yours)
    move = jnp.where((mine != devices) & free[:, None], move, jnp.inf)
    pair = jnp.where((mine != yours) & free[:, None] & free, pair, jnp.inf)
    after = jnp.concatenate([pair, move], axis=1)
    best = first_least(after)
    a, b = best // after.shape[1], best % after.shape[1]
    possible = jnp.min(after) < jnp.inf
    to = jnp.where(b < num_units, device_of[jnp.minimum(b, num_units - 1)], b - num_units)
    return (
        a,
        jnp.where(possible & (b < num_units), b, num_units),
        jnp.where(possible, to, device_of[a]),
    )


def _slower(units: _Units, device_of, num_layers: int):
    """Time that the layers take more after moves [U, G] and after exchanges [U, U]."""
    devices = jnp.arange(units.per_speed.shape[0])
    loads = _times(units, device_of, num_layers)
    before = jnp.max(loads * units.per_speed, axis=1)[units.layer][:, None]
    # Two devices of a layer change; the fullest of the others is one of its three fullest.
    top, who = lax.top_k((loads * units.per_speed)[units.layer], min(3, devices.size))
    mine, other = device_of[:, None], who[:, None]
    is_other = (other != mine[..., None]) & (other != devices[None, :, None])
    rest = jnp.max(jnp.where(is_other, top[:, None], 0), axis=-1)  # [U, G]

    def after(shift, q, rest):
        """Of layers of which so much load has gone from each unit's device to q."""
        left = (loads[units.layer[:, None], mine] - shift) * units.per_speed[mine]
        joined = (jnp.take_along_axis(loads[units.layer], q, axis=1) + shift) * units.per_speed[q]
        return jnp.maximum(jnp.maximum(rest, left), joined)

    everywhere = jnp.broadcast_to(devices, rest.shape)
    move = jnp.where(mine == devices, 0, after(units.load[:, None], everywhere, rest) - before)
    # Units of different layers: two moves. Of the same: one, of the difference.
    yours = jnp.broadcast_to(device_of, (device_of.size, device_of.size))
    same = after(units.load[:, None] - units.load, yours, rest[:, device_of]) - before
    across_layers = move[:, device_of] + move[:, device_of].T
    return move, jnp.where(units.layer[:, None] == units.layer, same, across_layers)


def _uneven(units: _Units, used, device):
    """What the memory held on devices costs there."""
    relative = used * units.per_even[device]
    over = jnp.maximum(relative - units.room[device] * (1 + ROUNDING), 0)
    return units.weight[device] * _EVEN * (relative - 1) ** 2 + _OVER * over
