"""Task weightings for multi-task gradients: a pair of pure functions, and the optax aggregator of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from optax.experimental import aggregating

from jbalance.multitask.gramian import combine, gramian, num_tasks


class TaskStats(NamedTuple):
    """Gradient Gramian and losses of the tasks in a step."""

    gram: Any  # [K, K] float32, or None if the weighting does not ask for it
    losses: Any  # [K] float32, or None if it does not ask for them


class TaskWeighting(NamedTuple):
    """Weights of tasks: `init(K) -> state`, `weigh(stats, state) -> (weights [K], state)`."""

    init: Callable[[int], Any]
    weigh: Callable[[TaskStats, Any], tuple[jax.Array, Any]]
    needs_gram: bool = False
    needs_losses: bool = False


class AggregatorState(NamedTuple):
    """State of an aggregator."""

    weights: jax.Array  # [K] float32, of the last update
    inner: Any


def aggregator(
    weighting: TaskWeighting, tasks: int, *, axis_name: str | None = None
) -> aggregating.Aggregator:
    """The optax aggregator that adds the gradients of K tasks by these weights.

    In a chain it comes first: `optax.chain(aggregator(upgrad(), 2), optax.adamw(1e-3))`. The update
    takes a tree of [K, ...] gradients, as from `jax.vmap(jax.grad(loss), (None, 0))` or `jax.jacrev`,
    and, where the weighting asks for them, `losses=` [K].

    Args:
      weighting: such as `upgrad()`.
      tasks: K.
      axis_name: mesh axis that the parameters are split over.

    Raises:
      ValueError: from update, gradients of another number of tasks, or losses missing.
    """
    if tasks < 1:
        raise ValueError(f"tasks is {tasks}: it must be at least 1")

    def init(params: chex.ArrayTree) -> AggregatorState:
        del params
        return AggregatorState(jnp.zeros(tasks, jnp.float32), weighting.init(tasks))

    def update(
        task_grads: chex.ArrayTree,
        state: AggregatorState,
        params: chex.ArrayTree | None = None,
        *,
        losses: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[chex.ArrayTree, AggregatorState]:
        del params, extra
        if (found := num_tasks(task_grads)) != tasks:
            raise ValueError(f"task_grads has {found} tasks along its first axis, not {tasks}")
        if weighting.needs_losses:
            if losses is None:
                raise ValueError("losses is None: this weighting needs losses=[K] in every update")
            losses = jnp.asarray(losses, jnp.float32)
            if losses.shape != (tasks,):
                raise ValueError(f"losses has shape {losses.shape}: it must be [K] = ({tasks},)")
        gram = gramian(task_grads, axis_name=axis_name) if weighting.needs_gram else None
        weights, inner = weighting.weigh(TaskStats(gram, losses), state.inner)
        return combine(weights, task_grads), AggregatorState(weights, inner)

    return aggregating.Aggregator(init, update)
