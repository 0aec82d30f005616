"""Slices and padding of arrays, as the loops and kernels over tiles need them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding

from jbalance.attention._operands import Operands, Visibility


def empty(shape, dtype):
    """An array whose content is not set. (`lax.empty` by itself ignores Explicit axes of a mesh.)"""
    mesh = jax.sharding.get_abstract_mesh()
    explicit = AxisType.Explicit in mesh.axis_types
    sharding = NamedSharding(mesh, jax.P()) if explicit else None
    return lax.empty(shape, dtype, out_sharding=sharding)


def iota(n):
    """[n] int32: 0, 1, ..."""
    return jnp.arange(n, dtype=jnp.int32)


def div_mod(x, n):
    """(x // n, x % n) of x >= 0; Python's on arrays take several steps each to heed the sign."""
    if n == 1:
        return x, 0
    return lax.div(x, jnp.int32(n)), lax.rem(x, jnp.int32(n))


def concatenate(parts, axis):
    """Without a copy of one part alone."""
    return jnp.concatenate(parts, axis) if len(parts) > 1 else parts[0]


# No index is negative: without the option, each costs a CPU a step of its own. All are int32, also where
# a Python number would be int64.
def read_slice(x, start, size):
    """x[start : start + size] on every axis."""
    return lax.dynamic_slice(x, _indices(start), size, allow_negative_indices=False)


def write_slice(x, values, start):
    """x with values in place of its own from `start` on."""
    return lax.dynamic_update_slice(x, values, _indices(start), allow_negative_indices=False)


def _indices(start):
    return [jnp.asarray(index, jnp.int32) for index in start]


def read_entry(x, place):
    """[]: the entry of x at a place."""
    return read_slice(x, place, (1,) * x.ndim).reshape(())


def add_slice(x, start, tile):
    """x with a tile added from `start` on."""
    old = read_slice(x, start, tile.shape)
    return write_slice(x, old + tile, start)


def padded(operands: Operands, where: Visibility) -> tuple[Operands, Visibility]:
    """Whole blocks. Keys behind the end are masked, queries behind it are cut off."""
    plan = where.plan
    short_q, short_k = -plan.num_queries % plan.block_q, -plan.num_keys % plan.block_k
    q, k, v, bias, line = operands
    if bias is not None:
        bias = bias if bias.shape[2] == 1 else pad(bias, 2, short_q)
        bias = bias if bias.shape[3] == 1 else pad(bias, 3, short_k)
    if line is not None:
        line = jnp.pad(line, ((0, 0), (short_k, short_q)))
    if where.q_ids is not None:
        q_ids = pad(where.q_ids, 1, short_q)
        where = where._replace(q_ids=q_ids, k_ids=pad(where.k_ids, 1, short_k))
    k, v = pad(k, 1, short_k), pad(v, 1, short_k)
    return Operands(pad(q, 1, short_q), k, v, bias, line), where


def pad(x, axis, amount, value=0):
    """x with so many entries of a value behind the end of one axis."""
    if not amount:
        return x
    widths = [(0, amount if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)
