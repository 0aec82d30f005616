"""Attention straight from the packed pages of an arena on TPUs: a Mosaic kernel by way of Pallas.

One program takes the queries of one unit and loops over its pages at one level, which are copied from
the main memory into a ring of buffers. A page in 32-bit lanes is a matrix of 128 bytes a row. Below 8
bits, 128 tokens of a coordinate are read as one row: rows that do not begin at lane 0 are turned
there, all those of one alignment at once. At 8 and 16 bits a row holds one token, a part of one, or
several; the queries are laid out so, and the two bytes of a bfloat16 are joined on the even lanes.
Products are those of bfloat16 digits, as on GPUs.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jbalance.attention.partial import EMPTY, NO_TOP, Partial
from jbalance.cache import codec, pages
from jbalance.cache._kernels import digits, merge_parts, whole_levels
from jbalance.cache.pages import Arena

LANES = 128
TABLE_BYTES = 15 << 16  # of an arena's tables, at most: they lie in scalar memory, 1 MiB
_RING_BYTES = 1 << 19  # of pages on their way
_ROWS = 16  # query rows come in multiples of this


class _Level(NamedTuple):
    """What is known of a level when it is compiled."""

    number: int
    num_levels: int
    bits: int
    head_dim: int
    page_tokens: int
    page_rows: int  # of 128 bytes

    @property
    def across(self) -> bool:
        """Whether a page lies coordinate by coordinate."""
        return self.bits < 8

    @property
    def width(self) -> int:
        """Bytes of one token's key."""
        return self.head_dim * self.bits // 8

    @property
    def parts(self) -> int:
        """Rows that a token takes, at least 1."""
        return 1 if self.across else max(1, self.width // LANES)

    @property
    def shared(self) -> int:
        """Tokens that share a row, at least 1."""
        return 1 if self.across else max(1, LANES // self.width)

    @property
    def chunk(self) -> int:
        """Coordinates that lie in one run of rows, of the narrowest plane."""
        return self.head_dim * min(w for w, _ in codec._PLANES[self.bits]) // 8

    @property
    def turns(self) -> int:
        """Alignments of the rows: row r begins at that of row r mod turns."""
        return LANES // math.gcd(self.page_tokens, LANES)


def unsupported(arena: Arena) -> str | None:
    """Why this kernel cannot read this arena, or None."""
    if arena.page_bytes % LANES:
        return f"page_bytes is {arena.page_bytes}: it must be a multiple of {LANES}"
    tables = 4 * (arena.order.size + arena.offset.size + arena.count.size)
    if tables > TABLE_BYTES:
        return f"its tables take {tables} bytes: at most {TABLE_BYTES}, page_bytes must be larger"
    for i, (bits, size) in enumerate(zip(arena.bits, arena.page_tokens, strict=True)):
        level = _level(arena, i)
        if level.across and level.chunk % level.turns:
            multiple = LANES // math.gcd(level.chunk, LANES)
            return f"a page holds {size} tokens of {bits} bits: it must be a multiple of {multiple}"
        if not level.across and LANES % level.width and level.width % LANES:
            return f"head_dim is {arena.head_dim}: it must be a power of two"
        if not level.across and size % level.shared:
            return f"a page holds {size} tokens of {bits} bits: it must be a multiple of {level.shared}"
    return None


def attend_rotated(
    q: jax.Array,
    arena: Arena,
    units: jax.Array,
    gain: tuple[float, ...],
    *,
    interpret: bool = False,
) -> Partial:
    """As `paged_gpu.attend_rotated`, for TPUs.

    Raises:
      NotImplementedError: an arena that this kernel cannot read, with the reason.
    """
    if reason := unsupported(arena):
        raise NotImplementedError(f"arena: {reason}")
    padded = jnp.pad(q, ((0, 0), (0, -q.shape[1] % _ROWS), (0, 0)))
    parts = [
        _attend_level(padded * gain[i], arena, units, _level(arena, i), interpret)
        for i in range(len(gain))
    ]
    y, mass, top = (
        jnp.stack([x[:, : q.shape[1]] for x in part], axis=1) for part in zip(*parts, strict=True)
    )
    return merge_parts(y, mass, top)


def _level(arena, index):
    """Static sizes of a level."""
    bits, size = arena.bits[index], arena.page_tokens[index]
    rows = arena.page_bytes // LANES
    return _Level(index, len(arena.bits), bits, arena.head_dim, size, rows)


def _attend_level(q, arena, units, level, interpret):
    """One level's y [N, T, D], not normalised, its mass and top [N, T]."""
    laid = _lay_out(q, level)
    num_units, size = q.shape[:2]
    depth = max(2, min(_RING_BYTES // arena.page_bytes, 32))
    # Of one page lanes and rows can be copied, of one row of [P, page_bytes] they cannot.
    data = arena.data.reshape(-1, level.page_rows, LANES)

    def block(*shape):
        return pl.BlockSpec((None, *shape), lambda n, *_: (n, *(0,) * len(shape)))

    y, mass, top = pl.pallas_call(
        functools.partial(_kernel, level=level, depth=depth),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(num_units,),
            in_specs=[block(*laid.shape[1:]), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=[block(*laid.shape[1:]), block(size, LANES), block(size, LANES)],
            scratch_shapes=[
                pltpu.VMEM((depth, level.page_rows, LANES), jnp.uint8),
                pltpu.VMEM((level.page_rows + LANES * level.parts, LANES), jnp.int32),
                pltpu.SemaphoreType.DMA((depth,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(laid.shape, jnp.float32),
            jax.ShapeDtypeStruct((num_units, size, LANES), jnp.float32),
            jax.ShapeDtypeStruct((num_units, size, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name=f"attend_pages_{level.bits}_bits",
    )(arena.order, arena.offset, arena.count.reshape(-1), units, laid, data)
    return _taken_back(y, level), mass[..., 0], top[..., 0]


def _lay_out(q, level):
    """Queries [N, T, D] as [N, parts, T, X], in the order of a page's coordinates."""
    if level.across:
        runs = q.reshape(*q.shape[:2], -1, level.chunk // level.turns, level.turns)
        return jnp.swapaxes(runs, -1, -2).reshape(q.shape)[:, None]
    if level.bits == pages.WIDE_BITS:
        q = jnp.stack([q, jnp.zeros_like(q)], axis=-1).reshape(*q.shape[:2], -1)
    q = jnp.tile(q, level.shared).reshape(*q.shape[:2], level.parts, LANES)
    return jnp.swapaxes(q, 1, 2)


def _taken_back(y, level):
    """The inverse of `_lay_out`; of tokens that share a row the sum."""
    if level.across:
        runs = y[:, 0].reshape(y.shape[0], y.shape[2], -1, level.turns, level.chunk // level.turns)
        return jnp.swapaxes(runs, -1, -2).reshape(y[:, 0].shape)
    y = jnp.swapaxes(y, 1, 2).reshape(y.shape[0], y.shape[2], level.shared, -1).sum(axis=2)
    return y[..., ::2] if level.bits == pages.WIDE_BITS else y


def _kernel(
    order_ref,  # [P]
    offset_ref,  # [U M + 1]
    count_ref,  # [U M]
    units_ref,  # [N]
    q_ref,  # [parts, T, X]
    data_ref,  # [P, page_rows, 128], in the main memory
    y_ref,  # [parts, T, X]
    mass_ref,  # [T, 128]
    top_ref,  # [T, 128]
    ring_ref,  # [depth, page_rows, 128] uint8
    page_ref,  # [page_rows and some, 128] int32
    arrived,  # [depth] semaphores
    *,
    level,
    depth,
):
    """One unit's queries over its pages."""
    group = units_ref[pl.program_id(0)] * level.num_levels + level.number
    begin, count = offset_ref[group], count_ref[group]
    num_pages = lax.div(count + level.page_tokens - 1, level.page_tokens)

    def copy(i):
        slot = lax.rem(i, depth)
        source = data_ref.at[order_ref[begin + i]]
        return pltpu.make_async_copy(source, ring_ref.at[slot], arrived.at[slot])

    def start(i, _):
        copy(i).start()

    lax.fori_loop(0, jnp.minimum(depth, num_pages), start, None)
    query = [digits(q_ref[i]) for i in range(level.parts)]
    size = q_ref.shape[1]

    def step(i, carry):
        copy(i).wait()
        page_ref[: level.page_rows] = ring_ref[lax.rem(i, depth)].astype(jnp.int32)

        @pl.when(i + depth < num_pages)
        def _():
            start(i + depth, None)

        left = count - i * level.page_tokens
        for block in range(-(-level.page_tokens // LANES)):
            carry = _add_block(query, _Block(page_ref, block, left, level), carry)
        return carry

    empty = (
        [jnp.zeros(q_ref.shape[1:], jnp.float32) for _ in range(level.parts)],
        jnp.zeros((size, 1), jnp.float32),
        jnp.full((size, 1), NO_TOP, jnp.float32),
    )
    y, mass, top = lax.fori_loop(0, num_pages, step, empty)
    for i in range(level.parts):
        y_ref[i] = y[i]
    mass_ref[...] = jnp.broadcast_to(mass, mass_ref.shape)
    top_ref[...] = jnp.broadcast_to(top, top_ref.shape)


class _Block(NamedTuple):
    """128 tokens of a page, fewer at its end."""

    ref: jax.Array
    number: int  # of the block in its page
    left: jax.Array  # tokens of the group from this page on
    level: _Level

    def there(self, tokens):
        """Whether these tokens [..., 128] of the block are."""
        tokens += self.number * LANES
        return (tokens < self.left) & (tokens < self.level.page_tokens)

    def tokens(self, shape, axis):
        """Tokens of the block in the order in which `vectors` has them."""
        at, shared = lax.broadcasted_iota(jnp.int32, shape, axis), self.level.shared
        per_row = LANES // shared
        return at if shared == 1 else lax.rem(at, per_row) * shared + lax.div(at, per_row)

    def bytes(self, first, rows=1, stride=1):
        """128 bytes each, from byte `first` on and `stride` rows of the page apart: [rows, 128]."""
        at, lane = divmod(first, LANES)
        out = self.ref[pl.ds(at, rows, stride=stride)]
        if lane == 0:
            return out
        after = self.ref[pl.ds(at + 1, rows, stride=stride)]
        ahead = lax.broadcasted_iota(jnp.int32, out.shape, 1) >= lane
        return pltpu.roll(jnp.where(ahead, out, after), LANES - lane, 1)

    def vectors(self, index):
        """Keys (0) or values (1) for norm 1 in bfloat16, by parts: [D, 128], else [128, 128]."""
        if self.level.across:
            return [self._coordinates(index)]
        return [self._rows(index, i) for i in range(self.level.parts)]

    def _coordinates(self, index):
        """[D, 128], coordinates in the order of `_lay_out`."""
        _, _, bits, head_dim, npp, _ = self.level
        chunk, turns = self.level.chunk, self.level.turns
        start = index * npp * self.level.width + self.number * LANES
        groups = [0] * (head_dim // chunk)
        for width, lowest in codec._PLANES[bits]:
            runs = head_dim * width // 8 // chunk
            found = [
                jnp.concatenate(
                    [
                        self.bytes(
                            start + (run * chunk + turn) * npp, chunk // turns, turns * npp // LANES
                        )
                        for turn in range(turns)
                    ]
                )
                for run in range(runs)
            ]
            for i in range(len(groups)):
                part = (found[i % runs] >> (width * (i // runs))) & (2**width - 1)
                groups[i] = groups[i] | (part << lowest)
            start += runs * chunk * npp
        return whole_levels(jnp.concatenate(groups), bits)

    def _rows(self, index, part):
        """[128, 128], part of each token on its lanes, 0 on others."""
        _, _, bits, _, npp, _ = self.level
        parts, shared = self.level.parts, self.level.shared
        rows = LANES // shared
        first = (index * npp + self.number * LANES) * self.level.width // LANES + part
        found = self.ref[pl.ds(first, rows, stride=parts)]
        lane = lax.broadcasted_iota(jnp.int32, found.shape, 1)
        if bits == 8:
            out = whole_levels(found, 8).astype(jnp.float32)
        else:
            joined = (found | (pltpu.roll(found, LANES - 1, 1) << 8)) << 16
            out = lax.bitcast_convert_type(joined, jnp.float32)
            out = jnp.where(lane % 2 == 0, out, 0)
        if shared > 1:
            own = lax.div(lane, LANES // shared)
            out = jnp.concatenate([jnp.where(own == i, out, 0) for i in range(shared)])
        # What lies behind the last token may decode to NaN.
        return jnp.where(self.there(self.tokens(out.shape, 0)), out, 0).astype(jnp.bfloat16)

    def norms(self, index):
        """Norms of the keys (0) or values (1): [1, 128] float32, 0 where there is no token."""
        npp = self.level.page_tokens
        start = npp * (2 * self.level.width + 2 * index) + self.number * LANES
        low, high = self.bytes(start), self.bytes(start + npp)
        norm = _from_float16(low | (high << 8))
        norm = jnp.where(self.there(lax.broadcasted_iota(jnp.int32, norm.shape, 1)), norm, 0)
        if self.level.shared == 1:
            return norm
        shape = (LANES, LANES)
        moved = lax.broadcasted_iota(jnp.int32, shape, 0) == self.tokens(shape, 1)
        return _dot(digits(norm), moved.astype(jnp.float32).astype(jnp.bfloat16))


def _from_float16(bits):
    """The float32 values of float16 whose bits are in int32; subnormal ones too."""
    exponent, fraction = (bits >> 10) & 31, bits & 1023
    normal = lax.bitcast_convert_type(((exponent + 112) << 23) | (fraction << 13), jnp.float32)
    small = fraction.astype(jnp.float32) * 2.0**-24
    return jnp.where(bits >= 1 << 15, -1.0, 1.0) * jnp.where(exponent == 0, small, normal)


def _dot(rows, vectors, across=False):
    """The sum of the products of bfloat16 digits with vectors; `across` contracts last axes."""
    dims = (((1,), (1,)) if across else ((1,), (0,))), ((), ())
    return sum(lax.dot_general(x, vectors, dims, preferred_element_type=jnp.float32) for x in rows)


def _add_block(query, block, carry):
    """The softmax so far with that of one block."""
    y, mass, top = carry
    level = block.level
    keys = block.vectors(0)
    logits = sum(_dot(q, k, not level.across) for q, k in zip(query, keys, strict=True))
    if level.bits != pages.WIDE_BITS:
        logits = logits * (block.norms(0) * codec.step(level.head_dim, level.bits))
    there = block.there(block.tokens(logits.shape, 1))
    logits = jnp.where(there, logits, EMPTY)
    new_top = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
    weight = jnp.exp(logits - new_top)
    decay = jnp.exp(top - new_top)
    mass = mass * decay + jnp.sum(weight, axis=1, keepdims=True)
    if level.bits != pages.WIDE_BITS:
        weight = weight * (block.norms(1) * codec.step(level.head_dim, level.bits))
    rows = digits(weight)
    added = [_dot(rows, v, level.across) for v in block.vectors(1)]
    return [a * decay + b for a, b in zip(y, added, strict=True)], mass, new_top
