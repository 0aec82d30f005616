"""The stages of `jbalance.sharded` for a pod, each as a program of its own."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from experiments.compiled import sizes
from experiments.compiled.pod_mesh import Program, as_on_tpus, groups, line
from jbalance import attention, importance, sharded


def ladder(devices: np.ndarray) -> Program:
    """A price for all and one for each chip, of units at four levels."""
    mesh, where = line(devices)
    values = where((sizes.UNITS * devices.size, 4), jnp.float32, "device")
    budgets = where((devices.size,), jnp.int32)

    def run(values, budgets):
        total = jnp.sum(budgets // 2)
        return sharded.ladder(
            values,
            jnp.array([0, 2, 4, 8]),
            budgets,
            total_budget=jnp.minimum(total, 2**30),
            mesh=mesh,
            axis_name="device",
        )

    return Program(run, (values, budgets))


def _units(call, devices):
    mesh, where = line(devices)
    w = where((sizes.UNITS * devices.size,), jnp.float32, "device")
    return Program(functools.partial(call, mesh=mesh, axis_name="device"), (w,))


def whole(devices: np.ndarray) -> Program:
    """Whole amounts of one budget."""
    return _units(lambda w, **on: sharded.whole(w, 2**30, **on), devices)


def shares(devices: np.ndarray) -> Program:
    """alpha = w / sum w."""
    return _units(sharded.shares, devices)


def blend(devices: np.ndarray) -> Program:
    """Importance with a prior."""
    return _units(lambda w, **on: sharded.blend(w, jnp.ones_like(w), 0.5, **on), devices)


def _qkv(devices, *places):
    mesh, where = groups(devices)
    return mesh, tuple(
        where((mesh.shape["data"], sizes.EXAMPLE, n, sizes.HEAD_DIM), jnp.bfloat16, *places)
        for n in (sizes.HEADS, sizes.KV_HEADS, sizes.KV_HEADS)
    )


def token_importance(devices: np.ndarray) -> Program:
    """What the last queries attend to."""
    mesh, qkv = _qkv(devices, "data", None, "model")
    run = functools.partial(
        sharded.token_importance, importance.window, mesh=mesh, batch="data", heads="model"
    )
    return Program(run, qkv)


def choose(devices: np.ndarray) -> Program:
    """The tiles of an example that are worth most, at one price over its heads."""
    mesh, qkv = _qkv(devices, "data", None, "model")
    tiling = attention.Tiling(sizes.EXAMPLE, sizes.EXAMPLE, sizes.BLOCK, sizes.BLOCK)
    along: dict[str, Any] = {"mesh": mesh, "batch": "data", "heads": "model"}
    tiles = int(sizes.DENSITY * sizes.HEADS * tiling.num_tiles)

    def run(q, k, v):
        score = sharded.tile_importance(importance.tile_sketch, q, k, v, tiling, **along)
        return sharded.choose(score, tiles, tiling, **along)

    return Program(run, qkv)


def attend(devices: np.ndarray) -> Program:
    """Attention over lists of tiles."""
    mesh, qkv = _qkv(devices, "data", None, "model")
    return _attend(mesh, qkv, {"batch": "data", "heads": "model"}, ("data", "model"))


def attend_by_queries(devices: np.ndarray) -> Program:
    """The same with blocks of queries over the 8 chips."""
    mesh, qkv = _qkv(devices, "data", "model")
    return _attend(mesh, qkv, {"batch": "data", "queries": "model"}, ("data", None, "model"))


def _attend(mesh, qkv, along, places):
    blocks = sizes.EXAMPLE // sizes.BLOCK
    lead = (mesh.shape["data"], sizes.HEADS, blocks)

    def lists(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, jax.P(*places)))

    def run(q, k, v, blocks, count):
        plan = attention.TilePlan(
            blocks, count, sizes.EXAMPLE, sizes.EXAMPLE, sizes.BLOCK, sizes.BLOCK
        )
        return sharded.attend(q, k, v, plan, causal=True, mesh=mesh, **along).y

    return Program(run, (*qkv, lists(*lead, blocks), lists(*lead)))


def cache_step(split: str, devices: np.ndarray) -> Program:
    """One layer's attention for one token of each request."""
    mesh, where = line(devices if split == "requests" else devices.reshape(-1)[: sizes.MODEL])
    requests = 4 * mesh.shape["device"] if split == "requests" else sizes.REQUESTS
    with as_on_tpus():
        cache = jax.eval_shape(
            lambda: sharded.cache.create(
                1 << 30,
                sizes.LAYERS,
                sizes.KV_HEADS,
                sizes.HEAD_DIM,
                mesh=mesh,
                axis_name="device",
                split=split,
                num_requests=requests,
            )
        )
    held = jax.tree.map(lambda x: where(x.shape, x.dtype, "device"), cache)
    places = ("device",) if split == "requests" else (None, "device")
    qkv = (
        where((requests, n, sizes.HEAD_DIM), jnp.bfloat16, *places)
        for n in (sizes.HEADS, sizes.KV_HEADS, sizes.KV_HEADS)
    )

    def run(cache, q, k, v):
        return sharded.cache.step(cache, 0, q, k, v)

    return Program(run, (held, *qkv), donated=(0,))
