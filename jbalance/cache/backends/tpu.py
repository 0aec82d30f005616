"""Attention straight from the packed pages of an arena on TPUs: a Mosaic kernel by way of Pallas.

One program takes up to 128 queries of one unit and loops over its pages at one level, which are copied
from the main memory into a ring of buffers. A page in 32-bit lanes is a matrix of 128 bytes a row.
Below 8 bits, 128 tokens of a coordinate are read as one row: rows that do not begin at lane 0 are turned
there, all those of one alignment at once. At 8 and 16 bits a row holds one token, a part of one, or
several; the queries are laid out so, and the two bytes of a bfloat16 are joined on the even lanes.
Products are those of bfloat16 digits, as on GPUs.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jbalance.attention.partial import EMPTY, NO_TOP, Partial
from jbalance.cache._pages import Arena
from jbalance.cache.backends._kernels import digits, merge_parts
from jbalance.cache.backends._tpu_page import LANES, Block, Level, dot

TABLE_BYTES = 15 << 16  # of an arena's tables, at most: they lie in scalar memory, 1 MiB
_RING_BYTES = 1 << 19  # of pages on their way
_ROWS = 16  # query rows come in multiples of this
_MOST_ROWS = 128  # of a program: as many as the matrix unit takes, and few enough for vector memory


def unsupported(arena: Arena) -> str | None:
    """Why this kernel cannot read this arena, or None."""
    if arena.page_bytes % LANES:
        return f"page_bytes is {arena.page_bytes}: it must be a multiple of {LANES}"
    tables = 4 * (arena.order.size + arena.offset.size + arena.count.size)
    if tables > TABLE_BYTES:
        return f"its tables take {tables} bytes: at most {TABLE_BYTES}, page_bytes must be larger"
    for i, (bits, size) in enumerate(zip(arena.bits, arena.page_tokens, strict=True)):
        level = _level(arena, i)
        chunks = [level.layout.run(index) for index in range(2)] if level.across else []
        if any(chunk % level.turns for chunk in chunks):
            multiple = LANES // math.gcd(*chunks, LANES)
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
    *,
    interpret: bool = False,
) -> Partial:
    """As `gpu.attend_rotated`, for TPUs.

    Raises:
      NotImplementedError: an arena that this kernel cannot read, with the reason.
    """
    if reason := unsupported(arena):
        raise NotImplementedError(f"arena: {reason}")
    rows = min(_MOST_ROWS, -(-q.shape[1] // _ROWS) * _ROWS)
    padded = jnp.pad(q, ((0, 0), (0, -q.shape[1] % rows), (0, 0)))
    parts = [
        _attend_level(padded, arena, units, _level(arena, i), rows, interpret)
        for i in range(len(arena.bits))
    ]
    y, mass, top = (
        jnp.stack([x[:, : q.shape[1]] for x in part], axis=1) for part in zip(*parts, strict=True)
    )
    return merge_parts(y, mass, top)


def _level(arena, index):
    """Static sizes of a level."""
    return Level(index, len(arena.bits), arena.layouts[index], arena.page_bytes // LANES)


def _attend_level(q, arena, units, level, rows, interpret):
    """One level's y [N, T, D], not normalised, its mass and top [N, T]."""
    laid = _lay_out(level.layout.asked(q), level)
    num_units, size, head_dim = q.shape
    sums = (1, size, head_dim) if level.across else laid.shape[1:]
    depth = max(2, min(_RING_BYTES // arena.page_bytes, 32))

    laid_rows, sum_rows = (
        pl.BlockSpec((None, number, rows, width), lambda n, r, *_: (n, 0, r, 0))
        for number, _, width in (laid.shape[1:], sums)
    )
    number_rows = pl.BlockSpec((None, rows, LANES), lambda n, r, *_: (n, r, 0))
    y, mass, top = pl.pallas_call(
        functools.partial(_kernel, level=level, depth=depth),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(num_units, size // rows),
            in_specs=[laid_rows, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=[sum_rows, number_rows, number_rows],
            scratch_shapes=[
                pltpu.VMEM((depth, level.page_rows, LANES), jnp.uint8),
                pltpu.VMEM((level.page_rows + LANES * level.parts, LANES), jnp.int32),
                pltpu.SemaphoreType.DMA((depth,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((num_units, *sums), jnp.float32),
            jax.ShapeDtypeStruct((num_units, size, LANES), jnp.float32),
            jax.ShapeDtypeStruct((num_units, size, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name=f"attend_pages_{level.bits}_bits",
    )(arena.order, arena.offset, arena.count.reshape(-1), units, laid, arena.data)
    return _taken_back(y, level), mass[..., 0], top[..., 0]


def _lay_out(q, level):
    """Queries [N, T, D] as [N, parts, T, X], in the order of a page's coordinates."""
    laid = jnp.matmul(q, _order(level, 0), precision=lax.Precision.HIGHEST)
    number = len(level.layout.parts(0)) if level.across else level.parts
    return jnp.swapaxes(laid.reshape(*q.shape[:2], number, -1), 1, 2)


def _taken_back(y, level):
    """Sums of values in the order of a page's coordinates, in that of vectors again."""
    y = jnp.swapaxes(y, 1, 2).reshape(y.shape[0], y.shape[2], -1)
    return jnp.matmul(y, _order(level, 1).T, precision=lax.Precision.HIGHEST)


def _order(level, index):
    """[D, parts X] of zeros and ones: to which lanes of a page's rows a coordinate goes.

    Of keys (0) or values (1). A product with it is exact, and keeps queries as TPUs hold matrices;
    reshapes would spread them.
    """
    eye = np.eye(level.layout.head_dim, dtype=np.float32)
    if level.across:
        runs = eye.reshape(len(eye), -1, level.layout.run(index) // level.turns, level.turns)
        return runs.swapaxes(-1, -2).reshape(len(eye), -1)
    if level.layout.wide:
        eye = np.stack([eye, np.zeros_like(eye)], axis=-1).reshape(len(eye), -1)
    return np.tile(eye, level.shared)


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
    """Some of one unit's queries over its pages."""
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
    query = [digits(q_ref[i]) for i in range(q_ref.shape[0])]
    size = q_ref.shape[1]

    def step(i, carry):
        copy(i).wait()
        page_ref[: level.page_rows] = ring_ref[lax.rem(i, depth)].astype(jnp.int32)

        @pl.when(i + depth < num_pages)
        def _():
            start(i + depth, None)

        left = count - i * level.page_tokens
        for block in range(-(-level.page_tokens // LANES)):
            carry = _add_block(query, Block(page_ref, block, left, level), carry)
        return carry

    empty = (
        [jnp.zeros(y_ref.shape[1:], jnp.float32) for _ in range(y_ref.shape[0])],
        jnp.zeros((size, 1), jnp.float32),
        jnp.full((size, 1), NO_TOP, jnp.float32),
    )
    y, mass, top = lax.fori_loop(0, num_pages, step, empty)
    for i, x in enumerate(y):
        y_ref[i] = x
    mass_ref[...] = jnp.broadcast_to(mass, mass_ref.shape)
    top_ref[...] = jnp.broadcast_to(top, top_ref.shape)


def _add_block(query, block, carry):
    """The softmax so far with that of one block."""
    y, mass, top = carry
    level = block.level
    keys = block.vectors(0)
    parts = [dot(q, k, not level.across) for q, k in zip(query, keys, strict=True)]
    if level.across:
        parts = [x * unit for x, unit in zip(parts, block.units(0), strict=True)]
    logits = sum(parts)
    if level.bits == 8:
        (unit,) = block.units(0)
        logits = logits * unit
    there = block.there(block.tokens(logits.shape, 1))
    logits = jnp.where(there, logits, EMPTY)
    new_top = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
    weight = jnp.exp(logits - new_top)
    decay = jnp.exp(top - new_top)
    mass = mass * decay + jnp.sum(weight, axis=1, keepdims=True)
    if not level.layout.wide:
        (unit,) = block.units(1)
        weight = weight * unit
    rows = digits(weight)
    added = [dot(rows, v, level.across) for v in block.vectors(1)]
    return [a * decay + b for a, b in zip(y, added, strict=True)], mass, new_top
