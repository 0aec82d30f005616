"""Bytes in motion: pages that change are read, their tokens move, full pages are written to free ones.

Units are walked in an order in which pages never run out: within a unit tokens only fall, so a page
that was read fills at most one, and units that give up pages go before those that take some. A unit's
sources, which are its pages of each level and then its new tokens, are read a block at a time; each
token of a block goes to the buffer of its level, as it is or encoded anew, or to the centroids. Beside
the arena there are only a few pages.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance.cache import _centroids, _price
from jbalance.cache._centroids import Entries
from jbalance.cache._layout import PageLayout
from jbalance.cache._pages import Arena
from jbalance.cache._sight import NO_WINDOW, Ages

READ_TOKENS = 256  # about so many tokens of a unit are read at once
ENCODE_TOKENS = 64  # so many are encoded at once


class Candidates(NamedTuple):
    """New tokens by unit; N rows of S tokens."""

    row: jax.Array  # [n] int32, the row of each unit, N for none
    unit: jax.Array  # [N] int32, the unit of each row, n for none
    k: jax.Array  # [N, S, D]
    v: jax.Array  # [N, S, D]
    code: jax.Array  # [N, S] uint8
    valid: jax.Array  # [N, S] bool
    time: jax.Array | None  # [N, S] positions, of a timed arena


class Walk(NamedTuple):
    """Which units change, in which order, and the pages for them; n units, M levels, P pages."""

    unit: jax.Array  # [n] int32, in the order of the walk
    num_units: jax.Array  # [] int32 that are walked
    supply: jax.Array  # [P] int32 page ids: free ones, those to be read in walking order, the rest
    used: jax.Array  # [P] int32 tokens in those
    first: jax.Array  # [n, M] int32, where in `supply` those of a group that are read begin
    number: jax.Array  # [n, M] int32, how many they are
    least: jax.Array  # [n, M] int32, codes
    ages: Ages | None  # of a timed arena


class Work(NamedTuple):
    """What the walk changes."""

    data: jax.Array  # as the arena's
    group: jax.Array  # [P] int32, whose each page of the supply is
    taken: jax.Array  # [] int32, how many of the supply have been written
    buffers: tuple[jax.Array, ...]  # of each level [tokens, token_bytes] uint8
    filled: tuple[jax.Array, ...]  # [] int32 tokens in them
    left: Entries  # of the n units, what stays of those that leave


class _Block(NamedTuple):
    """Some tokens of one source."""

    rows: jax.Array  # [C, most bytes of a token] uint8, as they lie in pages; zeros for new tokens
    k: jax.Array  # [C, D] float32
    v: jax.Array  # [C, D] float32
    code: jax.Array  # [C] uint8
    time: jax.Array | None  # [C] uint16, of a timed arena
    level: jax.Array  # [C] int32 that each token reaches now: M if it leaves, M + 1 if it is none


def move(
    arena: Arena,
    plan: Walk,
    group: jax.Array,
    new: Candidates,
    first_unit: jax.Array,
    left: Entries,
) -> Work:
    """Walk the units that change: read their pages, write tokens at their new levels."""
    layouts = arena.layouts
    work = Work(
        arena.data,
        group,
        jnp.zeros((), jnp.int32),
        tuple(
            jnp.zeros((x.page_tokens + ENCODE_TOKENS, x.token_bytes), jnp.uint8) for x in layouts
        ),
        (jnp.zeros((), jnp.int32),) * len(layouts),
        left,
    )

    def one_unit(i, work):
        unit = plan.unit[i]
        base = (first_unit + unit) * len(layouts)

        def one_source(source, work):
            def one_block(i, work):
                work, block = _read(work, plan, layouts, new, unit, source, i)
                for level in range(len(layouts)):
                    work = _put(work, plan, layouts, level, base + level, block, source)
                return _leave(work, unit, block, len(layouts))

            return lax.fori_loop(0, _num_blocks(plan, layouts, new, unit, source), one_block, work)

        # The source after the last has no tokens: for it buffers are written that are not full.
        return lax.fori_loop(0, len(layouts) + 2, one_source, work)

    return lax.fori_loop(0, plan.num_units, one_unit, work)


def _read_pages(layout: PageLayout) -> int:
    """Pages of a level in a block."""
    return max(1, min(8, READ_TOKENS // layout.page_tokens))


def _block_tokens(layouts) -> int:
    """C, which holds a block of every level."""
    return max(READ_TOKENS, *(_read_pages(x) * x.page_tokens for x in layouts))


def _num_blocks(plan, layouts, new, unit, source):
    """Blocks of a unit's source: a level's pages that are read, or its new tokens."""
    pages = [-(-plan.number[unit, m] // _read_pages(x)) for m, x in enumerate(layouts)]
    rows, size = new.code.shape
    fresh = jnp.where(new.row[unit] < rows, -(-size // _block_tokens(layouts)), 0)
    return jnp.stack([*pages, fresh, 1])[source]


def _read(work, plan, layouts, new, unit, source, i):
    """Block `i` of a unit's source, and the work that goes on after it."""
    size, width = _block_tokens(layouts), max(x.token_bytes for x in layouts)

    def of_level(level):
        def read(data):
            layout = layouts[level]
            page = i * _read_pages(layout) + np.arange(_read_pages(layout))
            at = jnp.minimum(plan.first[unit, level] + page, plan.supply.shape[0] - 1)
            used = jnp.where(page < plan.number[unit, level], plan.used[at], 0)
            rows = layout.from_page(data[plan.supply[at]].reshape(page.size, -1))
            valid = (np.arange(layout.page_tokens) < used[:, None]).reshape(-1)
            k, v, code = layout.decode(rows)
            reached = jnp.maximum(_price.levels_of(code, plan.least[unit]), level)
            time = layout.times(rows) if layout.timed else None
            reached = _reached(plan, reached, valid, time, unit, len(layouts))
            rows = jnp.pad(rows, ((0, 0), (0, width - layout.token_bytes)))
            return _padded(_Block(rows, k, v, code, time, reached), size, len(layouts) + 1)

        return read

    def of_new(data):
        rows, tokens = new.code.shape
        if rows == 0 or tokens == 0:
            return of_nothing(data)
        row = jnp.minimum(new.row[unit], rows - 1)
        at = jnp.minimum(i * size + np.arange(size), tokens - 1)
        valid = new.valid[row, at] & (i * size + np.arange(size) < tokens)
        code = new.code[row, at]
        time = None if new.time is None else new.time[row, at].astype(jnp.uint16)
        reached = _price.levels_of(code, plan.least[unit])
        reached = _reached(plan, reached, valid, None, unit, len(layouts))
        k, v = (x[row, at].astype(jnp.float32) for x in (new.k, new.v))
        return _Block(jnp.zeros((size, width), jnp.uint8), k, v, code, time, reached)

    def of_nothing(data):
        del data
        vectors = jnp.zeros((size, layouts[0].head_dim))
        level = jnp.full(size, len(layouts) + 1, jnp.int32)
        codes = jnp.zeros(size, jnp.uint8)
        time = jnp.zeros(size, jnp.uint16) if layouts[0].timed else None
        return _Block(jnp.zeros((size, width), jnp.uint8), vectors, vectors, codes, time, level)

    readers = [*(of_level(level) for level in range(len(layouts))), of_new, of_nothing]
    block = lax.switch(source, readers, work.data)
    # Read before anything is written, or XLA keeps a copy of all pages to read from later.
    block, data = lax.optimization_barrier((block, work.data))
    return work._replace(data=data), block


