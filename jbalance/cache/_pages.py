"""The byte-budgeted cache: one arena of equal-sized pages, each with tokens of one unit and precision.

A unit is a pair of layer and key/value head of a request. Its tokens at one level (so many bits per
coordinate) are a group; a group has a list of pages, full but for the last, and a page holds the more
tokens the fewer bits they take (`_layout`). The bytes are fixed when the arena is created. Which page is
whose is data, so that allocations change without compiling anew.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import checks
from jbalance.cache import _codec
from jbalance.cache._layout import WIDE_BITS, PageLayout, page_shape, table_bytes, token_bytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arena:
    """Pages [P] and whose they are; U units, M levels, group g = u M + m."""

    data: jax.Array  # [P, *page_shape(page_bytes)] uint8
    order: jax.Array  # [P] int32, page ids by group, then those that are free
    offset: jax.Array  # [U M + 1] int32, group g has pages order[offset[g] : offset[g + 1]]
    count: jax.Array  # [U, M] int32, tokens in the group
    head_dim: int = dataclasses.field(metadata={"static": True})
    bits: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # of each level
    # Whether its tokens have positions, for units with windows.
    timed: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def num_pages(self) -> int:
        """P."""
        return self.data.shape[0]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.data.shape[1] * self.data.shape[2]

    @property
    def flat(self) -> jax.Array:
        """[P, page_bytes] uint8; on TPUs a copy."""
        return self.data.reshape(self.num_pages, self.page_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes that stay resident: pages and tables."""
        return sum(x.nbytes for x in (self.data, self.order, self.offset, self.count))

    @property
    def layouts(self) -> tuple[PageLayout, ...]:
        """The format of the pages of each level."""
        return tuple(
            PageLayout.within(self.page_bytes, self.head_dim, b, timed=self.timed)
            for b in self.bits
        )

    @property
    def page_tokens(self) -> tuple[int, ...]:
        """Tokens that one page holds at each level."""
        return tuple(layout.page_tokens for layout in self.layouts)

    @property
    def pages(self) -> jax.Array:
        """[U, M] int32 pages of each group."""
        return jnp.diff(self.offset).reshape(self.count.shape)

    @property
    def capacity(self) -> jax.Array:
        """[U, M] int32 tokens for which each group has pages."""
        return self.pages * np.array(self.page_tokens, np.int32)


class Tokens(NamedTuple):
    """Decoded tokens of a group."""

    k: jax.Array  # [S, D] float32
    v: jax.Array  # [S, D] float32
    valid: jax.Array  # [S] bool; the others are zeros
    code: jax.Array  # [S] uint8, of their worth


def pages_within(
    budget_bytes: int,
    num_units: int,
    head_dim: int,
    bits: tuple[int, ...],
    page_bytes: int,
    *,
    timed: bool = False,
) -> int:
    """Pages of the arena that `create` makes of these arguments, with its errors."""
    allowed = (*_codec.BITS, WIDE_BITS)
    if not bits or len(set(bits)) != len(bits) or any(b not in allowed for b in bits):
        raise ValueError(f"bits is {bits}: it must be different ones of {allowed}")
    if num_units < 1:
        raise ValueError(f"num_units is {num_units}: it must be at least 1")
    largest = max(token_bytes(head_dim, b, timed=timed) for b in bits)
    if page_bytes < largest:
        raise ValueError(
            f"page_bytes is {page_bytes}: a token of {max(bits)} bits and head_dim {head_dim} "
            f"takes {largest}"
        )
    groups = num_units * len(bits)
    fixed, each = (
        table_bytes(num_units, len(bits), 0),
        page_bytes + 4,
    )  # a page's place in the order
    if budget_bytes < fixed + each:
        raise ValueError(
            f"budget_bytes is {budget_bytes}: the tables of {num_units} units and {len(bits)} levels "
            f"and one page of {page_bytes} bytes take {fixed + each}"
        )
    num_pages = int(budget_bytes - fixed) // each
    if (num_pages + 1) * (groups + 1) > checks.INT32_MAX:
        raise ValueError(
            f"budget_bytes is {budget_bytes}: {num_pages} pages for {groups} groups are more than "
            f"int32 can count; page_bytes {page_bytes} must be larger"
        )
    return num_pages


