"""Whether two ways to weigh the same units put them in the same order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbalance import _axes, checks


def rank_correlation(x: ArrayLike, y: ArrayLike) -> jax.Array:
    """Spearman's rank correlation: Pearson's of the ranks, equal values sharing their mean rank.

    Args:
      x: [U] finite, such as the worth that a scorer gives.
      y: [U] finite, such as the effect of leaving each unit out.

    Returns:
      [] float32 in -1..1; 0 where all of x or of y are alike.

    Raises:
      ValueError: lengths that differ, fewer than two units, values that are not finite.
    """
    for name, a in (("x", x), ("y", y)):
        checks.rank(name, a, 1, "[U]")
    _axes.unsplit(x=x, y=y)
    x, y = checks.finite("x", x), checks.finite("y", y)
    checks.same_length("y", y, "x", x)
    if np.shape(x)[0] < 2:
        raise ValueError("x has 1 entry: a correlation needs at least 2")
    a, b = (_ranks(jnp.asarray(z)) for z in (x, y))
    spread = jnp.sqrt(jnp.sum(a**2) * jnp.sum(b**2))
    return jnp.where(spread > 0, jnp.sum(a * b) / jnp.where(spread > 0, spread, 1.0), 0.0)


def _ranks(x: jax.Array) -> jax.Array:
    """[U] ranks around 0, equal values sharing their mean."""
    ordered = jnp.sort(x)
    below = jnp.searchsorted(ordered, x, side="left")
    up_to = jnp.searchsorted(ordered, x, side="right")
    return (below + up_to - x.shape[0]).astype(jnp.float32) / 2
