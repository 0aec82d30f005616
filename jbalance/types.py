"""Containers and callable protocols that the stages hand to each other.

Shape letters, here and everywhere: B batch, L layers, H query heads, K key/value heads, T queries,
S keys, D head dim, U (or N) units, M levels of a ladder, G devices.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Protocol, dataclass_transform

import jax

from jbalance.tiling import Tiling


class Status(enum.IntEnum):
    """Result code of an allocation; under jit an int32 array, since nothing can raise there."""

    OK = 0
    INFEASIBLE = 1  # the floors (or lowest levels) cost more than a budget
    INVALID = 2  # NaN, infinite or negative input


class Binding(enum.IntEnum):
    """What stops a unit from getting more: the reason reported with an allocation."""

    PRICE = 0  # its next step is worth less per cost than the price of the total budget
    FLOOR = 1  # it would get less, but for its floor
    CAP = 2  # it has all that it can take
    DEVICE = 3  # its device's own budget is full: that price, not the total's, stops it


class Term(enum.IntEnum):
    """Which lower bound on the fullest device's load is the largest (`place.bound`)."""

    MEAN = 0  # all devices are full alike: only less load or more devices would help
    LARGEST = 1  # one unit, or one copy of it, is too large: split it or copy it
    PIGEON_HOLE = 2  # units are few and large: some device gets one more than the others
    COUNT = 3  # the device of the largest unit must take others besides: allow uneven counts
    GROUP = 4  # whole groups go to nodes: relax that rule


@dataclass_transform(frozen_default=True)
def _container(cls):
    """A frozen dataclass whose fields are all pytree leaves."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_container
class Resources:
    """What devices have left (METHOD step 2), in the unit that capacity was given in."""

    available: jax.Array  # [G] or [], capacity - sum of what is used now
    remaining: jax.Array  # [G] or [], capacity - sum of min(demand, used)
    total_available: jax.Array  # []
    total_remaining: jax.Array  # []


@_container
class Fill:
    """Real amounts from water-filling: amount = clip(level * w, floor, cap), sum = budget."""

    amount: jax.Array  # [U] float32
    level: jax.Array  # [] the water level: amount per weight of a unit that nothing binds
    segment_level: jax.Array  # [P] the level of each segment, [1] without segments
    binding: jax.Array  # [U] int32, a Binding
    slack: jax.Array  # [] budget that no unit could take, all being at their caps
    status: jax.Array  # [] int32, a Status


@_container
class Whole:
    """Whole amounts that sum to the budget exactly."""

    amount: jax.Array  # [U] int32
    price: jax.Array  # [] weight per unit of amount at which the next one would be given
    binding: jax.Array  # [U] int32, a Binding
    slack: jax.Array  # [] int32, budget that no unit could take
    status: jax.Array  # [] int32, a Status


@_container
class Allocation:
    """Levels of the ladder chosen under the budgets, and the prices that explain them."""

    level: jax.Array  # [U] int32 in 0..M-1
    spent: jax.Array  # [G] uint32, cost of the chosen levels on each device
    price: jax.Array  # [G] float32, value of one more unit of cost on this device
    total_price: jax.Array  # [] float32, of the total budget; 0 where none was given
    slack: jax.Array  # [G] uint32, device budget left over
    total_slack: jax.Array  # [] uint32, total budget left over
    gap: jax.Array  # [] float32, at most this much value below the relaxed optimum
    binding: jax.Array  # [U] int32, a Binding
    status: jax.Array  # [] int32, a Status


@_container
class Bound:
    """What no placement can beat."""

    value: jax.Array  # [] load over capacity that some device reaches
    term: jax.Array  # [] int32, a Term: which bound that is


@_container
class TaskAmounts:
    """What N tasks get of a step."""

    alpha: jax.Array  # [N] shares, which are the weights of their losses too
    examples: jax.Array  # [N] int32 of the batch
    tokens: jax.Array  # [N] int32
    cache: jax.Array  # [G, N] int32 blocks on each device
    status: jax.Array  # [] int32, a Status


@_container
class GroupAudit:
    """How P groups of units fare: attention, and errors where there are any."""

    count: jax.Array  # [P] units
    attention: jax.Array  # [P] float32 part of all attention
    parity: jax.Array  # [P] attention over the group's part of the units; 0 for empty groups
    least_parity: jax.Array  # [] of the groups that have units
    error: jax.Array  # [P] float32 mean error of a unit; 0 for empty groups or without errors
    error_gap: jax.Array  # [] between the groups of most and of least error


@_container
class Placement:
    """Which device holds which unit."""

    device_of: jax.Array  # [U] int32
    load: jax.Array  # [G] float32, sum of the loads placed on each device
    count: jax.Array  # [G] int32, units placed on each device
    relative_load: jax.Array  # [] largest load / capacity over the devices
    bound: jax.Array  # [] no placement has a smaller relative load
    term: jax.Array  # [] int32, a Term: what binds
    status: jax.Array  # [] int32, a Status


@_container
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


@_container
class StepTime:
    """How long a step takes that waits for the fullest device of every layer."""

    total: jax.Array  # [] sum over the layers
    bound: jax.Array  # [] no placement takes less
    by_term: jax.Array  # [5] what of the bound is due to each Term


@_container
class Rebalanced:
    """A placement under new loads, and what has to move for it."""

    placement: Placement | Replicas  # the old one where moving is not worth it
    moved: jax.Array  # [U, G] bool, the units that each device has to fetch
    moved_blocks: jax.Array  # [] uint32, their sizes; 2^32 - 1 if it is as much or more
    load_before: jax.Array  # [] relative load if nothing moves


class TokenScorer(Protocol):
    """w of the cached tokens of one layer and sequence; families differ in keyword arguments only."""

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """q [T, H, D], k [S, K, D], v [S, K, D] (query t stands at position S - T + t) -> [K, S]."""
        ...


class TileScorer(Protocol):
    """What computing each tile of attention gains."""

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, tiling: Tiling, *, rows: int
    ) -> jax.Array:
        """q [B, T, H, D], k and v [B, S, K, D], `rows` queries looked at in a block -> [B, H, I, J]."""
        ...


class FeatureScorer(Protocol):
    """w of the features of a data set, each in 0..1."""

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """x [B, N] features, y [B] int labels -> [N]."""
        ...


class ShareRule(Protocol):
    """alpha from w: non-negative, summing to one."""

    def __call__(
        self, w: jax.Array, *, where: jax.Array | None = None, axis_name: str | None = None
    ) -> jax.Array:
        """w [U] -> alpha [U]; where [U] bool: units that there are; axis_name: of their mesh axis."""
        ...


class Rounding(Protocol):
    """Whole amounts from weights under one budget."""

    def __call__(self, w: jax.Array, budget: jax.Array, floor: jax.Array, cap: jax.Array) -> Whole:
        """w [U] -> amounts [U], within floor and cap, summing to budget."""
        ...


class Placer(Protocol):
    """Units to devices of equal capacity."""

    def __call__(self, loads: jax.Array, num_devices: int) -> Placement:
        """loads [U] >= 0 -> where each unit is."""
        ...
