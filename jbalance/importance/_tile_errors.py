"""Leave-one-tile-out error of attention, from a sample of the queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jbalance import _axes, checks
from jbalance._exp2 import LOG2_E, exp2
from jbalance.importance import _tokens
from jbalance.tiling import Tiling

HIDDEN = -1e30  # logits of keys that a query does not see
_CHUNK_ROWS = 64  # sampled queries looked at together, those of heads that share keys among them
_SEGMENTS = 4  # causal ones see no more keys than the last of their segment does
_LEAST_REST = 0.05  # a tile with more of the attention than 1 - this is worth enough


class Summary(Protocol):
    """What `errors` needs to know about the keys: exact (`_Keys`) or sketched (`_Sketch`)."""

    @property
    def block_k(self) -> int:
        """Keys of a block."""

    @property
    def value_stride(self) -> int:
        """One of so many values is looked at."""

    def errors(self, queries: jax.Array, last: jax.Array, values: Moments) -> jax.Array:
        """On average over sampled queries of a block.

        Args:
          queries: [B, K, G, step, rows, D] queries, scaled for logits in base 2.
          last: [step, rows], the last key that each sees.
          values: of the first J blocks of keys, all that are seen.

        Returns:
          [B, K, J, G, step].
        """


def errors(q: jax.Array, v: jax.Array, summary: Summary, tiling: Tiling, rows: int) -> jax.Array:
    """[B, H, I, J] squared errors of leaving out each tile: `tile_error` and its arguments."""
    batch, size, heads, head_dim = q.shape
    num_keys, kv_heads = v.shape[1:3]
    block_q, block_k, causal = tiling.block_q, tiling.block_k, tiling.causal
    num_rows, num_blocks = tiling.shape
    spots = (np.arange(rows) + 1) * block_q // rows - 1
    sampled = np.minimum(np.arange(num_rows)[:, None] * block_q + spots, size - 1)  # [I, rows]
    last = sampled + num_keys - size if causal else np.full_like(sampled, num_keys - 1)
    queries = q[:, sampled].astype(jnp.float32) * (LOG2_E / math.sqrt(head_dim))
    queries = queries.reshape(batch, num_rows, rows, kv_heads, -1, head_dim)
    queries = jnp.transpose(queries, (1, 0, 3, 4, 2, 5))  # [I, B, K, G, rows, D]
    values = Moments.of(padded(v, block_k), num_keys, block_k, summary.value_stride)

    rows_per_block = rows * heads // kv_heads
    # Segments of few rows would read the keys again for little.
    segments = min(_SEGMENTS, max(1, num_rows * rows_per_block // _CHUNK_ROWS)) if causal else 1
    out = []
    for part in np.array_split(np.arange(num_rows), min(segments, num_rows)):
        seen = min(max(int(last[part].max()) // block_k + 1, 1), num_blocks)
        moments = values.first(seen)

        def chunk(i, moments=moments):
            return summary.errors(jnp.moveaxis(queries[i], 0, 3), jnp.asarray(last)[i], moments)

        chunks = -(-part.size * rows_per_block // _CHUNK_ROWS)
        step = -(-part.size // chunks)
        chosen = np.minimum(np.arange(chunks * step) + part[0], num_rows - 1).reshape(-1, step)
        result = lax.map(chunk, jnp.asarray(chosen))  # [chunks, B, K, seen, G, step]
        result = jnp.transpose(result, (1, 2, 4, 0, 5, 3)).reshape(batch, heads, -1, seen)
        result = result[:, :, : part.size]
        out.append(jnp.pad(result, ((0, 0),) * 3 + ((0, num_blocks - seen),)))
    return jnp.concatenate(out, axis=2)


def checked(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, tiling: Tiling, rows: int
) -> tuple[jax.Array, jax.Array, jax.Array, int]:
    """q, k and v as arrays, and rows; ValueError for shapes and numbers that do not fit."""
    _axes.unsplit(q=q, k=k, v=v)
    checks.instance("tiling", tiling, Tiling)
    q, k, v = (
        jnp.asarray(checks.floats(name, x, 4, hint))
        for name, x, hint in (
            ("q", q, "[B, T, H, D]"),
            ("k", k, "[B, S, K, D]"),
            ("v", v, "[B, S, K, D]"),
        )
    )
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.non_empty(name, x)
    _tokens.comparable(q=q, k=k, v=v)
    if v.shape != k.shape:
        raise ValueError(f"v has shape {v.shape}: it must have that of k, {k.shape}")
    if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]) or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k has shape {k.shape}: with q {q.shape} it must be [B, S, K, D] = ({q.shape[0]}, S, a "
            f"divisor of {q.shape[2]}, {q.shape[3]})"
        )
    if (q.shape[1], k.shape[1]) != (tiling.num_queries, tiling.num_keys):
        raise ValueError(
            f"tiling is {tiling}: q and k have {q.shape[1]} queries and {k.shape[1]} keys"
        )
    return q, k, v, checks.static_int("rows", rows, 1, tiling.block_q)


def padded(x: jax.Array, multiple: int) -> jax.Array:
    """Keys or values [B, S, K, D] in float32, zeros behind the end."""
    widths = ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0))
    return jnp.pad(x.astype(jnp.float32), widths)


def by_block(
    one: Callable[[jax.Array], tuple[jax.Array, ...]], number: int, lead: tuple[int, ...]
) -> list[jax.Array]:
    """`one` of each tile of blocks, [B, K, blocks, rows] each, as [B, K, all blocks, rows]."""
    sums = lax.map(one, jnp.arange(number))
    return [jnp.moveaxis(x, 0, 2).reshape(*lead, -1, x.shape[-1]) for x in sums]


def normalized(top: jax.Array, mass: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention weight of each block [B, K, J, rows], of masses times 2^top; and the factor."""
    part = exp2(top - jnp.max(top, axis=2, keepdims=True))
    whole = jnp.sum(mass * part, axis=2, keepdims=True)
    part = part / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)
    return mass * part, part


