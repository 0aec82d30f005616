"""Whole programs for pods of TPUs: a model of Llama 8B's shape that decodes, reads and learns.

The mesh has an axis of 8 chips, `model`, over which heads, the vocabulary and the layers' inner
features are split, and one of all the rest, `data`, with requests or examples. Weights of a model that
decodes are bfloat16 and the same in every group of 8; those of one that learns are float32 and split
over all chips.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding

from jbalance import attention, importance, sharded
from jbalance import cache as kv_cache

MODEL = 8  # chips that share a layer
LAYERS, WIDTH, INNER, VOCABULARY = 32, 4096, 14336, 128256
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
REQUESTS, CONTEXT, SHARE = 32, 131_072, 0.1  # of each group of 8 chips; of a full cache's bytes
PROMPT, EXAMPLE = 32_768, 32_768  # tokens
BLOCK, DENSITY = 512, 0.5
UNITS = 1 << 18  # of each chip: of 4,096 together 2^30, as int32 counts
LOSS_TOKENS = 512  # of a chip, whose logits are held at once


# Which of its last two axes a weight is split along over `model`; a learner's other one is over `data`.
_ALONG_MODEL = {
    "embed": -2,
    "head": -1,
    "query": -1,
    "key": -1,
    "value": -1,
    "out": -2,
    "gate": -1,
    "up": -1,
    "down": -2,
}


class Program(NamedTuple):
    """A function, the shapes of its arguments and where they lie, and which of them it may overwrite."""

    run: Callable[..., Any]
    shapes: tuple[Any, ...]
    donated: tuple[int, ...] = ()


def programs() -> dict[str, Callable[[np.ndarray], Program]]:
    """By name: what makes it for an array of devices."""
    return {
        "decode, a token of each request": decode,
        "prefill of a prompt": prefill,
        "training step over half of the tiles": train,
        "sharded.ladder": ladder,
        "sharded.whole": whole,
        "sharded.shares": shares,
        "sharded.blend": blend,
        "sharded.token_importance": token_importance,
        "sharded.tile_importance, choose": choose,
        "sharded.attend, heads and examples": attend,
        "sharded.attend, blocks of queries": attend_by_queries,
        "sharded.cache.step, requests": functools.partial(cache_step, "requests"),
        "sharded.cache.step, heads": functools.partial(cache_step, "heads"),
    }


def decode(devices: np.ndarray) -> Program:
    """One token of each request through all layers, each chip's cache of its requests and its head."""
    mesh, where = _mesh(devices)
    full = CONTEXT * REQUESTS * LAYERS * (KV_HEADS // MODEL) * HEAD_DIM * 4
    cache = _on_each(where, functools.partial(_cache, int(SHARE * full), REQUESTS))
    ids = where((REQUESTS * mesh.shape["data"],), jnp.int32, "data")

    def local(weights, cache, ids):
        cache = jax.tree.map(lambda x: x[0, 0], cache)
        x = lax.psum(_embedded(weights, ids), "model")

        def layer(carry, given):
            x, cache = carry
            w, index = given
            q, k, v = _projected(w, _normed(x))
            y, cache = kv_cache.step(cache, index, q, k, v)
            return (_after(w, x, y.astype(x.dtype)), cache), None

        (x, cache), _ = lax.scan(layer, (x, cache), (weights["layers"], jnp.arange(LAYERS)))
        logits = _normed(x) @ weights["head"]
        best = lax.all_gather(jnp.stack([jnp.max(logits, -1), _first(logits)]), "model")
        ids = jnp.take_along_axis(best[:, 1], jnp.argmax(best[:, 0], 0)[None], 0)[0]
        return ids.astype(jnp.int32), jax.tree.map(lambda x: x[None, None], cache)

    both = jax.P("data", "model")
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(_specs(_decoder_places()), both, jax.P("data")),
        out_specs=(jax.P("data"), both),
        check_vma=False,
    )
    return Program(run, (_weights(where, _decoder_places()), cache, ids), donated=(1,))


