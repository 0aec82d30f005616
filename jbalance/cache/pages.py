"""The byte-budgeted cache: one arena of equal-sized pages, each with tokens of one unit and precision.

A unit is a pair of layer and key/value head. Its tokens at one level (so many bits per coordinate) are
a group; a group has a list of pages, full but for the last, and a page holds the more tokens the
fewer bits they take. The bytes are fixed when the arena is created. Which page is whose is data, so
that allocations change without compiling anew. Every level stores vectors in the basis of
`codec.rotate`: one rotated query serves all.

A page below 8 bits lies coordinate by coordinate: [D * bits / 8, tokens] bytes of keys, as
`codec.integer_levels` takes them, the same of values, then the low and the high bytes of the keys'
float16 norms, then of the values'. At 8 bits it is [tokens, D] of keys and of values and the norms; at
16 bits [tokens, D] bfloat16 of keys and of values. Then, at every level, one byte per token: the code
of its worth (`worth.encode_worth`). What is left at a page's end is unused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import checks
from jbalance.cache import codec

WIDE_BITS = 16  # stored as bfloat16, without a norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arena:
    """Pages [P] and whose they are; U units, M levels, group g = u M + m."""

    data: jax.Array  # [P, page_bytes] uint8
    order: jax.Array  # [P] int32, page ids by group, then those that are free
    offset: jax.Array  # [U M + 1] int32, group g has pages order[offset[g] : offset[g + 1]]
    count: jax.Array  # [U, M] int32, tokens in the group
    head_dim: int = dataclasses.field(metadata={"static": True})
    bits: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # of each level

    @property
    def num_pages(self) -> int:
        """P."""
        return self.data.shape[0]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.data.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that stay resident: pages and tables."""
        return sum(x.nbytes for x in (self.data, self.order, self.offset, self.count))

    @property
    def page_tokens(self) -> tuple[int, ...]:
        """Tokens that one page holds at each level."""
        return tuple(tokens_per_page(self.page_bytes, self.head_dim, b) for b in self.bits)

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
    worth: jax.Array  # [S] uint8


