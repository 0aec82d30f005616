"""Homoscedastic uncertainty: a learned variance of each task divides its loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jbalance import checks
from jbalance.multitask.types import TaskStats, TaskWeighting


def uncertainty(learning_rate: float = 1e-2) -> TaskWeighting:
    """Weights exp(-s_k), where s follows the gradient of sum_k exp(-s_k) L_k + s_k.

    At rest s_k = log L_k, so a task weighs 1 / L_k. Kendall et al. (2018), Multi-Task Learning Using
    Uncertainty, arXiv:1705.07115, eq. 7, with the factor 1/2 of regression left out and s = log σ².

    Args:
      learning_rate: of the log-variances; > 0.

    Raises:
      ValueError: learning_rate not above 0.
    """
    checks.positive("learning_rate", learning_rate)

    def weigh(stats: TaskStats, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = jnp.exp(-state)
        return weights, state - learning_rate * (1 - weights * stats.losses)

    return TaskWeighting(lambda tasks: jnp.zeros(tasks, jnp.float32), weigh, needs_losses=True)
