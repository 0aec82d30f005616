"""Attention straight from the packed pages of an arena on GPUs: a Triton kernel by way of Pallas.

One program takes the queries of one unit and some of its pages at one level, and loops over tiles of
tokens that lie in one page. It unpacks codes into levels, whole or half numbers that bfloat16 holds
exactly, multiplies logits and weights by the norms, and keeps an online softmax. A float32 is the sum
of three bfloat16 digits, so the products lose nothing and run on tensor cores. The programs' softmaxes
are merged outside.

Method: Dao et al., FlashAttention (arXiv:2205.14135), and Flash-Decoding (2023), splits over the keys.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jbalance import _fallback
from jbalance.attention.partial import EMPTY, NO_TOP, Partial
from jbalance.cache import _codec, _planes
from jbalance.cache._layout import KEY_NORMS, PageLayout
from jbalance.cache._pages import Arena
from jbalance.cache._planes import Part
from jbalance.cache.backends._kernels import digits, merge_parts, whole_levels

_TILE_BYTES = 1 << 14  # of a tile's keys in bfloat16, at most: several must fit in shared memory
HEAD_DIMS = (32, 64, 128, 256)  # halves of keys are the depth of a product, at least 16
_BLOCK = 1 << 12  # query rows of one program times D, at most
PROGRAMS = 512  # of one level, about
_LEAST_ROWS = 16  # of a product on tensor cores
_dot: Any = getattr(plt, "dot", None) or pl.dot  # where JAX has it, by its version


class _Level(NamedTuple):
    """What is known of a level when it is compiled."""

    number: int
    num_levels: int
    layout: PageLayout
    splits: int

    @property
    def page_tokens(self) -> int:
        """Tokens that a page holds."""
        return self.layout.page_tokens

    def parts(self, index: int) -> tuple[Part, ...]:
        """Of keys (0) or values (1)."""
        layout = self.layout
        return layout.parts(index) if layout.across else _planes.whole(layout.head_dim, 8)

    @property
    def tile(self) -> int:
        """Tokens of a tile."""
        return min(64, _TILE_BYTES // (2 * self.layout.head_dim))

    @property
    def tiles(self) -> int:
        """Tiles in a page."""
        return -(-self.page_tokens // self.tile)


def unsupported(arena: Arena) -> str | None:
    """Why these kernels cannot read this arena, or None."""
    if reason := _fallback.old_gpu():
        return reason
    head_dim = arena.head_dim
    if head_dim not in HEAD_DIMS:
        return f"head_dim is {head_dim}: it must be one of {HEAD_DIMS}"
    if 2**31 <= arena.data.size < 2**32:  # Pallas counts them in int32, Triton takes its sign
        return f"its pages take {arena.data.size} bytes: between 2 and 4 GiB cannot be addressed"
    return None


def attend_rotated(
    q: jax.Array,
    arena: Arena,
    units: jax.Array,
    *,
    interpret: bool = False,
) -> Partial:
    """Attention in the rotated basis, as `attend_pages` without its rotations.

    Args:
      q: [N, T, D] float32, rotated and divided by sqrt(D).
      arena: one for which `unsupported` is None.
      units: [N] int32, indices into the arena's units.
      interpret: run without a GPU, for tests.

    Returns:
      `Partial` with y [N, T, D], rotated, and lse [N, T].

    Raises:
      NotImplementedError: an arena that these kernels cannot read, with the reason.
    """
    if reason := unsupported(arena):
        raise NotImplementedError(f"arena: {reason}")
    rows = min(_BLOCK // q.shape[2], 64, max(_LEAST_ROWS, pl.next_power_of_2(q.shape[1])))
    padded = jnp.pad(q, ((0, 0), (0, -q.shape[1] % rows), (0, 0)))
    splits = -(-PROGRAMS // (q.shape[0] * (padded.shape[1] // rows)))
    parts = [
        _attend_level(
            padded,
            arena,
            units,
            _Level(i, len(arena.bits), layout, max(1, min(splits, arena.num_pages))),
            rows,
            interpret,
        )
        for i, layout in enumerate(arena.layouts)
    ]
    y, mass, top = (
        jnp.concatenate([x[:, :, : q.shape[1]] for x in part], axis=1)
        for part in zip(*parts, strict=True)
    )
    return merge_parts(y, mass, top)


def _attend_level(q, arena, units, level, rows, interpret):
    """Parts y [N, splits, T, D], mass and top [N, splits, T] of one level."""
    q = level.layout.asked(q)
    num_units, size, head_dim = q.shape
    lead = (num_units, level.splits, size)

    def whole(x):
        return pl.BlockSpec(x.shape, lambda n, r, s: (0,) * x.ndim)

    tables = (arena.flat, arena.order, arena.offset, arena.count, units)
    row_spec = pl.BlockSpec((None, None, rows), lambda n, r, s: (n, s, r))
    return pl.pallas_call(
        functools.partial(_kernel, level=level),
        grid=(num_units, size // rows, level.splits),
        in_specs=[
            pl.BlockSpec((None, rows, head_dim), lambda n, r, s: (n, r, 0)),
            *map(whole, tables),
        ],
        out_specs=[
            pl.BlockSpec((None, None, rows, head_dim), lambda n, r, s: (n, s, r, 0)),
            row_spec,
            row_spec,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*lead, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(lead, jnp.float32),
            jax.ShapeDtypeStruct(lead, jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=4 if head_dim <= 64 else 8, num_stages=2),
        interpret=interpret,
        name=f"attend_pages_{level.layout.bits}_bits",
    )(q, *tables)


def _kernel(
    q_ref,  # [rows, D]
    data_ref,  # [P, page_bytes]
    order_ref,  # [P]
    offset_ref,  # [U M + 1]
    count_ref,  # [U, M]
    units_ref,  # [N]
    y_ref,  # [rows, D]
    mass_ref,  # [rows]
    top_ref,  # [rows]
    *,
    level,
):
    """One unit's queries over one split of its pages."""
    unit = units_ref[pl.program_id(0)]
    begin = offset_ref[unit * level.num_levels + level.number]
    count = count_ref[unit, level.number]
    first, last = _tiles_of_split(count, level)
    query = [digits(q_ref[:, x.first : x.first + x.size]) for x in level.parts(0)]

    def step(i, carry):
        place, tile = i // level.tiles, i % level.tiles
        slots = tile * level.tile + lax.iota(jnp.int32, level.tile)
        there = (slots < level.page_tokens) & (slots < count - place * level.page_tokens)
        page = _Page(data_ref, order_ref[begin + place], slots, level)
        return _add_tile(query, page, there, carry)

    size, head_dim = q_ref.shape
    empty = (
        jnp.zeros((size, head_dim), jnp.float32),
        jnp.zeros(size, jnp.float32),
        jnp.full(size, NO_TOP, jnp.float32),
    )
    y_ref[...], mass_ref[...], top_ref[...] = lax.fori_loop(first, last, step, empty)


