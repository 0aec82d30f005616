"""The forward pass over lists of tiles on TPUs: a step takes several listed key blocks at once.

The matrix unit wants wide products, a plan's quality narrow key blocks. So the listed blocks of a step
lie side by side in one product. Keys and values of a head, together, are in vector memory where they fit
there, and a step takes its blocks from them. Where they do not, the blocks are copied from the main
memory into one buffer while the step before is computed; the copies of a row's first step are begun by
the row before.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jbalance._exp2 import LOG2_E
from jbalance.attention import _tile_kernels
from jbalance.attention._grid_tpu import LANES, column_of, lane_width
from jbalance.attention._operands import Operands, Rules, Visibility
from jbalance.attention._slices import pad
from jbalance.attention._steps_tpu import Copied, Read, Resident, Step, buffers
from jbalance.attention._tile_kernels import Side, dot
from jbalance.attention._varying import like
from jbalance.attention.partial import EMPTY, NO_TOP, Partial
from jbalance.attention.plan import TilePlan

STEP_KEYS = 512  # of a step, in as many blocks as there are in so many keys
RESIDENT_BYTES = 8 << 20  # of two heads' keys and values, at most, that lie in vector memory whole


def joined_blocks(plan: TilePlan) -> int:
    """How many key blocks a step takes."""
    return max(1, min(STEP_KEYS // plan.block_k, plan.blocks.shape[3]))


def step_bytes(operands: Operands, plan: TilePlan) -> int:
    """About what the kernel keeps in vector memory: two buffers, sums and scores."""
    keys = joined_blocks(plan) * plan.block_k
    width, size = _key_value_lanes(operands), operands.q.dtype.itemsize
    tokens = operands.k.shape[1] if _resident(operands) else keys
    return 2 * tokens * width * size + 4 * plan.block_q * (2 * width + 3 * keys)


def _resident(operands):
    """Whether keys and values of two heads fit into their part of vector memory."""
    row = _key_value_lanes(operands) * operands.k.dtype.itemsize
    return 2 * operands.k.shape[1] * row <= RESIDENT_BYTES


def _together(operands):
    """Whether keys and values lie in the lanes that keys alone would fill."""
    return operands.k.shape[3] + operands.v.shape[3] <= LANES


def _key_value_lanes(operands):
    """Of a key and its values in their row."""
    wide = lane_width(operands.k) + lane_width(operands.v)
    return LANES if _together(operands) else wide


@functools.partial(jax.jit, static_argnums=(0, 3))  # a constraint of memory is for programs only
def run(rules: Rules, operands: Operands, where: Visibility, interpret: bool) -> Partial:
    """y [B, T, H, E] and lse [B, T, H]."""
    plan, (batch, queries, heads, width) = where.plan, operands.q.shape
    together, resident = _together(operands), _resident(operands)
    inputs = _tile_kernels.inputs_of(operands, where, lambda x: jnp.swapaxes(x, 1, 2))
    if not together:
        inputs = inputs._replace(k=_whole_lanes(inputs.k), v=_whole_lanes(inputs.v))
    kv = _whole_lanes(jnp.concatenate([inputs.k, inputs.v], axis=3))
    key_lanes = LANES if together else inputs.k.shape[3]
    step = _step(rules, plan, operands, key_lanes, resident)
    if not resident:
        kv = kv.reshape(*kv.shape[:2], -1, plan.block_k, kv.shape[3])
        # XLA may put it into vector memory, where a copy is a loop of moves.
        kv = kv if interpret else pltpu.with_memory_space_constraint(kv, pltpu.HBM)
    read = Read(
        _lists(plan, step),
        pad(inputs.q, 3, step.key_lanes - width),
        kv,
        inputs.bias,
        *(None if x is None else x[:, None] for x in (inputs.q_ids, inputs.k_ids)),
    )
    wide = LANES if together else inputs.v.shape[3]
    rows, shape = plan.num_query_blocks, read.q.shape[:3]
    y, lse = pl.pallas_call(
        functools.partial(_kernel, step=step),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, rows),
            in_specs=[_specs(read, step)],
            out_specs=[
                pl.BlockSpec((None, None, plan.block_q, wide), lambda b, h, i, *_: (b, h, i, 0)),
                pl.BlockSpec((None, None, rows, plan.block_q), lambda b, h, i, *_: (b, h, 0, 0)),
            ],
            scratch_shapes=[
                *(pltpu.VMEM((plan.block_q, n), jnp.float32) for n in (wide, LANES, LANES)),
                *([] if resident else buffers(step, read.kv)),
            ],
        ),
        out_shape=[
            like(read.q, (*shape, wide), operands.q.dtype),
            like(read.q, (*shape[:2], rows, plan.block_q)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            disable_bounds_checks=True,  # what the lists name is there
        ),
        interpret=interpret,
        name="attend_tiles_forward",
    )(plan.count.reshape(-1), inputs.offset, read)
    first = width if together else 0
    y = jnp.swapaxes(y, 1, 2)[:, :queries, :, first : first + operands.v.shape[3]]
    lse = jnp.swapaxes(lse.reshape(batch, heads, -1), 1, 2)
    return Partial(y, lse[:, :queries])


def _step(rules, plan, operands, key_lanes, resident):
    joined = joined_blocks(plan)
    capacity = plan.blocks.shape[3] + -plan.blocks.shape[3] % joined
    group = operands.q.shape[2] // operands.k.shape[2]
    lists = *plan.blocks.shape[:3], capacity
    blocks = plan.block_q, plan.block_k
    return Step(rules, lists, group, *blocks, joined, plan.num_keys, key_lanes, resident)


def _lists(plan, step):
    """[B|1, H|1, I, 1, C + joined]: blocks of whole steps, behind the end the last one again.

    And those of the next row's first step; of the last row its own.
    """
    blocks = pad(plan.blocks, 3, step.lists[3] - plan.blocks.shape[3])
    last = jnp.maximum(plan.count - 1, 0)[..., None]
    place = jnp.minimum(jnp.arange(step.lists[3], dtype=jnp.int32), last)
    blocks = jnp.take_along_axis(blocks, place, axis=3)
    first = blocks[..., : step.joined]
    following = jnp.concatenate([first[:, :, 1:], first[:, :, -1:]], axis=2)
    return jnp.concatenate([blocks, following], axis=3)[..., None, :]


def _specs(read, step):
    def own(*shape):
        return pl.BlockSpec((None, None, *shape), lambda b, h, i, *_: (b, h, i, 0))

    def listed(b, h, i, *_):
        batches, heads = step.lists[:2]
        return 0 if batches == 1 else b, 0 if heads == 1 else h, i, 0, 0

    def of_keys(x):
        batches, heads = x.shape[0], x.shape[1] if x.ndim == 4 else 1
        none = (None,) * (x.ndim - 2)

        def index(b, h, i, *_):
            place = 0 if batches == 1 else b, 0 if heads == 1 else h
            return *place[: x.ndim - 2], 0, 0

        return pl.BlockSpec((*none, 1, x.shape[-1]), index)

    def of_head(b, h, i, *_):
        return b, lax.div(h, jnp.int32(step.group)), 0, 0

    whole = pl.BlockSpec((None, None, *read.kv.shape[2:]), of_head)
    q_ids = pl.BlockSpec((None, 1, step.block_q), lambda b, h, i, *_: (b, 0, i))
    return Read(
        pl.BlockSpec((None, None, None, *read.blocks.shape[3:]), listed, memory_space=pltpu.SMEM),
        own(step.block_q, read.q.shape[3]),
        whole if step.resident else pl.BlockSpec(memory_space=pltpu.HBM),
        None if read.bias is None else of_keys(read.bias),
        None if read.q_ids is None else q_ids,
        None if read.k_ids is None else of_keys(read.k_ids),
    )


def _whole_lanes(x):
    return pad(x, 3, lane_width(x) - x.shape[3])


def _kernel(
    count_ref,  # [B|1 H|1 I]
    offset_ref,  # [1]
    x: Read,  # blocks [1, C + joined], q [bq, D], bias and k_ids [1, S], q_ids [1, bq]
    y_ref,  # [bq, E]
    lse_ref,  # [I, bq], of all query blocks
    sum_ref,  # [bq, E]
    mass_ref,  # [bq, 128], of equal columns
    top_ref,  # [bq, 128]
    *ring,  # of `buffers`, if keys and values are in the main memory
    step: Step,
):
    """A block of queries of one head, and all blocks of its list."""
    batches, heads, rows, _ = step.lists
    batch, head, own = (pl.program_id(axis) for axis in range(3))
    first_row = ((0 if batches == 1 else batch) * heads + (0 if heads == 1 else head)) * rows
    count = count_ref[first_row + own]
    steps = jnp.maximum(pl.cdiv(count, step.joined), 1)
    place = batch, lax.div(head, jnp.int32(step.group))
    source = Resident(step, x) if step.resident else Copied(step, x, place, steps, *ring)
    pl.when(own == 0)(source.begin)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    mass_ref[...] = jnp.zeros_like(mass_ref)
    top_ref[...] = jnp.full_like(top_ref, NO_TOP)
    q_first = own * step.block_q + offset_ref[0]
    needs = _needs_mask(step, x)

    def one(s, carry):
        ready = source.ready(s)

        def update(masked):
            logits = functools.partial(_logits, step, x, s, count, q_first, masked)
            _add(x, source.take(ready), (sum_ref, mass_ref, top_ref), logits, step)

        if needs and step.joined > 4:  # positions of many blocks cost more than the branch
            free = _all_seen(step, x.blocks, s, count, q_first)
            pl.when(free & (count > 0))(lambda: update(False))
            pl.when(jnp.logical_not(free) & (count > 0))(lambda: update(True))
        else:
            pl.when(count > 0)(lambda: update(needs))
        return carry

    lax.fori_loop(0, steps, one, None)
    source.end(own == rows - 1)
    some = mass_ref[...] > 0
    mass = jnp.where(some, mass_ref[...], 1.0)
    y_ref[...] = (sum_ref[...] / _tiled(mass, sum_ref.shape[1])).astype(y_ref.dtype)
    lse = jnp.where(some, (top_ref[...] + jnp.log2(mass)) / LOG2_E, EMPTY)
    lse_ref[pl.ds(own, 1)] = lse.T[:1]


def _needs_mask(step, x):
    """Whether there is anything that a step's queries may not see."""
    rules = step.rules
    partial = step.num_keys % step.block_k != 0 or step.joined > 1
    return rules.causal or rules.window is not None or x.q_ids is not None or partial


