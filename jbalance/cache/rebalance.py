"""New tokens enter an arena: all tokens of their request are weighed anew, and bytes stay constant.

The price (`worth.price_of`) decides which tokens stay at their level, which are re-encoded at a lower
one and which leave; new tokens are encoded at the level that the price gives them. Pages in which
nothing changes stay where they are. The others are streamed: a block of pages is read, its tokens go to
one buffer per level, and full buffers are written to free pages, first of all to those already read.
Tokens that leave, and new ones that do not enter, join what is left of their like (`remainder`).

Pages never run out on the way. Within a unit tokens only fall, so a page that was read fills at most
one; units that give up pages go before those that take some, so that at no time more pages are held
than before or after, which both fit. Beside the arena there are only a few pages, the histogram of
[units, M, 256] and tables of 4 bytes for each page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import checks
from jbalance.cache import pages, remainder, worth
from jbalance.cache.pages import Arena
from jbalance.cache.remainder import Entries, Remainder

READ_TOKENS = 256  # about so many tokens of a group are read at once
ENCODE_TOKENS = 64  # so many are encoded at once
_SCAN_PAGES = 32


class Report(NamedTuple):
    """What an admission did, in tokens; [] int32 where nothing else is said."""

    price: jax.Array  # [n], of `worth.price_of` for each unit
    least: jax.Array  # [n, M], of `worth.levels_of` for each unit
    held: jax.Array  # tokens of these units now
    held_pages: jax.Array  # pages of these units now
    demoted: jax.Array  # held ones that fell to a lower level
    evicted: jax.Array  # held ones that left
    rejected: jax.Array  # new ones that did not enter
    dropped: jax.Array  # new ones whose unit is not one of these, or given twice
    shortfall: jax.Array  # pages; above 0 the arena is as before


class _Candidates(NamedTuple):
    """New tokens by unit; N rows of S tokens."""

    row: jax.Array  # [n] int32, the row of each unit, N for none
    unit: jax.Array  # [N] int32, the unit of each row, n for none
    k: jax.Array  # [N, S, D]
    v: jax.Array  # [N, S, D]
    code: jax.Array  # [N, S] uint8
    valid: jax.Array  # [N, S] bool


class _Plan(NamedTuple):
    """What the stream needs to know; n units, M levels, P pages."""

    unit: jax.Array  # [n] int32, in the order of the walk
    num_units: jax.Array  # [] int32 that are walked
    supply: jax.Array  # [P] int32 page ids: free ones, those to be read in walking order, the rest
    used: jax.Array  # [P] int32 tokens in those
    first: jax.Array  # [n, M] int32, where in `supply` those of a group that are read begin
    number: jax.Array  # [n, M] int32, how many they are
    least: jax.Array  # [n, M] int32, codes


class _Work(NamedTuple):
    """What the stream changes."""

    data: jax.Array  # [P, page_bytes] uint8
    group: jax.Array  # [P] int32, whose each page of the supply is
    taken: jax.Array  # [] int32, how many of the supply have been written
    buffers: tuple[jax.Array, ...]  # of each level [tokens, token_bytes] uint8
    filled: tuple[jax.Array, ...]  # [] int32 tokens in them
    left: Entries  # of the n units, what stays of those that leave


class _Format(NamedTuple):
    """What is known of a level when it is compiled."""

    bits: int
    head_dim: int
    page_tokens: int
    read_pages: int
    widths: tuple[int, ...]  # bytes of a token's parts in `pages.widths`' order

    @property
    def token_bytes(self):
        return sum(self.widths)

    def split(self, rows):
        """Bytes [S, token_bytes] to their parts."""
        return jnp.split(rows, np.cumsum(self.widths)[:-1], axis=-1)

    def rows(self, data):
        """Pages [W, page_bytes] to the bytes [W page_tokens, token_bytes] of their tokens."""
        parts = pages._from_page(data, self.page_tokens, self.bits, self.head_dim)
        return jnp.concatenate(pages._parts(parts), axis=-1)

    def page(self, rows):
        """Bytes of one page's tokens to [used] bytes of the page."""
        parts = pages._parts([x[None, None] for x in self.split(rows)])
        return pages._to_page(parts, self.bits)[0, 0]

    def encode(self, k, v, code):
        """Vectors [S, D] and codes [S] of worth to bytes [S, token_bytes]."""
        both = pages._encoded(jnp.concatenate([k, v]), self.bits)  # at once: half to compile
        parts = [*(x[: k.shape[0]] for x in both), *(x[k.shape[0] :] for x in both), code[:, None]]
        return jnp.concatenate(pages._parts(parts), axis=-1)

    def decode(self, rows):
        """Bytes [S, token_bytes] to vectors [S, D] and codes [S] of worth."""
        *content, code = pages._parts(self.split(rows))
        half = len(content) // 2
        both = [jnp.concatenate(x) for x in zip(content[:half], content[half:], strict=True)]
        k, v = jnp.split(pages._decoded(both, self.head_dim, self.bits), 2)
        return k, v, code[:, 0]


