"""Histogram of scores by half octave: how many small units of an owner are worth how much."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jbalance import _axes, checks

# Half octaves of float32, from 0 to infinity: the exponent and one bit of the fraction.
CURVE_BINS = 2 * 255
_SHIFT = 22


def worth_curve(value: ArrayLike, where: ArrayLike | None = None) -> jax.Array:
    """The number of tiles (or tokens, ...) in each half octave of value, the smallest first.

    Curves add up and average, over steps, batches and devices, and `shares.priced` reads the one price
    from them: an owner of a million tiles sends 510 numbers and no tile.

    Args:
      value: [..., N] >= 0, of N units; the axes before are averaged over, as examples of a batch.
      where: [N] bool, which of them count; None for all.

    Returns:
      [M] float32, M = `CURVE_BINS`.

    Raises:
      ValueError: values that are negative or NaN, shapes that do not fit.
    """
    _axes.unsplit(value=value)
    checks.rank("value", value, tuple(range(1, 9)), "[..., N]")
    checks.non_empty("value", value)
    value = checks.non_negative("value", value)
    value = jnp.asarray(value, jnp.float32)
    if where is not None:
        where = jnp.asarray(checks.booleans("where", where, value.shape[-1:], "[N]"))
    return _curve(value, where)


@jax.jit
def _curve(value, where):
    counts = jnp.ones(value.shape[-1:]) if where is None else where.astype(jnp.float32)
    bins = lax.bitcast_convert_type(value, jnp.int32) >> _SHIFT
    counts = jnp.broadcast_to(counts / np.prod(value.shape[:-1]), value.shape)
    return jnp.zeros(CURVE_BINS, jnp.float32).at[bins].add(counts)
