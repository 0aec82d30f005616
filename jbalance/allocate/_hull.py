"""Upper concave hull of each unit's ladder, its points being (cost, value)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_FEW_LEVELS = 8  # up to here the levels are written out one by one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hull:
    """Steps between the levels, on the concave hull of each unit's points; levels lead."""

    slope: jax.Array  # [M-1, U] value per cost, never rising with the level
    cost: jax.Array  # [M-1, U] uint32, or [M-1, 1] where all units have the same
    corner: jax.Array  # [M-1, U] the level that the step leads to lies on the hull


def hull_of(values: jax.Array, costs: jax.Array) -> Hull:
    """Slopes of the least concave majorant: slope_m = min over a < m of max over b >= m of s(a, b).

    Steps of one straight stretch of the hull come from the same quotient s(a, b), so they are equal
    to the bit and are taken together. (The min-max formula of isotonic regression: Barlow et al.,
    Statistical Inference under Order Restrictions, 1972.)
    """
    values, costs = values.T, jnp.atleast_2d(costs).T
    slopes = _slopes_written_out if values.shape[0] <= _FEW_LEVELS else _slopes_scanned
    slope, direct = slopes(values, costs)
    return Hull(slope, jnp.diff(costs, axis=0), direct >= slope)


def _slopes_written_out(values: jax.Array, costs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The hull's slopes [M-1, U], and the least slope straight to each level from one below it.

    Level by level: a few rows that XLA fuses into one pass over the units.
    """
    num_levels = values.shape[0]
    slope: list[Any] = [jnp.inf] * num_levels
    direct: list[Any] = [jnp.inf] * num_levels
    for a in range(num_levels - 1):
        best: Any = -jnp.inf
        for b in range(num_levels - 1, a, -1):
            rise = (values[b] - values[a]) / (costs[b] - costs[a]).astype(jnp.float32)
            best = jnp.maximum(best, rise)
            slope[b] = jnp.minimum(slope[b], best)
            direct[b] = jnp.minimum(direct[b], rise)
    return jnp.stack(slope[1:]), jnp.stack(direct[1:])


def _slopes_scanned(values: jax.Array, costs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same by a scan: many levels written out would take XLA minutes to compile."""
    level = jnp.arange(values.shape[0])[:, None]

    def from_level(carry, a):
        slope, direct = carry
        below, value, cost = a
        above = level > below
        run = jnp.where(above, costs - cost, 1).astype(jnp.float32)
        rise = jnp.where(above, (values - value) / run, -jnp.inf)
        best = lax.cummax(rise, axis=0, reverse=True)
        slope = jnp.where(above, jnp.minimum(slope, best), slope)
        return (slope, jnp.where(above, jnp.minimum(direct, rise), direct)), None

    far = jnp.full(values.shape, jnp.inf) + 0 * values  # varies over a mesh as the values do
    (slope, direct), _ = lax.scan(from_level, (far, far), (level[:, 0], values, costs))
    return slope[1:], direct[1:]


def by_level(x: jax.Array) -> list[jax.Array]:
    """x [M-1, U] level by level if they are few, for XLA to sum them in its pass over the units (over
    a short leading axis it reduces many times slower); else in one block."""
    return jnp.split(x, len(x)) if len(x) < _FEW_LEVELS else [x]
