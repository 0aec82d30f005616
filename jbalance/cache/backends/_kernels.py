"""What the kernels over packed pages share: numbers exact in bfloat16, and one softmax of many parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbalance.attention import EMPTY, Partial
from jbalance.cache import _codec

_MANTISSA = 0x4B000000  # bits of 2^23 as a float32, behind which a whole number is its fraction
_SIGN = -(1 << 31)
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
    """`_codec.levels` of int32 codes over `_codec.step`: bfloat16 holds them exactly.

    Magnitudes are whole numbers below 128: four lie in a word, from which a shift takes one. The bits
    of 2^23 before it make it a float32: on GPUs conversions are slow, and selects by rank would be most
    of the kernel.
    """
    if bits == 8:
        return (codes.astype(jnp.float32) - 127.5).astype(jnp.bfloat16)
    half = 2 ** (bits - 1)
    magnitudes = np.rint(_codec.levels(1, bits)[half:] / _codec.step(1, bits)).astype(np.uint32)
    below = ~((codes << (32 - bits)) >> 31)  # all bits where a code stands for a level below 0
    rank = (codes ^ below) & (half - 1)
    words = [
        int(sum(int(m) << (8 * i) for i, m in enumerate(magnitudes[j : j + 4])))
        for j in range(0, half, 4)
    ]
    word = jnp.full(codes.shape, words[-1], jnp.int32)
    for i, other in reversed(list(enumerate(words[:-1]))):
        word = jnp.where(rank < 4 * (i + 1), other, word)
    size = (word >> ((rank & 3) << 3)) & 127
    size = lax.bitcast_convert_type(size | _MANTISSA, jnp.float32) - 2.0**23
    turned = lax.bitcast_convert_type(size, jnp.int32) ^ (below & _SIGN)
    return lax.bitcast_convert_type(turned, jnp.float32).astype(jnp.bfloat16)


def digits(x: jax.Array) -> list[jax.Array]:
    """Three bfloat16 whose sum is the float32 x; by its bits, for compilers round casts away."""
    out = []
    for _ in range(3):
        head = lax.bitcast_convert_type(x, jnp.int32) & _HEAD
        head = lax.bitcast_convert_type(head, jnp.float32)
        out.append(head.astype(jnp.bfloat16))
        x = x - head
    return out
