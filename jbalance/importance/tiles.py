"""What the tiles of attention are worth: the error of leaving each out, from a sample of the queries."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jbalance import checks

_HIDDEN = -1e30  # logits of keys that a query does not see
_CHUNK_ROWS = 128  # sampled queries looked at together
_SEGMENTS = 4  # causal ones see no more keys than the last of their segment does
_LEAST_REST = 0.05  # a tile with more of the attention than 1 - this is worth enough


def tile_error(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    block_q: int,
    block_k: int,
    rows: int = 8,
    causal: bool = True,
) -> jax.Array:
    """Squared error of a query's output if a tile is left out, on average over its block's queries.

    With p the attention weights of query t and y its output, leaving out the keys of block j and
    normalising the rest changes y by |sum_{s in j} p_s (v_s - y)| / (1 - m_j), m_j = sum_{s in j} p_s.
    Its square is taken as m_j² |v̄_j - y|² + σ_j² sum p_s², with the block's mean value v̄_j and variance
    σ_j²: what does not depend on which keys of the block are read, and what does. Mass alone asks for
    all tiles of heads that spread their attention, whose outputs hardly change without them.

    `rows` evenly spaced queries of each block stand for it. Their logits are computed for all keys: for
    `rows` of `block_q` queries, that part of half of dense attention.

    Args:
      q: [B, T, H, D] float queries, after the rotary embedding.
      k: [B, S, K, D] float keys; H a multiple of K.
      v: [B, S, K, D] float values.
      block_q: queries of a tile.
      block_k: keys of a tile.
      rows: queries of a block that are looked at, 1 to block_q. Fewer are cheaper and noisier.
      causal: query t sees keys s <= t + S - T, else all.

    Returns:
      [B, H, I, J] float32 >= 0, I = ceil(T / block_q), J = ceil(S / block_k); 0 where nothing is seen.

    Raises:
      ValueError: shapes that do not fit, or numbers outside their range.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    _check(q, k, v, block_q, block_k, rows)
    batch, size, heads, head_dim = q.shape
    num_keys, kv_heads = k.shape[1:3]
    num_rows, num_blocks = -(-size // block_q), -(-num_keys // block_k)
    keys, values = (
        jnp.pad(jnp.moveaxis(x.astype(jnp.float32), 1, 2), _behind(num_blocks * block_k - num_keys))
        for x in (k, v)
    )
    spots = (np.arange(rows) + 1) * block_q // rows - 1
    at = np.minimum(np.arange(num_rows)[:, None] * block_q + spots, size - 1)  # [I, rows]
    asked = jnp.moveaxis(q[:, at.reshape(-1)].astype(jnp.float32) / math.sqrt(head_dim), 1, 2)
    asked = asked.reshape(batch, kv_heads, -1, num_rows, rows, head_dim)

    step = max(1, _CHUNK_ROWS // rows)
    out = []
    for part in np.array_split(np.arange(num_rows), min(_SEGMENTS, num_rows) if causal else 1):
        seen = num_blocks
        if causal:
            last = int(at[part[-1]].max()) + num_keys - size
            seen = min(max(last // block_k + 1, 1), num_blocks)
        blocks = _Blocks.of(
            keys[:, :, : seen * block_k], values[:, :, : seen * block_k], num_keys, seen
        )
        short = -part.size % step
        chosen = np.minimum(np.arange(part.size + short) + part[0], num_rows - 1).reshape(-1, step)

        def errors(i, blocks=blocks):
            own = jnp.take(asked, i, axis=3)
            shape = own.shape
            there = jnp.asarray(at)[i].reshape(-1) + num_keys - size if causal else None
            found = blocks.errors(own.reshape(*shape[:3], -1, head_dim), there)
            return jnp.mean(found.reshape(*shape[:5], -1), axis=4)

        found = lax.map(errors, jnp.asarray(chosen))  # [chunks, B, K, G, step, seen]
        found = jnp.moveaxis(found, 0, 3).reshape(batch, heads, -1, seen)[:, :, : part.size]
        out.append(jnp.pad(found, ((0, 0),) * 3 + ((0, num_blocks - seen),)))
    return jnp.concatenate(out, axis=2)


def _check(q, k, v, block_q, block_k, rows):
    """ValueError for shapes and numbers that do not fit."""
    checks.rank("q", q, 4, "[B, T, H, D]")
    checks.rank("k", k, 4, "[B, S, K, D]")
    for name, x in (("q", q), ("k", k)):
        checks.non_empty(name, x)
    if v.shape != k.shape:
        raise ValueError(f"v has shape {v.shape}: it must have that of k, {k.shape}")
    if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]) or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k has shape {k.shape}: with q {q.shape} it must be [B, S, K, D] = ({q.shape[0]}, S, a "
            f"divisor of {q.shape[2]}, {q.shape[3]})"
        )
    for name, value in (("block_q", block_q), ("block_k", block_k)):
        checks.positive(name, value)
    checks.in_range("rows", rows, 1, block_q)


def _behind(number):
    """Padding of the keys' axis of [B, K, S, D]."""
    return ((0, 0), (0, 0), (0, number), (0, 0))


class _Blocks:
    """Keys and values by blocks, and the moments of each block's values."""

    def __init__(self, keys, values, mean, spread, valid):
        self.keys, self.values, self.mean, self.spread, self.valid = (
            keys,
            values,
            mean,
            spread,
            valid,
        )

    @classmethod
    def of(cls, keys, values, num_keys, number):
        """From keys and values [B, K, S, D], of which those behind `num_keys` are padding."""
        valid = jnp.arange(keys.shape[2]) < num_keys
        size = keys.shape[2] // number
        blocks = values.reshape(*values.shape[:2], number, size, -1)
        inside = valid.reshape(number, size, 1)
        count = jnp.maximum(jnp.sum(inside, axis=1), 1)
        mean = jnp.sum(jnp.where(inside, blocks, 0), axis=3) / count
        apart = jnp.where(inside, blocks - mean[:, :, :, None], 0)
        spread = jnp.sum(jnp.square(apart), axis=(3, 4)) / count[:, 0]
        return cls(keys, values, mean, spread, valid)

    def errors(self, rows, at):
        """Of leaving out each block, [..., N, J]; rows [B, K, G, N, D] at [N], or None: they see all."""
        logits = jnp.einsum("bkgnd,bksd->bkgns", rows, self.keys)
        seen = self.valid
        if at is not None:
            seen = seen & (jnp.arange(seen.size) <= at[:, None])
        logits = jnp.where(seen, logits, _HIDDEN)
        top = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), 0.5 * _HIDDEN)
        p = jnp.exp(logits - top)
        p = p / jnp.maximum(jnp.sum(p, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        p = p.reshape(*p.shape[:-1], self.mean.shape[2], -1)
        mass, square = jnp.sum(p, axis=-1), jnp.sum(jnp.square(p), axis=-1)
        y = jnp.einsum("bkgnj,bkjd->bkgnd", mass, self.mean)
        across = jnp.einsum("bkgnd,bkjd->bkgnj", y, self.mean)
        length = jnp.sum(jnp.square(self.mean), axis=-1)[:, :, None, None]
        apart = jnp.maximum(length - 2 * across + jnp.sum(jnp.square(y), axis=-1, keepdims=True), 0)
        error = jnp.square(mass) * apart + square * self.spread[:, :, None, None]
        return error / jnp.square(jnp.maximum(1 - mass, _LEAST_REST))
