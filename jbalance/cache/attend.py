"""Attention over the cache: only the entries that are there, tile by tile."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from jbalance import checks
from jbalance.attention import EMPTY, Partial
from jbalance.cache.ragged import RaggedCache

TILE_ENTRIES = 128


def attend(q: jax.Array, cache: RaggedCache, units: jax.Array) -> Partial:
    """Attention of queries over the cached entries of their units.

    y_u = softmax(q_u k_u^T / sqrt(D)) v_u over the entries of unit u, all of which every query sees. The
    number of tiles that are computed is data: changed offsets do not recompile.

    Args:
      q: [N, T, D] queries of N units (a unit's T holds its group of heads and its tokens).
      cache: where the units are.
      units: [N] int32, indices into the cache's units.

    Returns:
      `Partial` with y [N, T, D] and lse [N, T], float32; a unit without entries gives y = 0.

    Raises:
      ValueError: shapes that do not fit.
    """
    checks.rank("q", q, 3, "[N, T, D]")
    checks.rank("units", units, 1, "[N]")
    checks.same_length("units", units, "q", q)
    checks.same_length("q", q, "cache.keys", cache.keys, axis=-1)
    if cache.num_entries == 0:
        return Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], EMPTY))
    tile = min(TILE_ENTRIES, cache.num_entries)

    def one_unit(at):
        q, unit = at
        return _attend_range(q, cache, cache.offsets[unit], cache.offsets[unit + 1], tile)

    return Partial(*lax.map(one_unit, (q.astype(jnp.float32), units)))


def _attend_range(q, cache, start, stop, tile):
    """One unit's queries [T, D] over entries start..stop-1, by an online softmax over its tiles."""
    scale = 1.0 / math.sqrt(q.shape[-1])

    def step(i, carry):
        y, mass, top = carry
        first = start + i * tile
        # The last tile is moved back into the array, and what came before it is masked.
        at = jnp.minimum(first, cache.num_entries - tile)
        keys, values = (
            lax.dynamic_slice_in_dim(x, at, tile).astype(jnp.float32)
            for x in (cache.keys, cache.values)
        )
        entry = at + jnp.arange(tile)
        logits = jnp.where((entry >= first) & (entry < stop), q @ keys.T * scale, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
        weight = jnp.exp(logits - new_top[:, None])
        decay = jnp.exp(top - new_top)
        return (
            y * decay[:, None] + weight @ values,
            mass * decay + jnp.sum(weight, axis=-1),
            new_top,
        )

    empty = (jnp.zeros_like(q), jnp.zeros(q.shape[:1]), jnp.full(q.shape[:1], EMPTY))
    y, mass, top = lax.fori_loop(0, (stop - start + tile - 1) // tile, step, empty)
    some = mass > 0
    mass = jnp.where(some, mass, 1.0)
    return jnp.where(some[:, None], y / mass[:, None], 0.0), top + jnp.where(some, jnp.log(mass), 0)
