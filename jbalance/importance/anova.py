"""Analysis of variance: how well a feature discriminates between the classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance.importance import _samples


def anova(x: ArrayLike, y: ArrayLike, *, num_classes: int | None = None) -> jax.Array:
    """ANOVA's F as eta squared, the share of the variance that lies between the classes.

    η² = SS_between / SS_total = F (C - 1) / (F (C - 1) + B - C), which rises with F and is in 0..1.

    Args:
      x: [B, N] features.
      y: [B] int labels in 0..C-1; classes without samples do not count.
      num_classes: C, static; read from y where y is concrete.

    Returns:
      [N] float32 in 0..1; 0 for a constant feature or a single class.

    Raises:
      ValueError: shapes that do not fit, x not finite, y outside 0..C-1 or traced without C.

    Reference: R. A. Fisher, Statistical Methods for Research Workers, 1925.
    """
    x, y, num_classes = _samples.samples(x, y, num_classes)
    x = _samples.centered(x)
    count = _samples.per_class(jnp.ones_like(x[:, 0]), y, num_classes)
    total = _samples.per_class(x, y, num_classes)
    between = jnp.sum(total**2 / jnp.maximum(count, 1.0)[:, None], axis=0)
    several = jnp.sum(count > 0) > 1
    return _samples.ratio(jnp.where(several, between, 0.0), jnp.sum(x**2, axis=0))
