"""Rotary position embedding, half-split convention: feature i turns with feature i + D/2."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jbalance import checks


def frequencies(base: float, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of features, float32 [D/2]."""
    checks.positive("rotary_base", base)
    if head_dim % 2:
        raise ValueError(
            f"the head dim is {head_dim}: rotary embeddings need an even one; "
            f"give rotary_base=None where there are none"
        )
    return (base ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)


def turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [..., D] turned by the angles with these cosines and sines [..., D/2]."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def unrotate(x: jax.Array, base: float, *, start: int) -> jax.Array:
    """x [T, H, D], rotated to the positions start..start+T-1, as it was before."""
    position = start + jnp.arange(x.shape[0], dtype=jnp.float32)
    angle = position[:, None, None] * frequencies(base, x.shape[-1])
    return turn(x, jnp.cos(angle), -jnp.sin(angle))


def rotate_to_mean(x: jax.Array, base: float, *, start: int, count: int) -> jax.Array:
    """x [..., D] under the mean of the rotations to the positions start..start+count-1."""
    frequency = frequencies(base, x.shape[-1]).astype(np.float64)
    angle = np.arange(start, start + count)[:, None] * frequency  # on the host: a constant
    cos, sin = np.cos(angle).mean(axis=0), np.sin(angle).mean(axis=0)
    return turn(x, jnp.asarray(cos, jnp.float32), jnp.asarray(sin, jnp.float32))
