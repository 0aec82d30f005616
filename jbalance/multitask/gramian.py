"""The Gramian of the tasks' gradients: all that most task weightings need to know of them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance import _axes, checks
from jbalance import _search as search

_COLUMNS = 8192
# Exponents of a gradient's largest entry: between them its square, and that of 2^40 such entries, is a
# normal float32 number.
_SMALLEST, _LARGEST = -60, 40


def gramian(task_grads: chex.ArrayTree, *, axis_name: str | None = None) -> jax.Array:
    """G_ij = g_i · g_j over all leaves, in float32.

    Every gradient is scaled by a power of two before it is squared. Where the squares would leave
    float32's range, G is that of gradients which a common power of two divides: a unit of length, on
    which no weights of this package depend. Gradients below some 1e-30 of the longest count as zero
    then.

    Args:
      task_grads: tree of floating [K, ...] arrays, the gradients of K tasks.
      axis_name: mesh axis that the parameters are split over: K exponents and K x K numbers cross it,
        nothing else.

    Returns:
      G [K, K] float32. Under jit, a gradient that is not finite makes entries of G NaN.

    Raises:
      ValueError: no leaves, leaves whose first axes differ, complex or whole numbers, NaN or infinity.
    """
    for leaf in jax.tree.leaves(task_grads):
        _axes.unsplit(task_grads=leaf)
    check_grads(task_grads)
    return gram_of(task_grads, axis_name)


def gram_of(task_grads: chex.ArrayTree, axis_name: str | None) -> jax.Array:
    """`gramian` of what has been checked."""
    parts = [_of_rows(leaf.reshape(leaf.shape[0], -1)) for leaf in jax.tree.leaves(task_grads)]
    total = functools.reduce(_sum, parts)
    if axis_name is not None:
        exponent = lax.pmax(total.exponent, axis_name)
        total = _Scaled(lax.psum(_in_units(total, exponent), axis_name), exponent)
    present = jnp.diagonal(total.gram) > 0
    top = jnp.max(jnp.where(present, total.exponent, -127)) - _LARGEST
    low = jnp.min(jnp.where(present, total.exponent, 127)) - _SMALLEST
    return _in_units(total, jnp.clip(0, top, jnp.maximum(top, low)))


class _Scaled(NamedTuple):
    """Products of gradients that powers of two divide: G_ij = gram_ij 2^(e_i + e_j)."""

    gram: jax.Array  # [K, K] float32
    exponent: jax.Array  # [K] int32 e, of the largest entry of each gradient


def _in_units(x: _Scaled, exponent: jax.Array) -> jax.Array:
    """The Gramian of gradients over 2^exponent, [] or [K], at least 2^-40 of their largest entry's."""
    factor = search.power_of_two(jnp.clip(x.exponent - exponent, -126, _LARGEST))
    return x.gram * factor[:, None] * factor


def _sum(a: _Scaled, b: _Scaled) -> _Scaled:
    exponent = jnp.maximum(a.exponent, b.exponent)
    return _Scaled(_in_units(a, exponent) + _in_units(b, exponent), exponent)


def _of_rows(rows: jax.Array) -> _Scaled:
    """x xᵀ of rows x [K, N], some columns at a time: XLA's product on CPUs turns all of x first."""
    whole = max(rows.shape[1] - 1, 0) // _COLUMNS

    def product(part: jax.Array) -> _Scaled:
        part = part.astype(jnp.float32)
        largest = jnp.max(jnp.abs(part), axis=1, initial=0)
        exponent = search.exponent_of(largest)
        part = search.scale(part, -exponent[:, None])
        return _Scaled(jnp.matmul(part, part.T, precision=lax.Precision.HIGHEST), exponent)

    def add(i: jax.Array, total: _Scaled) -> _Scaled:
        part = lax.dynamic_slice_in_dim(rows, i * _COLUMNS, _COLUMNS, axis=1)
        return _sum(total, product(part))

    last = product(rows[:, whole * _COLUMNS :])
    return lax.fori_loop(0, whole, add, last) if whole else last


def combine(weights: jax.Array, task_grads: chex.ArrayTree) -> chex.ArrayTree:
    """sum_k weights_k g_k, each leaf in its own dtype: [K, ...] to [...].

    The sum is one of float32 (or double) numbers; as float16 it keeps fewer digits below 6e-5.

    Args:
      weights: [K], finite.
      task_grads: tree of floating [K, ...] arrays, finite. Under jit, NaN and infinity go on.

    Raises:
      ValueError: another number of weights than tasks, complex or whole numbers, NaN or infinity.
    """
    check_grads(task_grads)
    checks.rank("weights", weights, 1, "[K]")
    checks.length("weights", weights, num_tasks(task_grads), "K, the tasks of task_grads,")
    checks.finite("weights", weights)
    return sum_of(weights, task_grads)


def sum_of(weights: jax.Array, task_grads: chex.ArrayTree) -> chex.ArrayTree:
    """`combine` of what has been checked."""

    def one(leaf: jax.Array) -> jax.Array:
        rows = leaf.reshape(leaf.shape[0], -1)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        out = jnp.matmul(jnp.asarray(weights, dtype), rows.astype(dtype), precision="highest")
        return out.reshape(leaf.shape[1:]).astype(leaf.dtype)

    return jax.tree.map(one, task_grads)


def num_tasks(task_grads: chex.ArrayTree) -> int:
    """K; ValueError unless all leaves have the same first axis."""
    leaves = jax.tree_util.tree_leaves_with_path(task_grads)
    for path, leaf in leaves:
        checks.instance(f"task_grads{jax.tree_util.keystr(path)}", leaf, jax.Array, np.ndarray)
    sizes = {leaf.shape[0] if leaf.ndim else 0 for _, leaf in leaves}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"task_grads has leaves whose first axes are {sorted(sizes)}: every leaf must be [K, ...], "
            f"one gradient for each of K tasks"
        )
    return sizes.pop()


def check_grads(task_grads: chex.ArrayTree) -> None:
    """ValueError unless all leaves are finite real numbers of as many tasks."""
    num_tasks(task_grads)
    for path, leaf in jax.tree_util.tree_leaves_with_path(task_grads):
        name = f"task_grads{jax.tree_util.keystr(path)}"
        checks.floating(name, leaf)
        checks.largest_finite(name, leaf)


def unit_diagonal(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The Gramian of the gradients' directions, and 1 / |g_k| [K], 0 for a gradient that is zero.

    A ridge relative to the largest gradient would swamp what the small ones say; relative to each it
    does not, so solvers work on this one.
    """
    length = jnp.sqrt(jnp.diagonal(gram))
    inverse = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)
    return gram * inverse[:, None] * inverse, inverse
