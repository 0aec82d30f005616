"""The grid of the TPU kernels of the gradient: a step for each tile of a plan's lists, what it loads."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jbalance.attention import _tile_kernels
from jbalance.attention._operands import Rules
from jbalance.attention._slices import pad
from jbalance.attention._tile_kernels import Inputs, Saved, Side, logits

LANES = 128


class Task(NamedTuple):
    """What is known when a kernel is compiled."""

    rules: Rules
    group: int  # heads that share keys
    block_q: int
    block_k: int
    end: int | None  # of the keys, if the last block is longer


class Place(NamedTuple):
    """Where a step of the grid is."""

    batch: Any
    head: Any
    kv_head: Any
    group_head: Any  # of those that share keys
    query: Any  # block
    key: Any  # block
    step: Any  # in the list
    count: Any  # length of the list
    last: Any  # step of the list, 0 if it is empty


class Walk(NamedTuple):
    """A grid over the lists of a plan, and what its steps read."""

    task: Task
    lists: tuple[int, ...]  # [B|1, H|1, I, C]
    by_key: bool  # whether they are those of the transposed plan

    def run(self, kernel, args, out_specs, out_shape, scratch, interpret):
        """Calls the kernel for every step, with lists, offset and arrays."""
        plan, inputs, saved = args
        batch, heads = inputs.q.shape[:2]
        longest = jnp.maximum(jnp.max(plan.count), 1)
        grid: tuple[Any, ...] = batch, heads, self.lists[2], longest
        if self.by_key:
            group = self.task.group
            grid = batch, heads // group, self.lists[2], group, longest
        order: Any = ("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3)
        call = pl.pallas_call(
            functools.partial(kernel, walk=self),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=grid,
                in_specs=[self.inputs(inputs), None if saved is None else self.saved(saved)],
                out_specs=out_specs,
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(dimension_semantics=order),
            interpret=interpret,
            name=f"attend_tiles{kernel.__name__.removesuffix('_kernel')}",
        )
        blocks, count = plan.blocks.reshape(-1), plan.count.reshape(-1)
        return call(blocks, count, inputs.offset, inputs._replace(offset=None), saved)

    def here(self, blocks_ref, count_ref) -> Place:
        """Of the step that runs."""
        ids = [pl.program_id(axis) for axis in range(5 if self.by_key else 4)]
        return self.place(ids, blocks_ref, count_ref)

    def place(self, ids, blocks_ref, count_ref) -> Place:
        group, (batches, heads, rows, capacity) = self.task.group, self.lists
        if self.by_key:
            batch, kv_head, own, group_head, step = ids
            head = kv_head * group + group_head
        else:
            batch, head, own, step = ids
            kv_head, group_head = lax.div(head, np.int32(group)), lax.rem(head, np.int32(group))
        first = (0 if batches == 1 else batch) * heads + (0 if heads == 1 else head)
        row = first * rows + own
        count = count_ref[row]
        last = jnp.maximum(count - 1, 0)
        listed = blocks_ref[row * capacity + jnp.minimum(step, last)]
        query, key = (listed, own) if self.by_key else (own, listed)
        return Place(batch, head, kv_head, group_head, query, key, step, count, last)

    def spec(self, shape, index):
        """Blocks whose index is that of a place."""

        def at(*args):
            *ids, blocks_ref, count_ref, _ = args
            return index(self.place(ids, blocks_ref, count_ref))

        return pl.BlockSpec(shape, at)

    def queries(self, width):
        """Of [B, H, T, width]."""
        shape = None, None, self.task.block_q, width
        return self.spec(shape, lambda at: (at.batch, at.head, at.query, 0))

    def keys(self, width):
        """Of [B, K, S, width]."""
        shape = None, None, self.task.block_k, width
        return self.spec(shape, lambda at: (at.batch, at.kv_head, at.key, 0))

    def query_numbers(self):
        """Of [B, H, 1, T]."""
        shape = None, None, 1, self.task.block_q
        return self.spec(shape, lambda at: (at.batch, at.head, 0, at.query))

    def key_numbers(self, batches=None, heads=None):
        """Of [B, H, 1, S], where an axis may be 1."""
        shape = None, None, 1, self.task.block_k

        def index(at):
            return 0 if batches == 1 else at.batch, 0 if heads == 1 else at.head, 0, at.key

        return self.spec(shape, index)

    def inputs(self, x: Inputs) -> Inputs:
        ids = x.q_ids is not None
        q_ids = self.spec((None, 1, self.task.block_q), lambda at: (at.batch, 0, at.query))
        k_ids = self.spec((None, 1, self.task.block_k), lambda at: (at.batch, 0, at.key))
        return Inputs(
            q=self.queries(x.q.shape[3]),
            k=self.keys(x.k.shape[3]),
            v=self.keys(x.v.shape[3]),
            bias=None if x.bias is None else self.key_numbers(*x.bias.shape[:2]),
            q_ids=q_ids if ids else None,
            k_ids=k_ids if ids else None,
            offset=None,
            blocks=None,
            count=None,
        )

    def saved(self, x: Saved) -> Saved:
        return Saved(self.queries(x.dy.shape[3]), self.query_numbers(), self.query_numbers())

    def logits(self, scores, at, x, offset):
        """A tile's products as logits in base 2, and the slope of the cap or None."""
        task = self.task
        axis = 1 if self.by_key else 0  # of the queries
        q_at = lax.broadcasted_iota(jnp.int32, scores.shape, axis)
        k_at = lax.broadcasted_iota(jnp.int32, scores.shape, 1 - axis)

        def along(ref, axis):
            return None if ref is None else ref[...] if axis else column_of(ref[...])

        query = Side(q_at + (at.query * task.block_q + offset), along(x.q_ids, axis))
        key = Side(k_at + at.key * task.block_k, along(x.k_ids, 1 - axis), along(x.bias, 1 - axis))
        return logits(task.rules, scores, query, key, task.end)


def prepared(rules, operands, where):
    """Arrays [B, H, T, D] of whole blocks, D of whole lanes, and what is static."""
    plan = where.plan
    inputs = _tile_kernels.inputs_of(operands, where, laid)._replace(blocks=None, count=None)
    if inputs.q_ids is not None:
        inputs = inputs._replace(q_ids=inputs.q_ids[:, None], k_ids=inputs.k_ids[:, None])
    end = plan.num_keys if plan.num_keys % plan.block_k else None
    group = operands.q.shape[2] // operands.k.shape[2]
    return inputs, Task(rules, group, plan.block_q, plan.block_k, end)


def laid(x):
    """[B, T, H, D] as [B, H, T, D] of whole lanes."""
    return pad(jnp.swapaxes(x, 1, 2), 3, lane_width(x) - x.shape[-1])


def column_of(row):
    """[1, n] as [n, 1]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def row_of(columns):
    """Equal columns [n, 128] as [1, n]."""
    return columns.T[:1]


def lane_width(x):
    """The last axis of x filled up to whole lanes."""
    return x.shape[-1] + -x.shape[-1] % LANES
