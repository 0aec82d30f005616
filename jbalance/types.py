"""Result codes, and the containers and callable protocols that the stages hand to each other.

Shape letters, here and everywhere: B batch, L layers, H query heads, K key/value heads, T queries,
S keys, D head dim, U (or N) units, M levels of a ladder, G devices.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Protocol, dataclass_transform

import jax
from jax.typing import ArrayLike

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


@dataclass_transform(frozen_default=True)
def container(cls):
    """A frozen dataclass whose fields are all pytree leaves: what a stage hands on by name.

    A NamedTuple is for what a function returns and its caller unpacks.
    """
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@container
class Resources:
    """What devices have left (METHOD step 2), in the unit that capacity was given in."""

    available: jax.Array  # [G] or [], capacity - sum of what is used now
    remaining: jax.Array  # [G] or [], capacity - sum of min(demand, used)
    total_available: jax.Array  # []
    total_remaining: jax.Array  # []


@container
class Fill:
    """Real amounts from water-filling: amount = clip(level * w, floor, cap), sum = budget."""

    amount: jax.Array  # [U] float32
    level: jax.Array  # [] the water level: amount per weight of a unit that nothing binds
    segment_level: jax.Array  # [P] the level of each segment, [1] without segments
    binding: jax.Array  # [U] int32, a Binding
    slack: jax.Array  # [] budget that no unit could take, all being at their caps
    status: jax.Array  # [] int32, a Status


@container
class IntegerAllocation:
    """Whole amounts that sum to the budget exactly."""

    amount: jax.Array  # [U] int32
    price: jax.Array  # [] weight per unit of amount at which the next one would be given
    binding: jax.Array  # [U] int32, a Binding
    slack: jax.Array  # [] int32, budget that no unit could take
    status: jax.Array  # [] int32, a Status


@container
class Allocation:
    """Levels of the ladder chosen under the budgets, and the prices that explain them."""

    level: jax.Array  # [U] int32 in 0..M-1
    spent: jax.Array  # [G] uint32, cost of the chosen levels on each device
    price: jax.Array  # [G] float32, Lagrange multiplier of its budget: value per unit of cost
    total_price: jax.Array  # [] float32, of the total budget; 0 where none was given
    slack: jax.Array  # [G] uint32, device budget left over
    total_slack: jax.Array  # [] uint32, total budget left over
    gap: jax.Array  # [] float32, at most this much value below the relaxed optimum
    binding: jax.Array  # [U] int32, a Binding
    status: jax.Array  # [] int32, a Status


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

    def __call__(self, x: ArrayLike, y: ArrayLike, *, num_classes: int | None) -> jax.Array:
        """x [B, N] features, y [B] int labels in 0..num_classes-1 (None: read from y) -> [N]."""
        ...


class ShareRule(Protocol):
    """alpha from w: non-negative, summing to one."""

    def __call__(
        self, w: jax.Array, *, where: jax.Array | None = None, axis_name: str | None = None
    ) -> jax.Array:
        """w [U] -> alpha [U]; where [U] bool: units that there are; axis_name: of their mesh axis."""
        ...
