"""What the placements ask of their arguments, and how loads are scaled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance import _axes, checks
from jbalance.types import Status

ROUNDING = 1e-6  # relative: sums of float32 that differ by less are the same


def check_loads(loads: ArrayLike, num_devices: int) -> tuple[ArrayLike, int]:
    """Loads [U] in float32 and the number; ValueError unless they are >= 0 and there is a device."""
    _axes.unsplit(loads=loads)
    checks.rank("loads", loads, 1, "[U]")
    checks.non_empty("loads", loads)
    loads = checks.non_negative("loads", loads)
    return loads, checks.static_int("num_devices", num_devices, 1)


def check_capacity(
    capacity: ArrayLike | None, num_devices: int, name: str = "capacity"
) -> ArrayLike | None:
    """Capacity [G] in float32; ValueError unless it is positive."""
    if capacity is None:
        return None
    _axes.unsplit(**{name: capacity})
    checks.rank(name, capacity, 1, "[G]")
    checks.length(name, capacity, num_devices, "num_devices")
    return checks.positive(name, capacity)


def check_max_count(max_count: int | None, num_units: int, num_devices: int) -> int | None:
    """`max_count`; ValueError unless all units fit, so many on a device."""
    if max_count is None:
        return None
    max_count, least = checks.static_int("max_count", max_count), -(-num_units // num_devices)
    hint = (
        f"{num_devices} devices then hold {num_devices * max_count} of {num_units} units of loads"
    )
    return checks.static_int(
        "max_count", max_count, least, hint=f"{hint}, it must be at least {least}"
    )


def check_slots(num_slots: int, num_units: int, num_devices: int) -> int:
    """`num_slots`; ValueError unless every unit has a slot and no unit needs two on one device."""
    hint = f"{num_units} units of loads need one slot each"
    num_slots = checks.static_int("num_slots", num_slots, num_units, hint=hint)
    if num_slots > num_units * num_devices:
        raise ValueError(
            f"num_slots is {num_slots}: {num_units} units of loads on {num_devices} devices, one copy "
            f"of each on a device, fill {num_units * num_devices} at most"
        )
    return num_slots


def check_memory(
    memory: ArrayLike | None, room: ArrayLike | None, loads, num_devices
) -> tuple[ArrayLike | None, ArrayLike | None]:
    """Both in float32; ValueError unless memory [U] and memory_capacity [G] come together."""
    if (memory is None) != (room is None):
        given, missing = ("memory", "memory_capacity")[:: 1 if room is None else -1]
        raise ValueError(f"{missing} is None, but {given} is given: give both or neither")
    if memory is None:
        return None, None
    _axes.unsplit(memory=memory)
    checks.rank("memory", memory, 1, "[U]")
    checks.same_length("memory", memory, "loads", loads)
    memory = checks.non_negative("memory", memory)
    return memory, check_capacity(room, num_devices, "memory_capacity")


def check_swaps(swaps: int) -> int:
    """`swaps`; ValueError unless it is whole and >= 0."""
    return checks.static_int("swaps", swaps)


def scale_of(loads: jax.Array, capacity: jax.Array) -> jax.Array:
    """What loads are divided by for their mean over capacity to be 1; 1 where there is no load."""
    mean = jnp.sum(loads) / jnp.sum(capacity)
    return jnp.where(mean > 0, mean, 1.0)


def with_empty(x: jax.Array) -> jax.Array:
    """x [U] and a 0 for the unit U, which stands for an empty place."""
    return jnp.append(x, jnp.zeros(1, x.dtype))


def status(infeasible: jax.Array, *numbers: jax.Array | None) -> jax.Array:
    """INVALID where a number is NaN, infinite or negative, else INFEASIBLE or OK."""
    valid = jnp.array(True)
    for x in numbers:
        if x is not None:
            valid &= jnp.all(jnp.isfinite(x) & (x >= 0))
    code = jnp.where(infeasible, Status.INFEASIBLE, Status.OK)
    return jnp.where(valid, code, Status.INVALID).astype(jnp.int32)
