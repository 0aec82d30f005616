"""Task weightings for multi-task gradients: a pair of pure functions, and the optax aggregator of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from optax.experimental import aggregating

from jbalance import checks
from jbalance._bits import in_32_bits
from jbalance.multitask.gramian import check_grads, gram_of, num_tasks, sum_of


class TaskStats(NamedTuple):
    """Gradient Gramian and losses of the tasks in a step."""

    gram: Any  # [K, K] float32 in any unit, or None if the weighting does not ask for it
    losses: Any  # [K] float32, or None if it does not ask for them


class TaskWeighting(NamedTuple):
    """Weights of tasks: `init(K) -> state`, `weigh(stats, state) -> (weights [K], state)`."""

    init: Callable[[int], Any]
    weigh: Callable[[TaskStats, Any], tuple[jax.Array, Any]]
    needs_gram: bool = False
    needs_losses: bool = False


Weigh = Callable[[TaskStats, Any], tuple[jax.Array, Any]]


def of_finite(weigh: Weigh) -> Weigh:
    """`weigh`, which NaN and infinity neither pass nor outlast.

    Concrete ones are an error. Under jit they make the weights of their step NaN, so that the optimizer
    can leave it out (`optax.apply_if_finite`), and the state stays what it was.
    """

    @in_32_bits
    def weigh_finite(stats: TaskStats, state: Any) -> tuple[jax.Array, Any]:
        numbers = {
            name: jnp.asarray(checks.finite(name, x))
            for name, x in zip(TaskStats._fields, stats, strict=True)
            if x is not None
        }
        given, stats = list(numbers.values()), stats._replace(**numbers)
        known = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in given]))
        weights, later = weigh(stats, state)
        later = jax.tree.map(lambda new, old: jnp.where(known, new, old), later, state)
        return jnp.where(known, weights, jnp.nan), later

    return weigh_finite


def not_negative(losses: jax.Array) -> jax.Array:
    """Losses [K] of a weighting that asks for those >= 0; others are errors, and under jit 0."""
    checks.non_negative("losses", losses)
    return jnp.maximum(losses, 0)


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

    Under jit, a gradient or loss that is not finite makes the weights and the update NaN and leaves the
    state of the weighting as it was: `optax.apply_if_finite` around the chain leaves such steps out.

    Args:
      weighting: such as `upgrad()`.
      tasks: K.
      axis_name: mesh axis that the parameters are split over.

    Raises:
      ValueError: tasks below 1; from update, gradients of another number of tasks, complex or whole
        ones, losses missing, NaN or infinity.
    """
    checks.instance("weighting", weighting, TaskWeighting)
    tasks = checks.static_int("tasks", tasks, 1)

    def init(params: chex.ArrayTree) -> AggregatorState:
        del params
        # Copies: a step that is given the state takes its buffers, of which a weighting may have one
        # twice, or share it with its caller.
        own = jax.tree.map(jnp.copy, weighting.init(tasks))
        return AggregatorState(jnp.zeros(tasks, jnp.float32), own)

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
        check_grads(task_grads)
        if weighting.needs_losses:
            if losses is None:
                raise ValueError("losses is None: this weighting needs losses=[K] in every update")
            checks.finite("losses", losses)
            losses = jnp.asarray(losses, jnp.float32)
            if losses.shape != (tasks,):
                raise ValueError(f"losses has shape {losses.shape}: it must be [K] = ({tasks},)")
        gram = gram_of(task_grads, axis_name) if weighting.needs_gram else None
        weights, inner = weighting.weigh(TaskStats(gram, losses), state.inner)
        return sum_of(weights, task_grads), AggregatorState(weights, inner)

    return aggregating.Aggregator(init, update)
