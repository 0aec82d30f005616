"""Calls of `jbalance.sharded` over a mesh with the one axis "x", and what one device says to them.

Shared by the tests on many devices and in many processes. Every number of units is odd, so that it
divides by no number of devices but one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import allocate, attention, cache, importance, place, sharded
from jbalance import shares as share_rules

AXIS = "x"
U, M, BLOCK = 29, 4, 8
B, T, K, GROUP, D, N = 3, 40, 3, 2, 8, 3
H, NUM_BLOCKS = K * GROUP, T // BLOCK
_rng = np.random.default_rng(3)


def _normal(*shape):
    return _rng.normal(size=shape).astype(np.float32)


W = _rng.integers(0, 9, U).astype(np.float32)
PRIOR = _rng.integers(0, 4, U).astype(np.float32)
FEEDBACK = _rng.uniform(-1, 1, U).astype(np.float32)
FLOOR = _rng.integers(0, 3, U).astype(np.int32)
CAP = _rng.integers(3, 40, U).astype(np.int32)
DEVICE_OF = _rng.integers(0, 3, U).astype(np.int32)
VALUES = np.cumsum(_rng.integers(0, 5, (U, M)), axis=1).astype(np.float32)
COSTS = np.array([1, 2, 4, 8], np.int32)
Q, KEYS, V = _normal(B, T, H, D), _normal(B, T, K, D), _normal(B, T, K, D)
TILE_SCORE = np.abs(_normal(B, H, NUM_BLOCKS, NUM_BLOCKS)).round(1)  # with ties
TILING = attention.Tiling(T, T, BLOCK, BLOCK)
NUM_TILES = np.array([60, 70, 80], np.int32)
SEGMENTS = np.sort(_rng.integers(0, 2, (B, T)), axis=1).astype(np.int32)
RELATIVE = _normal(H, 2 * T - 1)
BIAS = _normal(1, 1, T, T)
TASKS = np.abs(_normal(N, T))
TASKS /= TASKS.sum(axis=0)
# As many blocks on each of 1, 2, 4 or 8 ranks: packed documents for `block_at`.
LONG = 64
DOCUMENTS = np.repeat(np.arange(3), [10, 30, 24]).astype(np.int32)
LONG_Q, LONG_K, LONG_V = _normal(B, LONG, H, D), _normal(B, LONG, K, D), _normal(B, LONG, K, D)
LONG_RELATIVE, LONG_BIAS = _normal(H, 2 * LONG - 1), _normal(1, 1, LONG, LONG)
LAYERS, PROMPT, STEPS, HEAD_DIM, RECENT = 2, 24, 5, 16, 4
CACHE_BYTES = 30_000
PAGES = 8


class Stage(NamedTuple):
    """A stage over a mesh, and on one device as if it had `num_devices`."""

    over: Callable[[jax.sharding.Mesh], Any]
    alone: Callable[[int], Any]


def _units(mesh):
    return {"mesh": mesh, "axis_name": AXIS}


def _own_budgets(num_devices):
    each = -(-U // num_devices)
    return np.arange(U) // each, (each * (2 + np.arange(num_devices) % 3)).astype(np.int32)


def _plan():
    return attention.choose(TILE_SCORE, NUM_TILES, TILING)


def _tiles(plan):
    return {"mask": attention.plan.to_mask(plan), "count": plan.count, "dropped": plan.dropped}


_MASKS = {"causal": True, "window": 30, "segment_ids": (SEGMENTS, SEGMENTS)}
_BIASES = {"relative_bias": RELATIVE, "bias": BIAS}


def _attend(mesh, **axes):
    return sharded.attend(Q, KEYS, V, _plan(), mesh=mesh, **_MASKS, **_BIASES, **axes)


def _attend_alone(_, **more):
    return attention.attend(Q, KEYS, V, _plan(), **_MASKS, **_BIASES, **more)


def _long_plan():
    value = jnp.abs(jnp.asarray(LONG_BIAS[0, 0, ::8, ::8]))
    return attention.choose(
        jnp.broadcast_to(value, (B, H, 8, 8)), 150, attention.Tiling(LONG, LONG, BLOCK, BLOCK)
    )


def in_rank_order(num_ranks):
    """`block_at` and the tokens in that order."""
    ranks = place.causal_tiles(DOCUMENTS, num_ranks, BLOCK).device_of
    block_at = sharded.block_order(ranks, num_ranks)
    return block_at, (block_at[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)


def _attend_documents(mesh):
    block_at, token = in_rank_order(mesh.shape[AXIS])
    ids = jnp.broadcast_to(jnp.asarray(DOCUMENTS)[token], (B, LONG))
    return sharded.attend(
        *(jnp.asarray(x)[:, token] for x in (LONG_Q, LONG_K, LONG_V)),
        _long_plan(),
        mesh=mesh,
        queries=AXIS,
        block_at=block_at,
        causal=True,
        segment_ids=(ids, ids),
        relative_bias=LONG_RELATIVE,
        bias=jnp.asarray(LONG_BIAS)[:, :, token][..., token],
    )


def _attend_documents_alone(num_ranks):
    _, token = in_rank_order(num_ranks)
    ids = jnp.broadcast_to(DOCUMENTS, (B, LONG))
    out = attention.attend(
        LONG_Q,
        LONG_K,
        LONG_V,
        _long_plan(),
        causal=True,
        segment_ids=(ids, ids),
        relative_bias=LONG_RELATIVE,
        bias=LONG_BIAS,
    )
    return jax.tree.map(lambda x: x[:, token], out)


# A decode: prompts enter, then a few tokens, so that recent buffers are full and flushed.
_PROMPT_Q = _normal(B, PROMPT, H, HEAD_DIM)
_PROMPT_K, _PROMPT_V = _normal(B, PROMPT, K, HEAD_DIM), _normal(B, PROMPT, K, HEAD_DIM)
_STEP = _normal(STEPS, LAYERS, B, H + 2 * K, HEAD_DIM)


def _decode(held, stage, first=0, heads=K):
    """y [LAYERS, B, S, H, D] of prompts and [STEPS, LAYERS, B, H, D] of a few tokens after them.

    `stage` is the module with `prefill` and `step`; of the model it sees so many heads from `first` on.
    """
    pages = {"allowance_pages": jnp.full(B, PAGES, jnp.int32)}

    def own(*x):
        """Queries, keys and values of the heads, an axis before the last."""
        return (
            jax.lax.slice_in_dim(jnp.asarray(x), first * each, (first + heads) * each, axis=-2)
            for x, each in zip(x, (GROUP, 1, 1), strict=True)
        )

    def prompt(held, layer):
        qkv = own(_PROMPT_Q, _PROMPT_K, _PROMPT_V)
        y, held = stage.prefill(held, layer, *qkv, frequencies=None, **pages)
        return held, y

    def token(held, x):
        def one(held, at):
            layer, x = at
            y, held = stage.step(held, layer, *own(*jnp.split(x, (H, H + K), axis=-2)), **pages)
            return held, y

        return jax.lax.scan(one, held, (jnp.arange(LAYERS), x))

    held, y_prompt = jax.lax.scan(prompt, held, jnp.arange(LAYERS))
    return y_prompt, jax.lax.scan(token, held, jnp.asarray(_STEP))[1]


def _mesh_decode(mesh, split):
    over = {"mesh": mesh, "axis_name": AXIS, "split": split}
    sizes = {"num_requests": B, "recent_tokens": RECENT}
    held = sharded.cache.create(CACHE_BYTES, LAYERS, K, HEAD_DIM, **over, **sizes)
    return _decode(held, sharded.cache)


def _decode_heads(num_devices):
    """A cache of their own for the heads of each device."""
    each, parts = -(-K // num_devices), []
    for first in range(0, K, each):
        heads = min(each, K - first)
        sizes = {"num_requests": B, "recent_tokens": RECENT}
        held = cache.create(CACHE_BYTES, LAYERS, heads, HEAD_DIM, **sizes)
        parts.append(_decode(held, cache, first, heads))
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=-2), *parts)


STAGES: dict[str, Stage] = {
    "pool": Stage(
        lambda mesh: sharded.blend(W, PRIOR, 0.4, FEEDBACK, 0.2, **_units(mesh)),
        lambda _: importance.blend(W, PRIOR, 0.4, FEEDBACK, 0.2),
    ),
    **{
        f"shares, {name}": Stage(
            lambda mesh, name=name: sharded.shares(W, name, **_units(mesh)),
            lambda _, name=name: share_rules.SHARE_RULES[name](W),
        )
        for name in share_rules.SHARE_RULES
    },
    "shares of no weight": Stage(
        lambda mesh: sharded.shares(0 * W, **_units(mesh)),
        lambda _: share_rules.proportional(0 * W),
    ),
    "whole": Stage(
        lambda mesh: sharded.whole(W, 300, FLOOR, CAP, **_units(mesh)),
        lambda _: allocate.whole(W, 300, FLOOR, CAP),
    ),
    "ladder": Stage(
        lambda mesh: sharded.ladder(
            VALUES, COSTS, [50, 70, 90], DEVICE_OF, total_budget=150, **_units(mesh)
        ),
        lambda _: allocate.ladder(VALUES, COSTS, [50, 70, 90], DEVICE_OF, total_budget=150),
    ),
    "ladder of own budgets": Stage(
        lambda mesh: sharded.ladder(
            VALUES, COSTS, _own_budgets(mesh.shape[AXIS])[1], total_budget=60, **_units(mesh)
        ),
        lambda n: allocate.ladder(
            VALUES, COSTS, _own_budgets(n)[1], _own_budgets(n)[0], total_budget=60
        ),
    ),
    "importance of tokens": Stage(
        lambda mesh: sharded.token_importance(
            importance.key_norm, Q, KEYS, V, mesh=mesh, heads=AXIS
        ),
        lambda _: jax.vmap(importance.key_norm)(Q, KEYS, V),
    ),
    "importance of tiles": Stage(
        lambda mesh: sharded.tile_importance(
            importance.tile_error, Q, KEYS, V, TILING, mesh=mesh, batch=AXIS
        ),
        lambda _: importance.tile_error(Q, KEYS, V, TILING),
    ),
    "choice of tiles": Stage(
        lambda mesh: _tiles(sharded.choose(TILE_SCORE, NUM_TILES, TILING, mesh=mesh, heads=AXIS)),
        lambda _: _tiles(_plan()),
    ),
    "attention over examples": Stage(lambda mesh: _attend(mesh, batch=AXIS), _attend_alone),
    "attention over heads": Stage(lambda mesh: _attend(mesh, heads=AXIS), _attend_alone),
    "attention over queries": Stage(lambda mesh: _attend(mesh, queries=AXIS), _attend_alone),
    "attention over tasks": Stage(
        lambda mesh: _attend(mesh, tasks=AXIS, task_shares=TASKS),
        lambda _: _attend_alone(_, task_shares=TASKS),
    ),
    "attention over documents": Stage(_attend_documents, _attend_documents_alone),
    "cache of requests": Stage(
        lambda mesh: _mesh_decode(mesh, "requests"), lambda _: _decode_heads(1)
    ),
    "cache of heads": Stage(lambda mesh: _mesh_decode(mesh, "heads"), _decode_heads),
}
