"""PCGrad (gradient surgery): conflicting parts are projected out, one task after the other."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import lax

from jbalance import checks
from jbalance.multitask.types import TaskStats, TaskWeighting, of_finite


def pcgrad(key: chex.PRNGKey) -> TaskWeighting:
    """The mean of the gradients, each less its projections on those it conflicts with, in random order.

    In the Gramian's form: what is kept of g_i is a row of coefficients, and a product with g_j is one
    with a column of G. Yu et al. (2020), Gradient Surgery, arXiv:2001.06782, algorithm 1.

    Args:
      key: consumed: the state is split from it.
    """

    checks.random_key("key", key)

    def weigh(stats: TaskStats, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        state, subkey = jax.random.split(state)
        return pcgrad_weights(stats.gram, subkey), state

    return TaskWeighting(lambda tasks: key, of_finite(weigh), needs_gram=True)


@jax.jit  # once for all eager calls
def pcgrad_weights(gram: jax.Array, key: chex.PRNGKey) -> jax.Array:
    """Weights [K] of `pcgrad` for a Gramian [K, K]."""
    size = gram.shape[0]
    orders = jax.vmap(lambda k: jax.random.permutation(k, size))(jax.random.split(key, size))
    index = jnp.arange(size)

    def step(coefficients, j):  # j [K]: for each task, the one it meets
        conflict = jnp.sum(coefficients * gram[j], axis=-1)
        length = gram[j, j]
        least = jnp.where((conflict < 0) & (j != index) & (length > 0), conflict, 0.0)
        return coefficients.at[index, j].add(-least / jnp.where(length > 0, length, 1)), None

    coefficients, _ = lax.scan(step, jnp.eye(size, dtype=jnp.float32), orders.T)
    return jnp.mean(coefficients, axis=0)
