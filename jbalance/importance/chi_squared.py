"""Chi-squared statistic: how unevenly a feature of counts falls on the classes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jbalance import checks
from jbalance.importance import _samples


def chi_squared(x: ArrayLike, y: ArrayLike, *, num_classes: int | None = None) -> jax.Array:
    """Chi-squared of feature mass against class frequency, scaled as Cramér's V.

    With o_c the mass Σ x of a feature in class c, p_c the share of samples in c and n = Σ_c o_c,
    χ² = Σ_c (o_c - n p_c)² / (n p_c) is at most n (1 - p_min) / p_min, reached when all mass falls
    on the rarest class. V = √(χ² p_min / (n (1 - p_min))), which for classes of equal size is
    Cramér's √(χ² / (n (C - 1))).

    Args:
      x: [B, N] counts or other amounts, >= 0.
      y: [B] int labels in 0..C-1; classes without samples do not count.
      num_classes: C, static; read from y where y is concrete.

    Returns:
      [N] float32 in 0..1; 0 for a constant (or empty) feature or a single class.

    Raises:
      ValueError: shapes that do not fit, x negative or not finite, y outside 0..C-1 or traced
        without C.

    Reference: H. Cramér, Mathematical Methods of Statistics, 1946; chi2 of scikit-learn.
    """
    x, y, num_classes = _samples.samples(x, y, num_classes)
    # V does not depend on the unit, overflow does.
    np_: Any = np if isinstance(x, np.ndarray) else jnp
    largest = np_.abs(x if np_ is np else jax.lax.stop_gradient(x)).max(axis=0)
    x = jnp.asarray(checks.non_negative("x", x / np_.where(largest > 0, largest, 1.0)))
    share = _samples.per_class(jnp.ones_like(x[:, 0]), y, num_classes) / x.shape[0]
    present = share > 0
    p = jnp.where(present, share, 1.0)[:, None]
    mass = x.sum(axis=0)
    observed = _samples.per_class(x, y, num_classes) / jnp.where(mass > 0, mass, 1.0)
    # χ² / n; a class without samples has neither observed nor expected mass.
    chi2 = jnp.sum(jnp.where(present[:, None], (observed - p) ** 2 / p, 0.0), axis=0)
    rarest = p.min()
    squared = _samples.ratio(chi2 * rarest, 1.0 - rarest)
    some = (mass > 0) & (squared > 0)
    return jnp.where(some, jnp.sqrt(jnp.where(some, squared, 1.0)), 0.0)
