"""Tiles of short sentences: which to compute, and attention that computes these all at once.

A sentence of some 15 tokens has a few blocks of 4, so a query block's list holds one to eight tiles.
Back ends that loop over lists join narrow blocks until 128 keys are one product, and would compute all
of them; here the lists of all sentences and heads are one list, whose length is the budget.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jbalance import allocate, attention
from jbalance.attention import TilePlan

BLOCK = 4  # queries and keys of a tile
_LEAST = 1e-30  # a tile that is seen is worth something
_HIDDEN = -1e30  # logits of keys that a query does not see
_TILT = 1e-3


class Seen(NamedTuple):
    """What attention may compute: the full budget."""

    tiles: Array  # [P, 1, I, J] bool, those in which a query sees a key
    keys: Array  # [P, I, S] bool, what the first query of each block sees before its own block
    own: Array  # [I, J] bool, tiles that are always computed: their first query sees too little of them


def seen_by(
    q_length: Array, k_length: Array, num_queries: int, num_keys: int, causal: bool
) -> Seen:
    """Of sentences [P] of these lengths in rows of num_queries and num_keys places."""
    starts = jnp.arange(0, num_queries, BLOCK)
    key_starts = jnp.arange(0, num_keys, BLOCK)
    rows, blocks = starts < q_length[:, None], key_starts < k_length[:, None]
    tiles = rows[:, :, None] & blocks[:, None]
    own = jnp.zeros((starts.size, key_starts.size), bool)
    keys = rows[:, :, None] & (jnp.arange(num_keys) < k_length[:, None, None])
    if causal:
        own = starts[:, None] == key_starts
        tiles &= key_starts <= starts[:, None]
        keys &= jnp.arange(num_keys) < starts[:, None]
    return Seen(tiles[:, None], keys, own)


def tile_values(asked: Array, k: Array, v: Array, visible: Array) -> Array:
    """Squared error of a block's output without each tile: `importance.tile_error` under a mask.

    The first query of a block stands for it, and when the causal mask hides tokens of the block from
    it, nothing that comes later decides: a decoder can choose the same tiles.

    Args:
      asked: [P, I, H, D] queries, one of each block.
      k: [P, S, H, D] keys.
      v: [P, S, H, D] values.
      visible: [P, I, S] bool, the keys that each query sees.

    Returns:
      [P, H, I, J] float32.
    """
    asked, k, v = (jnp.moveaxis(x, 2, 1) for x in (asked, k, v))
    logits = jnp.einsum("phid,phsd->phis", asked, k) * asked.shape[-1] ** -0.5
    logits = jnp.where(visible[:, None], logits, _HIDDEN)
    weight = jnp.exp(logits - jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), 0.1 * _HIDDEN))
    weight = weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), _LEAST)
    weight = weight.reshape(*weight.shape[:3], -1, BLOCK)
    mass, square = jnp.sum(weight, axis=-1), jnp.sum(weight * weight, axis=-1)
    blocks = v.reshape(*v.shape[:2], -1, BLOCK, v.shape[-1])
    mean = jnp.mean(blocks, axis=3)  # [P, H, J, D]
    variance = jnp.mean(jnp.sum(jnp.square(blocks - mean[:, :, :, None]), axis=-1), axis=3)
    y = jnp.einsum("phij,phjd->phid", mass, mean)
    across = jnp.einsum("phid,phjd->phij", y, mean)
    length, own = (jnp.sum(jnp.square(x), axis=-1) for x in (mean, y))
    apart = jnp.maximum(length[:, :, None] - 2 * across + own[..., None], 0)
    rest = jnp.maximum(1 - mass, 0.05)
    return (jnp.square(mass) * apart + square * variance[:, :, None]) / jnp.square(rest)


class Choice(NamedTuple):
    """What an arm answers: `arm(values, seen, total)`, or with `level` in place of the total.

    The level is the price at which the budget was spent: with it a decoder, which does not know all
    lists in advance, chooses `block` after block.
    """

    tiles: Array  # [P, H, I, J] bool
    level: Array  # [] float32: the ladder's price, or that of a list's next tile


def full(
    values: Array,
    seen: Seen,
    total: Any,
    level: Array | None = None,
    block: Array | int = 0,
) -> Choice:
    """Every tile that sees something."""
    del total, level, block
    tiles = jnp.broadcast_to(seen.tiles, values.shape)
    return Choice(tiles, jnp.zeros(()))


def uniform(
    values: Array,
    seen: Seen,
    total: Any,
    level: Array | None = None,
    block: Array | int = 0,
) -> Choice:
    """The same part of every list, its tiles nearest to the diagonal."""
    i, j = (jnp.arange(n) for n in values.shape[2:])
    i = i + block
    near = jnp.broadcast_to(-jnp.abs(i[:, None] - j), values.shape)
    most = jnp.broadcast_to(jnp.sum(seen.tiles, axis=-1, dtype=jnp.float32), values.shape[:3])
    # Half of an odd number: every other head rounds up, the others down.
    tilt = 1 + _TILT * (-1.0) ** jnp.arange(values.shape[1])[:, None]
    return _by_list(most * tilt, near, seen, total, level)


def proportional(
    values: Array,
    seen: Seen,
    total: Any,
    level: Array | None = None,
    block: Array | int = 0,
) -> Choice:
    """Each list's share is that of its values, alpha = w / sum w; in it the best tiles."""
    del block
    worth = jnp.where(seen.tiles, values, 0)
    return _by_list(jnp.sum(worth, axis=-1), values, seen, total, level)