def token_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one token's key and value with their norms, and of its worth.

    >>> token_bytes(64, bits=4)
    69
    """
    if bits == WIDE_BITS and not isinstance(bits, bool):
        codec.rotation(head_dim)
        return 4 * head_dim + 1
    return 2 * codec.codes_bytes(head_dim, bits) + 1


def tokens_per_page(page_bytes: int, head_dim: int, bits: int) -> int:
    """Tokens that a page holds.

    >>> [tokens_per_page(16384, 64, bits) for bits in (16, 8, 4, 3, 2)]
    [63, 123, 237, 309, 442]
    """
    return page_bytes // token_bytes(head_dim, bits)


def pages_within(
    budget_bytes: int, num_units: int, head_dim: int, bits: tuple[int, ...], page_bytes: int
) -> int:
    """Pages of the arena that `create` makes of these arguments, with its errors."""
    allowed = (*codec.BITS, WIDE_BITS)
    if not bits or len(set(bits)) != len(bits) or any(b not in allowed for b in bits):
        raise ValueError(f"bits is {bits}: it must be different ones of {allowed}")
    if num_units < 1:
        raise ValueError(f"num_units is {num_units}: it must be at least 1")
    largest = max(token_bytes(head_dim, b) for b in bits)
    if page_bytes < largest:
        raise ValueError(
            f"page_bytes is {page_bytes}: a token of {max(bits)} bits and head_dim {head_dim} "
            f"takes {largest}"
        )
    groups = num_units * len(bits)
    fixed, each = 4 * (2 * groups + 1), page_bytes + 4
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
) -> Arena:
    """An empty arena of as many pages as the budget holds, its tables included.

    Args:
      budget_bytes: never exceeded by `Arena.nbytes`.
      num_units: U, layers times key/value heads.
      head_dim: D, one that `codec.rotation` knows.
      bits: of each level: different ones of 1, 2, 3, 4, 8 and 16.
      page_bytes: of one page; at least one token of each level must fit.

    Returns:
      `Arena` whose pages are all free.

    Raises:
      ValueError: values that do not fit, with what would.
    """
    bits = tuple(bits)
    num_pages = pages_within(budget_bytes, num_units, head_dim, bits, page_bytes)
    return empty(num_pages, num_units, head_dim, bits, page_bytes)


def empty(
    num_pages: int, num_units: int, head_dim: int, bits: tuple[int, ...], page_bytes: int
) -> Arena:
    """The arena of `create`, by the number of its pages."""
    return Arena(
        data=jnp.zeros((num_pages, page_bytes), jnp.uint8),
        order=jnp.arange(num_pages, dtype=jnp.int32),
        offset=jnp.zeros(num_units * len(bits) + 1, jnp.int32),
        count=jnp.zeros((num_units, len(bits)), jnp.int32),
        head_dim=head_dim,
        bits=bits,
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
    most = arena.num_pages + 1  # clipped here, sums stay in int32
    want = jnp.clip(jnp.asarray(pages), -most, most).astype(jnp.int32).reshape(-1)
    below = -jnp.sum(jnp.minimum(want, 0))
    shortfall = jnp.maximum(jnp.sum(jnp.maximum(want, 0)) - arena.num_pages, 0) + below
    offset = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(want, dtype=jnp.int32)])
    room = want.reshape(arena.count.shape) * np.array(arena.page_tokens, np.int32)
    count = jnp.minimum(arena.count, room)
    order = _reorder(arena.order, arena.offset, offset)
    order, offset, count = (
        jnp.where(shortfall == 0, new, old)
        for new, old in ((order, arena.order), (offset, arena.offset), (count, arena.count))
    )
    return dataclasses.replace(arena, order=order, offset=offset, count=count), shortfall


def _reorder(order, old, new):
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


def truncate(arena: Arena, count: jax.Array) -> Arena:
    """Keep at most count [U, M] tokens of each group, the first ones. Pages stay with their groups."""
    if np.shape(count) != arena.count.shape:
        raise ValueError(
            f"count has shape {np.shape(count)}: it must be [U, M] = {arena.count.shape}"
        )
    kept = jnp.clip(jnp.asarray(count), 0, arena.count).astype(jnp.int32)
    return dataclasses.replace(arena, count=kept)


def check_tokens(
    arena: Arena, units: jax.Array, k: jax.Array, v: jax.Array, code: jax.Array, name: str
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
            f"{name} is {jnp.result_type(code)} of shape {np.shape(code)}: it must be uint8 of shape "
            f"[N, S] = {(rows, size)}"
        )
    return rows, size, head_dim


def write(
    arena: Arena,
    units: jax.Array,
    level: int,
    first_slot: jax.Array,
    k: jax.Array,
    v: jax.Array,
    worth: jax.Array,
    num_tokens: jax.Array | None = None,
) -> tuple[Arena, jax.Array]:
    """Encode tokens into slots first_slot, first_slot + 1, ... of one level's groups.

    A group's count becomes that of the last slot written, if it was less; slots below it that were
    never written hold what their page held before, so leave none. Nothing else changes.

    Args:
      arena: before.
      units: [N] int32, different ones.
      level: index into arena.bits; static.
      first_slot: [N] int32, >= 0.
      k: [N, S, D] float keys.
      v: [N, S, D] float values.
      worth: [N, S] uint8 codes of what the tokens are worth.
      num_tokens: [N] int32 <= S, how many of the S tokens to write; None for all.

    Returns:
      The arena, and [N] int32 tokens dropped because their slots are outside the group's capacity.

    Raises:
      ValueError: shapes, dtypes or a level that do not fit.
    """
    npp, bits = _level_of(arena, level)
    num_units, size, head_dim = check_tokens(arena, units, k, v, worth, "worth")
    for name, x in (("units", units), ("first_slot", first_slot), ("num_tokens", num_tokens)):
        if x is not None and np.shape(x) != (num_units,):
            raise ValueError(f"{name} has shape {np.shape(x)}: it must be [N] = ({num_units},)")
    units, first = (jnp.asarray(x, jnp.int32) for x in (units, first_slot))
    given = jnp.full(num_units, size) if num_tokens is None else jnp.asarray(num_tokens)
    group = units * len(arena.bits) + level
    begin, capacity = arena.offset[group], arena.capacity[units, level]
    given = jnp.clip(given, 0, size).astype(jnp.int32)
    written = jnp.where(first < 0, 0, jnp.clip(capacity - first, 0, given))

    window = -(-(size + npp - 1) // npp)  # pages that S tokens can touch
    page = jnp.maximum(first, 0)[:, None] // npp + np.arange(window)
    slot = page[..., None] * npp + np.arange(npp)  # [N, W, npp]
    token = slot - first[:, None, None]
    fresh = (token >= 0) & (token < written[:, None, None])
    at = jnp.clip(token, 0, size - 1).reshape(num_units, -1, 1)
    content = [
        jnp.take_along_axis(x, at, axis=1).reshape(num_units, window, npp, -1)
        for x in (*_encoded(k, bits), *_encoded(v, bits), jnp.asarray(worth)[..., None])
    ]
    touched = jnp.any(fresh, axis=-1)
    ids = arena.order[jnp.clip(begin[:, None] + page, 0, arena.num_pages - 1)]
    used = npp * token_bytes(head_dim, bits)
    old = arena.data[ids, :used]
    mixed = jnp.where(_page_bytes(fresh, bits, head_dim), _to_page(content, bits), old)
    data = arena.data.at[jnp.where(touched, ids, arena.num_pages), :used].set(mixed, mode="drop")
    filled = jnp.where(written > 0, first + written, 0)
    count = arena.count.at[units, level].max(filled)
    return dataclasses.replace(arena, data=data, count=count), given - written


def read(
    arena: Arena, unit: jax.Array, level: int, first_page: int = 0, num_pages: int | None = None
) -> Tokens:
    """Decode a group's tokens, in float32 and the basis they were given in.

    Args:
      arena: where.
      unit: [] int32.
      level: index into arena.bits; static.
      first_page: of the group, with which to begin.
      num_pages: how many pages to read; static. None for as many as the arena has.

    Returns:
      `Tokens` of num_pages * page_tokens[level] slots.
    """
    npp, bits = _level_of(arena, level)
    window = arena.num_pages if num_pages is None else num_pages
    page = first_page + np.arange(window)
    begin = arena.offset[unit * len(arena.bits) + level]
    ids = arena.order[jnp.clip(begin + page, 0, arena.num_pages - 1)]
    slot = (jnp.asarray(page)[:, None] * npp + np.arange(npp)).reshape(-1)
    valid = slot < arena.count[unit, level]
    *content, worth = _from_page(arena.data[ids], npp, bits, arena.head_dim)
    half = len(content) // 2
    k, v = (
        jnp.where(valid[:, None], _decoded(part, arena.head_dim, bits), 0)
        for part in (content[:half], content[half:])
    )
    return Tokens(k, v, valid, jnp.where(valid, worth[:, 0], 0))


def _level_of(arena, level):
    """Tokens per page and bits of a level; ValueError if there is none such."""
    if not isinstance(level, int | np.integer) or not 0 <= level < len(arena.bits):
        raise ValueError(
            f"level is {level!r}: it must be an index into arena.bits = {arena.bits}, static"
        )
    return arena.page_tokens[level], arena.bits[level]


def _bytes_of(x):
    """[..., n] of 16 bits to [..., 2 n] uint8: low bytes and high bytes in turn."""
    return lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], -1)


def _encoded(x, bits):
    """Bytes [N, S, ...] of the codes, and of the norms if there are any."""
    if bits == WIDE_BITS:
        return (_bytes_of(codec.rotate(x).astype(jnp.bfloat16)),)
    codes = codec.encode(x, bits)
    return codes.packed, _bytes_of(codes.norm[..., None])


def _decoded(parts, head_dim, bits):
    """Vectors [S, D] of what `_encoded` gave."""
    if bits == WIDE_BITS:
        pairs = parts[0].reshape(-1, head_dim, 2)
        return codec.unrotate(lax.bitcast_convert_type(pairs, jnp.bfloat16))
    packed, norm = parts
    norm = lax.bitcast_convert_type(norm, jnp.float16)
    # A page that was another level's may hold any bytes behind its last token.
    return codec.decode(codec.Codes(packed, jnp.where(jnp.isfinite(norm), norm, 0)), head_dim, bits)


def widths(head_dim: int, bits: int) -> list[tuple[int, bool]]:
    """Of a page's parts in their order: bytes per token, and whether they lie byte by byte."""
    if bits == WIDE_BITS:
        return [(2 * head_dim, False)] * 2 + [(1, True)]
    code = (head_dim * bits // 8, bits < 8)
    return [code, code, (2, True), (2, True), (1, True)]


def _parts(content):
    """The order of a page's parts from that of keys, values and worth, and back."""
    return content if len(content) == 3 else [content[i] for i in (0, 2, 1, 3, 4)]


def _to_page(content, bits):
    """Bytes [N, W, npp, w] of each of `_encoded`'s parts to [N, W, used] bytes of pages."""
    head_dim = 8 * content[0].shape[-1] // bits
    flat = [
        (jnp.swapaxes(x, -1, -2) if across else x).reshape(*x.shape[:2], -1)
        for x, (_, across) in zip(_parts(content), widths(head_dim, bits), strict=True)
    ]
    return jnp.concatenate(flat, axis=-1)


def _page_bytes(fresh, bits, head_dim):
    """[N, W, npp] bool to [N, W, used]: which bytes belong to those tokens."""
    content = [
        jnp.broadcast_to(fresh[..., None], (*fresh.shape, width))
        for width, _ in widths(head_dim, bits)
    ]
    return _to_page(_parts(content), bits)


def _from_page(data, npp, bits, head_dim):
    """Pages [W, page_bytes] to `_encoded`'s parts [W npp, w] of keys, of values, and worth."""
    parts, at = [], 0
    for width, across in widths(head_dim, bits):
        part = data[:, at : at + npp * width]
        shape = (-1, width, npp) if across else (-1, npp, width)
        part = part.reshape(shape)
        parts.append((jnp.swapaxes(part, 1, 2) if across else part).reshape(-1, width))
        at += npp * width
    return _parts(parts)
