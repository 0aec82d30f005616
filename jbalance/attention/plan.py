"""Block-sparse attention patterns: lists of key blocks for each head and query block.

A tile is a block of queries against a block of keys. Shapes and capacities are static, so plans of the
same capacity run in one compiled program; which tiles they name is data.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbalance import _axes, checks
from jbalance._debug_check import debug_check
from jbalance.tiling import Tiling


def _static():
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TilePlan:
    """Which tiles of attention are computed: for every head and query block a list of key blocks.

    The last block of queries or keys may be shorter than the others. An axis of size 1 for B or H is one
    plan for all of them.
    """

    blocks: (
        jax.Array
    )  # [B|1, H|1, I, C] int32 key blocks, ascending; from `count` on padding in 0..J-1
    count: jax.Array  # [B|1, H|1, I] int32, how many of the C there are
    num_queries: int = _static()  # T
    num_keys: int = _static()  # S
    block_q: int = _static()
    block_k: int = _static()
    # [B|1, H|1, I] int32 tiles of a traced mask for which the capacity was too small; None: none
    dropped: jax.Array | None = None

    @property
    def num_query_blocks(self) -> int:
        """I."""
        return -(-self.num_queries // self.block_q)

    @property
    def num_key_blocks(self) -> int:
        """J."""
        return -(-self.num_keys // self.block_k)

    @property
    def capacity(self) -> int:
        """C, the most key blocks that a query block can have."""
        return np.shape(self.blocks)[-1]

    @property
    def num_tiles(self) -> jax.Array:
        """How many tiles the lists hold, all their heads together: [] int32."""
        return jnp.sum(self.count)

    @property
    def density(self) -> jax.Array:
        """`num_tiles` as a part of all I J tiles: [] float32."""
        return self.num_tiles / max(1, self.count.size * self.num_key_blocks)


def from_mask(mask: ArrayLike, tiling: Tiling, capacity: int | None = None) -> TilePlan:
    """The plan of the tiles where `mask` holds.

    Args:
      mask: [B|1, H|1, I, J] bool, (I, J) = `tiling.shape`.
      tiling: the tiles; if causal, the mask must not name tiles in which no query sees a key.
      capacity: C, the longest list that fits; None for J. Of a traced mask with longer lists the last C
        blocks are kept (the newest keys), and `dropped` counts the others; `checkify` can make that an
        error.

    Raises:
      ValueError: shapes that do not fit; a concrete mask with a longer list than `capacity`, or with a
        tile that is not visible.
    """
    checks.instance("tiling", tiling, Tiling)
    checks.rank("mask", mask, 4, "[B|1, H|1, I, J]")
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    if mask.shape[2:] != tiling.shape or mask.dtype != bool:
        raise ValueError(
            f"mask has shape {mask.shape} and dtype {mask.dtype}: for {tiling} it must be bool and its "
            f"last axes {tiling.shape}"
        )
    capacity = tiling.shape[1] if capacity is None else checks.static_int("capacity", capacity)
    capacity = min(capacity, tiling.shape[1])
    if checks.is_concrete(mask):
        mask = np.asarray(mask)
        _check_tiles(mask, tiling, capacity)
        blocks, count, dropped = (jnp.asarray(x) for x in _host_lists(mask, capacity))
    else:
        blocks, count, dropped = _traced_lists(mask, capacity)
        debug_check(jnp.all(dropped == 0), f"mask needs longer lists than capacity {capacity}")
    return TilePlan(
        blocks,
        count,
        num_queries=tiling.num_queries,
        num_keys=tiling.num_keys,
        block_q=tiling.block_q,
        block_k=tiling.block_k,
        dropped=dropped,
    )


def _check_tiles(mask, tiling, capacity):
    """ValueError for a concrete mask that names hidden tiles or needs longer lists."""
    longest = mask.sum(-1).max(initial=0)
    if longest > capacity:
        raise ValueError(f"capacity is {capacity}: mask needs {longest} blocks in one list")
    if (mask & ~tiling.visible()).any():
        raise ValueError(
            f"mask has tiles in which no query sees a key: for {tiling} it must be false outside of "
            f"`tiling.visible()`, or the tiling made with causal=False"
        )


def _host_lists(mask, capacity):
    """Blocks [..., C] where a NumPy `mask` holds, how many [...], and zeros: all of them fit."""
    first = np.argsort(~mask, axis=-1, kind="stable")[..., :capacity]
    count = mask.sum(-1, dtype=np.int32)
    return first.astype(np.int32), count, np.zeros_like(count)


def _traced_lists(mask, capacity):
    """The last blocks [..., C] where `mask` holds, how many [...], and how many were too many [...]."""
    found = jnp.sum(mask, axis=-1, dtype=jnp.int32)
    dropped = jnp.maximum(found - capacity, 0)
    place = jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1 - dropped[..., None]
    place = jnp.where(mask & (place >= 0), place, capacity).reshape(-1, mask.shape[-1])
    lists = jnp.zeros((place.shape[0], capacity), jnp.int32)
    lists = lists.at[jnp.arange(place.shape[0])[:, None], place].set(
        jnp.arange(mask.shape[-1], dtype=jnp.int32), mode="drop"
    )
    return lists.reshape(*mask.shape[:-1], capacity), found - dropped, dropped


def in_order(plan: TilePlan) -> TilePlan:
    """The same tiles in ascending lists without repetitions, as the back ends read them.

    Plans of this module are so already: that is looked at, and lists are sorted only where they are not.

    Raises:
      ValueError: concrete lists that name key blocks outside 0..J-1, or are not ascending, or a count
        outside 0..C. Traced, blocks outside 0..J-1 are left out.
    """
    capacity, blocks = plan.capacity, plan.num_key_blocks
    count = jnp.asarray(checks.int_in_range("plan.count", plan.count, 0, capacity))
    lists = jnp.asarray(checks.int_in_range("plan.blocks", plan.blocks, 0, blocks - 1))
    plan = dataclasses.replace(plan, blocks=lists, count=count)
    if checks.is_concrete(lists, count):
        _check_ascending(np.asarray(lists), np.asarray(count))
        return plan
    if capacity == 0:
        return plan
    count = jnp.clip(plan.count, 0, capacity)
    listed = jnp.arange(capacity) < count[..., None]
    key = jnp.where(listed & (plan.blocks >= 0) & (plan.blocks < blocks), plan.blocks, blocks)
    rising = jnp.all(jnp.where(listed[..., 1:], key[..., 1:] > key[..., :-1], True), axis=-1)
    valid = rising & (jnp.max(jnp.where(listed, key, -1), axis=-1) < blocks)

    def repaired():
        ordered = jnp.sort(key, axis=-1)
        again = jnp.pad(ordered[..., 1:] == ordered[..., :-1], [(0, 0)] * (key.ndim - 1) + [(1, 0)])
        ordered = jnp.sort(jnp.where(again, blocks, ordered), axis=-1)
        number = jnp.sum(ordered < blocks, axis=-1, dtype=jnp.int32)
        return jnp.minimum(ordered, blocks - 1).astype(jnp.int32), number

    fits = jnp.all(valid) & jnp.all(count == plan.count)
    lists, number = jax.lax.cond(fits, lambda: (plan.blocks, count), repaired)
    return dataclasses.replace(plan, blocks=lists, count=number)


def _check_ascending(lists, count):
    """ValueError unless concrete lists are ascending."""
    listed = np.arange(1, lists.shape[-1]) < count[..., None]
    falling = listed & (np.diff(lists, axis=-1) <= 0)
    if falling.any():
        at = tuple(int(i) for i in np.argwhere(falling)[0][:-1])
        raise ValueError(
            f"plan.blocks[{at}] is {lists[at][: count[at]].tolist()}: lists of key blocks must ascend, "
            f"without repetitions"
        )


def to_mask(plan: TilePlan) -> jax.Array:
    """[B|1, H|1, I, J] bool, the tiles of the plan."""
    checks.instance("plan", plan, TilePlan)
    return _to_mask(plan)


@jax.jit
def _to_mask(plan):
    listed = jnp.arange(plan.capacity) < plan.count[..., None]
    same = plan.blocks[..., None] == jnp.arange(plan.num_key_blocks)
    return jnp.any(same & listed[..., None], axis=-2)


def dense(tiling: Tiling) -> TilePlan:
    """All visible tiles: dense attention, causal or full."""
    checks.instance("tiling", tiling, Tiling)
    return from_mask(tiling.visible()[None, None], tiling)


def window(size: int, tiling: Tiling, num_sinks: int = 0) -> TilePlan:
    """Sliding-window attention with attention sinks.

    Args:
      size: keys that a query sees up to its own; as many behind it too, unless the tiling is causal.
      tiling: the tiles.
      num_sinks: first keys that every query sees besides.

    Raises:
      ValueError: a size below 1, a negative number of sinks.
    """
    checks.instance("tiling", tiling, Tiling)
    size = checks.static_int("size", size, 1)
    num_sinks = checks.static_int("num_sinks", num_sinks)
    blocks = tiling.positions()
    near = blocks.last_key > blocks.first_query - size
    if not tiling.causal:
        near &= blocks.first_key < blocks.last_query + size
    mask = (near | (blocks.first_key < num_sinks)) & tiling.visible()
    return from_mask(mask[None, None], tiling)


def segments(q_ids: jax.Array, k_ids: jax.Array, tiling: Tiling) -> TilePlan:
    """Packed documents: the visible tiles in which a query and a key have the same id.

    Args:
      q_ids: [B, T] int32, the document of each query.
      k_ids: [B, S] int32, that of each key.
      tiling: the tiles, for T queries and S keys.

    Raises:
      ValueError: shapes that do not fit.
    """
    checks.instance("tiling", tiling, Tiling)
    _axes.unsplit(q_ids=q_ids, k_ids=k_ids)
    checks.rank("q_ids", q_ids, 2, "[B, T]")
    checks.rank("k_ids", k_ids, 2, "[B, S]")
    checks.same_length("k_ids", k_ids, "q_ids", q_ids)
    q_ids, k_ids = checks.int_in_range("q_ids", q_ids), checks.int_in_range("k_ids", k_ids)
    sizes = q_ids.shape[1], k_ids.shape[1]
    if sizes != (tiling.num_queries, tiling.num_keys):
        raise ValueError(
            f"q_ids and k_ids have {sizes[0]} and {sizes[1]} tokens: not those of {tiling}"
        )
    mask = _share(_in_blocks(q_ids, tiling.block_q), _in_blocks(k_ids, tiling.block_k))
    return from_mask((mask & tiling.visible())[:, None], tiling)


@jax.jit  # once for all eager calls of equal shapes
def _share(q_ids: jax.Array, k_ids: jax.Array) -> jax.Array:
    """[B, I, J] bool: whether blocks of queries [B, I, q] and keys [B, J, k] have an id in common."""

    def row(q_ids):
        return jnp.any(q_ids[:, :, None, None] == k_ids[:, None], axis=(1, 3))

    return jnp.moveaxis(jax.lax.map(row, jnp.moveaxis(q_ids, 1, 0)), 0, 1)


def union(a: TilePlan, b: TilePlan) -> TilePlan:
    """The tiles of either plan."""
    _check_plans(a, b)
    return _combined(a, to_mask(a) | _mask_like(b, a), a.capacity + b.capacity)


def intersection(a: TilePlan, b: TilePlan) -> TilePlan:
    """The tiles of both plans."""
    _check_plans(a, b)
    return _combined(a, to_mask(a) & _mask_like(b, a), min(a.capacity, b.capacity))


def transposed(plan: TilePlan) -> TilePlan:
    """For every key block its query blocks: the plan of the transposed scores, of capacity I."""
    mask = jnp.swapaxes(to_mask(plan), -1, -2)
    tiling = Tiling(plan.num_keys, plan.num_queries, plan.block_k, plan.block_q, causal=False)
    return from_mask(mask, tiling)


def _check_plans(a: TilePlan, b: TilePlan) -> None:
    for name, plan in (("a", a), ("b", b)):
        checks.instance(name, plan, TilePlan)


def _combined(like: TilePlan, mask: jax.Array, capacity: int) -> TilePlan:
    return from_mask(mask, Tiling(*_sizes(like), causal=False), min(capacity, like.num_key_blocks))


def _mask_like(plan: TilePlan, other: TilePlan) -> jax.Array:
    """The mask of `plan`; ValueError unless the two are plans of the same tiles."""
    if _sizes(plan) != _sizes(other):
        raise ValueError(
            f"the plans have (queries, keys, block_q, block_k) {_sizes(other)} and {_sizes(plan)}: they "
            f"must be the same"
        )
    return to_mask(plan)


def _sizes(plan: TilePlan) -> tuple[int, int, int, int]:
    return plan.num_queries, plan.num_keys, plan.block_q, plan.block_k


def _in_blocks(ids, block):
    """Ids [B, X] as [B, blocks, block]; the last one is repeated behind the end."""
    short = -ids.shape[1] % block
    ids = jnp.pad(jnp.asarray(ids, jnp.int32), ((0, 0), (0, short)), mode="edge")
    return ids.reshape(ids.shape[0], -1, block)
