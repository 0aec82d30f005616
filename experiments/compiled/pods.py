"""Whole programs for pods of TPUs: a model of Llama 8B's shape that decodes, reads and learns.

The mesh has an axis of 8 chips, `model`, over which heads, the vocabulary and the layers' inner
features are split, and one of all the rest, `data`, with requests or examples. Weights of a model that
decodes are bfloat16 and the same in every group of 8; those of one that learns are float32 and split
over all chips.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.compiled import pod_model as model
from experiments.compiled import pod_stages as stages
from experiments.compiled import sizes
from experiments.compiled.pod_mesh import Program, as_on_tpus, groups
from jbalance import cache as kv_cache


def programs() -> dict[str, Callable[[np.ndarray], Program]]:
    """By name: what makes it for an array of devices."""
    return {
        "decode, a token of each request": decode,
        "prefill of a prompt": prefill,
        "training step over half of the tiles": train,
        "sharded.ladder": stages.ladder,
        "sharded.whole": stages.whole,
        "sharded.shares": stages.shares,
        "sharded.blend": stages.blend,
        "sharded.token_importance": stages.token_importance,
        "sharded.tile_importance, choose": stages.choose,
        "sharded.attend, heads and examples": stages.attend,
        "sharded.attend, blocks of queries": stages.attend_by_queries,
        "sharded.cache.step, requests": functools.partial(stages.cache_step, "requests"),
        "sharded.cache.step, heads": functools.partial(stages.cache_step, "heads"),
    }


def decode(devices: np.ndarray) -> Program:
    """One token of each request through all layers, each chip's cache of its requests and its head."""

    def end(weights, x):
        logits = model.normed(x) @ weights["head"]
        own = jnp.stack([jnp.max(logits, -1), model.first_largest(logits)])
        best = lax.all_gather(own, "model")
        ids = jnp.take_along_axis(best[:, 1], jnp.argmax(best[:, 0], 0)[None], 0)[0]
        return ids.astype(jnp.int32)

    number = sizes.REQUESTS * (devices.size // sizes.MODEL)
    attend = kv_cache.step
    return _over_caches(devices, sizes.REQUESTS, sizes.CONTEXT, (number,), attend, end)


def prefill(devices: np.ndarray) -> Program:
    """A prompt of each group of 8 chips enters the cache of one request."""
    half = sizes.HEAD_DIM // 2
    frequencies = 500_000.0 ** -(np.arange(half, dtype=np.float32) / half)
    attend = functools.partial(kv_cache.prefill, frequencies=frequencies)
    shape = devices.size // sizes.MODEL, sizes.PROMPT
    return _over_caches(
        devices, 1, sizes.PROMPT, shape, attend, lambda _, x: model.normed(x[:, -1])
    )


def _over_caches(devices, requests, context, ids_shape, attend, end) -> Program:
    """Tokens through all layers, `attend(cache, layer, q, k, v)` in each, and what `end` makes of x.

    Every chip has a cache of its group's requests, of a part of what their contexts take in full.
    """
    mesh, where = groups(devices)
    places = model.decoder_places()
    heads = sizes.KV_HEADS // sizes.MODEL
    full = context * requests * sizes.LAYERS * heads * sizes.HEAD_DIM * 4
    cache = _on_each(
        where,
        lambda: kv_cache.create(
            int(sizes.SHARE * full), sizes.LAYERS, heads, sizes.HEAD_DIM, num_requests=requests
        ),
    )

    def local(weights, cache, ids):
        cache = jax.tree.map(lambda x: x[0, 0], cache)
        x = lax.psum(model.embedded(weights, ids), "model")

        def layer(carry, given):
            x, cache = carry
            w, index = given
            q, k, v = model.projected(w, model.normed(x))
            y, cache = attend(cache, index, q, k, v)
            return (model.after(w, x, y.astype(x.dtype)), cache), None

        layers = weights["layers"], jnp.arange(sizes.LAYERS)
        (x, cache), _ = lax.scan(layer, (x, cache), layers)
        return end(weights, x), jax.tree.map(lambda x: x[None, None], cache)

    both = jax.P("data", "model")
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(model.specs_of(places), both, jax.P("data")),
        out_specs=(jax.P("data"), both),
        check_vma=False,
    )
    ids = where(ids_shape, jnp.int32, "data")
    return Program(run, (model.weights_of(where, places), cache, ids), donated=(1,))


def train(devices: np.ndarray) -> Program:
    """A step of AdamW: every layer chooses half of the causal tiles and attends to them.

    Between layers each chip has an eighth of an example's tokens; weights come together over `data`
    where a layer needs them, in bfloat16.
    """
    mesh, where = groups(devices)
    places = model.learner_places()
    weights = model.weights_of(where, places, jnp.float32)
    optimizer = optax.adamw(1e-4)
    state = optax.tree_map_params(
        optimizer,
        lambda _, weight: weight,  # where its weight lies
        jax.eval_shape(optimizer.init, weights),
        weights,
        transform_non_params=lambda x: where(x.shape, x.dtype),
    )
    ids = where((mesh.shape["data"], sizes.EXAMPLE + 1), jnp.int32, "data")
    specs = model.specs_of(places)

    def gradient(weights, ids):
        return jax.value_and_grad(model.loss)(weights, ids)

    spread = jax.shard_map(
        gradient, mesh=mesh, in_specs=(specs, jax.P("data")), out_specs=(jax.P(), specs)
    )

    def step(weights, state, ids):
        value, gradient = spread(weights, ids)
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, value

    return Program(step, (weights, state, ids), donated=(0, 1))


def _on_each(where, make) -> Any:
    """An array of every leaf for each chip."""
    with as_on_tpus():
        shapes = jax.eval_shape(make)
    mesh = where.args[0]
    lead = tuple(mesh.shape.values())
    return jax.tree.map(lambda x: where((*lead, *x.shape), x.dtype, *mesh.axis_names), shapes)
