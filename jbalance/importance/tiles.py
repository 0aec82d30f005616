"""What the tiles of attention are worth: the error of leaving each out, from a sample of the queries."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jbalance import checks
from jbalance._exp2 import LOG2_E, exp2

_HIDDEN = -1e30  # logits of keys that a query does not see
_CHUNK_ROWS = 64  # sampled queries looked at together, those of heads that share keys among them
_TILE_KEYS = 512
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
    spots = (np.arange(rows) + 1) * block_q // rows - 1
    at = np.minimum(np.arange(num_rows)[:, None] * block_q + spots, size - 1)  # [I, rows]
    last = at + num_keys - size if causal else np.full_like(at, num_keys - 1)
    asked = q[:, at].astype(jnp.float32) * (LOG2_E / math.sqrt(head_dim))
    asked = asked.reshape(batch, num_rows, rows, kv_heads, -1, head_dim)
    asked = jnp.transpose(asked, (1, 0, 3, 4, 2, 5))  # [I, B, K, G, rows, D]
    moments = _Moments.of(_padded(v, block_k), num_keys, block_k)
    together = max(1, min(_TILE_KEYS // block_k, num_blocks))  # key blocks
    keys = _padded(k, block_k * together)

    rows_per_block = rows * heads // kv_heads
    # Segments of few rows would read the keys again for little.
    segments = min(_SEGMENTS, max(1, num_rows * rows_per_block // _CHUNK_ROWS)) if causal else 1
    out = []
    for part in np.array_split(np.arange(num_rows), min(segments, num_rows)):
        seen = min(max(int(last[part].max()) // block_k + 1, 1), num_blocks)
        tiles = _Tiles(keys, -(-seen // together), together, block_k)
        own = moments.first(seen)

        def errors(i, tiles=tiles, own=own):
            rows = jnp.moveaxis(asked[i], 0, 3)
            sums = _block_sums(tiles, rows, jnp.asarray(last)[i])
            return jnp.mean(own.errors(*sums), axis=-1)

        chunks = -(-part.size * rows_per_block // _CHUNK_ROWS)
        step = -(-part.size // chunks)
        chosen = np.minimum(np.arange(chunks * step) + part[0], num_rows - 1).reshape(-1, step)
        found = lax.map(errors, jnp.asarray(chosen))  # [chunks, B, K, seen, G, step]
        found = jnp.transpose(found, (1, 2, 4, 0, 5, 3)).reshape(batch, heads, -1, seen)
        found = found[:, :, : part.size]
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


def _padded(x, multiple):
    """Keys or values [B, S, K, D] in float32, zeros behind the end."""
    widths = ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0))
    return jnp.pad(x.astype(jnp.float32), widths)


class _Tiles(NamedTuple):
    """The first keys, to be looked at some blocks at a time."""

    keys: jax.Array  # [B, S', K, D], whole tiles
    number: int
    together: int  # blocks of a tile
    size: int  # keys of a block


def _block_sums(tiles, asked, last):
    """What softmaxes are made of: largest logit, sum and sum of squares of each block of keys.

    Keys lie before rows, whose axis a CPU then takes as vectors; a tile at a time, so that the logits
    stay in its cache.

    Args:
      tiles: `_Tiles` of J' blocks together.
      asked: [B, K, G, step, rows, D] queries, scaled for logits in base 2.
      last: [step, rows], the last key that each sees.

    Returns:
      top, mass, square [B, K, J', G, step, rows]; mass sums 2^(logit - top).
    """
    lead, shape = asked.shape[:2], asked.shape[2:5]
    asked = asked.reshape(*lead, -1, asked.shape[-1])
    last = jnp.broadcast_to(last, shape).reshape(-1)
    width = tiles.together * tiles.size

    def one(i):
        keys = lax.dynamic_slice_in_dim(tiles.keys, i * width, width, axis=1)
        logits = jnp.einsum("bskd,bkmd->bksm", keys, asked)
        hidden = jnp.arange(width)[:, None] > last - i * width
        logits = jnp.where(hidden, _HIDDEN, logits)
        logits = logits.reshape(*lead, tiles.together, tiles.size, -1)
        top = jnp.maximum(jnp.max(logits, axis=3), 0.5 * _HIDDEN)
        weight = exp2(logits - top[:, :, :, None])
        return top, jnp.sum(weight, axis=3), jnp.sum(weight * weight, axis=3)

    sums = lax.map(one, jnp.arange(tiles.number))
    return [jnp.moveaxis(x, 0, 2).reshape(*lead, -1, *shape) for x in sums]


class _Moments(NamedTuple):
    """Mean and variance of the values of each block."""

    mean: jax.Array  # [B, K, J, D]
    variance: jax.Array  # [B, K, J], of all coordinates together

    @classmethod
    def of(cls, values, num_keys, size):
        """Of values [B, S', K, D] in whole blocks, of which those behind `num_keys` are padding."""
        batch, padded, heads, head_dim = values.shape
        blocks = values.reshape(batch, -1, size, heads * head_dim)
        inside = (jnp.arange(padded) < num_keys).reshape(-1, size, 1)
        count = jnp.sum(inside, axis=1)
        mean = jnp.sum(blocks, axis=2) / count
        apart = jnp.where(inside, blocks - mean[:, :, None], 0)
        square = jnp.sum(jnp.square(apart), axis=2) / count
        mean, square = (
            jnp.moveaxis(x.reshape(batch, -1, heads, head_dim), 1, 2) for x in (mean, square)
        )
        return cls(mean, jnp.sum(square, axis=-1))

    def first(self, number):
        return _Moments(self.mean[:, :, :number], self.variance[:, :, :number])

    def errors(self, top, mass, square):
        """Of leaving out each block, [B, K, J, ...], from its `_block_sums` [B, K, J', ...]."""
        shape, number = top.shape[3:], self.mean.shape[2]
        top, mass, square = (x.reshape(*x.shape[:3], -1) for x in (top, mass, square))
        whole = jnp.max(top, axis=2, keepdims=True)
        part = exp2(top - whole)
        total = jnp.sum(mass * part, axis=2, keepdims=True)
        part = part / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        mass, square, part = (x[:, :, :number] for x in (mass, square, part))
        mass, square = mass * part, square * part * part
        # (Products that contract the first axis of both operands are slow on CPUs.)
        y = jnp.einsum("bkmj,bkjd->bkmd", jnp.swapaxes(mass, 2, 3), self.mean)
        across = jnp.einsum("bkjd,bkmd->bkjm", self.mean, y)
        length = jnp.sum(jnp.square(self.mean), axis=-1)[..., None]
        apart = length - 2 * across + jnp.sum(jnp.square(y), axis=-1)[:, :, None]
        error = jnp.square(mass) * jnp.maximum(apart, 0) + square * self.variance[..., None]
        error = error / jnp.square(jnp.maximum(1 - mass, _LEAST_REST))
        return error.reshape(*error.shape[:3], *shape)
