"""Paged attention by XLA loops, written for CPUs: straight from the packed pages, a tile at a time.

Only pages that hold tokens are read; their number is data. Each block of pages gives its own softmax,
which is merged into that of its unit. The levels of the codes are whole numbers: a page is unpacked into
one byte per coordinate, nothing is looked up, and the norms multiply logits and weights, not vectors.

Products along the vectors' last axis in memory are those of 8-bit integers, where a query, or a row of
weights, is the sum of three 8-bit digits, which keep the 24 bits of a float32; products along the other
axis are in float32. Each is about twice as fast there as the other is (on a CPU, for few rows).

Method: Dao et al., FlashAttention (arXiv:2205.14135), the softmax by tiles.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance.attention.partial import EMPTY, NO_TOP, Partial, merge
from jbalance.cache import _codec
from jbalance.cache._layout import KEY_NORMS, TIMES, WIDE_BITS, PageLayout
from jbalance.cache._pages import Arena
from jbalance.cache._sight import Sight

BLOCK_TOKENS = 128  # small pages of one unit are joined to about so many tokens
TILE_TOKENS = 512  # of all blocks of one iteration: what lies beyond the last block is lost work
_TILE_LOGITS = 1 << 17
_LARGEST_WHOLE = 127 << 16  # a row's largest entry in units of the lowest of its three digits
_SHIFTS = np.array([16, 8, 0], np.int32).reshape(3, 1, 1)
_ROUNDING = np.array([0x8080, 0x80, 0], np.int32).reshape(3, 1, 1)


class _Level(NamedTuple):
    """What is known of a level when it is compiled."""

    layout: PageLayout
    block_pages: int
    tile_blocks: int


class _Query(NamedTuple):
    """The queries of a unit, as products take them, and what they see; T rows."""

    rows: Any
    half: jax.Array  # [N, T, 1] half of the sum of each
    sight: Sight  # of [N, T]


def attend_rotated(
    q: jax.Array, arena: Arena, units: jax.Array, sight: Sight | None = None
) -> Partial:
    """Attention in the rotated basis, one precision after the other, merged.

    Args:
      q: [N, T, D] float32, rotated and divided by sqrt(D).
      arena: where the units are.
      units: [N] int32, indices into the arena's units.
      sight: of the queries; None for all tokens and no cap.

    Returns:
      `Partial` with y [N, T, D], rotated, and lse [N, T].
    """
    sight = Sight() if sight is None else sight
    levels = (
        _attend_level(q, arena, units, i, _level(arena, i, q.shape), sight)
        for i in range(len(arena.bits))
    )
    return functools.reduce(merge, levels)


def _level(arena, index, shape):
    """Static sizes: about TILE_TOKENS at once, fewer if the arena has fewer pages for these units."""
    page_tokens = arena.page_tokens[index]
    block_pages = max(1, round(BLOCK_TOKENS / page_tokens))
    tokens = min(TILE_TOKENS, max(256, _TILE_LOGITS // shape[1]))
    share = -(-arena.num_pages * shape[0] // (2 * arena.count.shape[0] * block_pages))
    tile_blocks = min(max(1, round(tokens / (page_tokens * block_pages))), max(shape[0], share))
    return _Level(arena.layouts[index], block_pages, tile_blocks)


def _attend_level(q, arena, units, index, level, sight):
    """Queries [N, T, D], rotated and scaled, over one level's tokens; y is in the rotated basis."""
    layout, block_pages, tile_blocks = level
    bits, page_tokens = layout.bits, layout.page_tokens
    block_tokens = page_tokens * block_pages
    begin = arena.offset[units * len(arena.bits) + index]
    count = arena.count[units, index]
    # Blocks of all units lie one after the other, so that small groups share an iteration.
    ends = jnp.cumsum(-(-count // block_tokens))
    starts = ends - (-(-count // block_tokens))
    q = layout.asked(q)
    half = 0.5 * jnp.sum(q, axis=-1, keepdims=True)
    query = _Query(_rows(q, bits, contract_tokens=False), half, sight)
    of_unit = jnp.arange(units.shape[0])

    def step(i, carry):
        """The softmax of a tile's blocks merged into the carry."""
        block = i * tile_blocks + jnp.arange(tile_blocks)
        unit = jnp.sum(block[:, None] >= ends[:-1], axis=1)
        first = (block - starts[unit]) * block_pages
        left = jnp.where(block < ends[-1], count[unit] - first * page_tokens, 0)
        place = (begin[unit] + first)[:, None] + jnp.arange(block_pages)
        # Beyond a group's last page there is another's, or none: read, but masked.
        ids = arena.order[jnp.minimum(place, arena.num_pages - 1)]
        valid = jnp.arange(block_tokens) < left[:, None]
        tile = _Tile(arena.flat, ids, layout)
        y, mass, top = _softmax_blocks(jax.tree.map(lambda x: x[unit], query), tile, valid)
        own = (unit == of_unit[:, None]) & (left > 0)
        return _merge_blocks(carry, y, mass, top, own)

    shape = q.shape[:2]
    empty = jnp.zeros(q.shape), jnp.zeros(shape), jnp.full(shape, EMPTY)
    y, mass, top = lax.fori_loop(0, -(-ends[-1] // tile_blocks), step, empty)
    some = mass > 0
    mass = jnp.where(some, mass, 1.0)
    return Partial(jnp.where(some[..., None], y / mass[..., None], 0.0), top + jnp.log(mass))


class _Tile(NamedTuple):
    """The pages of some blocks."""

    data: jax.Array  # [P, page_bytes] uint8
    ids: jax.Array  # [B, pages of a block]
    layout: PageLayout

    def part(self, index, first=0, width=None):
        """Bytes first .. first + width - 1 per token of one part, [B, pages of a block, bytes]."""
        width = self.layout.widths[index] if width is None else width
        start = self.layout.offset(index) + self.layout.page_tokens * first
        at = jnp.stack([self.ids, jnp.full_like(self.ids, start)], axis=-1)
        numbers = lax.GatherDimensionNumbers(
            offset_dims=(2,), collapsed_slice_dims=(0,), start_index_map=(0, 1)
        )
        size = (1, self.layout.page_tokens * width)
        return lax.gather(self.data, at, numbers, size, mode="promise_in_bounds")

    def vectors(self, index):
        """Keys (0) or values (1) by parts: [B, tokens, D], or [B, size, tokens] below 8 bits.

        Integer levels in int8; bfloat16 at 16 bits.
        """
        part, blocks = self.part(index), self.ids.shape[0]
        head_dim, bits, page_tokens = self.layout[:3]
        if self.layout.wide:
            pairs = part.reshape(blocks, -1, head_dim, 2)
            return [lax.bitcast_convert_type(pairs, jnp.bfloat16)]
        if bits == 8:
            return self.layout.levels(index, part.reshape(blocks, -1, head_dim))
        part = part.reshape(*part.shape[:2], -1, page_tokens)
        joined = jnp.concatenate([part[:, i] for i in range(part.shape[1])], axis=-1)
        levels = self.layout.levels(index, joined.reshape(blocks, -1))
        return [x.reshape(blocks, -1, joined.shape[-1]) for x in levels]

    def units(self, index):
        """What one of `vectors` is worth in each part of keys (0) or values (1): [B, tokens] float32."""
        norms = self.layout.norms(index, self._halves(KEY_NORMS + index))
        return [
            norm * _codec.step(part.size, part.bits)
            for norm, part in zip(norms, self.layout.parts(index), strict=True)
        ]

    def times(self):
        """Positions of the tokens [B, tokens] uint16, modulo 2^16."""
        return self._halves(TIMES)

    def _halves(self, index):
        """A part of two bytes per token, [B, tokens] uint16."""
        low, high = (
            self.part(index, byte, 1).reshape(self.ids.shape[0], -1).astype(jnp.uint16)
            for byte in (0, 1)
        )
        return low | (high << 8)


def _softmax_blocks(query, tile, there):
    """The softmax of each block alone: y [B, T, D], not normalized, its mass and top [B, T]."""
    layout, bits = tile.layout, tile.layout.bits
    logits = query.sight.capped(_logits(query, tile, there[0, 0]))
    seen = there[:, None]
    if query.sight.limits.window is not None:
        seen = seen & query.sight.reaches(tile.times()[:, None])
    logits = jnp.where(seen, logits, EMPTY)
    top = jnp.maximum(jnp.max(logits, axis=-1), NO_TOP)
    weight = jnp.exp(logits - top[..., None])
    mass = jnp.sum(weight, axis=-1)
    # What lies behind the last token may decode to NaN.
    (values,) = tile.vectors(1)
    if layout.wide:
        values = jnp.where(there[..., None], values, 0)
    else:
        (unit,) = tile.units(1)
        weight = jnp.where(weight > 0, weight * unit[:, None], 0)
    y = _product(_rows(weight, bits, contract_tokens=True), values, contract_tokens=True, bits=bits)
    if bits == 8:
        y += 0.5 * jnp.sum(weight, axis=-1, keepdims=True)
    return y, mass, top


def _logits(query, tile, some):
    """Logits [B, T, tokens] of a tile, of which `some` tokens are there: always, but that is data."""
    rows, half = query.rows, query.half
    bits = tile.layout.bits
    if tile.layout.across:
        return _logits_across(rows, tile, some)
    (keys,) = tile.vectors(0)
    logits = _product(rows, keys, contract_tokens=False, bits=bits)
    if tile.layout.wide:
        return logits
    (unit,) = tile.units(0)
    return (logits + half) * unit[:, None]


def _logits_across(rows, tile, some):
    """`_logits` of a tile whose vectors lie coordinate by coordinate."""
    parts, blocks = tile.layout.parts(0), tile.ids.shape[0]
    # Unpacked by itself, in lanes of 8 bits: XLA would fuse it with the conversion, in lanes of 32 bits,
    # which takes twice as long. It does not fuse across branches.
    tokens = tile.ids.shape[1] * tile.layout.page_tokens
    none = [jnp.zeros((blocks, x.size, tokens), jnp.int8) for x in parts]
    levels = lax.cond(some, lambda: tile.vectors(0), lambda: none)
    logits = [
        _product(
            rows[..., x.first : x.first + x.size],
            level.astype(jnp.float32) * unit[:, None],
            contract_tokens=False,
            bits=tile.layout.bits,
        )
        for x, level, unit in zip(parts, levels, tile.units(0), strict=True)
    ]
    return sum(logits[1:], logits[0])


def _rows(x, bits, *, contract_tokens):
    """Rows [B, T, X] as `_product` takes them: float32, or digits [B, 3, T, X] int8 and their scale."""
    if not _in_integers(bits, contract_tokens):
        return x
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    largest = jnp.maximum(largest, 1e-30)
    whole = jnp.round(x * (np.float32(_LARGEST_WHOLE) / largest)).astype(jnp.int32)
    digits = ((whole[:, None] + _ROUNDING) >> _SHIFTS).astype(jnp.int8)
    return digits, largest * np.float32(1 / _LARGEST_WHOLE)


def _in_integers(bits, contract_tokens):
    """Whether the product's axis is the last of the vectors: tokens below 8 bits, D at 8."""
    return bits != WIDE_BITS and contract_tokens == (bits < 8)


def _product(rows, vectors, *, contract_tokens, bits):
    """Rows [B, T, X] of `_rows` times vectors: over D, or over tokens; float32."""
    across = bits < 8  # vectors are [B, D, tokens]
    spec = "brx,bxy->bry" if across != contract_tokens else "brx,byx->bry"
    if not _in_integers(bits, contract_tokens):
        return jnp.einsum(spec, rows, vectors.astype(jnp.float32), precision="highest")
    digits, scale = rows
    flat = digits.reshape(digits.shape[0], -1, digits.shape[-1])
    out = jnp.einsum(spec, flat, vectors, preferred_element_type=jnp.int32)
    out = out.reshape(*digits.shape[:3], -1).astype(jnp.float32)
    return (out[:, 0] * 65536 + out[:, 1] * 256 + out[:, 2]) * scale


def _merge_blocks(carry, y, mass, top, own):
    """The softmax of units [N, T, ...] with that of their `own` [N, B] blocks [B, T, ...]."""
    old_y, old_mass, old_top = carry
    own = own[..., None]
    new_top = jnp.maximum(old_top, jnp.max(jnp.where(own, top, EMPTY), axis=1))
    part = jnp.where(own, jnp.exp(top - new_top[:, None]), 0)
    decay = jnp.exp(old_top - new_top)
    return (
        old_y * decay[..., None] + jnp.einsum("nbt,btd->ntd", part, y, precision="highest"),
        old_mass * decay + jnp.sum(part * mass, axis=1),
        new_top,
    )
