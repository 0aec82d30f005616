"""New tokens enter an arena: all tokens of their request are weighed anew, and bytes stay constant.

The price (`_price.price_of`) decides which tokens stay at their level, which are re-encoded at a lower
one and which leave; new tokens are encoded at the level that the price gives them. Pages in which
nothing changes stay where they are. The others are streamed: a block of pages is read, its tokens go to
one buffer per level, and full buffers are written to free pages, first of all to those already read
(`_move`). Tokens that leave, and new ones that do not enter, join the centroids of their unit.

At no time more pages are held than before or after, which both fit. Beside the arena there are only a
few pages, the histogram of [units, M, 256] and tables of 4 bytes for each page.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import checks
from jbalance.cache import _centroids, _codec, _move, _pages, _price
from jbalance.cache._centroids import Centroids
from jbalance.cache._layout import CODES, TIMES
from jbalance.cache._move import Candidates, Walk
from jbalance.cache._pages import Arena
from jbalance.cache._sight import Ages

_SCAN_PAGES = 32


class Report(NamedTuple):
    """What an admission did, in tokens; [] int32 where nothing else is said."""

    price: jax.Array  # [n], of `_price.price_of` for each unit
    least: jax.Array  # [n, M], of `_price.levels_of` for each unit
    held: jax.Array  # tokens of these units now
    held_pages: jax.Array  # pages of these units now
    demoted: jax.Array  # held ones that fell to a lower level
    evicted: jax.Array  # held ones that left
    rejected: jax.Array  # new ones that did not enter
    dropped: jax.Array  # new ones not finite, or whose unit is not one of these or given twice
    shortfall: jax.Array  # pages; above 0 the arena is as before


def admit(
    arena: Arena,
    centroids: Centroids,
    first_unit: jax.Array | int,
    num_units: int,
    units: jax.Array,
    k: jax.Array,
    v: jax.Array,
    code: jax.Array,
    allowance_pages: jax.Array | int,
    *,
    num_tokens: jax.Array | None = None,
    certain: bool = False,
    time: jax.Array | None = None,
    ages: Ages | None = None,
) -> tuple[Arena, Centroids, Report]:
    """Let new tokens into some neighbouring units, within so many pages for all of these.

    Which tokens are held afterwards, and at which levels, is `_price.price_of` over the tokens of these
    units and the new ones; the free pages bound it too. What does not change keeps its bytes; what
    falls is decoded and encoded anew; what leaves or does not enter joins the centroids; what is not
    finite does neither. Other units keep theirs. Donate the arena: its bytes are then changed in place.

    Args:
      arena: before; its bits must descend.
      centroids: the centroids of the arena's units, before.
      first_unit: [] int32, first of these units.
      num_units: n, how many there are; static.
      units: [N] int32 units of the new tokens, different ones.
      k: [N, S, D] float keys.
      v: [N, S, D] float values.
      code: [N, S] uint8, `_price.encode_worth` or `_price.PROTECTED`.
      allowance_pages: [] int32, for all n units together.
      num_tokens: [N] int32, how many of the S there are; None for all.
      certain: whether the price knows of `_price.plenty`; static.
      time: [N, S] int32 positions of the tokens, of a timed arena.
      ages: of these units, of a timed arena: tokens that have left their unit's window go.

    Returns:
      The arena, the centroids and a `Report`; with a shortfall arena and centroids are as before, so
      that the same can be tried again with more pages.

    Raises:
      ValueError: shapes, dtypes or bits that do not fit.
    """
    _check(arena, centroids, first_unit, num_units, units, k, v, code, num_tokens)
    if arena.timed != (time is not None) or arena.timed != (ages is not None):
        raise ValueError("time and ages are of a timed arena: give both of them for one, else none")
    steps = _price.steps(arena.head_dim, arena.bits)
    first_unit = jnp.asarray(first_unit, jnp.int32)
    new, dropped = _candidates(first_unit, num_units, units, k, v, code, num_tokens)
    new = _in_window(new, time, ages)
    owner = _owners(arena, first_unit, num_units)
    histogram, least, gone = _weigh(arena, owner, num_units, ages)
    entering = _entering(new, num_units)
    free = arena.num_pages - arena.offset[-1]
    limit = jnp.minimum(allowance_pages, free + jnp.sum(owner.mine, dtype=jnp.int32))
    weighed = histogram.at[:, 0].add(entering)
    own = first_unit + np.arange(num_units)
    plenty = jnp.int32(0)
    if certain:
        tokens = jnp.sum(weighed) + jnp.sum(centroids.count[own])
        plenty = _price.plenty(arena.page_tokens, limit, tokens)
    found = _price.price_of(weighed, steps, arena.page_tokens, limit, plenty)
    fate = _fate(histogram, entering, found.least)
    if ages is not None:
        unit = jnp.where(gone, owner.unit, num_units)
        fate = fate._replace(changed=fate.changed.at[unit].set(True, mode="drop"))
    growth = jnp.sum(found.pages, axis=1) - _held_pages(owner, num_units)
    # A unit in which nothing changes may still hold pages that it does not need.
    done = found.shortfall == 0
    moves = (fate.changed | (growth != 0)) & done
    walked = moves | (jnp.any(entering > 0, axis=1) & done)
    plan, group, rank = _plan(arena, owner, least, gone, found, growth, moves, walked, ages)
    work = _move.move(arena, plan, group, new, first_unit, _centroids.load(centroids, own))
    after = _tables(arena, work, plan, rank, found, first_unit)
    held = jnp.sum(histogram)
    return (
        after,
        _centroids.store(centroids, own, work.left),
        Report(
            price=found.price,
            least=found.least,
            held=jnp.where(done, jnp.sum(found.tokens), held),
            held_pages=jnp.where(done, jnp.sum(found.pages), jnp.sum(owner.mine)),
            demoted=done * jnp.sum(fate.demoted),
            evicted=done * jnp.sum(fate.evicted),
            rejected=jnp.sum(jnp.where(done, fate.rejected, jnp.sum(entering, axis=-1))),
            dropped=dropped,
            shortfall=found.shortfall,
        ),
    )


def _check(arena, centroids, first_unit, num_units, units, k, v, code, num_tokens):
    """ValueError for arguments that do not fit."""
    rows, _, _ = _pages.check_tokens(arena, units, k, v, code)
    total = arena.count.shape[0]
    if (centroids.count.shape[0], centroids.head_dim) != (total, arena.head_dim):
        raise ValueError(
            f"centroids are of {centroids.count.shape[0]} units and head_dim {centroids.head_dim}: "
            f"they must be of the arena's, {total} and {arena.head_dim}"
        )
    for name, x in (("units", units), ("num_tokens", num_tokens)):
        if x is not None and np.shape(x) != (rows,):
            raise ValueError(f"{name} has shape {np.shape(x)}: it must be [N] = ({rows},)")
    if not isinstance(num_units, int | np.integer) or not 1 <= num_units <= total:
        raise ValueError(f"num_units is {num_units!r}: it must be in 1..{total}, static")
    checks.one_int("first_unit", first_unit, 0, total - num_units)


def _candidates(first_unit, num_units, units, k, v, code, num_tokens):
    """The new tokens by unit, and how many have none."""
    k, v, code = (jnp.asarray(x) for x in (k, v, code))
    rows, size = code.shape
    there = jnp.full(rows, size) if num_tokens is None else jnp.clip(num_tokens, 0, size)
    local = jnp.asarray(units, jnp.int32) - first_unit
    mine = (local >= 0) & (local < num_units)
    at = jnp.where(mine, local, num_units)
    row = jnp.full(num_units + 1, rows).at[at].min(np.arange(rows))[:num_units]
    chosen = mine & (row[jnp.minimum(at, num_units - 1)] == np.arange(rows))
    valid = (np.arange(size) < there[:, None]) & chosen[:, None]
    valid &= _codec.usable(k, v)
    dropped = jnp.sum(there, dtype=jnp.int32) - jnp.sum(valid, dtype=jnp.int32)
    unit = jnp.where(chosen, local, num_units)
    return Candidates(row.astype(jnp.int32), unit, k, v, code, valid, None), dropped


def _in_window(new, time, ages):
    """The new tokens, without those that left their windows before they came."""
    if ages is None:
        return new
    last = ages.window.shape[0] - 1
    valid = new.valid & ages.new_alive(time, jnp.minimum(new.unit, last)[:, None])
    return new._replace(valid=valid, time=time)


def _entering(new, num_units):
    """[n, 256] int32: the new tokens of each unit by code."""
    at = jnp.where(new.valid, new.unit[:, None], num_units)
    out = jnp.zeros((num_units, _price.NUM_CODES), jnp.int32)
    return out.at[at, new.code].add(1, mode="drop")


class _Owners(NamedTuple):
    """Whose each page is, by its place in `Arena.order`; [P] each."""

    group: jax.Array  # int32, U M for free pages
    mine: jax.Array  # bool, of one of these units
    unit: jax.Array  # int32, counted from first_unit; any if not mine
    level: jax.Array  # int32
    used: jax.Array  # int32 tokens


def _owners(arena, first_unit, num_units):
    """`_Owners` of the arena's pages."""
    num_levels = len(arena.bits)
    place = jnp.arange(arena.num_pages, dtype=jnp.int32)
    group = jnp.searchsorted(arena.offset, place, side="right").astype(jnp.int32) - 1
    unit, level = group // num_levels - first_unit, group % num_levels
    held = jnp.minimum(group, arena.count.size - 1)
    size = jnp.asarray(arena.page_tokens, jnp.int32)[level]
    used = arena.count.reshape(-1)[held] - (place - arena.offset[group]) * size
    mine = (group < arena.count.size) & (unit >= 0) & (unit < num_units)
    return _Owners(group, mine, unit, level, jnp.where(mine, jnp.clip(used, 0, size), 0))


