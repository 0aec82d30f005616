"""What the kernels over packed pages share: numbers exact in bfloat16, and one softmax of many parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance.attention import EMPTY, Partial
from jbalance.cache import _codec

_HEAD = -(1 << 16)  # mask of the bits that a float32 shares with a bfloat16


def merge_parts(y: jax.Array, mass: jax.Array, top: jax.Array) -> Partial:
    """One softmax of parts [N, X, T]: y [N, X, T, D] not normalised, their mass and top."""
    highest = jnp.max(top, axis=1)
    part = jnp.where(mass > 0, jnp.exp(top - highest[:, None]), 0)
    total = jnp.sum(part * mass, axis=1)
    some = total > 0
    total = jnp.where(some, total, 1)
    y = jnp.sum(y * part[..., None], axis=1) / total[..., None]
    return Partial(y, jnp.where(some, highest + jnp.log(total), EMPTY))


def whole_levels(codes: jax.Array, bits: int) -> jax.Array:
    """`_codec.levels` of int32 codes over `_codec.step`: bfloat16 holds them exactly."""
    if bits == 8:
        return (codes.astype(jnp.float32) - 127.5).astype(jnp.bfloat16)
    half = 2 ** (bits - 1)
    below = codes < half
    rank = jnp.where(below, half - 1 - codes, codes - half)
    magnitudes = np.rint(_codec.levels(1, bits)[half:] / _codec.step(1, bits))
    size = jnp.full(codes.shape, float(magnitudes[0]), jnp.float32)
    for i, magnitude in enumerate(magnitudes[1:], 1):
        size = jnp.where(rank >= i, float(magnitude), size)
    return jnp.where(below, -size, size).astype(jnp.bfloat16)


def digits(x: jax.Array) -> list[jax.Array]:
    """Three bfloat16 whose sum is the float32 x; by its bits, for compilers round casts away."""
    out = []
    for _ in range(3):
        head = lax.bitcast_convert_type(x, jnp.int32) & _HEAD
        head = lax.bitcast_convert_type(head, jnp.float32)
        out.append(head.astype(jnp.bfloat16))
        x = x - head
    return out
