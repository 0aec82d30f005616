"""Pearson correlation, absolute: how relevant a feature is to the target."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance.importance import _samples


def correlation(x: ArrayLike, y: ArrayLike, *, num_classes: int | None = None) -> jax.Array:
    """Absolute Pearson correlation |Σ (x - x̄)(y - ȳ)| / (‖x - x̄‖ ‖y - ȳ‖).

    The labels are taken as numbers, so their order counts: meant for two classes or ordered ones.

    Args:
      x: [B, N] features.
      y: [B] int labels in 0..C-1.
      num_classes: C, static; only checks y here.

    Returns:
      [N] float32 in 0..1; 0 for a constant feature or a single class.

    Raises:
      ValueError: shapes that do not fit, x not finite, y outside 0..C-1 or traced without C.

    Reference: K. Pearson, 1895.
    """
    x, y, _ = _samples.samples(x, y, num_classes)
    x, target = _samples.centered(x), _samples.centered(y[:, None].astype(jnp.float32))
    norms = jnp.sum(x**2, axis=0) * jnp.sum(target**2)
    safe = jnp.sqrt(jnp.where(norms > 0, norms, 1.0))
    return jnp.where(norms > 0, _samples.ratio(jnp.abs(jnp.sum(x * target, axis=0)), safe), 0.0)