def of_the_rest(share: jax.Array) -> jax.Array:
    """(m / (1 - m))²: what leaving out a share of the attention moves the rest by, squared."""
    return jnp.square(share / jnp.maximum(1 - share, _LEAST_REST))


class Moments(NamedTuple):
    """Mean and variance of the values of each block."""

    mean: jax.Array  # [B, K, J, D]
    variance: jax.Array  # [B, K, J], of all coordinates together

    @classmethod
    def of(cls, values: jax.Array, num_keys: int, size: int, stride: int = 1) -> Moments:
        """Of one in `stride` values [B, S', K, D] of whole blocks; `num_keys` are no padding."""
        batch, padded, heads, head_dim = values.shape
        blocks = values.reshape(batch, -1, size, heads * head_dim)[:, :, ::stride]
        inside = (jnp.arange(padded) < num_keys).reshape(-1, size, 1)[:, ::stride]
        count = jnp.sum(inside, axis=1)
        mean = jnp.sum(blocks, axis=2) / count
        centered = jnp.where(inside, blocks - mean[:, :, None], 0)
        square = jnp.sum(jnp.square(centered), axis=2) / count
        mean, square = (
            jnp.moveaxis(x.reshape(batch, -1, heads, head_dim), 1, 2) for x in (mean, square)
        )
        return cls(mean, jnp.sum(square, axis=-1))

    def first(self, number: int) -> Moments:
        """Of the first blocks."""
        return Moments(self.mean[:, :, :number], self.variance[:, :, :number])

    def squared_distance(self, share: jax.Array) -> jax.Array:
        """|v̄_j - y|² [B, K, J, rows] with y = Σ_j m_j v̄_j, of shares m [B, K, J, rows]."""
        # (Products that contract the first axis of both operands are slow on CPUs.)
        y = jnp.einsum("bkmj,bkjd->bkmd", jnp.swapaxes(share, 2, 3), self.mean)
        across = jnp.einsum("bkjd,bkmd->bkjm", self.mean, y)
        length = jnp.sum(jnp.square(self.mean), axis=-1)[..., None]
        return jnp.maximum(length - 2 * across + jnp.sum(jnp.square(y), axis=-1)[:, :, None], 0)
