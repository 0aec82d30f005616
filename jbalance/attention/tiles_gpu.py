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

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jbalance import _fallback
from jbalance._exp2 import LOG2_E
from jbalance.attention._loads_gpu import (
    LEAST,
    one_of,
    over_keys,
    over_list,
    part_of,
    prepared,
    queries_of_program,
    side,
)
from jbalance.attention._operands import Operands, Rules, Visibility
from jbalance.attention._slices import pad
from jbalance.attention._tile_kernels import (
    Inputs,
    Saved,
    cut,
    dot,
    logits,
    saved_rows,
    unsupported_bias,
)
from jbalance.attention._varying import like
from jbalance.attention.partial import EMPTY, NO_TOP, Partial
from jbalance.attention.plan import transposed

PLATFORM = "cuda"
HEAD_DIM = 256  # at most, of keys and of values
_FORWARD_ROWS = {2: 2, 4: 1}  # times as many queries as keys in a tile of the forward kernel


def unsupported(
    operands: Operands, where: Visibility, rules: Rules, method: str = "forward"
) -> str | None:
    """Why this back end cannot run that, or None."""
    if reason := _fallback.old_gpu():
        return reason
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
    inputs, task = prepared(rules, operands, where, rows=_FORWARD_ROWS[operands.q.dtype.itemsize])
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
    inputs, task = prepared(rules, operands, where)
    short = inputs.q.shape[1] - where.plan.num_queries
    wide = inputs.v.shape[3] - operands.v.shape[3]
    lse, delta = saved_rows(out, cotangent, short)
    saved = Saved(pad(pad(cotangent.y, 1, short), 3, wide), lse, delta)
    dq = _queries_gradient(task, inputs, saved, interpret)
    by_key = transposed(where.plan)
    inputs = inputs._replace(blocks=by_key.blocks, count=by_key.count)
    dk, dv, dbias = _keys_gradient(task, inputs, saved, interpret)
    return cut(operands, where.plan, dq, dk, dv, dbias)


def _forward_kernel(
    x: Inputs,  # q [tile_q, D], k [S, D], v [S, E], bias [S], q_ids [tile_q], k_ids [S], blocks [C]
    y_ref,  # [tile_q, E]
    lse_ref,  # [tile_q]
    *,
    task,
):
    """Some queries of one head over the list of their block."""
    query, rows = queries_of_program(x, task)

    def step(first, carry):
        y, mass, top = carry
        part = pl.ds(first, task.tile_k)
        values = x.v[part]
        columns = side(1, first, task.tile_k, part_of(x.k_ids, part), part_of(x.bias, part))
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
    y, mass, top = over_keys(x, task, step, start)
    some = mass > 0
    mass = jnp.where(some, mass, 1.0)
    y_ref[...] = (y / mass[:, None]).astype(y_ref.dtype)
    lse_ref[...] = jnp.where(some, (top + jnp.log2(mass)) / LOG2_E, EMPTY)


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
    query, rows = queries_of_program(x, task)
    dy, lse, delta = saved.dy[...], saved.lse[...][:, None], saved.delta[...][:, None]

    def step(first, dq):
        part = pl.ds(first, task.tile_k)
        keys = x.k[part]
        columns = side(1, first, task.tile_k, part_of(x.k_ids, part), part_of(x.bias, part))
        scores, slope = logits(task.rules, dot(query, keys, turned=True), rows, columns, task.end)
        dscores = jnp.exp2(scores - lse) * (dot(dy, x.v[part], turned=True) - delta)
        if slope is not None:
            dscores = dscores * slope
        return dq + dot(dscores.astype(keys.dtype), keys)

    start = jnp.zeros(query.shape, jnp.float32)
    dq = over_keys(x, task, step, start)
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
    rows = side(0, rows, task.tile_k, part_of(x.k_ids, slice(None)))

    def head(g, carry):
        bias = None
        if x.bias is not None:
            bias = x.bias[one_of(x.bias.shape[0], g)][:, None]
        own_rows = rows._replace(bias=bias)

        def step(first, carry):
            dk, dv, dbias = carry
            part = pl.ds(first, task.tile_q)
            query, dy = x.q[part, g], saved.dy[part, g]
            columns = side(1, first + offset, task.tile_q, part_of(x.q_ids, part))
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

        own = one_of(x.count.shape[0], g)
        start = *carry, None if bias is None else jnp.zeros(task.tile_k, jnp.float32)
        sizes = task.block_q, task.tile_q
        dk, dv, dbias = over_list(lambda c: x.blocks[own, c], x.count[own, 0], *sizes, step, start)
        if dbias is not None:
            dbias_ref[g] = dbias
        return dk, dv

    start = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, task.group, head, start) if task.group > 1 else head(0, start)
    dk_ref[...] = (dk * task.rules.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)
