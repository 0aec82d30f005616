"""One classifier for all tasks: attention over a text's tokens, and a head of each task."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.sharing.data import NONE, TASKS, VOCABULARY

WIDTH = 32
_ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


def init(seed: int) -> tuple[Any, Any]:
    """Parameters, and the optimizer's state."""
    rng = np.random.default_rng(seed)
    parameters = {
        "vectors": jnp.asarray(rng.normal(0, 0.1, (VOCABULARY, WIDTH)), jnp.float32),
        "attention": jnp.zeros(VOCABULARY),
        "shift": jnp.zeros(WIDTH),
        "heads": jnp.asarray(rng.normal(0, WIDTH**-0.5, (len(TASKS), WIDTH)), jnp.float32),
        "bias": jnp.zeros(len(TASKS)),
    }
    return parameters, _ADAM.init(parameters)


def logits(parameters: Any, token_bias: Array, ids: Array, task: Array) -> Array:
    """[B] of texts [B, S], each by its task's head [B]; `token_bias` [V] joins attention's logits."""
    at, there = ids.astype(jnp.int32), ids != NONE
    score = (parameters["attention"] + token_bias).at[at].get(mode="fill", fill_value=0)
    weight = jax.nn.softmax(jnp.where(there, score, -1e30))
    vectors = parameters["vectors"].at[at].get(mode="fill", fill_value=0)
    y = jax.nn.relu(jnp.einsum("bs,bsw->bw", weight, vectors) + parameters["shift"])
    return jnp.einsum("bw,bw->b", y, parameters["heads"][task]) + parameters["bias"][task]


def losses(parameters: Any, token_bias: Array, ids: Array, task: Array, positive: Array) -> Array:
    """[B] cross-entropies."""
    found = logits(parameters, token_bias, ids, task)
    return optax.sigmoid_binary_cross_entropy(found, positive.astype(jnp.float32))


@jax.jit
def fit(trained: tuple[Any, Any], token_bias: Array, batches: Any, rate: Array) -> tuple[Any, Any]:
    """What a step for each of the batches (ids, task, positive) [steps, B, ...] makes of both."""

    def step(carry: Any, batch: Any) -> Any:
        parameters, state = carry
        gradient = jax.grad(lambda p: jnp.mean(losses(p, token_bias, *batch)))(parameters)
        updates, state = _ADAM.update(gradient, state)
        updates = jax.tree.map(lambda x: -rate * x, updates)
        return (optax.apply_updates(parameters, updates), state), None

    return jax.lax.scan(step, trained, batches)[0]
