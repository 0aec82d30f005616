"""Leave-one-tile-out error from a sketch of the keys: group means, variances and outliers."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jbalance._exp2 import LOG2_E, exp2
from jbalance.importance import _tile_errors
from jbalance.importance._tile_errors import HIDDEN, Moments
from jbalance.tiling import Tiling

_GROUP_KEYS, _TILE_GROUPS = 32, 128
_VALUES = 32  # of a block, at most, stand for it
# Of a logit's variance: beyond, what is expected is mostly that of a few lucky keys.
_MOST_SPREAD = 12 * LOG2_E**2


def tile_sketch(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    tiling: Tiling,
    *,
    rows: int = 8,
) -> jax.Array:
    """`tile_error` from a sketch of the keys, for a fraction of its cost.

    Of up to 32 neighboring keys the one that is least like their mean stays as it is: attention may
    single it out. The n others are taken as a normal distribution with their mean μ and the variances of
    their coordinates, of which the sum of exp(q · k) is n exp(q · μ + s / 2), with s the variance of
    q · k. Means alone do not see a tile that is peaked. The output y is that of the block's queries on
    average, and the attention within a block of keys counts as that to one of them (sum p_s² = m_j²).

    Args, Returns, Raises: those of `tile_error`.
    """
    q, k, v, rows = _tile_errors.checked(q, k, v, tiling, rows)
    return _measured(q, k, v, tiling, rows)


@functools.partial(jax.jit, static_argnames=("tiling", "rows"))  # once for all eager calls
def _measured(q: jax.Array, k: jax.Array, v: jax.Array, tiling: Tiling, rows: int) -> jax.Array:
    """`tile_sketch` without its checks."""
    sketch = _Sketch.of(k.astype(jnp.float32), tiling.block_k)
    return _tile_errors.errors(q, v, sketch, tiling, rows)


class _Sketch(NamedTuple):
    """Groups of neighboring keys: one key as it is, the mean and the variances of the others."""

    key: jax.Array  # [B, K, N', D], whole tiles of groups
    position: jax.Array  # [B, K, N'] int32 of that key
    mean: jax.Array  # [B, K, N', D]
    variance: jax.Array  # [B, K, N', D]
    group: int  # keys
    together: int  # blocks of a tile
    block_k: int
    value_stride: int

    @classmethod
    def of(cls, keys: jax.Array, block_k: int) -> _Sketch:
        """Of keys [B, S, K, D] in groups that divide `block_k`."""
        batch, size, heads, head_dim = keys.shape
        group = max(n for n in range(1, min(_GROUP_KEYS, block_k) + 1) if block_k % n == 0)
        together = max(1, min(_TILE_GROUPS * group // block_k, -(-size // block_k)))
        keys = _tile_errors.padded(keys, block_k * together)
        groups = keys.reshape(batch, -1, group, heads * head_dim)
        index = jnp.arange(keys.shape[1], dtype=jnp.int32).reshape(-1, group, 1)
        count = jnp.sum(index < size, axis=1)
        mean = jnp.sum(groups, axis=2) / jnp.maximum(count, 1)
        distance = (groups - mean[:, :, None]).reshape(batch, -1, group, heads, head_dim)
        distance = jnp.einsum("bngkd,bngkd->bngk", distance, distance)
        chosen = jnp.argmax(jnp.where(index < size, distance, -1.0), axis=2).astype(jnp.int32)
        position = index[:, 0] + chosen
        flat = jnp.arange(batch)[:, None, None] * keys.shape[1] + position
        key = keys.reshape(-1, head_dim)[flat * heads + jnp.arange(heads)]
        # Of the others. Padding is zeros, and so adds nothing.
        number = jnp.maximum(count - 1, 1)[..., None]
        by_head = batch, -1, heads, head_dim
        others = ((mean * count).reshape(by_head) - key) / number
        square = jnp.sum(jnp.square(groups), axis=2).reshape(by_head)
        variance = (square - jnp.square(key)) / number - jnp.square(others)
        key, position, mean, variance = (
            jnp.moveaxis(x, 1, 2) for x in (key, position, others, jnp.maximum(variance, 0.0))
        )
        stride = next(n for n in range(max(1, block_k // _VALUES), 0, -1) if block_k % n == 0)
        return cls(key, position, mean, variance, group, together, block_k, stride)

    def errors(self, queries: jax.Array, last: jax.Array, values: Moments) -> jax.Array:
        """`Summary.errors`, as expected of what the sketch does not say."""
        lead, shape = queries.shape[:2], queries.shape[2:5]
        number = values.mean.shape[2]
        queries = queries.reshape(*lead, -1, queries.shape[-1])
        last = jnp.broadcast_to(last, shape).reshape(-1)
        squared, width = jnp.square(queries), self.together * self.block_k // self.group

        def one(i):
            parts = self.key, self.position, self.mean, self.variance
            key, position, mean, variance = (
                lax.dynamic_slice_in_dim(x, i * width, width, axis=2) for x in parts
            )
            single = jnp.einsum("bksd,bkmd->bksm", key, queries)
            middle = jnp.einsum("bksd,bkmd->bksm", mean, queries)
            spread = jnp.einsum("bksd,bkmd->bksm", variance, squared)
            visible = position[..., None] <= last
            begin = (i * width + jnp.arange(width)[:, None]) * self.group
            count = jnp.clip(last - begin + 1, 0, self.group) - visible
            others = middle + jnp.minimum(spread, _MOST_SPREAD) * np.float32(0.5 / LOG2_E)
            blocks = (*lead, self.together, -1, last.size)
            single = jnp.where(visible, single, HIDDEN).reshape(blocks)
            others = jnp.where(count > 0, others, HIDDEN).reshape(blocks)
            top = jnp.maximum(jnp.max(jnp.maximum(single, others), axis=3), 0.5 * HIDDEN)
            near = top[:, :, :, None]
            mass = exp2(single - near) + count.reshape(blocks) * exp2(others - near)
            return top, jnp.sum(mass, axis=3)

        sums = _tile_errors.by_block(one, -(-number // self.together), lead)
        share, _ = _tile_errors.normalized(*(x[:, :, :number] for x in sums))
        moved = _tile_errors.of_the_rest(share)
        share, moved = (
            jnp.mean(x.reshape(*lead, number, -1, shape[2]), axis=-1) for x in (share, moved)
        )
        error = moved * (values.squared_distance(share) + values.variance[..., None])
        return error.reshape(*lead, number, *shape[:2])
