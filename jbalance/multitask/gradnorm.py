"""GradNorm: weights that make the tasks' weighted gradients as long as their training lags."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jbalance import checks
from jbalance.multitask.types import TaskStats, TaskWeighting


class GradNormState(NamedTuple):
    """State of `gradnorm`."""

    weights: jax.Array  # [K], sum K
    first: jax.Array  # [K] losses of the first step
    step: jax.Array  # [] int32


def gradnorm(asymmetry: float = 1.5, learning_rate: float = 0.025) -> TaskWeighting:
    """Weights follow the gradient of sum_k | w_k |g_k| - mean_j(w_j |g_j|) r_k^a |, and sum to K.

    r_k is the part of its first loss that task k still has, over the mean of all; the target is held
    fixed. Only the diagonal of the Gramian is used. Chen et al. (2018), GradNorm, arXiv:1711.02257,
    eq. 1 and 2.

    Args:
      asymmetry: a >= 0; larger pulls harder towards tasks that lag.
      learning_rate: of the weights; > 0.

    Raises:
      ValueError: a number outside its range.
    """
    checks.non_negative("asymmetry", asymmetry)
    checks.positive("learning_rate", learning_rate)
    tiny = jnp.finfo(jnp.float32).tiny

    def init(tasks: int) -> GradNormState:
        return GradNormState(jnp.ones(tasks), jnp.ones(tasks), jnp.zeros((), jnp.int32))

    def weigh(stats: TaskStats, state: GradNormState) -> tuple[jax.Array, GradNormState]:
        first = jnp.where(state.step == 0, stats.losses, state.first)
        length = jnp.sqrt(jnp.diagonal(stats.gram))
        left = stats.losses / jnp.maximum(first, tiny)
        lag = left / jnp.maximum(jnp.mean(left), tiny)
        scaled = state.weights * length
        slope = jnp.sign(scaled - jnp.mean(scaled) * lag**asymmetry) * length
        # In units of the mean length, so that the rate does not depend on the gradients' scale.
        slope = slope / jnp.maximum(jnp.mean(length), tiny)
        weights = jnp.maximum(state.weights - learning_rate * slope, 1e-3)
        weights = weights * (weights.size / jnp.sum(weights))
        return state.weights, GradNormState(weights, first, state.step + 1)

    return TaskWeighting(init, weigh, needs_gram=True, needs_losses=True)
