"""Attention over tiles on a mesh.

Examples go over one mesh axis (data parallel), heads over another (tensor parallel; those that share
keys stay together), blocks of queries over a third (context parallel), tasks over a fourth: any of
them, of any type. What does not divide is filled up and cut again: examples, query blocks and tasks
that are not there compute no tile, heads that are not there do (`padding` says how much that is); a
result with an axis that did not divide is the same on all devices along it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jbalance import _axes, attention, checks
from jbalance.attention import Partial, TilePlan
from jbalance.sharded._layout import Dims, axis_size, operands, padding, shapes, sizes_of, spread

_Q, _KV = Dims("BTHD"), Dims("BSKD")
# The arrays among the options of `attention.attend`.
_ARRAYS = ("bias", "relative_bias", "segment_ids", "task_shares")


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: TilePlan,
    *,
    mesh: Mesh,
    batch: str | None = None,
    heads: str | None = None,
    queries: str | None = None,
    tasks: str | None = None,
    block_at: jax.Array | None = None,
    **options: Any,
) -> Partial:
    """`attention.attend` over a mesh; differentiable as it is.

    Over examples, heads and tasks nothing is exchanged. Over queries each device gathers the keys and
    values of its heads, and in the gradient scatters their sums: 2 S K D numbers each way.

    Causal blocks of queries see the more keys the later they come, so that ranks in the order of the
    sequence wait for the last one. `block_at` lets the tokens lie on the devices in another order:
    `place.pack` of what the blocks cost (the counts of a plan; `place.causal_tiles` where all is
    computed) says which block goes where, `block_order` in which order that is, and everything by
    token (q, k, v, segment_ids, the keys of bias and task_shares) comes in that order; plan and
    relative_bias stay in that of the sequence.

    Args:
      q: [B, T, H, D].
      k: [B, S, K, D].
      v: [B, S, K, D].
      plan: the tiles.
      mesh: of the devices.
      batch: the mesh axis that examples are split over, or None.
      heads: that of key/value heads, with the query heads that share them.
      queries: that of query blocks and keys.
      tasks: that of the rows of task_shares.
      block_at: [I] int32, the block of the sequence that each block of q is; for T = S, whole blocks,
        as many on each device.
      **options: those of `attention.attend`: causal, bias, segment_ids, task_shares, ...

    Returns:
      The `Partial` of one device.

    Raises:
      ValueError: those of `attention.attend`; an axis that the mesh does not have; tasks without
        task_shares; a block_at whose blocks do not fit.
    """
    checks.instance("plan", plan, TilePlan)
    q, k, v = operands(q, k, v)
    options = {name: x for name, x in options.items() if x is not None}
    offset = options.pop("offset", None)
    given = {name: options.pop(name) for name in _ARRAYS if name in options}
    num_ranks = axis_size(mesh, "queries", queries)
    if block_at is not None:
        _check_block_at(block_at, plan, num_ranks)
        if offset is not None:
            raise ValueError(f"offset is {offset}: with block_at the queries are those of the keys")
    if tasks is not None and "task_shares" not in given:
        raise ValueError(
            f"tasks is {tasks!r}, but task_shares is None: there are no tasks to split"
        )
    return _attend(
        {"q": q, "k": k, "v": v} | given,
        plan,
        block_at,
        offset,
        mesh=mesh,
        axes=(batch, heads, queries, tasks),
        rules=tuple(options.items()),
    )


def block_order(device_of: jax.Array, num_ranks: int) -> jax.Array:
    """`block_at` [I] of a placement of query blocks with equal counts: rank by rank, each ascending.

    Args:
      device_of: [I] int32, as of `place.causal_tiles`.
      num_ranks: G, of which I is a multiple.

    Raises:
      ValueError: a number of blocks that does not divide; ranks that do not have as many blocks each.
    """
    _axes.unsplit(device_of=device_of)
    checks.rank("device_of", device_of, 1, "[I]")
    num_ranks = checks.static_int("num_ranks", num_ranks, 1)
    checks.non_empty("device_of", device_of)
    device_of = checks.index_below("device_of", device_of, num_ranks)
    num_blocks = np.shape(device_of)[0]
    _check_divides("device_of", num_blocks, num_ranks)
    if checks.is_concrete(device_of):
        count = np.bincount(np.asarray(device_of), minlength=num_ranks)
        if (count != num_blocks // num_ranks).any():
            raise ValueError(
                f"device_of gives the ranks {count.tolist()} blocks: it must be "
                f"{num_blocks // num_ranks} each"
            )
    return jnp.argsort(jnp.asarray(device_of), stable=True).astype(jnp.int32)


def _check_block_at(block_at, plan, num_ranks):
    num_blocks = plan.num_query_blocks
    if np.shape(block_at) != (num_blocks,):
        raise ValueError(
            f"block_at has shape {np.shape(block_at)}: it must be [I] = ({num_blocks},)"
        )
    if plan.num_queries != plan.num_keys or plan.num_queries % plan.block_q:
        raise ValueError(
            f"block_at is given for {plan.num_queries} queries and {plan.num_keys} keys in blocks of "
            f"{plan.block_q}: it needs as many keys as queries, and whole blocks"
        )
    _check_divides("block_at", num_blocks, num_ranks)


def _check_divides(name, num_blocks, num_ranks):
    if num_blocks % num_ranks:
        raise ValueError(
            f"{name} has {num_blocks} blocks for {num_ranks} ranks: their number must divide, fill the "
            f"sequence up to {padding(num_blocks, num_ranks).size} blocks"
        )


@functools.partial(jax.jit, static_argnames=("mesh", "axes", "rules"))
def _attend(given, plan, block_at, offset, *, mesh, axes, rules):
    # Its errors, of the shapes that the caller knows.
    want = jax.eval_shape(
        lambda a, plan: attention.attend(plan=plan, **a, **dict(rules)), *shapes((given, plan))
    )
    batch, heads, queries, tasks = axes
    axis_of = {"B": batch, "H": heads, "K": heads, "N": tasks} | dict.fromkeys("TSI", queries)
    q, k = given["q"], given["k"]
    sizes = sizes_of(mesh, batch, heads, q.shape[0], q.shape[2], k.shape[2])
    num_ranks = axis_size(mesh, "queries", queries)
    if queries is not None:
        sizes["I"] = padding(plan.num_query_blocks, num_ranks).size
        sizes["T"] = sizes["I"] * plan.block_q
        sizes["S"] = padding(plan.num_keys, num_ranks).size
    if tasks is not None:
        num_tasks = given["task_shares"].shape[0]
        sizes["N"] = padding(num_tasks, axis_size(mesh, "tasks", tasks)).size
    # "s" and "x" are whole on every device.
    dims: dict[str, Any] = {"q": _Q, "k": _KV, "v": _KV}
    of_others = {
        "bias": Dims("BHTs"),
        "relative_bias": Dims("Hx"),
        "segment_ids": (Dims("BT"), Dims("Bs")),
        "task_shares": Dims("Ns"),
    }
    dims |= {name: d for name, d in of_others.items() if name in given}
    lists = {"blocks": plan.blocks, "count": plan.count}
    if block_at is not None:
        lists = {name: x[:, :, block_at] for name, x in lists.items()}
    args = given | {"lists": lists}
    dims["lists"] = {"blocks": Dims("BHIC"), "count": Dims("BHI")}
    if block_at is not None:
        args |= {"block_at": block_at, "order": jnp.argsort(block_at)}
        dims |= {"block_at": Dims("I"), "order": Dims("x")}
    if offset is not None:
        args["offset"], dims["offset"] = jnp.asarray(offset, jnp.int32), Dims("")
    local = functools.partial(_local, plan=plan, queries=queries, tasks=tasks, rules=dict(rules))
    out_dims = Dims("BTNHD" if "task_shares" in given else "BTHD"), Dims("BTH")
    out_shapes = want.y.shape, want.lse.shape
    return Partial(*spread(local, mesh, axis_of, sizes, args, dims, out_dims, out_shapes))


def _local(args, *, plan, queries, tasks, rules):
    """One device's queries, against all keys."""
    args = dict(args)
    lists = args.pop("lists")
    block_at, order = args.pop("block_at", None), args.pop("order", None)
    if queries is not None:
        for name in ("k", "v"):
            whole = lax.all_gather(args[name], queries, axis=1, tiled=True)
            args[name] = whole[:, : plan.num_keys]
    if block_at is not None:
        args = _in_order(args, order, plan.block_q)
        out = _by_blocks(args, lists, block_at, plan, rules)
    else:
        out = _in_one(args, lists, plan, queries, rules)
    if tasks is None:
        return tuple(out)
    # The same for all tasks; of the first device, as a sum that can be differentiated.
    first = lax.axis_index(tasks) == 0
    return out.y, lax.psum(jnp.where(first, out.lse, 0), tasks)


