"""The mesh axes over which an array varies inside of `shard_map`, as JAX names them in its versions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def axes_of(x: jax.Array) -> frozenset[Any]:
    """Names of the manual mesh axes over which x varies; none outside of `shard_map`."""
    kind: Any = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying
    return kind.vma  # before JAX 0.10


def like(x: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """A result that varies over the same mesh axes as x, as `shard_map` needs it."""
    kind: Any = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        given = {"manual_axis_type": kind.manual_axis_type}
    else:
        given = {"vma": kind.vma}
    return jax.ShapeDtypeStruct(shape, dtype, **given)