def prefill(devices: np.ndarray) -> Program:
    """A prompt of each group of 8 chips enters the cache of one request."""
    mesh, where = _mesh(devices)
    full = PROMPT * LAYERS * (KV_HEADS // MODEL) * HEAD_DIM * 4
    cache = _on_each(where, functools.partial(_cache, int(SHARE * full), 1))
    ids = where((mesh.shape["data"], PROMPT), jnp.int32, "data")
    frequencies = 500_000.0 ** -(np.arange(HEAD_DIM // 2, dtype=np.float32) / (HEAD_DIM // 2))

    def local(weights, cache, ids):
        cache = jax.tree.map(lambda x: x[0, 0], cache)
        x = lax.psum(_embedded(weights, ids), "model")

        def layer(carry, given):
            x, cache = carry
            w, index = given
            q, k, v = _projected(w, _normed(x))
            y, cache = kv_cache.prefill(cache, index, q, k, v, frequencies=frequencies)
            return (_after(w, x, y.astype(x.dtype)), cache), None

        (x, cache), _ = lax.scan(layer, (x, cache), (weights["layers"], jnp.arange(LAYERS)))
        return _normed(x[:, -1]), jax.tree.map(lambda x: x[None, None], cache)

    both = jax.P("data", "model")
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(_specs(_decoder_places()), both, jax.P("data")),
        out_specs=(jax.P("data"), both),
        check_vma=False,
    )
    return Program(run, (_weights(where, _decoder_places()), cache, ids), donated=(1,))


def train(devices: np.ndarray) -> Program:
    """A step of AdamW: every layer chooses half of the causal tiles and attends to them.

    Between layers each chip has an eighth of an example's tokens; weights come together over `data`
    where a layer needs them, in bfloat16.
    """
    mesh, where = _mesh(devices)
    places = _learner_places()
    weights = _weights(where, places, jnp.float32)
    optimizer = optax.adamw(1e-4)
    state = optax.tree_map_params(
        optimizer,
        lambda _, weight: weight,  # where its weight lies
        jax.eval_shape(optimizer.init, weights),
        weights,
        transform_non_params=lambda x: where(x.shape, x.dtype),
    )
    ids = where((mesh.shape["data"], EXAMPLE + 1), jnp.int32, "data")
    specs = _specs(places)

    def gradient(weights, ids):
        return jax.value_and_grad(_loss)(weights, ids)

    spread = jax.shard_map(
        gradient, mesh=mesh, in_specs=(specs, jax.P("data")), out_specs=(jax.P(), specs)
    )

    def step(weights, state, ids):
        value, gradient = spread(weights, ids)
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, value

    return Program(step, (weights, state, ids), donated=(0, 1))


def _loss(weights, ids):
    """Mean negative log-likelihood of the next tokens; on each chip of its part of the vocabulary."""
    tiling = attention.Tiling(EXAMPLE, EXAMPLE, BLOCK, BLOCK)
    tiles = int(DENSITY * HEADS * tiling.num_tiles)

    def whole(x):
        return lax.all_gather(x, "model", axis=1, tiled=True)

    def split(x):
        return lax.psum_scatter(x, "model", scatter_dimension=1, tiled=True)

    @jax.checkpoint
    def layer(x, own):
        w = {name: _over_data(y, name) for name, y in own.items()}
        q, k, v = _projected(w, whole(_normed(x)))
        fixed = [lax.stop_gradient(y) for y in (q, k, v)]
        score = importance.tile_sketch(fixed[0], fixed[1], fixed[2], tiling)
        plan = attention.choose(score, tiles, tiling, axis_name="model")
        y = attention.attend(q, k, v, plan, causal=True).y
        x = x + split(y.reshape(*y.shape[:2], -1) @ w["out"])
        return x + split(_inner(w, whole(_normed(x)))), None

    table = {"embed": _over_data(weights["embed"], "embed")}
    x, _ = lax.scan(layer, split(_embedded(table, ids[:, :-1])), weights["layers"])
    head = _over_data(weights["head"], "head")
    x = _normed(x)
    at = lax.axis_index("model") * x.shape[1]
    labels = lax.dynamic_slice_in_dim(ids, at + 1, x.shape[1], axis=1)

    @jax.checkpoint
    def part(total, given):
        x, labels = map(whole, given)
        logits = (x @ head).astype(jnp.float32)
        top = lax.pmax(lax.stop_gradient(jnp.max(logits, -1)), "model")
        mass = lax.psum(jnp.sum(jnp.exp(logits - top[..., None]), -1), "model")
        own = labels - lax.axis_index("model") * logits.shape[-1]
        inside = (own >= 0) & (own < logits.shape[-1])
        found = jnp.take_along_axis(logits, jnp.where(inside, own, 0)[..., None], -1)[..., 0]
        label = lax.psum(jnp.where(inside, found, 0), "model")
        return total + jnp.sum(top + jnp.log(mass) - label), None

    parts = tuple(
        jnp.moveaxis(y.reshape(y.shape[0], -1, min(LOSS_TOKENS, y.shape[1]), *y.shape[2:]), 1, 0)
        for y in (x, labels)
    )
    total, _ = lax.scan(part, lax.pcast(jnp.zeros(()), ("data",), to="varying"), parts)
    return lax.psum(total, "data") / (lax.axis_size("data") * ids.shape[0] * EXAMPLE)


def _over_data(weight, name):
    """All of a weight that this chip's place along `model` has, in bfloat16."""
    axis = weight.ndim - (2 if _ALONG_MODEL[name] == -1 else 1)
    return lax.all_gather(weight.astype(jnp.bfloat16), "data", axis=axis, tiled=True)


def _chosen(q, k, v, tiling, tiles, along):
    score = sharded.tile_importance(importance.tile_sketch, q, k, v, tiling, **along)
    return sharded.choose(score, tiles, tiling, **along)


def ladder(devices: np.ndarray) -> Program:
    """A price for all and one for each chip, of a million units each at four levels."""
    mesh, where = _line(devices)
    values = where((UNITS * devices.size, 4), jnp.float32, "device")
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
    mesh, where = _line(devices)
    w = where((UNITS * devices.size,), jnp.float32, "device")
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
    mesh, where = _mesh(devices)
    return mesh, tuple(
        where((mesh.shape["data"], EXAMPLE, n, HEAD_DIM), jnp.bfloat16, *places)
        for n in (HEADS, KV_HEADS, KV_HEADS)
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
    tiling = attention.Tiling(EXAMPLE, EXAMPLE, BLOCK, BLOCK)
    along = {"mesh": mesh, "batch": "data", "heads": "model"}
    tiles = int(DENSITY * HEADS * tiling.num_tiles)
    return Program(lambda q, k, v: _chosen(q, k, v, tiling, tiles, along), qkv)


def attend(devices: np.ndarray) -> Program:
    """Attention over lists of tiles."""
    mesh, qkv = _qkv(devices, "data", None, "model")
    return _attend(mesh, qkv, {"batch": "data", "heads": "model"}, ("data", "model"))


def attend_by_queries(devices: np.ndarray) -> Program:
    """The same with blocks of queries over the 8 chips."""
    mesh, qkv = _qkv(devices, "data", "model")
    return _attend(mesh, qkv, {"batch": "data", "queries": "model"}, ("data", None, "model"))


def _attend(mesh, qkv, along, places):
    blocks = EXAMPLE // BLOCK
    lead = (mesh.shape["data"], HEADS, blocks)

    def lists(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, jax.P(*places)))

    def run(q, k, v, blocks, count):
        plan = attention.TilePlan(blocks, count, EXAMPLE, EXAMPLE, BLOCK, BLOCK)
        return sharded.attend(q, k, v, plan, causal=True, mesh=mesh, **along).y

    return Program(run, (*qkv, lists(*lead, blocks), lists(*lead)))


def cache_step(split: str, devices: np.ndarray) -> Program:
    """One layer's attention for one token of each request."""
    mesh, where = _line(devices if split == "requests" else devices.reshape(-1)[:MODEL])
    requests = 4 * mesh.shape["device"] if split == "requests" else REQUESTS
    with _as_on_tpus():
        cache = jax.eval_shape(
            lambda: sharded.cache.create(
                1 << 30,
                LAYERS,
                KV_HEADS,
                HEAD_DIM,
                mesh=mesh,
                axis_name="device",
                split=split,
                num_requests=requests,
            )
        )
    held = jax.tree.map(lambda x: where(x.shape, x.dtype, "device"), cache)
    places = ("device",) if split == "requests" else (None, "device")
    qkv = (
        where((requests, n, HEAD_DIM), jnp.bfloat16, *places) for n in (HEADS, KV_HEADS, KV_HEADS)
    )

    def run(cache, q, k, v):
        return sharded.cache.step(cache, 0, q, k, v)

    return Program(run, (held, *qkv), donated=(0,))


def _mesh(devices: np.ndarray) -> tuple[Mesh, Callable[..., Any]]:
    """Groups of 8, and what says where an array lies."""
    mesh = Mesh(devices.reshape(-1, MODEL), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return mesh, functools.partial(_array, mesh)


def _line(devices: np.ndarray) -> tuple[Mesh, Callable[..., Any]]:
    """All along one axis."""
    mesh = Mesh(devices.reshape(-1), ("device",), axis_types=(AxisType.Auto,))
    return mesh, functools.partial(_array, mesh)


def _array(mesh, shape, dtype, *places):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, jax.P(*places)))


def _on_each(where, make) -> Any:
    """An array of every leaf for each chip."""
    with _as_on_tpus():
        shapes = jax.eval_shape(make)
    mesh = where.args[0]
    lead = tuple(mesh.shape.values())
    return jax.tree.map(lambda x: where((*lead, *x.shape), x.dtype, *mesh.axis_names), shapes)


def _as_on_tpus():
    """Sizes of pages as they are where a TPU is what computes."""
    return mock.patch.object(jax, "default_backend", return_value="tpu")


def _cache(budget_bytes, requests):
    heads = KV_HEADS // MODEL
    return kv_cache.create(budget_bytes, LAYERS, heads, HEAD_DIM, num_requests=requests)


def _shapes() -> dict[str, Any]:
    """Of each weight; those of layers have an axis of layers first."""
    return {
        "embed": (VOCABULARY, WIDTH),
        "head": (WIDTH, VOCABULARY),
        "layers": {
            "query": (LAYERS, WIDTH, HEADS * HEAD_DIM),
            "key": (LAYERS, WIDTH, KV_HEADS * HEAD_DIM),
            "value": (LAYERS, WIDTH, KV_HEADS * HEAD_DIM),
            "out": (LAYERS, HEADS * HEAD_DIM, WIDTH),
            "gate": (LAYERS, WIDTH, INNER),
            "up": (LAYERS, WIDTH, INNER),
            "down": (LAYERS, INNER, WIDTH),
        },
    }


def _decoder_places() -> dict[str, Any]:
    """Of each weight its shape and the mesh axis of each of its own."""
    return _places(other=None)


def _learner_places() -> dict[str, Any]:
    """The same with the other axis over `data`."""
    return _places(other="data")


def _places(other):
    def place(path, shape):
        along: list[str | None] = [None] * (len(shape) - 2) + [other, other]
        along[_ALONG_MODEL[path[-1].key]] = "model"
        return shape, tuple(along)

    return jax.tree_util.tree_map_with_path(
        place, _shapes(), is_leaf=lambda x: isinstance(x, tuple)
    )


def _weights(where, places, dtype: Any = jnp.bfloat16) -> Any:
    def leaf(weight):
        return where(weight[0], dtype, *weight[1])

    return jax.tree.map(leaf, places, is_leaf=lambda x: isinstance(x, tuple))


def _specs(places) -> Any:
    return jax.tree.map(lambda w: jax.P(*w[1]), places, is_leaf=lambda x: isinstance(x, tuple))


def _embedded(weights, ids):
    """This chip's rows of the table, zeros for those of others."""
    own = weights["embed"].shape[0]
    at = ids - lax.axis_index("model") * own
    inside = (at >= 0) & (at < own)
    return jnp.where(inside[..., None], jnp.take(weights["embed"], jnp.clip(at, 0, own - 1), 0), 0)


def _first(logits):
    """The index of the largest logit among those of all chips, as a float."""
    return (jnp.argmax(logits, -1) + lax.axis_index("model") * logits.shape[-1]).astype(jnp.float32)


def _normed(x):
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return (x * lax.rsqrt(square + 1e-5)).astype(x.dtype)


def _projected(w, x):
    """q, k, v [..., heads, D]; the rotary embedding, which no collective sees, is left out."""
    return tuple(
        (x @ w[name]).reshape(*x.shape[:-1], -1, HEAD_DIM) for name in ("query", "key", "value")
    )


def _inner(w, x):
    return (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]


def _after(w, x, y):
    """What follows attention in a layer, its products split over `model`."""
    x = x + lax.psum(y.reshape(*x.shape[:-1], -1) @ w["out"], "model")
    return x + lax.psum(_inner(w, _normed(x)), "model")