def create(
    budget_bytes: int,
    num_units: int,
    head_dim: int,
    bits: Sequence[int] = (16, 8, 4, 3, 2),
    page_bytes: int = 16384,
    *,
    timed: bool = False,
) -> Arena:
    """An empty arena of as many pages as the budget holds, its tables included.

    Args:
      budget_bytes: never exceeded by `Arena.nbytes`.
      num_units: U, layers times key/value heads.
      head_dim: D, one that `codec.rotation` knows.
      bits: of each level: different ones of 1, 2, 3, 4, 8 and 16.
      page_bytes: of one page; at least one token of each level must fit.
      timed: whether tokens have positions, which units with windows need.

    Returns:
      `Arena` whose pages are all free.

    Raises:
      ValueError: values that do not fit, with what would.
    """
    bits = tuple(bits)
    num_pages = pages_within(budget_bytes, num_units, head_dim, bits, page_bytes, timed=timed)
    return empty(num_pages, num_units, head_dim, bits, page_bytes, timed=timed)


@functools.partial(jax.jit, static_argnums=range(5), static_argnames="timed")
def empty(
    num_pages: int,
    num_units: int,
    head_dim: int,
    bits: tuple[int, ...],
    page_bytes: int,
    *,
    timed: bool = False,
) -> Arena:
    """The arena of `create`, by the number of its pages."""
    return Arena(
        data=jnp.zeros((num_pages, *page_shape(page_bytes)), jnp.uint8),
        order=jnp.arange(num_pages, dtype=jnp.int32),
        offset=jnp.zeros(num_units * len(bits) + 1, jnp.int32),
        count=jnp.zeros((num_units, len(bits)), jnp.int32),
        head_dim=head_dim,
        bits=bits,
        timed=timed,
    )


def reallocate(arena: Arena, pages: jax.Array) -> tuple[Arena, jax.Array]:
    """Give each group so many pages.

    Groups that shrink give up their last pages and the tokens in them; those that grow take freed
    pages first, then free ones. A page that stays keeps its id, its tokens and its place in the group.

    Args:
      arena: before.
      pages: [U, M] int pages that each group shall have.

    Returns:
      The arena, and a shortfall [] int32: 0 when done; else how many pages the request has too many
      (entries below 0 count by their size), and the arena is as before.

    Raises:
      ValueError: shape or dtype.
    """
    if np.shape(pages) != arena.count.shape or not jnp.issubdtype(
        jnp.result_type(pages), jnp.integer
    ):
        raise ValueError(
            f"pages is {jnp.result_type(pages)} of shape {np.shape(pages)}: it must be integers of "
            f"shape [U, M] = {arena.count.shape}"
        )
    tables = arena.order, arena.offset, arena.count
    (order, offset, count), shortfall = _reallocated(tables, pages, arena.page_tokens)
    return dataclasses.replace(arena, order=order, offset=offset, count=count), shortfall


@functools.partial(jax.jit, static_argnums=2)
def _reallocated(tables, pages, page_tokens):
    """The tables of an arena whose groups have so many pages, or as before, and the shortfall."""
    order, offset, count = tables
    most = order.shape[0] + 1  # clipped here, sums stay in int32
    want = jnp.clip(jnp.asarray(pages), -most, most).astype(jnp.int32).reshape(-1)
    below = -jnp.sum(jnp.minimum(want, 0))
    shortfall = jnp.maximum(jnp.sum(jnp.maximum(want, 0)) - order.shape[0], 0) + below
    begins = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(want, dtype=jnp.int32)])
    room = want.reshape(count.shape) * np.array(page_tokens, np.int32)
    after = _reordered(order, offset, begins), begins, jnp.minimum(count, room)
    return jax.tree.map(
        lambda new, old: jnp.where(shortfall == 0, new, old), after, tables
    ), shortfall


def _reordered(order, old, new):
    """`order` under new offsets: pages that stay first in their groups, others fill what is left."""
    place = jnp.arange(order.shape[0], dtype=jnp.int32)
    kept = jnp.append(jnp.minimum(jnp.diff(old), jnp.diff(new)), 0)  # of the free pages none

    def stays(offset):
        """Whether each place is one of a page that stays, and of which group it is."""
        group = jnp.searchsorted(offset, place, side="right").astype(jnp.int32) - 1
        return place - offset[group] < kept[group], group

    before, _ = stays(old)
    after, group = stays(new)
    others = order[jnp.argsort(before, stable=True)]
    filler = others[jnp.cumsum(~after) - 1]
    return jnp.where(after, order[(old[group] + place - new[group]) * after], filler)


