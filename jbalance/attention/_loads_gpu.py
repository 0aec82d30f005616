"""What a program of the GPU kernels loads: its parts of the arrays, and the tiles of its list."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jbalance.attention._operands import Rules
from jbalance.attention._slices import pad
from jbalance.attention._tile_kernels import Inputs, Side, inputs_of

LEAST = 16  # of a product on tensor cores
_TILE_BYTES = 1 << 14  # of a tile of keys or queries, at most: several must fit in shared memory
_TILE = {2: 64, 4: 32}  # rows of a tile, at most, by bytes of a number: more spill registers


class Task(NamedTuple):
    """What is known when a kernel is compiled, and which parts of the arrays its programs get."""

    rules: Rules
    group: int  # heads that share keys
    block_q: int
    block_k: int
    tile_q: int
    tile_k: int
    end: int | None  # of the keys, if the last block is longer
    width: int  # of the widest of keys and values

    def compiler_params(self):
        small = max(self.width, self.tile_q) <= 64
        return plt.CompilerParams(num_warps=4 if small else 8, num_stages=2)

    def rows(self, width):
        """A program's queries of [B, T, H, width]."""
        return pl.BlockSpec((None, self.tile_q, None, width), lambda i, h, b: (b, i, h, 0))

    def row_numbers(self):
        """One number for each of a program's queries, of [B, H, T]."""
        return pl.BlockSpec((None, None, self.tile_q), lambda i, h, b: (b, h, i))

    def by_query(self, x: Inputs) -> Inputs:
        """What a program for queries reads, of a grid (query tiles, H, B)."""
        parts, size = self.block_q // self.tile_q, x.k.shape[1]

        def keys(x):
            shape = None, size, None, x.shape[3]
            return pl.BlockSpec(shape, lambda i, h, b: (b, 0, h // self.group, 0))

        ids = x.q_ids is not None
        bias = x.bias is not None
        return Inputs(
            q=self.rows(x.q.shape[3]),
            k=keys(x.k),
            v=keys(x.v),
            bias=_of_heads(x.bias, (None, None, size), lambda i: (0, 0)) if bias else None,
            q_ids=pl.BlockSpec((None, self.tile_q), lambda i, h, b: (b, i)) if ids else None,
            k_ids=pl.BlockSpec((None, size), lambda i, h, b: (b, 0)) if ids else None,
            offset=pl.BlockSpec((1,), lambda i, h, b: (0,)),
            blocks=_of_heads(x.blocks, (None, None, x.blocks.shape[3]), lambda i: (i // parts, 0)),
            count=_of_heads(x.count, (None, 1), lambda i: (i // parts,)),
        )

    def columns(self, width):
        """A program's keys of [B, S, K, width]."""
        return pl.BlockSpec((None, self.tile_k, None, width), lambda j, h, b: (b, j, h, 0))

    def heads(self, width, size):
        """The queries of a program's heads, of [B, T, H, width]."""
        return pl.BlockSpec((None, size, self.group, width), lambda j, h, b: (b, 0, h, 0))

    def head_numbers(self, size):
        """One number for each of those queries, of [B, H, T]."""
        return pl.BlockSpec((None, self.group, size), lambda j, h, b: (b, h, 0))

    def by_key(self, x: Inputs) -> Inputs:
        """What a program for keys reads, of a grid (key tiles, K, B)."""
        parts, size = self.block_k // self.tile_k, x.q.shape[1]

        def of_group(x, shape, rest):
            return _of_heads(x, (1 if x.shape[1] == 1 else self.group, *shape), rest)

        ids = x.q_ids is not None
        bias = x.bias is not None
        return Inputs(
            q=self.heads(x.q.shape[3], size),
            k=self.columns(x.k.shape[3]),
            v=self.columns(x.v.shape[3]),
            bias=of_group(x.bias, (None, self.tile_k), lambda j: (0, j)) if bias else None,
            q_ids=pl.BlockSpec((None, size), lambda j, h, b: (b, 0)) if ids else None,
            k_ids=pl.BlockSpec((None, self.tile_k), lambda j, h, b: (b, j)) if ids else None,
            offset=pl.BlockSpec((1,), lambda j, h, b: (0,)),
            blocks=of_group(x.blocks, (None, x.blocks.shape[3]), lambda j: (j // parts, 0)),
            count=of_group(x.count, (1,), lambda j: (j // parts,)),
        )


def _of_heads(x, shape, rest):
    """A program's part of x [B|1, H|1, ...], whose index on the other axes is `rest`."""

    def place(i, h, b):
        return one_of(x.shape[0], b), one_of(x.shape[1], h), *rest(i)

    return pl.BlockSpec((None, *shape), place)


def prepared(rules, operands, where, rows=1):
    """Arrays of whole blocks and widths that are powers of two, and what is static.

    Tiles may have `rows` times as many queries as keys.
    """
    plan = where.plan
    inputs = inputs_of(operands, where, _widened)
    width = max(inputs.k.shape[3], inputs.v.shape[3])
    itemsize = operands.q.dtype.itemsize
    most = min(_TILE[itemsize], _TILE_BYTES // (width * itemsize))

    def tile(block, most):
        return max(LEAST, min(block & -block, most))

    return inputs, Task(
        rules=rules,
        group=operands.q.shape[2] // operands.k.shape[2],
        block_q=plan.block_q,
        block_k=plan.block_k,
        tile_q=tile(plan.block_q, rows * most),
        tile_k=tile(plan.block_k, most),
        end=plan.num_keys if plan.num_keys % plan.block_k else None,
        width=width,
    )


def _widened(x):
    """x [..., D] with zeros up to a power of two."""
    return pad(x, x.ndim - 1, max(LEAST, pl.next_power_of_2(x.shape[-1])) - x.shape[-1])


def one_of(size, index):
    """The index on an axis that may have size 1."""
    return 0 if size == 1 else index


def side(axis, first, size, ids=None, bias=None):
    """A tile's queries or keys from `first` on, along `axis` of the scores."""
    arrays = first + lax.iota(jnp.int32, size), ids, bias
    return Side(*(None if x is None else jnp.expand_dims(x, 1 - axis) for x in arrays))


def part_of(ref, part):
    """What a program reads of an array that may not be there."""
    return None if ref is None else ref[part]


def over_list(entry, count, block, tile, step, carry):
    """`step(first row, carry)` over the tiles of the blocks `entry(0)` to `entry(count - 1)`."""
    parts = block // tile

    def body(i, carry):
        return step(
            entry(lax.div(i, np.int32(parts))) * block + lax.rem(i, np.int32(parts)) * tile, carry
        )

    return lax.fori_loop(0, count * parts, body, carry)


def over_keys(x, task, step, carry):
    """`step(first key, carry)` over the list of a program's queries."""
    sizes = task.block_k, task.tile_k
    return over_list(lambda c: x.blocks[c], x.count[0], *sizes, step, carry)


def queries_of_program(x, task):
    """A program's queries [tile_q, D], and where they are."""
    first = pl.program_id(0) * task.tile_q + x.offset[0]
    return x.q[...], side(0, first, task.tile_q, part_of(x.q_ids, slice(None)))
