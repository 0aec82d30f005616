"""Which tiles of attention are computed: lists of key blocks, and where they come from.

A tile is a block of queries against a block of keys. Shapes and capacities are static, so plans of the
same capacity run in one compiled program; which tiles they name is data.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from jbalance import checks

BLOCK_TOKENS = 128


def _static():
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TilePlan:
    """Which tiles of attention are computed: for every head and query block a list of key blocks.

    The last block of queries or keys may be shorter than the others. An axis of size 1 for B or H is one
    plan for all of them.
    """

    blocks: jax.Array  # [B|1, H|1, I, C] int32 key blocks, ascending; behind `count` any in 0..J-1
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
        return self.blocks.shape[-1]

    @property
    def num_tiles(self) -> jax.Array:
        """How many tiles the lists hold, all their heads together: [] int32."""
        return jnp.sum(self.count)

    @property
    def density(self) -> jax.Array:
        """`num_tiles` as a part of all I J tiles: [] float32."""
        return self.num_tiles / max(1, self.count.size * self.num_key_blocks)


def from_mask(
    mask: jax.Array,
    num_queries: int,
    num_keys: int,
    block_q: int = BLOCK_TOKENS,
    block_k: int = BLOCK_TOKENS,
    capacity: int | None = None,
) -> TilePlan:
    """The plan of the tiles where `mask` holds.

    Args:
      mask: [B|1, H|1, I, J] bool, I = ceil(num_queries / block_q), J = ceil(num_keys / block_k).
      num_queries: T.
      num_keys: S.
      block_q: queries of a block.
      block_k: keys of a block.
      capacity: C, the longest list that fits; None for J. Of a traced mask with longer lists the last C
        blocks are kept (the newest keys), and `dropped` counts the others; `checkify` can make that an
        error.

    Raises:
      ValueError: shapes that do not fit; a concrete mask with a longer list than `capacity`.
    """
    shape = _num_blocks(num_queries, num_keys, block_q, block_k)
    checks.rank("mask", mask, 4, "[B|1, H|1, I, J]")
    if mask.shape[2:] != shape or mask.dtype != bool:
        raise ValueError(
            f"mask has shape {mask.shape} and dtype {mask.dtype}: for {num_queries} queries in blocks "
            f"of {block_q} and {num_keys} keys in blocks of {block_k} it must be bool and its last "
            f"axes {shape}"
        )
    capacity = shape[1] if capacity is None else capacity
    if capacity < 0:
        raise ValueError(f"capacity is {capacity}: it must be >= 0")
    capacity = min(capacity, shape[1])
    if checks.is_concrete(mask):
        longest = np.asarray(mask).sum(-1).max(initial=0)
        if longest > capacity:
            raise ValueError(f"capacity is {capacity}: mask needs {longest} blocks in one list")
    found = jnp.sum(mask, axis=-1, dtype=jnp.int32)
    dropped = jnp.maximum(found - capacity, 0)
    checkify.debug_check(jnp.all(dropped == 0), f"mask needs longer lists than capacity {capacity}")
    sizes = num_queries, num_keys, block_q, block_k
    return TilePlan(_listed(mask, dropped, capacity), found - dropped, *sizes, dropped)


def _listed(mask, dropped, capacity):
    """Blocks [..., C] where `mask` holds, without the first `dropped`."""
    if checks.is_concrete(mask):
        first = np.argsort(~np.asarray(mask), axis=-1, kind="stable")
        return jnp.asarray(first[..., :capacity], jnp.int32)
    place = jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1 - dropped[..., None]
    place = jnp.where(mask & (place >= 0), place, capacity).reshape(-1, mask.shape[-1])
    lists = jnp.zeros((place.shape[0], capacity), jnp.int32)
    lists = lists.at[jnp.arange(place.shape[0])[:, None], place].set(
        jnp.arange(mask.shape[-1], dtype=jnp.int32), mode="drop"
    )
    return lists.reshape(*mask.shape[:-1], capacity)


def to_mask(plan: TilePlan) -> jax.Array:
    """[B|1, H|1, I, J] bool, the tiles of the plan."""
    listed = jnp.arange(plan.capacity) < plan.count[..., None]
    same = plan.blocks[..., None] == jnp.arange(plan.num_key_blocks)
    return jnp.any(same & listed[..., None], axis=-2)


def full(
    num_queries: int, num_keys: int, block_q: int = BLOCK_TOKENS, block_k: int = BLOCK_TOKENS
) -> TilePlan:
    """All tiles."""
    shape = _num_blocks(num_queries, num_keys, block_q, block_k)
    mask = jnp.ones((1, 1, *shape), bool)
    return from_mask(mask, num_queries, num_keys, block_q, block_k)


def causal(
    num_queries: int, num_keys: int, block_q: int = BLOCK_TOKENS, block_k: int = BLOCK_TOKENS
) -> TilePlan:
    """The tiles in which some query t sees a key s <= t + S - T: the last query sees all keys."""
    _, last, keys, _ = positions(num_queries, num_keys, block_q, block_k)
    return from_mask((keys <= last)[None, None], num_queries, num_keys, block_q, block_k)


def window(
    size: int,
    num_queries: int,
    num_keys: int,
    block_q: int = BLOCK_TOKENS,
    block_k: int = BLOCK_TOKENS,
    num_sinks: int = 0,
) -> TilePlan:
    """The causal tiles with one of a query's last `size` keys, or one of the first `num_sinks`."""
    if size < 1 or num_sinks < 0:
        raise ValueError(
            f"size is {size} and num_sinks {num_sinks}: they must be >= 1 and >= 0 keys"
        )
    first, last, keys, key_ends = positions(num_queries, num_keys, block_q, block_k)
    near = (key_ends > first - size) | (keys < num_sinks)
    mask = (keys <= last) & near
    return from_mask(mask[None, None], num_queries, num_keys, block_q, block_k)


