"""FAMO: equal relative progress of all tasks, from the losses alone."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jbalance import checks
from jbalance.multitask.types import TaskStats, TaskWeighting, not_negative, of_finite


class FamoState(NamedTuple):
    """State of `famo`."""

    logits: jax.Array  # [K]
    losses: jax.Array  # [K] of the last step
    step: jax.Array  # [] int32


def famo(learning_rate: float = 0.025, decay: float = 1e-3) -> TaskWeighting:
    """Weights z_k / L_k over their sum, z = softmax(ξ); ξ moves towards tasks whose log-loss fell least.

    The loss after a step is that which the next update is given: of another batch, in place of a second
    look at the same one. Liu et al. (2023), FAMO, arXiv:2306.03792, algorithm 1 (with plain descent).

    Args:
      learning_rate: of ξ; > 0.
      decay: of ξ; >= 0.

    Raises:
      ValueError: a number outside its range; from update, a loss that is negative or not finite (under
        jit, a negative one counts as 0, which has the weight of the smallest float32 number).
    """
    learning_rate = checks.static_float("learning_rate", learning_rate, checks.FLOAT32_TINY)
    decay = checks.static_float("decay", decay, 0)
    tiny = jnp.finfo(jnp.float32).tiny

    def init(tasks: int) -> FamoState:
        zeros = jnp.zeros(tasks, jnp.float32)
        return FamoState(zeros, zeros + 1, jnp.zeros((), jnp.int32))

    def weigh(stats: TaskStats, state: FamoState) -> tuple[jax.Array, FamoState]:
        losses = jnp.maximum(not_negative(stats.losses), tiny)
        z = jax.nn.softmax(state.logits)
        fell = jnp.where(state.step == 0, 0.0, jnp.log(state.losses) - jnp.log(losses))
        slope = z * (fell - jnp.sum(z * fell))  # of z · fell with respect to the logits
        logits = state.logits - learning_rate * (slope + decay * state.logits)
        # softmax(logits) / losses over its sum, where the quotients may vanish or overflow.
        weights = jax.nn.softmax(logits - jnp.log(losses))
        return weights, FamoState(logits, losses, state.step + 1)

    return TaskWeighting(init, of_finite(weigh), needs_losses=True)
