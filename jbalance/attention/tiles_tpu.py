"""Flash attention over lists of tiles: Mosaic kernels by way of Pallas. Not yet run on hardware.

The forward pass (`_forward_tpu`) takes several key blocks a step. In the backward pass the lists of the
plan are prefetched into scalar memory, and the grid runs over heads, query blocks and places in their
lists, of which there are as many as the longest list has. The blocks that a step reads are looked up in
the lists, so that they are copied while the step before computes; steps behind the end of a list stay at
its last block and copy nothing. As on GPUs there is one kernel over the same lists, and one over those
of the transposed plan, whose scores lie with keys before queries, so that what there is of a query is a
row in both.

Products of float32 are in float32, those of bfloat16 are native and accumulate in float32. Blocks are
multiples of 16, and of the 128 lanes for gradients, biases and segment ids; heads of any width are
filled up to whole lanes. Of the biases only those of keys are supported: the gradient of others would
need sums over programs.

Method: Dao, FlashAttention-2 (arXiv:2307.08691), over lists of tiles.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl

from jbalance.attention import _forward_tpu, _tile_kernels
from jbalance.attention._grid_tpu import LANES, Walk, column_of, laid, lane_width, prepared, row_of
from jbalance.attention._operands import Operands, Rules, Visibility
from jbalance.attention._slices import pad
from jbalance.attention._tile_kernels import Inputs, Saved, dot
from jbalance.attention._varying import like
from jbalance.attention.partial import Partial
from jbalance.attention.plan import transposed

PLATFORM = "tpu"
LIST_BYTES = 15 << 16  # of a plan, at most: it lies in scalar memory, 1 MiB
BLOCK_BYTES = 12 << 20  # of the blocks of a program, at most: they lie in vector memory, 16 MiB
ROWS = 16  # of blocks, at least: those of a tile of the chip's memory
_DTYPES = ("float32", "bfloat16")


def unsupported(
    operands: Operands, where: Visibility, rules: Rules, method: str = "forward"
) -> str | None:
    """Why this back end cannot run that, or None."""
    plan, dtype = where.plan, operands.q.dtype
    blocks = f"plan has blocks of {plan.block_q} queries and {plan.block_k} keys"
    narrow = plan.block_q % LANES or plan.block_k % LANES
    if dtype.name not in _DTYPES:
        return f"q has dtype {dtype}: it must be one of {', '.join(_DTYPES)}"
    if plan.block_q % ROWS or plan.block_k % ROWS:
        return f"{blocks}: they must be multiples of {ROWS}"
    if narrow and (method == "backward" or operands.bias is not None or where.q_ids is not None):
        return f"{blocks}: with biases or segment ids, and for gradients, multiples of {LANES}"
    if reason := _tile_kernels.unsupported_bias(operands, plan):
        return reason
    if method == "forward":
        size = _forward_tpu.step_bytes(operands, plan)
    else:
        lists = plan.count.size // plan.num_query_blocks
        longest = max(
            plan.blocks.size + plan.count.size,
            lists * plan.num_key_blocks * (plan.num_query_blocks + 1),
        )
        if 4 * longest > LIST_BYTES:
            return f"plan has lists of {4 * longest} bytes: they must have at most {LIST_BYTES}"
        size = _block_bytes(operands, plan)
    if size > BLOCK_BYTES:
        return f"plan has blocks that take {size} bytes: they must take at most {BLOCK_BYTES}"
    return None


def forward(
    rules: Rules, operands: Operands, where: Visibility, *, interpret: bool = False
) -> Partial:
    """y [B, T, H, E] in q's dtype and lse [B, T, H] float32; `interpret` needs no TPU, for tests."""
    return sequential_vmap(functools.partial(_forward, rules, interpret))(operands, where)


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
    run = sequential_vmap(functools.partial(_backward, rules, interpret))
    return run(operands, where, out, cotangent)


def _block_bytes(operands, plan):
    """About what the backward pass keeps in vector memory: two copies of blocks, sums and scores."""
    width = sum(lane_width(x) for x in (operands.k, operands.v))
    blocks = 2 * (plan.block_q + 2 * plan.block_k) * width * operands.q.dtype.itemsize
    return blocks + 4 * plan.block_k * width + 5 * 4 * plan.block_q * plan.block_k


def _forward(rules, interpret, operands, where):
    return _forward_tpu.run(rules, operands, where, interpret)


def _backward(rules, interpret, operands, where, out, cotangent):
    inputs, task = prepared(rules, operands, where)
    short = inputs.q.shape[2] - where.plan.num_queries
    lse, delta = _tile_kernels.saved_rows(out, cotangent, short)
    saved = Saved(laid(pad(cotangent.y, 1, short)), lse[:, :, None], delta[:, :, None])
    dq = _queries_gradient(task, where.plan, inputs, saved, interpret)
    dk, dv, dbias = _keys_gradient(task, transposed(where.plan), inputs, saved, interpret)
    dbias = None if dbias is None else dbias[:, :, 0]
    dq, dk, dv = (jnp.swapaxes(x, 1, 2) for x in (dq, dk, dv))
    return _tile_kernels.cut(operands, where.plan, dq, dk, dv, dbias)