def _all_seen(step, blocks_ref, s, count, q_first):
    """Whether every query sees every key of a step, by the first and last of its blocks, in order."""
    rules, first = step.rules, s * step.joined
    begin = blocks_ref[0, first] * step.block_k
    end = (blocks_ref[0, first + step.joined - 1] + 1) * step.block_k  # of the keys
    q_last = q_first + step.block_q - 1
    seen = ((s + 1) * step.joined <= count) & (end <= step.num_keys)
    if rules.causal:
        seen = seen & (end - 1 <= q_first)
    if rules.window is not None:
        seen = seen & (begin > q_last - rules.window)
        if not rules.causal:
            seen = seen & (end - 1 < q_first + rules.window)
    return seen


def _logits(step, x, s, count, q_first, masked, scores):
    """A step's products as logits in base 2."""
    query, key, end = Side(None, None), Side(None, None), None
    bias = step.along(x.bias, x.blocks, s)
    rules = step.rules._replace(causal=False, window=None)
    if masked or x.q_ids is not None:
        q_at = lax.broadcasted_iota(jnp.int32, scores.shape, 0) + q_first
        k_at = jnp.broadcast_to(step.position(x.blocks, s, count), scores.shape)
        q_ids = None if x.q_ids is None else column_of(x.q_ids[...])
        query = Side(q_at, q_ids)
        key = Side(k_at, step.along(x.k_ids, x.blocks, s))
        rules, end = step.rules, step.num_keys
    return _tile_kernels.logits(rules, scores, query, key._replace(bias=bias), end)[0]


def _add(x, kv, sums, logits, step):
    """The softmax so far with that of a step."""
    sum_ref, mass_ref, top_ref = sums
    together = kv.shape[1] == step.key_lanes
    values = kv if together else kv[:, step.key_lanes :]
    scores = logits(dot(x.q[...], kv[:, : step.key_lanes], turned=True))
    top = top_ref[...]
    new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
    weight = jnp.exp2(scores - _tiled(new_top, scores.shape[1]))
    decay = jnp.exp2(top - new_top)
    added = dot(weight.astype(values.dtype), values)
    sum_ref[...] = sum_ref[...] * _tiled(decay, sum_ref.shape[1]) + added
    mass_ref[...] = mass_ref[...] * decay + jnp.sum(weight, axis=1, keepdims=True)
    top_ref[...] = new_top


def _tiled(columns, width):
    """Equal columns [n, 128] as [n, width]: taking one and spreading it would cost a step a row."""
    copies = -(-width // LANES)
    wide = columns if copies == 1 else jnp.concatenate([columns] * copies, axis=1)
    return wide[:, :width]