def ladder(
    values: Array,
    seen: Seen,
    total: Any,
    level: Array | None = None,
    block: Array | int = 0,
) -> Choice:
    """One price for all tiles; before it every list has its own tile, or else its best one."""
    del block
    first = _first(values, seen)
    open_ = jnp.where(seen.tiles & ~first, jnp.maximum(values, _LEAST), 0)
    if level is not None:
        return Choice(first | (open_ >= jnp.maximum(level, _LEAST)), level)
    steps = jnp.stack([jnp.zeros(open_.size), open_.reshape(-1)], axis=1)
    left = jnp.maximum(total - jnp.sum(first, dtype=jnp.int32), 0)
    out = allocate.ladder(steps, jnp.array([0, 1]), left)
    return Choice(first | (out.level == 1).reshape(first.shape), out.price[0])


Arm = Callable[..., Choice]
ARMS: dict[str, Arm] = {
    "full": full,
    "uniform": uniform,
    "proportional": proportional,
    "ladder": ladder,
}


def part_of(arm: str) -> float:
    """What an arm computes, of the full budget."""
    return 1.0 if arm == "full" else 0.5


def _first(score: Array, seen: Seen) -> Array:
    """The tile that each list has for sure."""
    own = seen.own & seen.tiles
    best = _rank(jnp.where(seen.tiles, score, -jnp.inf)) == 0
    has_own = jnp.any(own, axis=-1, keepdims=True)
    return jnp.where(has_own, own, best & seen.tiles)


def _by_list(w: Array, score: Array, seen: Seen, total: Any, level: Array | None) -> Choice:
    """Whole amounts by `w` [P, H, I] of each list's best tiles."""
    most = jnp.broadcast_to(jnp.sum(seen.tiles, axis=-1, dtype=jnp.int32), w.shape)
    least = jnp.minimum(most, 1)
    if level is None:
        out = allocate.whole(
            jnp.where(most > 0, w, 0).reshape(-1), total, least.reshape(-1), most.reshape(-1)
        )
        amount, level = out.amount.reshape(w.shape), out.price
    else:
        wanted = jnp.floor(w / jnp.maximum(level, _LEAST) + 0.5)
        amount = jnp.clip(jnp.minimum(wanted, 1e6).astype(jnp.int32), least, most)
    score = jnp.where(seen.tiles, score, -jnp.inf)
    score = jnp.where(seen.own & seen.tiles, jnp.inf, score)
    return Choice((_rank(score) < amount[..., None]) & seen.tiles, level)


def _rank(score: Array) -> Array:
    """How many of its list come before each tile; few enough to compare them all."""
    before = score[..., None, :] > score[..., :, None]
    j = jnp.arange(score.shape[-1])
    tied = (score[..., None, :] == score[..., :, None]) & (j < j[:, None])
    return jnp.sum(before | tied, axis=-1, dtype=jnp.int32)


def plan_of(tiles: Array, num_queries: int, num_keys: int, block_q: int = BLOCK) -> TilePlan:
    """The plan of the tiles [P, H, I, J]."""
    tiling = attention.Tiling(num_queries, num_keys, block_q, BLOCK, causal=False)
    return attention.from_mask(tiles, tiling)


