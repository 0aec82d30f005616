"""2^x for loops that XLA compiles for CPUs, where `jnp.exp` takes three times as long."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LOG2_E = math.log2(math.e)


def _exp2_coefficients(degree):
    """2^x on [-1/2, 1/2], by interpolation in Chebyshev's nodes; exact at 0."""
    series = np.polynomial.Chebyshev.interpolate(np.exp2, degree, domain=[-0.5, 0.5])
    coefficients = series.convert(kind=np.polynomial.Polynomial).coef.astype(np.float32)
    return [np.float32(1), *coefficients[1:]]


_EXP2 = _exp2_coefficients(5)


def exp2(x: jax.Array) -> jax.Array:
    """2^x for float32 x < 128 to a relative 3e-7: fewer operations than `jnp.exp2`. 0 for x <= -127."""
    x = jnp.maximum(x, -127.0)
    whole = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    part = x - whole
    y = functools.reduce(lambda y, c: y * part + c, reversed(_EXP2))
    bits = lax.bitcast_convert_type(y, jnp.int32) + (whole.astype(jnp.int32) << 23)
    return lax.bitcast_convert_type(bits, jnp.float32)
