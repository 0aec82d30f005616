"""The Gramian of the tasks' gradients: all that most task weightings need to know of them."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jax import lax

_COLUMNS = 8192


def gramian(task_grads: chex.ArrayTree, *, axis_name: str | None = None) -> jax.Array:
    """G_ij = g_i · g_j over all leaves, in float32.

    Args:
      task_grads: tree of [K, ...] arrays, the gradients of K tasks.
      axis_name: mesh axis that the parameters are split over: K x K numbers cross it, nothing else.

    Returns:
      G [K, K] float32.

    Raises:
      ValueError: no leaves, or leaves whose first axes differ.
    """
    num_tasks(task_grads)
    first, *rest = (
        _of_rows(leaf.reshape(leaf.shape[0], -1)) for leaf in jax.tree.leaves(task_grads)
    )
    total = sum(rest, first)
    return total if axis_name is None else lax.psum(total, axis_name)


def _of_rows(rows: jax.Array) -> jax.Array:
    """x xᵀ of rows x [K, N], some columns at a time: XLA's product on CPUs turns all of x first."""
    whole = max(rows.shape[1] - 1, 0) // _COLUMNS

    def product(part: jax.Array) -> jax.Array:
        part = part.astype(jnp.float32)
        return jnp.matmul(part, part.T, precision=lax.Precision.HIGHEST)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + product(lax.dynamic_slice_in_dim(rows, i * _COLUMNS, _COLUMNS, axis=1))

    last = product(rows[:, whole * _COLUMNS :])
    return lax.fori_loop(0, whole, add, last) if whole else last


def combine(weights: jax.Array, task_grads: chex.ArrayTree) -> chex.ArrayTree:
    """sum_k weights_k g_k, each leaf in its own dtype: [K, ...] to [...]."""

    def one(leaf: jax.Array) -> jax.Array:
        rows = leaf.reshape(leaf.shape[0], -1)
        out = jnp.matmul(weights.astype(jnp.float32), rows.astype(jnp.float32), precision="highest")
        return out.reshape(leaf.shape[1:]).astype(leaf.dtype)

    return jax.tree.map(one, task_grads)


def num_tasks(task_grads: chex.ArrayTree) -> int:
    """K; ValueError unless all leaves have the same first axis."""
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(task_grads)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"task_grads has leaves whose first axes are {sorted(sizes)}: every leaf must be [K, ...], "
            f"one gradient for each of K tasks"
        )
    return sizes.pop()


def unit_diagonal(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The Gramian of the gradients' directions, and 1 / |g_k| [K], 0 for a gradient that is zero.

    A ridge relative to the largest gradient would swamp what the small ones say; relative to each it
    does not, so solvers work on this one.
    """
    length = jnp.sqrt(jnp.diagonal(gram))
    inverse = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)
    return gram * inverse[:, None] * inverse, inverse
