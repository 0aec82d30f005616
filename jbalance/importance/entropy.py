"""Shannon entropy of a binned feature, normalized: how much of its range it uses."""

from __future__ import annotations

import math

import jax
from jax.typing import ArrayLike

from jbalance import checks
from jbalance.importance import _samples


def entropy(
    x: ArrayLike, y: ArrayLike, *, num_classes: int | None = None, bins: int = 16
) -> jax.Array:
    """Normalized entropy of each binned feature: -Σ_b p_b log p_b / log(bins).

    Args:
      x: [B, N] features.
      y: [B] int labels; only checked, since complexity does not depend on the target.
      num_classes: C, static; only checks y here.
      bins: of equal width between the feature's extremes; static, >= 2.

    Returns:
      [N] float32 in 0..1; 0 for a constant feature, 1 for one that fills all bins equally.

    Raises:
      ValueError: shapes that do not fit, x not finite, y outside 0..C-1, fewer than 2 bins.

    Reference: C. E. Shannon, A Mathematical Theory of Communication, 1948.
    """
    bins = checks.static_int("bins", bins, 2)
    x, y, num_classes = _samples.samples(x, y, num_classes)
    counts = _samples.histogram(x, y, bins=bins, num_classes=num_classes).sum(axis=2)
    return (_samples.entropy_nats(counts) / math.log(bins)).clip(0.0, 1.0)
