"""Placements, what bounds them and what they cost: the containers that the placers return."""

from __future__ import annotations

import enum
from typing import Protocol

import jax

from jbalance.types import container


class Term(enum.IntEnum):
    """Which lower bound on the fullest device's load is the largest (`place.bound`)."""

    MEAN = 0  # all devices are full alike: only less load or more devices would help
    LARGEST = 1  # one unit, or one copy of it, is too large: split it or copy it
    PIGEON_HOLE = 2  # units are few and large: some device gets one more than the others
    COUNT = 3  # the device of the largest unit must take others besides: allow uneven counts
    GROUP = 4  # whole groups go to nodes: relax that rule


@container
class Bound:
    """What no placement can beat."""

    value: jax.Array  # [] load over capacity that some device reaches
    term: jax.Array  # [] int32, a Term: which bound that is


@container
class Placement:
    """Which device holds which unit."""

    device_of: jax.Array  # [U] int32
    load: jax.Array  # [G] float32, sum of the loads placed on each device
    count: jax.Array  # [G] int32, units placed on each device
    relative_load: jax.Array  # [] largest load / capacity over the devices
    bound: jax.Array  # [] no placement has a smaller relative load
    term: jax.Array  # [] int32, a Term: what binds
    status: jax.Array  # [] int32, a Status


@container
class Replicas:
    """Which slot holds which unit, where units have copies; C = ceil(slots / G) on a device."""

    unit_of: jax.Array  # [G, C] int32, the unit in each slot of each device; U where it is empty
    copies: jax.Array  # [U] int32 >= 1, on distinct devices, of equal shares of the unit's load
    load: jax.Array  # [G] float32
    count: jax.Array  # [G] int32, slots in use on each device
    relative_load: jax.Array  # [] largest load over the devices
    bound: jax.Array  # [] no placement with so many slots has a smaller one
    term: jax.Array  # [] int32, a Term: what binds
    status: jax.Array  # [] int32, a Status


@container
class StepTime:
    """How long a step takes that waits for the fullest device of every layer."""

    total: jax.Array  # [] sum over the layers
    bound: jax.Array  # [] no placement takes less
    by_term: jax.Array  # [5] what of the bound is due to each Term


@container
class Rebalanced:
    """A placement under new loads, and what has to move for it."""

    placement: Placement  # the old one where moving is not worth it
    moved: jax.Array  # [U, G] bool, the units that each device has to fetch
    moved_blocks: jax.Array  # [] uint32, their sizes; 2^32 - 1 if it is as much or more
    load_before: jax.Array  # [] relative load if nothing moves


class Placer(Protocol):
    """Units to devices of equal capacity."""

    def __call__(self, loads: jax.Array, num_devices: int) -> Placement:
        """loads [U] >= 0 -> where each unit is."""
        ...