def _weigh(arena, owner, num_units, ages):
    """Tokens by unit, level and code [n, M, 256] int32, and of each page [P] the least code, uint8, and
    whether it has tokens that left their window, which count as none.
    """
    num_levels = len(arena.bits)
    size = max(arena.page_tokens)
    start = np.array([layout.offset(CODES) for layout in arena.layouts], np.int32)
    slot = np.arange(size, dtype=np.int32)
    begin = jnp.argmax(owner.mine)
    end = begin + jnp.sum(owner.mine)

    def block(i, carry):
        histogram, least, gone = carry
        place = begin + i * _SCAN_PAGES + np.arange(_SCAN_PAGES)
        inside = place < end
        at = jnp.minimum(place, arena.num_pages - 1)
        level = owner.level[at]
        byte = jnp.minimum(jnp.asarray(start)[level][:, None] + slot, arena.page_bytes - 1)
        code = arena.data[arena.order[at][:, None], *_place_of(arena, byte)]
        valid = (slot < owner.used[at][:, None]) & inside[:, None]
        kept = jnp.where(inside, place, arena.num_pages)
        if ages is not None:
            alive = ages.held_alive(_times_at(arena, at, level, slot), owner.unit[at][:, None])
            gone = gone.at[kept].set(jnp.any(valid & ~alive, axis=1), mode="drop")
            valid &= alive
        unit = jnp.where(valid, owner.unit[at][:, None], num_units)
        histogram = histogram.at[unit, level[:, None], code].add(1, mode="drop")
        low = jnp.min(jnp.where(valid, code, np.uint8(255)), axis=1)
        return histogram, least.at[kept].set(low, mode="drop"), gone

    histogram = jnp.zeros((num_units, num_levels, _price.NUM_CODES), jnp.int32)
    least = jnp.full(arena.num_pages, 255, jnp.uint8)
    gone = None if ages is None else jnp.zeros(arena.num_pages, bool)
    return lax.fori_loop(0, -(-(end - begin) // _SCAN_PAGES), block, (histogram, least, gone))


def _times_at(arena, at, level, slot):
    """Positions, modulo 2^16, in the slots of the pages at these places and levels."""
    start = np.array([layout.offset(TIMES) for layout in arena.layouts], np.int32)
    size = np.array(arena.page_tokens, np.int32)
    page = arena.order[at][:, None]

    def half(number):
        first = jnp.asarray(start + number * size)[level][:, None]
        byte = jnp.minimum(first + slot, arena.page_bytes - 1)
        return arena.data[page, *_place_of(arena, byte)].astype(jnp.int32)

    return half(0) + 256 * half(1)


def _place_of(arena, byte):
    """Row of a page and place in it of its bytes."""
    width = arena.data.shape[2]
    return byte // width, byte % width


class _Fate(NamedTuple):
    """What a price does to each unit; [n] each."""

    demoted: jax.Array
    evicted: jax.Array
    rejected: jax.Array
    changed: jax.Array  # bool, whether anything moves or enters


def _fate(histogram, entering, least):
    """`_Fate` of tokens held [n, M, 256] and entering [n, 256] under the least codes [n, M]."""
    held = _price.tails(histogram)
    unit, level = np.arange(least.shape[0]), np.arange(least.shape[1])
    stay = jnp.sum(held[unit[:, None], level, least], axis=1)
    survive = jnp.sum(held[unit[:, None], level, least[:, -1:]], axis=1)
    enter = _price.tails(entering)[unit, least[:, -1]]
    total = jnp.sum(histogram, axis=(1, 2))
    rejected = jnp.sum(entering, axis=-1) - enter
    return _Fate(survive - stay, total - survive, rejected, (stay < total) | (enter > 0))


def _held_pages(owner, num_units):
    """[n] int32 pages of each unit."""
    unit = jnp.where(owner.mine, owner.unit, num_units)
    return jnp.zeros(num_units, jnp.int32).at[unit].add(1, mode="drop")


def _plan(arena, owner, least, gone, found, growth, moves, walked, ages):
    """The walk, and in the order of its supply each page's group and rank within the group."""
    num_units, num_levels = found.tokens.shape
    groups, num_pages = arena.count.size, arena.num_pages
    unit = jnp.clip(owner.unit, 0, num_units - 1)
    walk = jnp.argsort(jnp.where(walked, growth, num_pages + 1), stable=True).astype(jnp.int32)
    turn = jnp.zeros(num_units, jnp.int32).at[walk].set(np.arange(num_units, dtype=np.int32))
    size = jnp.asarray(arena.page_tokens, jnp.int32)[owner.level]
    falls = least < found.least[unit, owner.level]
    if ages is not None:
        falls |= gone
    read = owner.mine & moves[unit] & (falls | (owner.used < size))
    free = owner.group == groups
    visit = turn[unit] * num_levels + owner.level
    key = jnp.where(free, 0, jnp.where(read, 1 + visit, 1 + num_units * num_levels))
    at = jnp.argsort(key, stable=True)
    number = jnp.zeros((num_units, num_levels), jnp.int32)
    number = number.at[unit, owner.level].add(read.astype(jnp.int32))
    ends = jnp.sum(free, dtype=jnp.int32) + jnp.cumsum(number[walk].reshape(-1), dtype=jnp.int32)
    first = jnp.zeros_like(number).at[walk].set(ends.reshape(number.shape) - number[walk])
    place = jnp.arange(num_pages, dtype=jnp.int32)
    empty = (free | read)[at]
    # Pages that are written come behind those of their group that stay, in the order of writing.
    rank = jnp.where(empty, num_pages + place, place[at])
    plan = Walk(
        walk,
        jnp.sum(walked, dtype=jnp.int32),
        arena.order[at],
        owner.used[at],
        first,
        number,
        found.least,
        ages,
    )
    return plan, jnp.where(empty, groups, owner.group[at]), rank


def _tables(arena, work, plan, rank, found, first_unit):
    """The arena with its new pages, their order, offsets and counts."""
    group, _, order = lax.sort((work.group, rank, plan.supply), num_keys=2)
    groups = arena.count.size
    number = jnp.zeros(groups + 1, jnp.int32).at[group].add(1)[:groups]
    offset = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(number, dtype=jnp.int32)])
    count = lax.dynamic_update_slice(arena.count, found.tokens, (first_unit, 0))
    done = found.shortfall == 0
    order, offset, count = (
        jnp.where(done, new, old)
        for new, old in ((order, arena.order), (offset, arena.offset), (count, arena.count))
    )
    return dataclasses.replace(arena, data=work.data, order=order, offset=offset, count=count)
