"""Leave-one-tile-out error: what the output loses without a tile, from a sample of the queries."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jbalance._exp2 import exp2
from jbalance.importance import _tile_errors
from jbalance.importance._tile_errors import HIDDEN, Moments
from jbalance.tiling import Tiling

_TILE_KEYS = 512


def tile_error(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    tiling: Tiling,
    *,
    rows: int = 8,
) -> jax.Array:
    """Squared error of a query's output if a tile is left out, on average over its block's queries.

    With p the attention weights of query t and y its output, leaving out the keys of block j and
    normalizing the rest changes y by |sum_{s in j} p_s (v_s - y)| / (1 - m_j), m_j = sum_{s in j} p_s.
    Its square is taken as m_j² |v̄_j - y|² + σ_j² sum p_s², with the block's mean value v̄_j and variance
    σ_j²: what does not depend on which keys of the block are read, and what does. Mass alone asks for
    all tiles of heads that spread their attention, whose outputs hardly change without them.

    `rows` evenly spaced queries of each block stand for it. Their logits are computed for all keys: for
    `rows` of `block_q` queries, that part of half of dense attention.

    Args:
      q: [B, T, H, D] float queries, after the rotary embedding.
      k: [B, S, K, D] float keys; H a multiple of K.
      v: [B, S, K, D] float values.
      tiling: the tiles, for T queries and S keys.
      rows: queries of a block that are looked at, 1 to block_q. Fewer are cheaper and noisier.

    Returns:
      [B, H, I, J] float32 >= 0, (I, J) = `tiling.shape`; 0 where nothing is visible.

    Raises:
      ValueError: shapes that do not fit, or numbers outside their range.
    """
    q, k, v, rows = _tile_errors.checked(q, k, v, tiling, rows)
    return _measured(q, k, v, tiling, rows)


@functools.partial(jax.jit, static_argnames=("tiling", "rows"))  # once for all eager calls
def _measured(q: jax.Array, k: jax.Array, v: jax.Array, tiling: Tiling, rows: int) -> jax.Array:
    """`tile_error` without its checks."""
    block_k = tiling.block_k
    together = max(1, min(_TILE_KEYS // block_k, tiling.shape[1]))
    keys = _Keys(_tile_errors.padded(k, block_k * together), together, block_k)
    return _tile_errors.errors(q, v, keys, tiling, rows)


class _Keys(NamedTuple):
    """Keys, to be looked at some blocks at a time."""

    keys: jax.Array  # [B, S', K, D], whole tiles
    together: int  # blocks of a tile
    block_k: int
    value_stride: int = 1

    def errors(self, queries: jax.Array, last: jax.Array, values: Moments) -> jax.Array:
        """`Summary.errors`, exact.

        Keys lie before rows, whose axis a CPU then takes as vectors; a tile at a time, so that the
        logits stay in its cache.
        """
        lead, shape = queries.shape[:2], queries.shape[2:5]
        queries = queries.reshape(*lead, -1, queries.shape[-1])
        last = jnp.broadcast_to(last, shape).reshape(-1)
        width, number = self.together * self.block_k, values.mean.shape[2]

        def one(i):
            keys = lax.dynamic_slice_in_dim(self.keys, i * width, width, axis=1)
            logits = jnp.einsum("bskd,bkmd->bksm", keys, queries)
            hidden = jnp.arange(width)[:, None] > last - i * width
            logits = jnp.where(hidden, HIDDEN, logits)
            logits = logits.reshape(*lead, self.together, self.block_k, -1)
            top = jnp.maximum(jnp.max(logits, axis=3), 0.5 * HIDDEN)
            weight = exp2(logits - top[:, :, :, None])
            return top, jnp.sum(weight, axis=3), jnp.sum(weight * weight, axis=3)

        sums = _tile_errors.by_block(one, -(-number // self.together), lead)
        top, mass, square = (x[:, :, :number] for x in sums)
        share, factor = _tile_errors.normalized(top, mass)
        # Σ p² of a block's keys, of (Σ p)²: what is not shared by its keys.
        single = square * factor * factor / jnp.maximum(share * share, jnp.finfo(jnp.float32).tiny)
        distance = values.squared_distance(share) + single * values.variance[..., None]
        error = _tile_errors.of_the_rest(share) * distance
        return jnp.mean(error.reshape(*lead, number, *shape), axis=-1)
