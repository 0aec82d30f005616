"""Weighted sum of indicators: how much complexity a unit is associated with (METHOD step 1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbalance import checks


def weighted(association: ArrayLike, complexity: ArrayLike) -> jax.Array:
    """Importance of N units from K indicators: w_i = Σ_k a_ik · complexity_k.

    Args:
      association: a, [N, K], >= 0: how strongly unit i is associated with indicator k.
      complexity: [K], >= 0: how much indicator k weighs (complexity, data volume, loss, ...).

    Returns:
      w, [N] float32; under jit, sums beyond float32's range are its largest number.

    Raises:
      ValueError: the shapes do not fit, or an entry is negative or not finite, or a sum beyond
        float32's range.

    >>> weighted([[0.6, 0.4], [0.4, 0.6]], [0.5, 0.3]).round(2)
    Array([0.42, 0.38], dtype=float32)
    """
    checks.rank("association", association, 2, "[N, K]")
    checks.rank("complexity", complexity, 1, "[K]")
    checks.same_length("complexity", complexity, "association", association, axis=-1)
    checks.non_empty("association", association)
    a = jnp.asarray(checks.non_negative("association", association))
    c = jnp.asarray(checks.non_negative("complexity", complexity))
    w = jnp.matmul(a, c, precision=jax.lax.Precision.HIGHEST)
    checks.finite("the largest w = association @ complexity", jnp.max(w))
    return jnp.minimum(w, jnp.finfo(jnp.float32).max)
