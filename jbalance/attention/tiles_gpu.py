"""Flash attention over lists of tiles: Triton kernels by way of Pallas. Not yet run on hardware.

One program takes a part of one head's query block and loops over the block's list of key blocks, as
often as the list is long, with an online softmax. The backward pass computes the scores again from
their log-sum-exp: one kernel for the queries over the same lists; one for keys, values and their bias
over the lists of the transposed plan, in which a program takes all heads that share its keys.

Products of float32 are in float32, those of bfloat16 and float16 are native and accumulate in float32.
Blocks are multiples of 16, of which the largest power of two that fits is one tile; heads of any width
up to 256 are filled up with zeros to a power of two. Of the biases only those of keys are supported:
the gradient of others would need sums over programs.

Method: Dao, FlashAttention-2 (arXiv:2307.08691), over lists of tiles.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jbalance._exp2 import LOG2_E
from jbalance.attention._blocks import pad
from jbalance.attention._operands import Operands, Rules, Visibility
from jbalance.attention._tile_kernels import (
    Inputs,
    Saved,
    Side,
    cut,
    dot,
    inputs_of,
    like,
    logits,
    saved_rows,
    unsupported_bias,
)
from jbalance.attention.partial import EMPTY, NO_TOP, Partial
from jbalance.attention.plan import transposed

PLATFORM = "cuda"
LEAST = 16  # of a product on tensor cores
HEAD_DIM = 256  # at most, of keys and of values
_TILE_BYTES = 1 << 14  # of a tile of keys or queries, at most: several must fit in shared memory
_TILE = {2: 64, 4: 32}  # rows of a tile, at most, by bytes of a number: more spill registers
_FORWARD_ROWS = {2: 2, 4: 1}  # times as many queries as keys in a tile of the forward kernel


def unsupported(operands: Operands, where: Visibility, rules: Rules) -> str | None:
    """Why this back end cannot run that, or None."""
    plan = where.plan
    widths = operands.q.shape[3], operands.v.shape[3]
    if max(widths) > HEAD_DIM:
        return f"keys and values have {widths} entries: they must have at most {HEAD_DIM}"
    if plan.block_q % LEAST or plan.block_k % LEAST:
        return (
            f"plan has blocks of {plan.block_q} queries and {plan.block_k} keys: they must be "
            f"multiples of {LEAST}"
        )
    return unsupported_bias(operands, plan)


def forward(
    rules: Rules, operands: Operands, where: Visibility, *, interpret: bool = False
) -> Partial:
    """y [B, T, H, E] in q's dtype and lse [B, T, H] float32; `interpret` needs no GPU, for tests."""
    inputs, task = _prepared(rules, operands, where, rows=_FORWARD_ROWS[operands.q.dtype.itemsize])
    batch, size, heads, _ = inputs.q.shape
    values = inputs.v.shape[3]
    y, lse = pl.pallas_call(
        functools.partial(_forward_kernel, task=task),
        grid=(size // task.tile_q, heads, batch),
        in_specs=[task.by_query(inputs)],
        out_specs=[task.rows(values), task.row_numbers()],
        out_shape=[
            like(inputs.q, (batch, size, heads, values), operands.q.dtype),
            like(inputs.q, (batch, heads, size)),
        ],
        compiler_params=task.compiler_params(),
        interpret=interpret,
        name="attend_tiles",
    )(inputs)
    y, lse = y[..., : operands.v.shape[3]], jnp.swapaxes(lse, 1, 2)
    return Partial(*(x[:, : where.plan.num_queries] for x in (y, lse)))


def backward(
    rules: Rules,
    operands: Operands,
    where: Visibility,
    out: Partial,
    cotangent: Partial,
    *,
    interpret: bool = False,
) -> Operands:
    """The gradient to the operands, from the tiles computed once more."""
    inputs, task = _prepared(rules, operands, where)
    short = inputs.q.shape[1] - where.plan.num_queries
    wide = inputs.v.shape[3] - operands.v.shape[3]
    lse, delta = saved_rows(out, cotangent, short)
    saved = Saved(pad(pad(cotangent.y, 1, short), 3, wide), lse, delta)
    dq = _queries_gradient(task, inputs, saved, interpret)
    by_key = transposed(where.plan)
    inputs = inputs._replace(blocks=by_key.blocks, count=by_key.count)
    dk, dv, dbias = _keys_gradient(task, inputs, saved, interpret)
    return cut(operands, where.plan, dq, dk, dv, dbias)


class _Task(NamedTuple):
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
        return _one_of(x.shape[0], b), _one_of(x.shape[1], h), *rest(i)

    return pl.BlockSpec((None, *shape), place)


def _prepared(rules, operands, where, rows=1):
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

    return inputs, _Task(
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


def _one_of(size, index):
    """The index on an axis that may have size 1."""
    return 0 if size == 1 else index


def _side(axis, first, size, ids=None, bias=None):
    """A tile's queries or keys from `first` on, along `axis` of the scores."""
    arrays = first + lax.iota(jnp.int32, size), ids, bias
    return Side(*(None if x is None else jnp.expand_dims(x, 1 - axis) for x in arrays))


def _part(ref, part):
    return None if ref is None else ref[part]


def _over_list(entry, count, block, tile, step, carry):
    """`step(first row, carry)` over the tiles of the blocks `entry(0)` to `entry(count - 1)`."""
    parts = block // tile

    def body(i, carry):
        return step(
            entry(lax.div(i, np.int32(parts))) * block + lax.rem(i, np.int32(parts)) * tile, carry
        )

    return lax.fori_loop(0, count * parts, body, carry)


def _over_keys(x, task, step, carry):
    """`step(first key, carry)` over the list of a program's queries."""
    sizes = task.block_k, task.tile_k
    return _over_list(lambda c: x.blocks[c], x.count[0], *sizes, step, carry)


def _forward_kernel(
    x: Inputs,  # q [tile_q, D], k [S, D], v [S, E], bias [S], q_ids [tile_q], k_ids [S], blocks [C]
    y_ref,  # [tile_q, E]
    lse_ref,  # [tile_q]
    *,
    task,
):
    """Some queries of one head over the list of their block."""
    query, rows = _queries_of_program(x, task)

    def step(first, carry):
        y, mass, top = carry
        part = pl.ds(first, task.tile_k)
        values = x.v[part]
        columns = _side(1, first, task.tile_k, _part(x.k_ids, part), _part(x.bias, part))
        scores, _ = logits(task.rules, dot(query, x.k[part], turned=True), rows, columns, task.end)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weight = jnp.exp2(scores - new_top[:, None])
        decay = jnp.exp2(top - new_top)
        y = y * decay[:, None] + dot(weight.astype(values.dtype), values)
        return y, mass * decay + jnp.sum(weight, axis=1), new_top

    start = (
        jnp.zeros(y_ref.shape, jnp.float32),
        jnp.zeros(task.tile_q, jnp.float32),
        jnp.full(task.tile_q, NO_TOP, jnp.float32),
    )
    y, mass, top = _over_keys(x, task, step, start)
    some = mass > 0
    mass = jnp.where(some, mass, 1.0)
    y_ref[...] = (y / mass[:, None]).astype(y_ref.dtype)
    lse_ref[...] = jnp.where(some, (top + jnp.log2(mass)) / LOG2_E, EMPTY)


def _queries_of_program(x, task):
    """A program's queries [tile_q, D], and where they are."""
    first = pl.program_id(0) * task.tile_q + x.offset[0]
    return x.q[...], _side(0, first, task.tile_q, _part(x.q_ids, slice(None)))


def _queries_gradient(task, inputs, saved, interpret):
    """The gradient to the queries."""
    batch, size, heads, head_dim = inputs.q.shape
    numbers = task.row_numbers()
    return pl.pallas_call(
        functools.partial(_queries_kernel, task=task),
        grid=(size // task.tile_q, heads, batch),
        in_specs=[task.by_query(inputs), Saved(task.rows(saved.dy.shape[3]), numbers, numbers)],
        out_specs=task.rows(head_dim),
        out_shape=like(inputs.q, inputs.q.shape, inputs.q.dtype),
        compiler_params=task.compiler_params(),
        interpret=interpret,
        name="attend_tiles_dq",
    )(inputs, saved)


def _queries_kernel(
    x: Inputs,  # as in `_forward_kernel`
    saved: Saved,  # dy [tile_q, E], lse and delta [tile_q]
    dq_ref,  # [tile_q, D]
    *,
    task,
):
    """The gradient to some queries of one head."""
    query, rows = _queries_of_program(x, task)
    dy, lse, delta = saved.dy[...], saved.lse[...][:, None], saved.delta[...][:, None]

    def step(first, dq):
        part = pl.ds(first, task.tile_k)
        keys = x.k[part]
        columns = _side(1, first, task.tile_k, _part(x.k_ids, part), _part(x.bias, part))
        scores, slope = logits(task.rules, dot(query, keys, turned=True), rows, columns, task.end)
        dscores = jnp.exp2(scores - lse) * (dot(dy, x.v[part], turned=True) - delta)
        if slope is not None:
            dscores = dscores * slope
        return dq + dot(dscores.astype(keys.dtype), keys)

    start = jnp.zeros(query.shape, jnp.float32)
    dq = _over_keys(x, task, step, start)
    dq_ref[...] = (dq * task.rules.scale).astype(dq_ref.dtype)


def _keys_gradient(task, inputs, saved, interpret):
    """The gradients to keys and values, and to the bias of each head [B, H, S] if there is one."""
    batch, size, heads, _ = inputs.q.shape
    num_keys, kv_heads = inputs.k.shape[1:3]
    numbers = task.head_numbers(size)
    dkv = [(task.columns(x.shape[3]), like(x, x.shape, x.dtype)) for x in inputs[1:3]]
    spec = pl.BlockSpec((None, task.group, task.tile_k), lambda j, h, b: (b, h, j))
    dbias = spec, like(inputs.q, (batch, heads, num_keys))
    specs, shapes = zip(*dkv, (None, None) if inputs.bias is None else dbias, strict=True)
    return pl.pallas_call(
        functools.partial(_keys_kernel, task=task),
        grid=(num_keys // task.tile_k, kv_heads, batch),
        in_specs=[
            task.by_key(inputs),
            Saved(task.heads(saved.dy.shape[3], size), numbers, numbers),
        ],
        out_specs=specs,
        out_shape=shapes,
        compiler_params=task.compiler_params(),
        interpret=interpret,
        name="attend_tiles_dkv",
    )(inputs, saved)


def _keys_kernel(
    x: Inputs,  # q [T, G, D], k [tile_k, D], v [tile_k, E], bias [G|1, tile_k], q_ids [T],
    # k_ids [tile_k], blocks [G|1, I]
    saved: Saved,  # dy [T, G, E], lse and delta [G, T]
    dk_ref,  # [tile_k, D]
    dv_ref,  # [tile_k, E]
    dbias_ref,  # [G, tile_k] or None
    *,
    task,
):
    """The gradient to some keys: over the heads that share them, over the list of their block."""
    keys, values, offset = x.k[...], x.v[...], x.offset[0]
    rows = pl.program_id(0) * task.tile_k
    rows = _side(0, rows, task.tile_k, _part(x.k_ids, slice(None)))

    def head(g, carry):
        bias = None
        if x.bias is not None:
            bias = x.bias[_one_of(x.bias.shape[0], g)][:, None]
        own_rows = rows._replace(bias=bias)

        def step(first, carry):
            dk, dv, dbias = carry
            part = pl.ds(first, task.tile_q)
            query, dy = x.q[part, g], saved.dy[part, g]
            columns = _side(1, first + offset, task.tile_q, _part(x.q_ids, part))
            scores, slope = logits(
                task.rules, dot(keys, query, turned=True), columns, own_rows, task.end
            )
            weight = jnp.exp2(scores - saved.lse[g, part][None])
            dv = dv + dot(weight.astype(dy.dtype), dy)
            dscores = weight * (dot(values, dy, turned=True) - saved.delta[g, part][None])
            if dbias is not None:
                dbias = dbias + jnp.sum(dscores, axis=1)
            if slope is not None:
                dscores = dscores * slope
            return dk + dot(dscores.astype(query.dtype), query), dv, dbias

        own = _one_of(x.count.shape[0], g)
        start = *carry, None if bias is None else jnp.zeros(task.tile_k, jnp.float32)
        sizes = task.block_q, task.tile_q
        dk, dv, dbias = _over_list(lambda c: x.blocks[own, c], x.count[own, 0], *sizes, step, start)
        if dbias is not None:
            dbias_ref[g] = dbias
        return dk, dv

    start = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, task.group, head, start) if task.group > 1 else head(0, start)
    dk_ref[...] = (dk * task.rules.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)