def _tiles_of_split(count, level):
    """The range of this program's tiles among those of the group."""
    npp, tiles = level.page_tokens, level.tiles
    full = count // npp
    everything = full * tiles + (count - full * npp + level.tile - 1) // level.tile
    share = (everything + level.splits - 1) // level.splits
    first = pl.program_id(2) * share
    return first, jnp.minimum(first + share, everything)


class _Page(NamedTuple):
    """A tile of tokens of one page."""

    ref: Any  # of all pages
    page: jax.Array
    slots: jax.Array  # [B]
    level: _Level

    def load(self, at):
        """Bytes `at` of the page; 0 for slots that no page has. A count would forbid wide loads."""
        found = self.ref.at[self.page, at]
        if self.level.page_tokens % self.level.tile == 0:
            return plt.load(found)
        mask = jnp.broadcast_to(self.inside(at.ndim), at.shape)
        return plt.load(found, mask=mask, other=np.uint8(0))

    def inside(self, axes):
        """Which slots a page has, on the last axis below 8 bits, else on the first."""
        inside = self.slots < self.level.page_tokens
        if axes == 1:
            return inside
        return inside[None] if self.level.layout.across else inside[:, None]

    def vectors(self, index):
        """Keys (0) or values (1) for norm 1 in bfloat16, by parts: [size, B], from 8 bits on [B, D]."""
        layout = self.level.layout
        head_dim, bits = layout[:2]
        start = layout.offset(index)
        if not layout.across:
            width = layout.widths[index]
            at = start + self.slots[:, None] * width + lax.iota(jnp.int32, width)
            found = self.load(at)
            if bits == 8:
                return [whole_levels(found.astype(jnp.int32), 8)]
            pairs = found.reshape(-1, head_dim, 2)
            low, high = (x.astype(jnp.uint16) for x in jnp.unstack(pairs, axis=-1))
            return [lax.bitcast_convert_type(low | (high << 8), jnp.bfloat16)]
        return [self._levels(start, part) for part in self.level.parts(index)]

    def _levels(self, start, part):
        """[size, B] bfloat16 of a part of the vectors that begin at byte `start`."""
        npp = self.level.page_tokens
        codes = jnp.zeros((part.size, self.slots.shape[0]), jnp.int32)
        for plane in part.planes:
            rows = plane.row + lax.iota(jnp.int32, plane.rows(part.size))
            at = start + rows[:, None] * npp + self.slots[None]
            found = self.load(at).astype(jnp.int32)
            position = lax.broadcasted_iota(jnp.int32, (plane.positions, 1, 1), 0)
            found = (found[None] >> (position * plane.width + plane.shift)) & (2**plane.width - 1)
            codes = codes | (found.reshape(part.size, -1) << plane.lowest)
        return whole_levels(codes, part.bits)

    def units(self, index):
        """What one of `vectors` is worth in each part of keys (0) or values (1): [B] float32."""
        start = self.level.layout.offset(KEY_NORMS + index) + self.slots
        low, high = (self.load(start + self.level.page_tokens * byte) for byte in (0, 1))
        word = low.astype(jnp.uint16) | (high.astype(jnp.uint16) << 8)
        return [
            norm * _codec.step(part.size, part.bits)
            for norm, part in zip(
                self.level.layout.norms(index, word), self.level.parts(index), strict=True
            )
        ]


def _add_tile(query, page, there, carry):
    """The softmax so far with that of one tile."""
    y, mass, top = carry
    layout = page.level.layout
    across = layout.across
    parts = [
        sum(_dot(x, keys, trans_b=not across) for x in rows)
        for rows, keys in zip(query, page.vectors(0), strict=True)
    ]
    if not layout.wide:
        parts = [x * unit[None] for x, unit in zip(parts, page.units(0), strict=True)]
    logits = sum(parts)
    logits = jnp.where(there[None], logits, EMPTY)
    new_top = jnp.maximum(top, jnp.max(logits, axis=1))
    weight = jnp.exp(logits - new_top[:, None])
    decay = jnp.exp(top - new_top)
    mass = mass * decay + jnp.sum(weight, axis=1)
    (values,) = page.vectors(1)
    # What lies behind the last token may decode to NaN.
    if layout.wide:
        values = jnp.where(there[:, None], values, 0)
    else:
        (unit,) = page.units(1)
        weight = jnp.where(there[None], weight * unit[None], 0)
    added = sum(_dot(x, values, trans_b=across) for x in digits(weight))
    return y * decay[:, None] + added, mass, new_top