def segments(
    q_ids: jax.Array,
    k_ids: jax.Array,
    block_q: int = BLOCK_TOKENS,
    block_k: int = BLOCK_TOKENS,
) -> TilePlan:
    """The tiles in which a query and a key have the same id (packed documents).

    Args:
      q_ids: [B, T] int32, the document of each query.
      k_ids: [B, S] int32, that of each key.
      block_q: queries of a block.
      block_k: keys of a block.

    Raises:
      ValueError: shapes that do not fit.
    """
    checks.rank("q_ids", q_ids, 2, "[B, T]")
    checks.rank("k_ids", k_ids, 2, "[B, S]")
    checks.same_length("k_ids", k_ids, "q_ids", q_ids)
    num_queries, num_keys = q_ids.shape[1], k_ids.shape[1]
    _num_blocks(num_queries, num_keys, block_q, block_k)
    q_ids, k_ids = _in_blocks(q_ids, block_q), _in_blocks(k_ids, block_k)

    def row(q_ids):
        return jnp.any(q_ids[:, :, None, None] == k_ids[:, None], axis=(1, 3))

    mask = jax.lax.map(row, jnp.moveaxis(q_ids, 1, 0))
    return from_mask(jnp.moveaxis(mask, 0, 1)[:, None], num_queries, num_keys, block_q, block_k)


def union(a: TilePlan, b: TilePlan) -> TilePlan:
    """The tiles of either plan."""
    return _combined(a, to_mask(a) | _mask_like(b, a), a.capacity + b.capacity)


def intersection(a: TilePlan, b: TilePlan) -> TilePlan:
    """The tiles of both plans."""
    return _combined(a, to_mask(a) & _mask_like(b, a), min(a.capacity, b.capacity))


def difference(a: TilePlan, b: TilePlan) -> TilePlan:
    """The tiles of `a` that are not in `b`."""
    return _combined(a, to_mask(a) & ~_mask_like(b, a), a.capacity)


def transposed(plan: TilePlan) -> TilePlan:
    """For every key block its query blocks: the plan of the transposed scores, of capacity I."""
    mask = jnp.swapaxes(to_mask(plan), -1, -2)
    return from_mask(mask, plan.num_keys, plan.num_queries, plan.block_k, plan.block_q)


def _combined(like: TilePlan, mask: jax.Array, capacity: int) -> TilePlan:
    sizes = like.num_queries, like.num_keys, like.block_q, like.block_k
    return from_mask(mask, *sizes, min(capacity, like.num_key_blocks))


def _mask_like(plan: TilePlan, other: TilePlan) -> jax.Array:
    """The mask of `plan`; ValueError unless the two are plans of the same tiles."""
    sizes = [(p.num_queries, p.num_keys, p.block_q, p.block_k) for p in (plan, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the plans have (queries, keys, block_q, block_k) {sizes[1]} and {sizes[0]}: they must be "
            f"the same"
        )
    return to_mask(plan)


def _num_blocks(num_queries, num_keys, block_q, block_k) -> tuple[int, int]:
    """(I, J); ValueError for sizes that are not positive."""
    sizes = {"num_queries": num_queries, "num_keys": num_keys}
    for name, size in (sizes | {"block_q": block_q, "block_k": block_k}).items():
        if size < 1:
            raise ValueError(f"{name} is {size}: it must be at least 1")
    return -(-num_queries // block_q), -(-num_keys // block_k)


def positions(num_queries, num_keys, block_q, block_k):
    """Where the blocks lie among the keys: first and last query [I, 1], first and last key [J]."""
    num_q, num_k = _num_blocks(num_queries, num_keys, block_q, block_k)
    first = np.arange(num_q)[:, None] * block_q
    last = np.minimum(first + block_q, num_queries) - 1
    keys = np.arange(num_k) * block_k
    key_ends = np.minimum(keys + block_k, num_keys) - 1
    shift = num_keys - num_queries
    return first + shift, last + shift, keys, key_ends


def _in_blocks(ids, block):
    """Ids [B, X] as [B, blocks, block]; the last one is repeated behind the end."""
    short = -ids.shape[1] % block
    ids = jnp.pad(jnp.asarray(ids, jnp.int32), ((0, 0), (0, short)), mode="edge")
    return ids.reshape(ids.shape[0], -1, block)
