"""GradNorm: weights that make the tasks' weighted gradients as long as their training lags."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jbalance import checks
from jbalance.multitask.types import TaskStats, TaskWeighting, not_negative, of_finite

_LARGEST = 1e30  # part of its first loss that a task has left, and power of it


class GradNormState(NamedTuple):
    """State of `gradnorm`."""

    weights: jax.Array  # [K], sum K
    first: jax.Array  # [K] losses of the first step; of a task that began at 0, the first above it
    step: jax.Array  # [] int32


def gradnorm(asymmetry: float = 1.5, learning_rate: float = 0.025) -> TaskWeighting:
    """Weights follow the gradient of sum_k | w_k |g_k| - mean_j(w_j |g_j|) r_k^a |, and sum to K.

    r_k is the part of its first loss that task k still has (of the first above 0, where it begins with
    0), over the mean of all, and 1 where all are at 0; the target is held fixed. Only the diagonal of
    the Gramian is used. Chen et al. (2018), GradNorm, arXiv:1711.02257, eq. 1 and 2.

    Args:
      asymmetry: a >= 0; larger pulls harder towards tasks that lag.
      learning_rate: of the weights; > 0.

    Raises:
      ValueError: a number outside its range; from update, a loss that is negative or not finite (under
        jit, a negative one counts as 0).
    """
    asymmetry = checks.static_float("asymmetry", asymmetry, 0)
    learning_rate = checks.static_float("learning_rate", learning_rate, checks.FLOAT32_TINY)

    def init(tasks: int) -> GradNormState:
        ones = jnp.ones(tasks, jnp.float32)
        return GradNormState(ones, ones, jnp.zeros((), jnp.int32))

    def weigh(stats: TaskStats, state: GradNormState) -> tuple[jax.Array, GradNormState]:
        losses = not_negative(stats.losses)
        first = jnp.where((state.step == 0) | (state.first == 0), losses, state.first)
        left = jnp.where(first > 0, losses / jnp.where(first > 0, first, 1), 0)
        lag = _over_mean(jnp.minimum(left, _LARGEST))
        # In units of the mean length, so that the rate does not depend on the gradients' scale.
        length = _over_mean(jnp.sqrt(jnp.diagonal(stats.gram)))
        scaled = state.weights * length
        target = jnp.mean(scaled) * jnp.minimum(lag**asymmetry, _LARGEST)
        slope = jnp.sign(scaled - target) * length
        weights = jnp.maximum(state.weights - learning_rate * slope, 1e-3)
        weights = weights * (weights.size / jnp.sum(weights))
        return state.weights, GradNormState(weights, first, state.step + 1)

    return TaskWeighting(init, of_finite(weigh), needs_gram=True, needs_losses=True)


def _over_mean(x: jax.Array) -> jax.Array:
    """x [K] >= 0 over its mean; ones where all are 0."""
    top = jnp.max(x)
    x = jnp.where(top > 0, x / jnp.where(top > 0, top, 1), 1)
    return x / jnp.mean(x)
