"""Who computes which tiles of a prefill: one function a policy, all within the same number of tiles."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import attention, importance
from jbalance.attention import TilePlan, Tiling
from jbalance.types import TileScorer

BLOCK_Q, BLOCK_K = 64, 16  # fine on the side of the keys, where attention is sparse
ROWS = 8  # queries of a block that are looked at

Policy = Callable[[jax.Array, jax.Array, jax.Array, float], TilePlan]


def tiling(size: int) -> Tiling:
    """The causal tiles of a text."""
    return Tiling(size, size, BLOCK_Q, BLOCK_K)


def tiles_of(size: int, density: float) -> int:
    """Tiles of one head at a part of the causal ones."""
    return int(density * tiling(size).num_tiles)


def dense(q: jax.Array, k: jax.Array, v: jax.Array, density: float) -> TilePlan:
    """All causal tiles, whatever the density."""
    return attention.dense(tiling(q.shape[1]))


def window(q: jax.Array, k: jax.Array, v: jax.Array, density: float) -> TilePlan:
    """The first key block and the latest ones, the same part of every query block's."""
    seen = tiling(q.shape[1]).visible()
    return _latest(_each(seen, density), seen, q)


def sliding_window(q: jax.Array, k: jax.Array, v: jax.Array, density: float) -> TilePlan:
    """The first key block and the latest ones, as many for every query block that has so many."""
    seen = tiling(q.shape[1]).visible()
    _least(seen, density)
    total, widths = tiles_of(q.shape[1], density), np.arange(1, seen.shape[1] + 1)[:, None]
    number = np.minimum(widths, seen.sum(axis=1))  # by width
    width = np.searchsorted(number.sum(axis=1), total, side="right") - 1
    number = number[width]
    # What is left is less than one more for each of those that have more.
    number[number.size - (total - number.sum()) :] += 1
    return _latest(number, seen, q)


def _latest(number: np.ndarray, seen: np.ndarray, q: jax.Array) -> TilePlan:
    """Of `number` [I] tiles for each query block, one for the first keys."""
    at = np.arange(seen.shape[1])
    latest = at >= (seen.sum(axis=1) - (number - 1))[:, None]
    return _plan(((at == 0) | latest) & seen, q)


def uniform(q: jax.Array, k: jax.Array, v: jax.Array, density: float) -> TilePlan:
    """The same part of every query block's tiles: those of most attention, by a sample of rows."""
    seen = tiling(q.shape[1]).visible()
    number = jnp.asarray(_each(seen, density))[:, None]
    ends = (np.arange(seen.shape[0]) + 1)[:, None] * BLOCK_Q
    own = (np.arange(seen.shape[1]) * BLOCK_K >= ends - BLOCK_Q) & seen
    mass = sampled_mass(q, k)
    score = jnp.where(own | (np.arange(seen.shape[1]) == 0), 2, jnp.where(seen, mass, -1))
    rank = jnp.argsort(jnp.argsort(-score, axis=-1), axis=-1)
    return _plan((rank < number) & seen, q)


def ladder(q: jax.Array, k: jax.Array, v: jax.Array, density: float) -> TilePlan:
    """One price for all heads and query blocks of a layer, the value the error of leaving out."""
    return _balanced(q, k, v, density, importance.tile_error)


def ladder_sketch(q: jax.Array, k: jax.Array, v: jax.Array, density: float) -> TilePlan:
    """The same, the value from a sketch of the keys."""
    return _balanced(q, k, v, density, importance.tile_sketch)


def _balanced(
    q: jax.Array, k: jax.Array, v: jax.Array, density: float, scorer: TileScorer
) -> TilePlan:
    number = q.shape[2] * tiles_of(q.shape[1], density)
    return attention.balanced_plan(q, k, v, number, tiling(q.shape[1]), scorer=scorer, rows=ROWS)


POLICIES: dict[str, Policy] = {
    "dense": dense,
    "window": window,
    "sliding-window": sliding_window,
    "uniform": uniform,
    "ladder": ladder,
    "ladder-sketch": ladder_sketch,
}


def overlap(a: TilePlan, b: TilePlan) -> jax.Array:
    """[] in 0..1: the tiles that both plans have, over those that either has (Jaccard's index)."""
    return attention.intersection(a, b).num_tiles / attention.union(a, b).num_tiles


def sampled_mass(q: jax.Array, k: jax.Array) -> jax.Array:
    """[B, H, I, J]: the attention that a block's sampled rows give each block of keys, on average."""
    batch, size, heads, head_dim = q.shape
    at = np.arange(1, size // BLOCK_Q * ROWS + 1) * BLOCK_Q // ROWS - 1
    keys = jnp.repeat(jnp.moveaxis(k, 2, 1), heads // k.shape[2], axis=1)
    asked = jnp.moveaxis(q[:, at], 2, 1) / math.sqrt(head_dim)
    logits = jnp.einsum("bhnd,bhsd->bhns", asked, keys)
    weights = jax.nn.softmax(jnp.where(np.arange(size) <= at[:, None], logits, -1e30))
    return weights.reshape(batch, heads, -1, ROWS, size // BLOCK_K, BLOCK_K).sum(-1).mean(3)


def _each(seen: np.ndarray, density: float) -> np.ndarray:
    """[I] tiles of each query block, together `tiles_of`, each at least those that it must have."""
    total, wanted = int(density * seen.sum()), density * seen.sum(axis=1)
    least = _least(seen, density)
    number = np.maximum(np.floor(wanted).astype(int), least)
    while number.sum() != total:  # the largest remainders first, never below the least
        step = np.sign(total - number.sum())
        free = number < seen.sum(axis=1) if step > 0 else number > least
        number[np.argmax(np.where(free, step * (wanted - number), -np.inf))] += step
    return number


def _least(seen: np.ndarray, density: float) -> np.ndarray:
    """[I] tiles that each query block must have: its own and the first keys.

    Raises:
      ValueError: if these alone are more than there are to be.
    """
    least, total = np.minimum(seen.sum(axis=1), BLOCK_Q // BLOCK_K + 1), int(density * seen.sum())
    if least.sum() > total:
        raise ValueError(
            f"--density is {density}: {total} tiles, but their own and the first keys alone take "
            f"{least.sum()}; more --tokens or a higher density would fit"
        )
    return least


def _plan(mask: jax.Array | np.ndarray, q: jax.Array) -> TilePlan:
    """Of a mask [I, J] or [B, H, I, J]."""
    mask = jnp.broadcast_to(mask, (1,) * (4 - mask.ndim) + mask.shape)
    return attention.from_mask(mask, tiling(q.shape[1]))