def attend(q: Array, k: Array, v: Array, plan: TilePlan, visible: Array, most: int) -> Array:
    """`attention.attend` with all tiles of the plan side by side.

    Args:
      q: [P, T, H, D].
      k: [P, S, H, D].
      v: [P, S, H, D].
      plan: for each sentence and head; no more than `most` tiles in all.
      visible: [P, 1 or T, S] bool, the keys that a query sees.
      most: how many tiles are computed, static; what the plan lacks is computed for nothing.

    Returns:
      [P, T, H, D]; 0 where a query sees no key.
    """
    (rows, _, heads, dim), block_q = q.shape, plan.block_q
    lists, capacity = plan.count.size, plan.capacity
    listed = (jnp.arange(capacity) < plan.count[..., None]).reshape(-1)
    (at,) = jnp.nonzero(listed, size=most, fill_value=lists * capacity)
    there = at < lists * capacity
    at = jnp.minimum(at, lists * capacity - 1)
    own = at // capacity  # the list of each tile, a head's query block
    key_block = plan.blocks.reshape(-1)[at]
    pair = own // plan.num_query_blocks
    shown = visible.reshape(rows, -1, min(block_q, visible.shape[1]), plan.num_key_blocks, BLOCK)
    row = jnp.minimum(own % plan.num_query_blocks, shown.shape[1] - 1)
    shown = shown[pair // heads, row, :, key_block] & there[:, None, None]
    bias = jnp.broadcast_to(jnp.where(shown, 0.0, _HIDDEN), (most, block_q, BLOCK))
    tiles = _Tiles(own, pair * plan.num_key_blocks + key_block, bias, jnp.swapaxes(bias, 1, 2))

    def in_blocks(x: Array, block: int) -> Array:
        """[P, N, H, D] as [P H blocks, block, D]."""
        return jnp.moveaxis(x, 2, 1).reshape(-1, block, dim)

    y = _attend(in_blocks(q * dim**-0.5, block_q), in_blocks(k, BLOCK), in_blocks(v, BLOCK), tiles)
    return jnp.moveaxis(y.reshape(rows, heads, -1, dim), 1, 2)


class _Tiles(NamedTuple):
    """Pairs of a block of queries and one of keys."""

    own: Array  # [N] int32 block of queries
    key: Array  # [N] int32 block of keys
    bias: Array  # [N, bq, bk] 0, or `_HIDDEN`
    turned: Array  # [N, bk, bq], the same


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, tiles: _Tiles) -> Array:
    """Queries [L, bq, D], scaled, over keys and values [M, bk, D] -> [L, bq, D]."""
    return _attend_forward(q, k, v, tiles)[0]


def _attend_forward(q: Array, k: Array, v: Array, tiles: _Tiles) -> tuple[Array, tuple]:
    lists = q.shape[0]
    logits = jnp.einsum("nqd,nkd->nqk", q[tiles.own], k[tiles.key]) + tiles.bias
    top = jax.ops.segment_max(jnp.max(logits, axis=-1), tiles.own, lists)
    top = jnp.maximum(top, 0.1 * _HIDDEN)
    weight = jnp.exp(logits - top[tiles.own][..., None])
    mass = jax.ops.segment_sum(jnp.sum(weight, axis=-1), tiles.own, lists)
    y = jax.ops.segment_sum(jnp.einsum("nqk,nkd->nqd", weight, v[tiles.key]), tiles.own, lists)
    y = y / jnp.maximum(mass, _LEAST)[..., None]
    lse = jnp.where(mass > 0, top + jnp.log(jnp.maximum(mass, _LEAST)), -_HIDDEN)
    return y, (q, k, v, tiles, y, lse)


def _attend_backward(saved: tuple, dy: Array) -> tuple:
    """Scores lie both ways: XLA's product over the first axes of both takes ten times as long."""
    q, k, v, tiles, y, lse = saved
    delta = jnp.sum(dy * y, axis=-1)[tiles.own]
    queries, keys, values = q[tiles.own], k[tiles.key], v[tiles.key]
    dy_rows, lse = dy[tiles.own], lse[tiles.own]
    weight = jnp.exp(jnp.einsum("nqd,nkd->nqk", queries, keys) + tiles.bias - lse[..., None])
    slope = weight * (jnp.einsum("nqd,nkd->nqk", dy_rows, values) - delta[..., None])
    dq = jax.ops.segment_sum(jnp.einsum("nqk,nkd->nqd", slope, keys), tiles.own, q.shape[0])
    weight = jnp.exp(jnp.einsum("nkd,nqd->nkq", keys, queries) + tiles.turned - lse[:, None])
    slope = weight * (jnp.einsum("nkd,nqd->nkq", values, dy_rows) - delta[:, None])
    dk = jax.ops.segment_sum(jnp.einsum("nkq,nqd->nkd", slope, queries), tiles.key, k.shape[0])
    dv = jax.ops.segment_sum(jnp.einsum("nkq,nqd->nkd", weight, dy_rows), tiles.key, k.shape[0])
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)