def admit(
    arena: Arena,
    rest: Remainder,
    first_unit: jax.Array | int,
    num_units: int,
    units: jax.Array,
    k: jax.Array,
    v: jax.Array,
    code: jax.Array,
    allowance_pages: jax.Array | int,
    *,
    num_tokens: jax.Array | None = None,
) -> tuple[Arena, Remainder, Report]:
    """Let new tokens into some neighbouring units, within so many pages for all of these.

    Which tokens are held afterwards, and at which levels, is `worth.price_of` over the tokens of these
    units and the new ones; the free pages bound it too. What does not change keeps its bytes; what
    falls is decoded and encoded anew; what leaves or does not enter joins the remainder. Other units
    keep theirs. Donate the arena: its bytes are then changed in place.

    Args:
      arena: before; its bits must descend.
      rest: the remainder of the arena's units, before.
      first_unit: [] int32, first of these units.
      num_units: n, how many there are; static.
      units: [N] int32 units of the new tokens, different ones.
      k: [N, S, D] float keys.
      v: [N, S, D] float values.
      code: [N, S] uint8, `worth.encode_worth` or `worth.PROTECTED`.
      allowance_pages: [] int32, for all n units together.
      num_tokens: [N] int32, how many of the S there are; None for all.

    Returns:
      The arena, the remainder and a `Report`; with a shortfall arena and remainder are as before, so
      that the same can be tried again with more pages.

    Raises:
      ValueError: shapes, dtypes or bits that do not fit.
    """
    _check(arena, rest, first_unit, num_units, units, k, v, code, num_tokens)
    offsets = worth.steps(arena.head_dim, arena.bits)
    first_unit = jnp.asarray(first_unit, jnp.int32)
    new, dropped = _candidates(first_unit, num_units, units, k, v, code, num_tokens)
    owner = _owners(arena, first_unit, num_units)
    histogram, least = _weigh(arena, owner, num_units)
    entering = _entering(new, num_units)
    free = arena.num_pages - arena.offset[-1]
    limit = jnp.minimum(allowance_pages, free + jnp.sum(owner.mine, dtype=jnp.int32))
    found = worth.price_of(histogram.at[:, 0].add(entering), offsets, arena.page_tokens, limit)
    fate = _fate(histogram, entering, found.least)
    growth = jnp.sum(found.pages, axis=1) - _held_pages(owner, num_units)
    # A unit in which nothing changes may still hold pages that it does not need.
    moves = (fate.changed | (growth != 0)) & (found.shortfall == 0)
    plan, group, rank = _plan(arena, owner, least, found, growth, moves)
    own = first_unit + np.arange(num_units)
    work = _stream(arena, plan, group, new, first_unit, remainder.load(rest, own))
    after = _tables(arena, work, plan, rank, found, first_unit)
    left = _reject(work.left, new, found)
    held = jnp.sum(histogram)
    done = jnp.where(found.shortfall == 0, 1, 0)
    return (
        after,
        remainder.store(rest, own, left),
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


def _check(arena, rest, first_unit, num_units, units, k, v, code, num_tokens):
    """ValueError for arguments that do not fit."""
    rows, _, _ = pages.check_tokens(arena, units, k, v, code, "code")
    total = arena.count.shape[0]
    if (rest.count.shape[0], rest.head_dim) != (total, arena.head_dim):
        raise ValueError(
            f"rest is of {rest.count.shape[0]} units and head_dim {rest.head_dim}: it must be of the "
            f"arena's, {total} and {arena.head_dim}"
        )
    for name, x in (("units", units), ("num_tokens", num_tokens)):
        if x is not None and np.shape(x) != (rows,):
            raise ValueError(f"{name} has shape {np.shape(x)}: it must be [N] = ({rows},)")
    if not isinstance(num_units, int | np.integer) or not 1 <= num_units <= total:
        raise ValueError(f"num_units is {num_units!r}: it must be in 1..{total}, static")
    checks.in_range("first_unit", first_unit, 0, total - num_units)


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
    dropped = jnp.sum(there, dtype=jnp.int32) - jnp.sum(valid, dtype=jnp.int32)
    unit = jnp.where(chosen, local, num_units)
    return _Candidates(row.astype(jnp.int32), unit, k, v, code, valid), dropped


def _entering(new, num_units):
    """[n, 256] int32: the new tokens of each unit by code."""
    at = jnp.where(new.valid, new.unit[:, None], num_units)
    out = jnp.zeros((num_units, worth.NUM_CODES), jnp.int32)
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


def _weigh(arena, owner, num_units):
    """Tokens by unit, level and code [n, M, 256] int32, and the least code of each page [P] uint8."""
    num_levels = len(arena.bits)
    size = max(arena.page_tokens)
    start = np.array(
        [
            n * (pages.token_bytes(arena.head_dim, b) - 1)
            for n, b in zip(arena.page_tokens, arena.bits, strict=True)
        ],
        np.int32,
    )
    slot = np.arange(size, dtype=np.int32)
    begin = jnp.argmax(owner.mine)
    end = begin + jnp.sum(owner.mine)

    def block(i, carry):
        histogram, least = carry
        place = begin + i * _SCAN_PAGES + np.arange(_SCAN_PAGES)
        inside = place < end
        at = jnp.minimum(place, arena.num_pages - 1)
        level = owner.level[at]
        byte = jnp.minimum(jnp.asarray(start)[level][:, None] + slot, arena.page_bytes - 1)
        code = arena.data[arena.order[at][:, None], byte]
        valid = (slot < owner.used[at][:, None]) & inside[:, None]
        unit = jnp.where(valid, owner.unit[at][:, None], num_units)
        histogram = histogram.at[unit, level[:, None], code].add(1, mode="drop")
        low = jnp.min(jnp.where(valid, code, np.uint8(255)), axis=1)
        return histogram, least.at[jnp.where(inside, place, arena.num_pages)].set(low, mode="drop")

    histogram = jnp.zeros((num_units, num_levels, worth.NUM_CODES), jnp.int32)
    least = jnp.full(arena.num_pages, 255, jnp.uint8)
    return lax.fori_loop(0, -(-(end - begin) // _SCAN_PAGES), block, (histogram, least))


class _Fate(NamedTuple):
    """What a price does to each unit; [n] each."""

    demoted: jax.Array
    evicted: jax.Array
    rejected: jax.Array
    changed: jax.Array  # bool, whether anything moves or enters


def _fate(histogram, entering, least):
    """`_Fate` of tokens held [n, M, 256] and entering [n, 256] under the least codes [n, M]."""
    held = worth.tails(histogram)
    unit, level = np.arange(least.shape[0]), np.arange(least.shape[1])
    stay = jnp.sum(held[unit[:, None], level, least], axis=1)
    survive = jnp.sum(held[unit[:, None], level, least[:, -1:]], axis=1)
    enter = worth.tails(entering)[unit, least[:, -1]]
    total = jnp.sum(histogram, axis=(1, 2))
    rejected = jnp.sum(entering, axis=-1) - enter
    return _Fate(survive - stay, total - survive, rejected, (stay < total) | (enter > 0))


def _held_pages(owner, num_units):
    """[n] int32 pages of each unit."""
    unit = jnp.where(owner.mine, owner.unit, num_units)
    return jnp.zeros(num_units, jnp.int32).at[unit].add(1, mode="drop")


def _plan(arena, owner, least, found, growth, moves):
    """The walk, and in the order of its supply each page's group and rank within the group."""
    num_units, num_levels = found.tokens.shape
    groups, num_pages = arena.count.size, arena.num_pages
    unit = jnp.clip(owner.unit, 0, num_units - 1)
    walk = jnp.argsort(jnp.where(moves, growth, num_pages + 1), stable=True).astype(jnp.int32)
    turn = jnp.zeros(num_units, jnp.int32).at[walk].set(np.arange(num_units, dtype=np.int32))
    size = jnp.asarray(arena.page_tokens, jnp.int32)[owner.level]
    falls = least < found.least[unit, owner.level]
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
    plan = _Plan(
        walk,
        jnp.sum(moves, dtype=jnp.int32),
        arena.order[at],
        owner.used[at],
        first,
        number,
        found.least,
    )
    return plan, jnp.where(empty, groups, owner.group[at]), rank


def _stream(arena, plan, group, new, first_unit, left):
    """Walk the units that change: read their pages, write tokens at their new levels."""
    formats = _formats(arena)
    chunk = min(ENCODE_TOKENS, max(f.page_tokens for f in formats))
    room = [f.page_tokens + max(chunk, f.read_pages * f.page_tokens) for f in formats]
    work = _Work(
        arena.data,
        group,
        jnp.zeros((), jnp.int32),
        tuple(jnp.zeros((n, f.token_bytes), jnp.uint8) for n, f in zip(room, formats, strict=True)),
        (jnp.zeros((), jnp.int32),) * len(formats),
        left,
    )

    def one_unit(i, work):
        unit = plan.unit[i]
        base = (first_unit + unit) * len(formats)

        def put(level, chosen, rows_of, size, work):
            return _put(work, plan, formats, level, base + level, chosen, rows_of, size)

        for level in range(len(formats)):
            work = _reread(work, plan, formats, level, unit, put, chunk)
        work = _enter(work, plan, formats, new, unit, put, chunk)
        for level in range(len(formats)):
            last = jnp.minimum(work.filled[level], 1)
            work = lax.fori_loop(
                0, last, lambda _, w, at=level: _write(w, plan, formats, at, base + at), work
            )
        return work

    return lax.fori_loop(0, plan.num_units, one_unit, work)


def _formats(arena):
    """`_Format` of each level."""
    return tuple(
        _Format(
            bits,
            arena.head_dim,
            size,
            max(1, min(8, READ_TOKENS // size)),
            tuple(w for w, _ in pages.widths(arena.head_dim, bits)),
        )
        for bits, size in zip(arena.bits, arena.page_tokens, strict=True)
    )


def _reread(work, plan, formats, level, unit, put, chunk):
    """Read the pages of one group that change, and put their tokens where they belong now."""
    form = formats[level]
    first, number = plan.first[unit, level], plan.number[unit, level]

    def block(i, work):
        page = i * form.read_pages + np.arange(form.read_pages)
        at = jnp.minimum(first + page, plan.supply.shape[0] - 1)
        used = jnp.where(page < number, plan.used[at], 0)
        # Read before anything is written, or XLA keeps a copy of all pages to read from later.
        rows, data = lax.optimization_barrier((form.rows(work.data[plan.supply[at]]), work.data))
        work = work._replace(data=data)
        valid = (np.arange(form.page_tokens) < used[:, None]).reshape(-1)
        now = jnp.maximum(worth.levels_of(rows[:, -1], plan.least[unit]), level)
        work = put(level, valid & (now == level), lambda at: rows[at], rows.shape[0], work)
        for lower in range(level + 1, len(formats)):

            def again(at, lower=lower):
                return formats[lower].encode(*form.decode(rows[at]))

            work = put(lower, valid & (now == lower), again, chunk, work)
        return _leave(work, form, unit, rows, valid & (now == len(formats)), chunk)

    return lax.fori_loop(0, -(-number // form.read_pages), block, work)


def _leave(work, form, unit, rows, chosen, size):
    """The chosen ones of held tokens join what stays of their unit's like, `size` at a time."""
    index, total = _order(chosen, size)

    def step(i, work):
        k, v, code = form.decode(rows[lax.dynamic_slice_in_dim(index, i * size, size)])
        valid = i * size + np.arange(size) < total
        own = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, unit, 1), work.left)
        tokens = (x[None] for x in (k, v, worth.decode_worth(code), valid))
        left = jax.tree.map(
            lambda old, x: lax.dynamic_update_slice_in_dim(old, x, unit, 0),
            work.left,
            remainder.add(own, *tokens),
        )
        return work._replace(left=left)

    return lax.fori_loop(0, -(-total // size), step, work)


def _reject(left, new, found):
    """New tokens that do not enter join what stays of their unit's like; none with a shortfall."""
    at = jnp.minimum(new.unit, found.least.shape[0] - 1)
    out = worth.levels_of(new.code, found.least[at][:, None]) == found.least.shape[1]
    tokens = new.k, new.v, worth.decode_worth(new.code), new.valid & out & (found.shortfall == 0)
    own = remainder.add(jax.tree.map(lambda x: x[at], left), *tokens)
    return jax.tree.map(lambda old, x: old.at[new.unit].set(x, mode="drop"), left, own)


def _enter(work, plan, formats, new, unit, put, chunk):
    """Put a unit's new tokens where they belong."""
    rows, size = new.code.shape
    if rows == 0 or size == 0:
        return work
    row = jnp.minimum(new.row[unit], rows - 1)
    now = worth.levels_of(new.code[row], plan.least[unit])
    valid = new.valid[row] & (new.row[unit] < rows)
    for level, form in enumerate(formats):

        def rows_of(at, form=form):
            k, v = (x[row, at].astype(jnp.float32) for x in (new.k, new.v))
            return form.encode(k, v, new.code[row, at])

        work = put(level, valid & (now == level), rows_of, chunk, work)
    return work


def _put(
    work: _Work,
    plan: _Plan,
    formats: tuple[_Format, ...],
    level: int,
    group: jax.Array,
    chosen: jax.Array,
    rows_of: Callable[[jax.Array], jax.Array],
    size: int,
) -> Any:
    """Append the chosen [S] tokens, `size` at a time, to a level's buffer; write what is full."""
    index, total = _order(chosen, size)

    def step(i, work):
        rows = rows_of(lax.dynamic_slice_in_dim(index, i * size, size))
        filled = work.filled[level]
        buffer = lax.dynamic_update_slice_in_dim(work.buffers[level], rows, filled, 0)
        filled += jnp.minimum(total - i * size, size)
        work = work._replace(
            buffers=_with(work.buffers, level, buffer), filled=_with(work.filled, level, filled)
        )
        return lax.fori_loop(
            0,
            filled // formats[level].page_tokens,
            lambda _, w: _write(w, plan, formats, level, group),
            work,
        )

    return lax.fori_loop(0, -(-total // size), step, work)


def _order(chosen, size):
    """Where the chosen [S] ones are, padded to a multiple of `size`, and how many they are."""
    length = -(-chosen.shape[0] // size) * size
    rank = jnp.cumsum(chosen, dtype=jnp.int32)
    at = jnp.where(chosen, rank - 1, length)
    index = jnp.zeros(length, jnp.int32).at[at].set(np.arange(chosen.shape[0]), mode="drop")
    return index, rank[-1]


def _write(work, plan, formats, level, group):
    """Write one page of a level's buffer to the next page of the supply."""
    form, buffer = formats[level], work.buffers[level]
    size = form.page_tokens
    page = form.page(buffer[:size])
    at = plan.supply[work.taken]
    return work._replace(
        data=lax.dynamic_update_slice(work.data, page[None], (at, 0)),
        group=work.group.at[work.taken].set(group),
        taken=work.taken + 1,
        buffers=_with(work.buffers, level, jnp.concatenate([buffer[size:], buffer[:size]])),
        filled=_with(work.filled, level, jnp.maximum(work.filled[level] - size, 0)),
    )


def _with(items, index, item):
    """The tuple with one entry replaced."""
    return (*items[:index], item, *items[index + 1 :])


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
