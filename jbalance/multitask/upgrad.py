"""UPGrad: every task's gradient projected onto the cone in which it conflicts with no task."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jbalance import checks
from jbalance.multitask._complementarity import minimize
from jbalance.multitask.gramian import unit_diagonal
from jbalance.multitask.types import TaskStats, TaskWeighting, of_finite


def upgrad(ridge: float = 1e-6) -> TaskWeighting:
    """The mean of the gradients' projections onto {v: g_j · v >= 0 for all j}: no task is harmed.

    The projection of g_i is sum_j w_j g_j, w = argmin wᵀ G w over w >= e_i. It is linear in the length
    of each gradient, so the programs are solved for directions: G has diagonal one, and a ridge does
    not swamp short gradients. Quinton and Rey (2024), Jacobian Descent, arXiv:2406.16232, eq. 5.

    Args:
      ridge: added to the diagonal of the directions' Gramian; > 0.

    Raises:
      ValueError: ridge not above 0; from update, gradients that are not finite.
    """
    ridge = checks.static_float("ridge", ridge, checks.FLOAT32_TINY)

    def weigh(stats: TaskStats, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        return upgrad_weights(stats.gram, ridge), state

    return TaskWeighting(lambda tasks: (), of_finite(weigh), needs_gram=True)


def upgrad_weights(gram: jax.Array, ridge: float = 1e-6) -> jax.Array:
    """Weights [K] of `upgrad` for a Gramian [K, K]; 0 for gradients that are zero."""
    size = gram.shape[0]
    direction, inverse = unit_diagonal(gram)
    direction += jnp.diag((inverse == 0).astype(jnp.float32))
    # Row i: weights of directions for g_i / |g_i|.
    projected = jnp.eye(size, dtype=jnp.float32) + minimize(direction, direction, ridge)
    length = jnp.sqrt(jnp.diagonal(gram))
    return length @ projected * inverse / size
