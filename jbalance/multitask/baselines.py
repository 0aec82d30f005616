"""Equal, random and dynamic-weight-average (DWA) weights, which need no gradients."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jbalance import checks
from jbalance.multitask.types import TaskStats, TaskWeighting, not_negative, of_finite

_LARGEST = 1e30  # ratio of two losses


def mean() -> TaskWeighting:
    """1 / K for every task."""

    def init(tasks: int) -> jax.Array:
        return jnp.full(tasks, 1 / tasks, jnp.float32)

    return TaskWeighting(init, lambda stats, state: (state, state))


class RandomState(NamedTuple):
    """State of `random`."""

    key: chex.PRNGKey
    like: jax.Array  # [K]


def random(key: chex.PRNGKey) -> TaskWeighting:
    """Softmax of standard normal numbers, drawn anew in every step: a baseline that is hard to beat.

    Lin et al. (2022), Reasonable Effectiveness of Random Weighting, arXiv:2111.10603, eq. 4.

    Args:
      key: consumed: the state's key is split from it.
    """

    checks.random_key("key", key)

    def weigh(stats: TaskStats, state: RandomState) -> tuple[jax.Array, RandomState]:
        key, subkey = jax.random.split(state.key)
        weights = jax.nn.softmax(jax.random.normal(subkey, state.like.shape, jnp.float32))
        return weights, state._replace(key=key)

    return TaskWeighting(lambda tasks: RandomState(key, jnp.zeros(tasks, jnp.float32)), weigh)


class DwaState(NamedTuple):
    """State of `dwa`."""

    last: jax.Array  # [K] losses of the last step
    before: jax.Array  # [K] of the step before it
    step: jax.Array  # [] int32


def dwa(temperature: float = 2.0) -> TaskWeighting:
    """softmax(r / temperature), r_k the last loss over that before it: more for what falls slowly.

    Equal weights in the first two steps, and for a task whose loss stays 0. One whose loss rises from 0
    takes all of the weight in the step after. The losses are those of single steps here; the paper takes
    the means of epochs. Liu et al. (2019), End-to-End Multi-Task Learning with Attention,
    arXiv:1803.10704, eq. 7.

    Args:
      temperature: > 0; larger is more even.

    Raises:
      ValueError: temperature not above 0; from update, a loss that is negative or not finite (under jit,
        a negative one counts as 0).
    """
    temperature = checks.static_float("temperature", temperature, checks.FLOAT32_TINY)

    def init(tasks: int) -> DwaState:
        ones = jnp.ones(tasks, jnp.float32)
        return DwaState(ones, ones, jnp.zeros((), jnp.int32))

    def weigh(stats: TaskStats, state: DwaState) -> tuple[jax.Array, DwaState]:
        from_zero = jnp.where(state.last > 0, _LARGEST, 1.0)
        positive = state.before > 0
        ratio = state.last / jnp.where(positive, state.before, 1)
        ratio = jnp.where(positive, jnp.minimum(ratio, _LARGEST), from_zero)
        ratio = jnp.where(state.step < 2, 1.0, ratio)
        # Of the largest, which the division by a small temperature could take beyond float32.
        weights = jax.nn.softmax((ratio - jnp.max(ratio)) / temperature)
        return weights, DwaState(not_negative(stats.losses), state.last, state.step + 1)

    return TaskWeighting(init, of_finite(weigh), needs_losses=True)
