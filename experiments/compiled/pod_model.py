"""A model of Llama 8B's shape, one chip's part of it: inside `shard_map` over `data` and `model`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.compiled import sizes
from jbalance import attention, importance

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


def _shapes() -> dict[str, Any]:
    """Of each weight; those of layers have an axis of layers first."""
    return {
        "embed": (sizes.VOCABULARY, sizes.WIDTH),
        "head": (sizes.WIDTH, sizes.VOCABULARY),
        "layers": {
            "query": (sizes.LAYERS, sizes.WIDTH, sizes.HEADS * sizes.HEAD_DIM),
            "key": (sizes.LAYERS, sizes.WIDTH, sizes.KV_HEADS * sizes.HEAD_DIM),
            "value": (sizes.LAYERS, sizes.WIDTH, sizes.KV_HEADS * sizes.HEAD_DIM),
            "out": (sizes.LAYERS, sizes.HEADS * sizes.HEAD_DIM, sizes.WIDTH),
            "gate": (sizes.LAYERS, sizes.WIDTH, sizes.INNER),
            "up": (sizes.LAYERS, sizes.WIDTH, sizes.INNER),
            "down": (sizes.LAYERS, sizes.INNER, sizes.WIDTH),
        },
    }


def decoder_places() -> dict[str, Any]:
    """Of each weight its shape and the mesh axis of each of its own."""
    return _places(other=None)


def learner_places() -> dict[str, Any]:
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


def weights_of(where, places, dtype: Any = jnp.bfloat16) -> Any:
    def leaf(weight):
        return where(weight[0], dtype, *weight[1])

    return jax.tree.map(leaf, places, is_leaf=lambda x: isinstance(x, tuple))


def specs_of(places) -> Any:
    return jax.tree.map(lambda w: jax.P(*w[1]), places, is_leaf=lambda x: isinstance(x, tuple))


def embedded(weights, ids):
    """This chip's rows of the table, zeros for those of others."""
    own = weights["embed"].shape[0]
    at = ids - lax.axis_index("model") * own
    inside = (at >= 0) & (at < own)
    return jnp.where(inside[..., None], jnp.take(weights["embed"], jnp.clip(at, 0, own - 1), 0), 0)


def first_largest(logits):
    """The index of the largest logit among those of all chips, as a float."""
    return (jnp.argmax(logits, -1) + lax.axis_index("model") * logits.shape[-1]).astype(jnp.float32)


def normed(x):
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return (x * lax.rsqrt(square + 1e-5)).astype(x.dtype)


def projected(w, x):
    """q, k, v [..., heads, D]; the rotary embedding, which no collective sees, is left out."""
    return tuple(
        (x @ w[name]).reshape(*x.shape[:-1], -1, sizes.HEAD_DIM)
        for name in ("query", "key", "value")
    )


def _inner(w, x):
    return (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]


def after(w, x, y):
    """What follows attention in a layer, its products split over `model`."""
    x = x + lax.psum(y.reshape(*x.shape[:-1], -1) @ w["out"], "model")
    return x + lax.psum(_inner(w, normed(x)), "model")


def loss(weights, ids):
    """Mean negative log-likelihood of the next tokens; on each chip of its part of the vocabulary."""
    tiling = attention.Tiling(sizes.EXAMPLE, sizes.EXAMPLE, sizes.BLOCK, sizes.BLOCK)
    tiles = int(sizes.DENSITY * sizes.HEADS * tiling.num_tiles)

    def whole(x):
        return lax.all_gather(x, "model", axis=1, tiled=True)

    def split(x):
        return lax.psum_scatter(x, "model", scatter_dimension=1, tiled=True)

    @jax.checkpoint
    def layer(x, own):
        w = {name: _over_data(y, name) for name, y in own.items()}
        q, k, v = projected(w, whole(normed(x)))
        fixed = [lax.stop_gradient(y) for y in (q, k, v)]
        score = importance.tile_sketch(fixed[0], fixed[1], fixed[2], tiling)
        plan = attention.choose(score, tiles, tiling, axis_name="model")
        y = attention.attend(q, k, v, plan, causal=True).y
        x = x + split(y.reshape(*y.shape[:2], -1) @ w["out"])
        return x + split(_inner(w, whole(normed(x)))), None

    table = {"embed": _over_data(weights["embed"], "embed")}
    x, _ = lax.scan(layer, split(embedded(table, ids[:, :-1])), weights["layers"])
    head = _over_data(weights["head"], "head")
    x = normed(x)
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
        jnp.moveaxis(
            y.reshape(y.shape[0], -1, min(sizes.LOSS_TOKENS, y.shape[1]), *y.shape[2:]), 1, 0
        )
        for y in (x, labels)
    )
    total, _ = lax.scan(part, lax.pcast(jnp.zeros(()), ("data",), to="varying"), parts)
    return lax.psum(total, "data") / (lax.axis_size("data") * ids.shape[0] * sizes.EXAMPLE)


def _over_data(weight, name):
    """All of a weight that this chip's place along `model` has, in bfloat16."""
    axis = weight.ndim - (2 if _ALONG_MODEL[name] == -1 else 1)
    return lax.all_gather(weight.astype(jnp.bfloat16), "data", axis=axis, tiled=True)
