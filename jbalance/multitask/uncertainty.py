"""Homoscedastic uncertainty: a learned variance of each task divides its loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jbalance import checks
from jbalance.multitask.types import TaskStats, TaskWeighting, not_negative, of_finite

_LARGEST = 46.0  # |s|: weights of 1e-20 to 1e20
_STEEPEST = 1e30  # loss times weight


def uncertainty(learning_rate: float = 1e-2) -> TaskWeighting:
    """Weights exp(-s_k), where s follows the gradient of sum_k exp(-s_k) L_k + s_k.

    At rest s_k = log L_k, so a task weighs 1 / L_k; no step leads beyond that, and no weight leaves
    1e-20 to 1e20, where a loss of 0 ends. Kendall et al. (2018), Multi-Task Learning Using
    Uncertainty, arXiv:1705.07115, eq. 7, with the factor 1/2 of regression left out and s = log σ².

    Args:
      learning_rate: of the log-variances; > 0.

    Raises:
      ValueError: learning_rate not above 0; from update, a loss that is negative or not finite (under
        jit, a negative one counts as 0).
    """
    learning_rate = checks.static_float("learning_rate", learning_rate, checks.FLOAT32_TINY)

    def weigh(stats: TaskStats, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = jnp.exp(-state)
        losses = not_negative(stats.losses)
        rest = jnp.clip(jnp.log(losses), -_LARGEST, _LARGEST)
        slope = 1 - jnp.minimum(weights * losses, _STEEPEST)
        later = state - learning_rate * slope
        return weights, jnp.clip(later, jnp.minimum(state, rest), jnp.maximum(state, rest))

    return TaskWeighting(
        lambda tasks: jnp.zeros(tasks, jnp.float32), of_finite(weigh), needs_losses=True
    )
