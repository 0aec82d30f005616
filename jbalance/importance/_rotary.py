"""Rotary position embedding by its frequencies, half-split convention: feature i turns with i + D/2.

A model's frequencies (radians per position of each pair of features) come in as an array, scaled or not,
so that a checkpoint with stretched positions is scored with its own rotation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbalance import _axes, checks

LARGEST = 1e28  # radians per position


def check(frequencies: Any, head_dim: int) -> Any:
    """Frequencies [D/2] in float32, None for no rotary embedding; ValueError for others.

    The angle at any position must be within float32.
    """
    if frequencies is None:
        return None
    if head_dim % 2:
        raise ValueError(
            f"the head dim is {head_dim}: rotary embeddings need an even one; "
            f"give frequencies=None where there are none"
        )
    _axes.unsplit(frequencies=frequencies)
    checks.rank("frequencies", frequencies, 1, "[D/2]")
    if np.shape(frequencies) != (head_dim // 2,):
        raise ValueError(
            f"frequencies has shape {np.shape(frequencies)}: it must be [D/2] = ({head_dim // 2},), "
            f"radians per position of each rotated pair (0 for a pair that does not turn)"
        )
    return checks.in_range("frequencies", frequencies, -LARGEST, LARGEST)


def turn(x: jax.Array, angle: ArrayLike) -> jax.Array:
    """x [..., D] turned by angles [..., D/2]."""
    return rotated(x, jnp.cos(angle), jnp.sin(angle))


def rotated(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [..., D] turned by the angles with these cosines and sines [..., D/2]."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def unrotate(x: jax.Array, frequencies: ArrayLike, *, start: int) -> jax.Array:
    """x [T, H, D], rotated to the positions start..start+T-1, as it was before."""
    position = start + jnp.arange(x.shape[0], dtype=jnp.float32)
    return turn(x, -position[:, None, None] * jnp.asarray(frequencies, jnp.float32))


def rotate_to_mean(x: jax.Array, frequencies: ArrayLike, *, start: int, count: int) -> jax.Array:
    """x [..., D] under the mean of the rotations to the positions start..start+count-1."""
    position = start + jnp.arange(count, dtype=jnp.float32)
    angle = position[:, None] * jnp.asarray(frequencies, jnp.float32)
    return rotated(x, jnp.cos(angle).mean(axis=0), jnp.sin(angle).mean(axis=0))