def check_tokens(
    arena: Arena, units: jax.Array, k: jax.Array, v: jax.Array, code: jax.Array
) -> tuple[int, int, int]:
    """N, S and D of tokens for N units; ValueError for shapes and dtypes that do not fit the arena."""
    checks.rank("k", k, 3, "[N, S, D]")
    checks.rank("units", units, 1, "[N]")
    rows, size, head_dim = np.shape(k)
    if np.shape(v) != np.shape(k) or head_dim != arena.head_dim:
        raise ValueError(
            f"k has shape {np.shape(k)} and v {np.shape(v)}: both must be [N, S, {arena.head_dim}]"
        )
    if np.shape(code) != (rows, size) or jnp.result_type(code) != jnp.uint8:
        raise ValueError(
            f"code is {jnp.result_type(code)} of shape {np.shape(code)}: it must be uint8 of shape "
            f"[N, S] = {(rows, size)}"
        )
    return rows, size, head_dim


def write(
    arena: Arena,
    units: jax.Array,
    level: int,
    k: jax.Array,
    v: jax.Array,
    code: jax.Array,
    num_tokens: jax.Array | None = None,
    *,
    time: jax.Array | None = None,
) -> tuple[Arena, jax.Array]:
    """Encode tokens into the first slots of one level's groups, which have the pages for them.

    Args:
      arena: before.
      units: [N] int32, different ones.
      level: index into arena.bits; static.
      k: [N, S, D] float keys.
      v: [N, S, D] float values.
      code: [N, S] uint8 codes of what the tokens are worth.
      num_tokens: [N] int32 <= S, how many of the S tokens to write; None for all.
      time: [N, S] positions, of a timed arena.

    Returns:
      The arena, and [N] int32 tokens dropped because their slots are outside the group's capacity.

    Raises:
      ValueError: shapes, dtypes or a level that do not fit.
    """
    layout = _layout_of(arena, level)
    rows, size, _ = check_tokens(arena, units, k, v, code)
    for name, x in (("units", units), ("num_tokens", num_tokens)):
        if x is not None and np.shape(x) != (rows,):
            raise ValueError(f"{name} has shape {np.shape(x)}: it must be [N] = ({rows},)")
    units = jnp.asarray(units, jnp.int32)
    given = jnp.full(rows, size) if num_tokens is None else jnp.asarray(num_tokens)
    given = jnp.clip(given, 0, size).astype(jnp.int32)
    written = jnp.minimum(given, arena.capacity[units, level])
    window = -(-size // layout.page_tokens)  # pages that S tokens take
    padding = window * layout.page_tokens - size
    encoded = layout.encode(jnp.asarray(k), jnp.asarray(v), jnp.asarray(code), time)
    encoded = jnp.pad(encoded, ((0, 0), (0, padding), (0, 0)))
    content = layout.to_page(encoded.reshape(rows, window, layout.page_tokens, -1))
    page = np.arange(window)
    begin = arena.offset[units * len(arena.bits) + level]
    ids = arena.order[jnp.clip(begin[:, None] + page, 0, arena.num_pages - 1)]
    touched = page * layout.page_tokens < written[:, None]
    ids = jnp.where(touched, ids, arena.num_pages)
    content = jnp.pad(content, ((0, 0), (0, 0), (0, arena.page_bytes - layout.used_bytes)))
    content = content.reshape(rows, window, *arena.data.shape[1:])
    data = arena.data.at[ids].set(content, mode="drop")
    count = arena.count.at[units, level].set(written)
    return dataclasses.replace(arena, data=data, count=count), given - written


def read(arena: Arena, unit: jax.Array, level: int) -> Tokens:
    """Decode a group's tokens, in float32 and the basis they were given in.

    Args:
      arena: where.
      unit: [] int32.
      level: index into arena.bits; static.

    Returns:
      `Tokens` of num_pages * page_tokens[level] slots.
    """
    layout = _layout_of(arena, level)
    page = np.arange(arena.num_pages)
    begin = arena.offset[unit * len(arena.bits) + level]
    ids = arena.order[jnp.clip(begin + page, 0, arena.num_pages - 1)]
    slot = jnp.arange(arena.num_pages * layout.page_tokens)
    valid = slot < arena.count[unit, level]
    k, v, code = layout.decode(layout.from_page(arena.data[ids].reshape(page.size, -1)))
    k, v = (jnp.where(valid[:, None], x, 0) for x in (k, v))
    return Tokens(k, v, valid, jnp.where(valid, code, 0))


def _layout_of(arena, level):
    """The format of a level's pages; ValueError if there is none such."""
    if not isinstance(level, int | np.integer) or not 0 <= level < len(arena.bits):
        raise ValueError(
            f"level is {level!r}: it must be an index into arena.bits = {arena.bits}, static"
        )
    return arena.layouts[level]