def _queries_gradient(task, plan, inputs, saved, interpret):
    """The gradient to the queries."""
    walk = Walk(task, plan.blocks.shape, by_key=False)
    return walk.run(
        _queries_kernel,
        (plan, inputs, saved),
        out_specs=walk.queries(inputs.q.shape[3]),
        out_shape=like(inputs.q, inputs.q.shape, inputs.q.dtype),
        scratch=[(task.block_q, inputs.q.shape[3])],
        interpret=interpret,
    )


def _keys_gradient(task, plan, inputs, saved, interpret):
    """The gradients to keys and values, and to the bias of each head [B, H, 1, S] if there is one."""
    walk = Walk(task, plan.blocks.shape, by_key=True)
    (batch, heads), num_keys = inputs.q.shape[:2], inputs.k.shape[2]
    specs = [walk.keys(x.shape[3]) for x in inputs[1:3]]
    shapes = [like(x, x.shape, x.dtype) for x in inputs[1:3]]
    scratch = [(task.block_k, x.shape[3]) for x in inputs[1:3]]
    if inputs.bias is not None:
        specs.append(walk.key_numbers())
        shapes.append(like(inputs.q, (batch, heads, 1, num_keys)))
        scratch.append((task.block_k, LANES))
    return *walk.run(
        _keys_kernel,
        (plan, inputs, saved),
        out_specs=specs,
        out_shape=shapes,
        scratch=scratch,
        interpret=interpret,
    ), *[None] * (3 - len(specs))


def _queries_kernel(
    blocks_ref,
    count_ref,
    offset_ref,
    x: Inputs,  # as in `_forward_kernel`
    saved: Saved,  # dy [bq, E], lse and delta [1, bq]
    dq_ref,  # [bq, D]
    sum_ref,  # [bq, D]
    *,
    walk,
):
    """The gradient to a block of queries of one head, by one block of its list."""
    at = walk.here(blocks_ref, count_ref)

    @pl.when(at.step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(at.step < at.count)
    def _():
        keys = x.k[...]
        scores, slope = walk.logits(dot(x.q[...], keys, turned=True), at, x, offset_ref[0])
        weight = jnp.exp2(scores - column_of(saved.lse[...]))
        dscores = dot(saved.dy[...], x.v[...], turned=True) - column_of(saved.delta[...])
        dscores = dscores * weight if slope is None else dscores * weight * slope
        sum_ref[...] += dot(dscores.astype(keys.dtype), keys)

    @pl.when(at.step == at.last)
    def _():
        dq_ref[...] = (sum_ref[...] * walk.task.rules.scale).astype(dq_ref.dtype)


def _keys_kernel(
    blocks_ref,  # of the transposed plan
    count_ref,
    offset_ref,
    x: Inputs,  # as in `_forward_kernel`
    saved: Saved,  # dy [bq, E], lse and delta [1, bq]
    *out_refs,  # dk [bk, D], dv [bk, E], the bias's [1, bk]; and their sums, the last [bk, 128]
    walk,
):
    """The gradient to a block of keys, by one block of queries of one of the heads that share it."""
    at = walk.here(blocks_ref, count_ref)
    dk_ref, dv_ref, *dbias_ref = out_refs[: len(out_refs) // 2]
    dk_sum_ref, dv_sum_ref, *dbias_sum_ref = out_refs[len(out_refs) // 2 :]

    @pl.when((at.step == 0) & (at.group_head == 0))
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    @pl.when(at.step == 0)
    def _():
        for ref in dbias_sum_ref:
            ref[...] = jnp.zeros_like(ref)

    @pl.when(at.step < at.count)
    def _():
        query, dy = x.q[...], saved.dy[...]
        scores, slope = walk.logits(dot(x.k[...], query, turned=True), at, x, offset_ref[0])
        weight = jnp.exp2(scores - saved.lse[...])
        dv_sum_ref[...] += dot(weight.astype(dy.dtype), dy)
        dscores = (dot(x.v[...], dy, turned=True) - saved.delta[...]) * weight
        for ref in dbias_sum_ref:
            ref[...] += jnp.sum(dscores, axis=1, keepdims=True)
        if slope is not None:
            dscores = dscores * slope
        dk_sum_ref[...] += dot(dscores.astype(query.dtype), query)

    @pl.when((at.step == at.last) & (at.group_head == walk.task.group - 1))
    def _():
        dk_ref[...] = (dk_sum_ref[...] * walk.task.rules.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)

    @pl.when(at.step == at.last)
    def _():
        for ref, sum_ref in zip(dbias_ref, dbias_sum_ref, strict=True):
            ref[...] = row_of(sum_ref[...])
