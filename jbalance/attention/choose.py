"""Which tiles to compute: those of most value, within a number of tiles for all heads together."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify

from jbalance import _search as search
from jbalance import checks
from jbalance.attention import plan as plans
from jbalance.attention.plan import TilePlan


def choose(
    value: jax.Array,
    num_tiles: jax.Array | int,
    *,
    num_queries: int,
    num_keys: int,
    block_q: int,
    block_k: int,
    causal: bool = True,
    floor: float = 0.5,
    capacity: int | None = None,
    where: jax.Array | None = None,
    axis_name: str | None = None,
) -> TilePlan:
    """The plan of most value: one price for the tiles of all heads and query blocks.

    Every tile costs the same, so the ladder (METHOD section 4) is a threshold on the value: found by
    bisection on the bits, exact, ties by index. Before it, each query block has the tiles of its own
    positions and the first key block, where much of the attention rests that has nowhere to go; and of
    the part of its tiles that an even division would give it, `floor`, its own best ones: a value is
    an estimate, and a query block that gets nothing is lost. If causal, the tile of the key just before
    a block's own positions comes before all others, whatever its value: without it the block's first
    queries see hardly more than themselves, and a sample of queries seldom has these.

    Args:
      value: [B, H, I, J] float >= 0 of computing each tile, such as `importance.tile_error`.
      num_tiles: [] or [B] int, for all heads and query blocks of an example together.
      num_queries: T.
      num_keys: S.
      block_q: queries of a tile.
      block_k: keys of a tile.
      causal: query t sees keys s <= t + S - T; other tiles are no candidates.
      floor: in [0, 1].
      capacity: longest list of a plan; None for J. See `plan.from_mask`.
      where: [H] bool, the heads that there are; the others get no tiles. None for all.
      axis_name: mesh axis that the heads are split over; num_tiles is for all of them, and a pass of
        the search exchanges B scalars.

    Returns:
      A plan with num_tiles tiles per example, fewer only if there are no more.

    Raises:
      ValueError: shapes that do not fit, values that are negative or NaN, fewer tiles than those that
        every query block has; traced, that is a `checkify` error, and the plan has these alone.
    """
    checks.rank("value", value, 4, "[B, H, I, J]")
    shape = (-(-num_queries // block_q), -(-num_keys // block_k))
    if np.shape(value)[2:] != shape:
        raise ValueError(
            f"value has shape {np.shape(value)}: for {num_queries} queries in blocks of {block_q} and "
            f"{num_keys} keys in blocks of {block_k} its last axes must be {shape}"
        )
    checks.non_negative("value", value)
    checks.rank("num_tiles", num_tiles, (0, 1), "[] or [B]")
    checks.whole("num_tiles", num_tiles)
    checks.in_range("floor", floor, 0, 1)
    seen, always, before = _structure(num_queries, num_keys, block_q, block_k, causal)
    batch, heads = np.shape(value)[:2]
    num_heads: Any = heads
    if where is not None and np.shape(where) != (heads,):
        raise ValueError(f"where has shape {np.shape(where)}: it must be [H] = ({heads},)")
    there = None if where is None else jnp.asarray(where)[:, None, None]
    if there is not None:
        num_heads = search.psum(jnp.sum(there), axis_name)
    elif axis_name is not None:
        num_heads *= lax.axis_size(axis_name)
    least = num_heads * int(always.sum())
    if checks.is_concrete(num_tiles, least) and (np.asarray(num_tiles) < least).any():
        raise ValueError(
            f"num_tiles is {num_tiles}: the tiles of their own positions and the first keys of all "
            f"query blocks and heads take {least}"
        )
    total = jnp.broadcast_to(jnp.asarray(num_tiles, jnp.int32), (batch,))
    checkify.debug_check(
        jnp.all(total >= least), f"num_tiles is below the {least} that are always there"
    )
    value = jnp.where(before, jnp.inf, jnp.asarray(value, jnp.float32))
    part = floor * total / (num_heads * seen.sum())
    even = jnp.floor(part[:, None] * seen.sum(axis=1)).astype(jnp.int32)  # [B, I]
    more = jnp.maximum(even - always.sum(axis=1), 0)[:, None]
    rows = (-1, shape[1])
    open_ = seen & ~always
    if there is not None:
        always, open_ = always & there, open_ & there
    open_ = jnp.broadcast_to(open_, value.shape)
    more = jnp.broadcast_to(more, value.shape[:3]).reshape(-1)
    own = _largest(value.reshape(rows), open_.reshape(rows), more).reshape(value.shape)
    mask = always | own
    given = search.psum(jnp.sum(mask, axis=(1, 2, 3), dtype=jnp.int32), axis_name)
    rest = jnp.maximum(total - given, 0)
    flat = (batch, -1)
    taken = _largest(value.reshape(flat), (open_ & ~own).reshape(flat), rest, axis_name)
    mask |= taken.reshape(mask.shape)
    return plans.from_mask(mask, num_queries, num_keys, block_q, block_k, capacity)


def candidates(
    *, num_queries: int, num_keys: int, block_q: int, block_k: int, causal: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The tiles of one head that `choose` can give, and those of them that it always does.

    Returns:
      [I, J] bool each: their sums are the most and the fewest tiles that a head can have.
    """
    seen, always, _ = _structure(num_queries, num_keys, block_q, block_k, causal)
    return seen, always


def _structure(num_queries, num_keys, block_q, block_k, causal):
    """[I, J] bool: tiles in which something is seen, that are always computed, and that come first."""
    first, last, keys, key_ends = plans.positions(num_queries, num_keys, block_q, block_k)
    seen = keys <= last if causal else np.ones((first.size, keys.size), bool)
    own = (keys <= last) & (key_ends >= first)
    before = (keys < first) & (key_ends >= first - 1) & causal
    return seen, seen & (own | (keys == 0)), before


def _largest(value, open_, number, axis_name=None):
    """The `number` [R] largest of the open values [R, N], the first ones of equal values.

    The N are split over a mesh axis, if there is one.
    """
    none = jnp.uint32(search.INF_KEY + 2)
    # From the largest down, as the search spends more the higher the key.
    down = jnp.where(open_, jnp.uint32(search.INF_KEY) - search.to_key(value), none)

    def of_all(mask):
        return search.psum(jnp.sum(mask, axis=1, dtype=jnp.int32), axis_name)

    def over(key):
        return (of_all(down < key[:, None]) - number).astype(jnp.float32)

    at = search.largest(over, search.INF_KEY + 2, number.shape)[:, None]
    above, tied = down < at, down == at
    left = number - of_all(above)

    def first_ones():
        before: Any = 0
        if axis_name is not None:
            here = jnp.sum(tied, axis=1, dtype=jnp.uint32)
            before = search.before_shard(here, axis_name).astype(jnp.int32)[:, None]
        return above | (
            tied & (before + jnp.cumsum(tied, axis=1, dtype=jnp.int32) <= left[:, None])
        )

    # Counting along the ties takes as long as the search; mostly all of them are wanted.
    return lax.cond(jnp.all(of_all(tied) <= left), lambda: above | tied, first_ones)