def _reached(plan, level, valid, time, unit, num_levels):
    """Where tokens go that a price lets reach a level [C]: M + 1, into nothing, if they are none.

    In a unit with a window a token that is out of it is none (of new ones `valid` says so already), and
    one that leaves does not join the centroids, which would be seen for ever.
    """
    if plan.ages is not None:
        if time is not None:
            valid = valid & plan.ages.held_alive(time, unit)
        has_window = plan.ages.window[unit] < NO_WINDOW
        level = jnp.where(has_window & (level == num_levels), num_levels + 1, level)
    return jnp.where(valid, level, num_levels + 1)


def _padded(block, size, none):
    """The block filled up to C tokens."""
    missing = size - block.k.shape[0]
    level = jnp.pad(block.level, (0, missing), constant_values=none)
    block = jax.tree.map(lambda x: jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))), block)
    return block._replace(level=level)


def _put(work, plan, layouts, level, group, block, source):
    """Append a block's tokens of one level to the level's buffer; write what is full."""
    layout = layouts[level]
    index, total = _order(block.level == level, ENCODE_TOKENS)

    def step(i, work):
        at = lax.dynamic_slice_in_dim(index, i * ENCODE_TOKENS, ENCODE_TOKENS)
        rows = lax.cond(
            source == level,
            lambda: block.rows[at, : layout.token_bytes],
            lambda: layout.encode(
                block.k[at],
                block.v[at],
                block.code[at],
                None if block.time is None else block.time[at],
            ),
        )
        filled = work.filled[level]
        buffer = lax.dynamic_update_slice_in_dim(work.buffers[level], rows, filled, 0)
        filled += jnp.minimum(total - i * ENCODE_TOKENS, ENCODE_TOKENS)
        work = work._replace(
            buffers=_with(work.buffers, level, buffer), filled=_with(work.filled, level, filled)
        )
        number = jnp.where(last, jnp.minimum(filled, 1), filled // layout.page_tokens)
        return lax.fori_loop(0, number, lambda _, w: _write(w, plan, layouts, level, group), work)

    last = source == len(layouts) + 1
    return lax.fori_loop(0, jnp.where(last, 1, -(-total // ENCODE_TOKENS)), step, work)


def _leave(work, unit, block, num_levels):
    """A block's tokens that leave, or do not enter, join their unit's centroids."""
    index, total = _order(block.level == num_levels, ENCODE_TOKENS)

    def step(i, left):
        at = lax.dynamic_slice_in_dim(index, i * ENCODE_TOKENS, ENCODE_TOKENS)
        valid = i * ENCODE_TOKENS + np.arange(ENCODE_TOKENS) < total
        tokens = block.k[at], block.v[at], _price.decode_worth(block.code[at]), valid
        own = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, unit, 1), left)
        own = _centroids.add(own, *(x[None] for x in tokens))
        return jax.tree.map(
            lambda old, x: lax.dynamic_update_slice_in_dim(old, x, unit, 0), left, own
        )

    return work._replace(left=lax.fori_loop(0, -(-total // ENCODE_TOKENS), step, work.left))


def _order(chosen, size):
    """Where the chosen [S] ones are, padded to a multiple of `size`, and how many they are."""
    length = -(-chosen.shape[0] // size) * size
    rank = jnp.cumsum(chosen, dtype=jnp.int32)
    at = jnp.where(chosen, rank - 1, length)
    index = jnp.zeros(length, jnp.int32).at[at].set(np.arange(chosen.shape[0]), mode="drop")
    return index, rank[-1]


def _write(work, plan, layouts, level, group):
    """Write one page of a level's buffer to the next page of the supply."""
    layout, buffer = layouts[level], work.buffers[level]
    size = layout.page_tokens
    shape = work.data.shape[1:]
    page = layout.to_page(buffer[:size])
    page = jnp.pad(page, (0, math.prod(shape) - page.size)).reshape(1, *shape)
    at = plan.supply[work.taken]
    return work._replace(
        data=lax.dynamic_update_slice(work.data, page, (at, 0, 0)),
        group=work.group.at[work.taken].set(group),
        taken=work.taken + 1,
        buffers=_with(work.buffers, level, jnp.concatenate([buffer[size:], buffer[:size]])),
        filled=_with(work.filled, level, jnp.maximum(work.filled[level] - size, 0)),
    )


def _with(items, index, item):
    """The tuple with one entry replaced."""
    return (*items[:index], item, *items[index + 1 :])