def _in_order(args, order, block):
    """What belongs to keys, in the order of the sequence."""

    def sorted_(x, axis):
        blocks = x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
        return jnp.take(blocks, order, axis=axis).reshape(x.shape)

    args |= {name: sorted_(args[name], 1) for name in ("k", "v")}
    if "segment_ids" in args:
        q_ids, k_ids = args["segment_ids"]
        args["segment_ids"] = q_ids, sorted_(k_ids, 1)
    if "task_shares" in args:
        args["task_shares"] = sorted_(args["task_shares"], 1)
    if "bias" in args and args["bias"].shape[3] > 1:
        args["bias"] = sorted_(args["bias"], 3)
    return args


def _in_one(args, lists, plan, queries, rules):
    """Queries that follow each other."""
    size = args["q"].shape[1]
    first: Any = 0 if queries is None else lax.axis_index(queries) * size
    start = args.pop("offset", plan.num_keys - plan.num_queries)
    return _part(args, lists, first, start + first, plan, rules)


def _by_blocks(args, lists, block_at, plan, rules):
    """Blocks of queries from anywhere in the sequence, one after the other.

    A scan, so that the gradients of the keys add up in its carry.
    """
    size = plan.block_q
    by_block = {
        "q": _blocks(args.pop("q"), size),
        "blocks": jnp.moveaxis(lists["blocks"], 2, 0)[:, :, :, None],
        "count": jnp.moveaxis(lists["count"], 2, 0)[..., None],
        "at": block_at * size,
    }
    if "segment_ids" in args:
        by_block["ids"] = _blocks(args["segment_ids"][0], size)
    if "bias" in args and args["bias"].shape[2] > 1:
        by_block["bias"] = _blocks(jnp.moveaxis(args.pop("bias"), 2, 1), size)

    def step(_, x):
        own = args | {"q": x["q"]}
        if "ids" in x:
            own["segment_ids"] = x["ids"], args["segment_ids"][1]
        if "bias" in x:
            own["bias"] = jnp.moveaxis(x["bias"], 1, 2)
        own_lists = {"blocks": x["blocks"], "count": x["count"]}
        return None, _part(own, own_lists, x["at"], x["at"], plan, rules)

    _, out = lax.scan(step, None, by_block)
    return jax.tree.map(_unblocked, out)


def _blocks(x, size):
    """[B, n size, ...] as [n, B, size, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _unblocked(x):
    """[n, B, size, ...] as [B, n size, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _part(args, lists, first, offset, plan, rules):
    """Attention of queries `first`, first + 1, ..., the first at position `offset` of the keys."""
    args = dict(args)
    size = args["q"].shape[1]
    if "relative_bias" in args:
        # [H, T + S - 1] at t - s + S - 1: of these queries T' + S - 1 from the first one on.
        length, bias = size + plan.num_keys - 1, args["relative_bias"]
        short = max(0, -(-plan.num_queries // size) * size + plan.num_keys - 1 - bias.shape[1])
        bias = jnp.pad(bias, ((0, 0), (0, short)))
        args["relative_bias"] = lax.dynamic_slice_in_dim(bias, first, length, axis=1)
    own = TilePlan(
        **lists,
        num_queries=size,
        num_keys=plan.num_keys,
        block_q=plan.block_q,
        block_k=plan.block_k,
    )
    return attention.attend(plan=own, offset=offset, **args, **rules)
