"""Budgeted top-k over tiles: those of highest score, within a number for all heads together."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import _axes, checks
from jbalance import _search as search
from jbalance._bits import in_32_bits
from jbalance._debug_check import debug_check
from jbalance.attention import plan as plans
from jbalance.attention.plan import TilePlan
from jbalance.tiling import Tiling

_BELOW_ONE = 1 - 2.0**-20


@in_32_bits
def choose(
    score: jax.Array,
    num_tiles: jax.Array | int,
    tiling: Tiling,
    *,
    floor: float = 0.5,
    capacity: int | None = None,
    where: jax.Array | None = None,
    axis_name: str | None = None,
) -> TilePlan:
    """Budgeted top-k over tiles: those of highest score, one price for all heads and query blocks.

    Every tile costs the same, so the ladder (METHOD section 4) is a threshold on the score: found by
    bisection on the bits, exact, ties by index. Three kinds of tiles come before it: the tiles of the
    query block's own positions; the first key block, the attention sink; and, since a score is an
    estimate, the block's best tiles up to `floor` times its even share. If causal, the tile of the key
    just before a block's own positions comes before all others, whatever its score: without it the
    block's first queries see hardly more than themselves, and a sample of queries seldom has these.

    Args:
      score: [B, H, I, J] float >= 0, what computing each tile gains, such as `importance.tile_error`.
      num_tiles: [] or [B] int, the budget for all heads and query blocks of an example together.
      tiling: the tiles; those that are not visible are no candidates.
      floor: in [0, 1].
      capacity: longest list of a plan; None for J. See `plan.from_mask`.
      where: [H] bool, the heads that there are; the others get no tiles. None for all.
      axis_name: mesh axis that the heads are split over; num_tiles is for all of them, and a pass of
        the search exchanges B scalars.

    Returns:
      A plan with num_tiles tiles per example, fewer only if there are no more.

    Raises:
      ValueError: shapes that do not fit, scores that are negative or NaN, fewer tiles than those that
        every query block has; traced, that is a `checkify` error, and the plan has these alone.
    """
    score, num_tiles, floor = _check(score, num_tiles, tiling, floor, where)
    batch, heads = np.shape(score)[:2]
    valid = None if where is None else jnp.asarray(where)[:, None, None]
    num_heads = _number_of_heads(heads, valid, axis_name)
    least = num_heads * int(_structure(tiling)[1].sum())
    total = _budget(num_tiles, least, batch)
    mask = _chosen(score, total, floor, num_heads, valid, tiling, axis_name)
    return plans.from_mask(mask, tiling, capacity)


@functools.partial(jax.jit, static_argnums=(5, 6))  # once for all eager calls of equal shapes
def _chosen(score, total, floor, num_heads, valid, tiling, axis_name):
    """[B, H, I, J] bool: the tiles of `choose` for a budget [B]."""
    visible, always, previous = _structure(tiling)
    quota = _quota(floor, total, num_heads, visible, always)
    candidate = visible & ~always
    if valid is not None:
        always, candidate = always & valid, candidate & valid
    score = jnp.where(previous, jnp.inf, jnp.asarray(score, jnp.float32))
    candidate = jnp.broadcast_to(candidate, score.shape)
    best = _best_of_rows(score, candidate, quota)
    mask = always | best
    given = search.psum(jnp.sum(mask, axis=(1, 2, 3), dtype=jnp.int32), axis_name)
    rest = jnp.maximum(total - given, 0)
    flat = (len(score), -1)
    taken = _largest(score.reshape(flat), (candidate & ~best).reshape(flat), rest, axis_name)
    return mask | taken.reshape(mask.shape)


def candidates(tiling: Tiling) -> tuple[np.ndarray, np.ndarray]:
    """The tiles of one head that `choose` can give, and those of them that it always does.

    Returns:
      [I, J] bool each: their sums are the most and the fewest tiles that a head can have.
    """
    checks.instance("tiling", tiling, Tiling)
    visible, always, _ = _structure(tiling)
    return visible, always


def _check(score, num_tiles, tiling, floor, where):
    """score, num_tiles and floor as numbers of the device; ValueError for what does not fit."""
    _axes.unsplit(score=score)
    checks.instance("tiling", tiling, Tiling)
    checks.rank("score", score, 4, "[B, H, I, J]")
    checks.non_empty("score", score)
    if np.shape(score)[2:] != tiling.shape:
        raise ValueError(
            f"score has shape {np.shape(score)}: for {tiling} its last axes must be {tiling.shape}"
        )
    score = checks.non_negative("score", score)
    checks.rank("num_tiles", num_tiles, (0, 1), "[] or [B]")
    if np.ndim(num_tiles):
        checks.length("num_tiles", num_tiles, np.shape(score)[0], "B")
    num_tiles = checks.whole("num_tiles", num_tiles)
    checks.rank("floor", floor, 0, "[]")
    floor = checks.in_range("floor", floor, 0, 1)
    heads = np.shape(score)[1]
    if where is not None:
        checks.booleans("where", where, (heads,), "[H]")
    return score, num_tiles, floor


def _structure(tiling):
    """[I, J] bool: tiles that are visible, that are always computed, and that come first."""
    blocks, visible = tiling.positions(), tiling.visible()
    own = (blocks.first_key <= blocks.last_query) & (blocks.last_key >= blocks.first_query)
    previous = blocks.first_key < blocks.first_query
    previous &= (blocks.last_key >= blocks.first_query - 1) & tiling.causal
    return visible, visible & (own | (blocks.first_key == 0)), previous


def _number_of_heads(heads: Any, valid, axis_name) -> Any:
    """Of all shards together."""
    if valid is not None:
        return search.psum(jnp.sum(valid), axis_name)
    return heads if axis_name is None else heads * lax.axis_size(axis_name)


def _budget(num_tiles, least, batch):
    """[B] int32 tiles, at least `least`."""
    if checks.is_concrete(num_tiles, least) and (np.asarray(num_tiles) < least).any():
        raise ValueError(
            f"num_tiles is {num_tiles}: the tiles of their own positions and the first keys of all "
            f"query blocks and heads take {least}"
        )
    total = jnp.broadcast_to(jnp.asarray(num_tiles, jnp.int32), (batch,))
    debug_check(jnp.all(total >= least), f"num_tiles is below the {least} that are always there")
    return total


def _quota(floor, total, num_heads, visible, always):
    """[B, 1, I] int32: how many of its best tiles every query block has beside those of `always`.

    Where blocks with more than their share in `always` leave too few for the others, these have less.
    """
    part = floor * total / (num_heads * visible.sum())
    even = jnp.floor(part[:, None] * visible.sum(axis=1)).astype(jnp.int32)
    quota = jnp.maximum(even - always.sum(axis=1), 0)
    rest, wanted = total - num_heads * always.sum(), num_heads * quota.sum(axis=1)
    # Below the quotient: rounded up, the parts might be more than the rest.
    less = jnp.floor(quota * (_BELOW_ONE * rest / jnp.maximum(wanted, 1))[:, None])
    return jnp.where((wanted > rest)[:, None], less.astype(jnp.int32), quota)[:, None]


def _best_of_rows(score, candidate, quota):
    """[B, H, I, J] bool: the candidates of highest score in every row of a head."""
    rows = (-1, score.shape[-1])
    number = jnp.broadcast_to(quota, score.shape[:3]).reshape(-1)
    return _largest(score.reshape(rows), candidate.reshape(rows), number).reshape(score.shape)


def _largest(score, candidate, number, axis_name=None):
    """The `number` [R] largest of the candidates' scores [R, N], the first ones of equal scores.

    The N are split over a mesh axis, if there is one.
    """
    none = jnp.uint32(search.INF_KEY + 2)
    # From the largest down, as the search spends more the higher the key.
    key = jnp.where(candidate, jnp.uint32(search.INF_KEY) - search.to_key(score), none)

    def of_all(mask):
        return search.psum(jnp.sum(mask, axis=1, dtype=jnp.int32), axis_name)

    def excess(threshold):
        return (of_all(key < threshold[:, None]) - number).astype(jnp.float32)

    threshold = search.largest(excess, search.INF_KEY + 2, number.shape)[:, None]
    above, tied = key < threshold, key == threshold
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
