"""PCGrad: each gradient without what opposes the others, one after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jbalance.multitask.types import Facts, Weighing


def pcgrad(key: jax.Array) -> Weighing:
    """The mean of the gradients, each less its projections on those it conflicts with, in random order.

    In the Gramian's form: what is kept of g_i is a row of coefficients, and a product with g_j is one
    with a column of G. Yu et al. (2020), Gradient Surgery, arXiv:2001.06782, algorithm 1.

    Args:
      key: consumed: the state is split from it.
    """

    def weigh(facts: Facts, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        state, own = jax.random.split(state)
        return pcgrad_weights(facts.gram, own), state

    return Weighing(lambda tasks: key, weigh, needs_gram=True)


def pcgrad_weights(gram: jax.Array, key: jax.Array) -> jax.Array:
    """Weights [K] of `pcgrad` for a Gramian [K, K]."""
    size = gram.shape[0]
    orders = jax.vmap(lambda k: jax.random.permutation(k, size))(jax.random.split(key, size))
    own = jnp.arange(size)

    def step(coefficients, j):  # j [K]: for each task, the one it meets
        conflict = jnp.sum(coefficients * gram[j], axis=-1)
        length = gram[j, j]
        least = jnp.where((conflict < 0) & (j != own) & (length > 0), conflict, 0.0)
        return coefficients.at[own, j].add(-least / jnp.where(length > 0, length, 1)), None

    coefficients, _ = lax.scan(step, jnp.eye(size, dtype=jnp.float32), orders.T)
    return jnp.mean(coefficients, axis=0)
